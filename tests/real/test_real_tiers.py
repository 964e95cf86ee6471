"""Lower tiers of real engines: prompts that return are answered sooner, copies hold nobody up, tokens stay the same."""

from itertools import accumulate
from pathlib import Path

import pytest
from msgspec.structs import replace

from cluster import events as ev
from cluster.manager import GroupPlan
from cluster.request import Answer, Arrival, Request, Trigger
from cluster.vocabulary import NS_PER_S, Role
from flowserve.core.config import EngineConfig
from flowserve.core.tiers import TierConfig
from flowserve.runtime.checkpoint import CheckpointShape, make_checkpoint
from flowserve.runtime.wire import NullDevice, TorchDevice
from tests.builders import MODEL, chain, make_spec
from tests.real.engines import RealRun, run_real

ONE = [GroupPlan(make_spec(Role.COLOCATED), 1, 1, 1)]
DOCUMENTS, BLOCKS = 4, 10
PROMPT = BLOCKS * 16 + 5
TIERS = TierConfig(60, swap_low=0.9, swap_high=1.0)


def documents(rounds: int, output: int = 2) -> list[Arrival]:
    """Questions about four documents, each asked when the one before is answered and swapped out."""
    arrivals = []
    for number in range(DOCUMENTS * rounds):
        request = Request(number, PROMPT, output, MODEL, chain(1 + number % DOCUMENTS, *[0] * (BLOCKS - 1)))
        after = Trigger("ended", request_id=number - 1, delay_ns=30_000_000) if number else None
        arrivals.append(Arrival(request, Answer(output), after=after))
    return arrivals


def ttfts(run: RealRun) -> list[float]:
    columns = run.recorder.requests
    return [
        (first - arrival) / NS_PER_S
        for first, arrival in zip(columns["first_token_ns"], columns["arrival_ns"], strict=True)
    ]


def test_ttft_falls_with_a_dram_tier() -> None:
    """A token of prompt takes a millisecond: what comes back from DRAM is answered in a fraction of the time."""
    second = {}
    for tiers in (TierConfig(), TIERS):
        engine = EngineConfig(kv_blocks=14, token_budget=256, max_sequences=8, tiers=tiers)
        device = NullDevice(0.001, prefill_token_s=0.001)
        run = run_real(documents(2), groups=ONE, engine=engine, device=device)
        second[tiers.dram_blocks] = sorted(ttfts(run)[DOCUMENTS:])
        tokens = [event.dram_tokens for event in run.of(ev.TaskFinished)]
        assert tokens == [0] * DOCUMENTS + [BLOCKS * 16 if tiers.dram_blocks else 0] * DOCUMENTS
    assert second[0][0] > PROMPT * 0.001
    assert second[60][DOCUMENTS // 2] < 0.5 * second[0][0]


def test_a_slow_copy_holds_nobody_up() -> None:
    """While a document comes back in a fifth of a second, another request decodes, a token every 3 ms."""
    arrivals = documents(1)
    long = Request(90, 5, 400, MODEL)
    arrivals.append(Arrival(long, Answer(400), after=Trigger("ended", request_id=DOCUMENTS - 1, delay_ns=NS_PER_S)))
    again = replace(arrivals[0].request, request_id=91)
    arrivals.append(Arrival(again, Answer(2), after=Trigger("first_token", request_id=90)))
    engine = EngineConfig(kv_blocks=60, token_budget=256, max_sequences=8, tiers=replace(TIERS, fetch="always"))
    run = run_real(arrivals, groups=ONE, engine=engine, device=NullDevice(0.003, move_block_s=0.02))
    ended = {event.request_id: event for event in run.of(ev.TaskFinished)}
    assert ended[91].dram_tokens == BLOCKS * 16
    first = {event.request_id: event.occurred for event in run.of(ev.FirstToken)}
    assert first[91] - first[90] > 0.15 * NS_PER_S
    times = accumulate(ended[90].token_gaps_ns, initial=first[90])
    assert sum(time < first[91] for time in times) > 20


SHAPE = CheckpointShape(
    hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=96, vocab_size=256, max_position=512
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the model."""
    return make_checkpoint("tiny", SHAPE, tmp_path_factory.mktemp("models"))


def test_tokens_are_the_same_with_tiers(model: Path) -> None:
    """Real copies on real threads, to DRAM and disk and back, change no token."""
    arrivals = documents(3, output=8)
    outputs = []
    for kv_blocks, tiers in ((256, TierConfig()), (14, TierConfig(12, 60, 0.9, 1.0, fetch="always"))):
        engine = EngineConfig(kv_blocks, token_budget=64, max_sequences=8, max_in_flight=2, tiers=tiers)
        run = run_real(arrivals, groups=ONE, engine=engine, device=TorchDevice(str(model)), vocab=SHAPE.vocab_size)
        outputs.append(run.outputs)
        events = run.of(ev.TaskFinished)
        assert sum(event.cached_tokens for event in events) >= DOCUMENTS * BLOCKS * 16
        if tiers.blocks:
            assert sum(event.ssd_tokens for event in events) > 0
            assert sum(event.dram_tokens + event.ssd_tokens for event in events) >= DOCUMENTS * BLOCKS * 16
    assert outputs[0] == outputs[1]
