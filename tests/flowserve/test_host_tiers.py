"""Host memory and disk behind the KV cache: what is copied out comes back, and means the same."""

import os
import select
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from flowserve.core.messages import KvMoved
from flowserve.core.tiers import Move, Tier, TierConfig
from flowserve.runtime.checkpoint import make_checkpoint
from flowserve.runtime.host_tiers import HostTiers
from flowserve.runtime.mover import Mover
from flowserve.runtime.tier_costs import measured
from flowserve.runtime.torch_runner import TorchRunner
from tests.flowserve.driver import TINY, Engine, make_prompt

HBM, DRAM, SSD = Tier


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model."""
    return make_checkpoint("tiny", TINY, tmp_path_factory.mktemp("models"))


# -- copies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("axis", [0, 2])
def test_blocks_come_back_from_every_tier(axis: int, dtype: torch.dtype, tmp_path: Path) -> None:
    """Blocks wander HBM, DRAM, SSD, HBM; in the end they are elsewhere, the same to the bit, and no other is."""
    shape = [3, 2, 4, 2]
    shape.insert(axis, 10)
    hbm = torch.randn(shape).to(dtype)
    before = hbm.clone()
    tiers = HostTiers(hbm, axis, TierConfig(dram_blocks=6, ssd_blocks=5), str(tmp_path))
    tiers.move(Move(1, HBM, [1, 2, 7], DRAM, [5, 0, 1]))
    tiers.move(Move(2, DRAM, [0, 1, 5], SSD, [3, 4, 0]))
    tiers.move(Move(3, HBM, [9], SSD, [1]))
    hbm.index_fill_(axis, torch.tensor([1, 2, 7, 9]), 0)
    tiers.move(Move(4, SSD, [0, 3, 4, 1], HBM, [2, 7, 9, 1]))
    expected = {2: 1, 7: 2, 9: 7, 1: 9}
    for block in range(10):
        assert torch.equal(hbm.select(axis, block), before.select(axis, expected.get(block, block)))
    assert list(tmp_path.iterdir()) == []  # the file has no name: it is gone with the process
    tiers.close()


def test_a_disk_that_fails_is_an_error_of_that_move(tmp_path: Path) -> None:
    """The error is the operating system's; other tiers still work."""
    hbm = torch.randn(2, 2, 4, 3)
    tiers = HostTiers(hbm, 2, TierConfig(dram_blocks=4, ssd_blocks=4), str(tmp_path))
    assert tiers._file is not None
    os.ftruncate(tiers._file.fileno(), 0)
    with pytest.raises(OSError, match="ends at byte 0"):
        tiers.move(Move(1, SSD, [0], HBM, [0]))
    tiers.move(Move(2, HBM, [0], DRAM, [0]))
    tiers.close()


def test_no_folder_for_the_disk_is_said_at_once(tmp_path: Path) -> None:
    """A folder that does not exist fails the start, not a copy later on."""
    with pytest.raises(OSError, match="nowhere"):
        HostTiers(torch.zeros(1, 2, 4), 2, TierConfig(ssd_blocks=1), str(tmp_path / "nowhere"))


def test_the_mover_holds_nobody_up() -> None:
    """Copies run on other threads, the disk's apart from DRAM's; what ended is told, failures too, and fd says when."""
    go = threading.Event()

    def copy(move: Move) -> None:
        if move.source is SSD:
            go.wait(10)
        if move.ticket == 3:
            raise OSError("broken")

    mover = Mover(copy)
    mover.start([Move(1, SSD, [0], HBM, [0]), Move(2, DRAM, [0], HBM, [1]), Move(3, DRAM, [1], HBM, [2])])
    ended: list[KvMoved] = []
    deadline = time.monotonic() + 10
    while len(ended) < 2 and time.monotonic() < deadline:
        ended += mover.ended()
    assert ended == [KvMoved(2, True), KvMoved(3, False)]
    go.set()
    while len(ended) < 3:
        assert select.select([mover.fd], [], [], 10)[0]
        ended += mover.ended()
    assert ended[2] == KvMoved(1, True)
    mover.start([Move(4, DRAM, [0], HBM, [0])])
    mover.close()  # what was queued has ended
    assert mover._ended.get_nowait() == KvMoved(4, True)


# -- in an engine -----------------------------------------------------------------------------------------------------


def outputs(model: Path, **limits: Any) -> tuple[Engine, list[list[int]]]:
    """Three rounds of questions about three documents, then two long answers at once, greedy."""
    engine = Engine(model, **limits)
    documents = [make_prompt(seed, 80) for seed in range(3)]
    tasks = []
    for turn in range(3):
        for number, document in enumerate(documents):
            tasks.append(engine.add([*document, *make_prompt(10 * turn + number, 7)], 6))
            engine.run()
    tasks += [engine.add(make_prompt(50 + number, 40), 60) for number in range(2)]
    engine.run()
    return engine, [engine.output[task] for task in tasks]


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
@pytest.mark.parametrize(("dram", "ssd"), [(64, 0), (6, 64), (0, 64)])
def test_tokens_are_the_same_with_tiers(model: Path, dram: int, ssd: int, preemption: str) -> None:
    """With an HBM cache too small for the work, tiers change where KV cache comes from and not one token."""
    plain, expected = outputs(model, kv_blocks=128)
    plain.close()
    tiers = TierConfig(dram, ssd, swap_low=0.5, swap_high=0.7, fetch="always")
    engine, tokens = outputs(model, kv_blocks=9, tiers=tiers, preemption=preemption)
    assert engine.core.preemptions > 0
    assert engine.core.rtc.populated_blocks >= 20
    assert tokens == expected
    engine.close()


def test_costs_are_measured(model: Path) -> None:
    """Computing and fetching have a price; a long document in DRAM or on disk is worth a copy of a few microseconds."""
    engine = Engine(model, kv_blocks=64, tiers=TierConfig(16, 16, fetch="always"))
    cost = measured(engine.runner, engine.config)
    assert isinstance(engine.runner, TorchRunner)
    assert cost._execution_ns(512, 0) > cost._execution_ns(512, 256) > 0
    assert cost._transfer_ns([(DRAM, 8)]) >= 0
    assert cost.worthwhile(1000, 0, 16, [(DRAM, 60)]) == 60
    task = engine.add(make_prompt(1, 40), 3)
    assert len(engine.run()[task]) == 3
    engine.close()
