"""KV cache sized by measurement: the arithmetic on invented memories, and an engine that sizes itself."""

from pathlib import Path

import pytest

from cluster import events as ev
from flowserve.core.config import EngineConfig
from flowserve.core.plan import Plan
from flowserve.ops import device
from flowserve.ops.device import Memory
from flowserve.runtime.checkpoint import make_checkpoint
from flowserve.runtime.sizing import blocks_that_fit
from flowserve.runtime.torch_runner import TorchRunner
from flowserve.runtime.wire import TorchDevice
from tests.builders import make_arrival
from tests.flowserve.driver import TINY
from tests.real.engines import run_real

GB = 10**9


def test_what_is_left_of_the_share() -> None:
    """90 of 100 GB, of which others use 5 and weights and a step 25, leave 60 GB."""
    memory = Memory(free=75 * GB, total=100 * GB)
    assert blocks_that_fit(memory, 20 * GB, 25 * GB, GB // 100, 0.9) == 6000
    assert blocks_that_fit(memory, 20 * GB, 25 * GB, GB // 100, 0.5) == 2000
    assert blocks_that_fit(Memory(80 * GB, 100 * GB), 20 * GB, 25 * GB, GB // 100, 0.9) == 6500  # nobody else there
    assert blocks_that_fit(memory, 20 * GB, 90 * GB - 5 * GB - 1000, 1000, 0.9) == 1


def test_no_room_is_said_with_the_numbers() -> None:
    """Who uses what, and what can be done; a share that is none is refused."""
    said = "of 100.00 GB, memory_share 0.3 allows 30.00 GB, other processes use 5.00 GB, weights and a step 25.00 GB"
    with pytest.raises(ValueError, match=said):
        blocks_that_fit(Memory(75 * GB, 100 * GB), 20 * GB, 25 * GB, GB // 100, 0.3)
    for share in (0.0, -1.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"memory_share is .*: allowed is a share"):
            blocks_that_fit(Memory(75 * GB, 100 * GB), 20 * GB, 25 * GB, GB // 100, share)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("tiny", TINY, tmp_path_factory.mktemp("models"))


class _Gigabytes:
    """A device of 4 GB of which this process uses 1, and 1.5 at its peak."""

    def memory(self) -> Memory:
        return Memory(3 * GB, 4 * GB)

    def allocated(self) -> int:
        return GB

    def peak(self) -> int:
        return GB + GB // 2


def test_a_runner_measures(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the blocks that it found, after a step of its whole budget, and serves with them."""
    steps: list[int] = []
    launch = TorchRunner.launch

    def watched(runner: TorchRunner, plan: Plan) -> None:
        steps.append(plan.shape.prefill_tokens)
        launch(runner, plan)

    monkeypatch.setattr(TorchRunner, "launch", watched)
    for name in ("memory", "allocated", "peak"):
        monkeypatch.setattr(device._Cpu, name, getattr(_Gigabytes, name))
    limits = EngineConfig(kv_blocks=1, token_budget=96, max_sequences=8)
    runner = TorchRunner(folder, limits, memory_share=0.5)
    assert steps == [96]
    block_bytes = 16 * 2 * TINY.num_layers * TINY.num_kv_heads * TINY.head_dim * 4
    measured_at = -(-97 // 16)
    assert runner.kv_blocks == (2 * GB - (GB + GB // 2 - measured_at * block_bytes)) // block_bytes
    assert runner.pool.tensor.shape[2] == runner.kv_blocks
    runner.warm_up()
    runner.close()


def test_an_engine_says_how_many_blocks_it_found(folder: Path) -> None:
    """What executors announce and report is what was measured, not what the configuration guessed."""
    sized = TorchDevice(str(folder), memory_share=0.2)
    run = run_real([make_arrival(0)], engine=EngineConfig(kv_blocks=7), device=sized, vocab=TINY.vocab_size)
    ready = run.of(ev.ExecutorReady)
    assert len(ready) == 2 and all(event.kv_blocks > 1000 for event in ready)
    totals = {(event.executor, event.total_blocks) for event in run.of(ev.LoadReport)}
    assert totals <= {(event.executor, event.kv_blocks) for event in ready}
