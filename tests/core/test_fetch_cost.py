"""The cost model of populating: fetch only where it is not slower than computing."""

import pytest

from cluster.latency import StepShape
from flowserve.core.fetch_cost import Always, CostModel, PrefillTime, TierRate, TransferTime
from flowserve.core.tiers import Tier
from sim.latency import Constant

PARTS = [(Tier.DRAM, 4), (Tier.SSD, 8)]


def cost(dram_ns: float, ssd_ns: float, token_ns: float = 1.0, latency_ns: float = 0.0) -> CostModel:
    rates = {Tier.DRAM: TierRate(latency_ns, dram_ns), Tier.SSD: TierRate(latency_ns, ssd_ns)}
    return CostModel(lambda context, cached: token_ns * (context - cached), TransferTime(rates))


@pytest.mark.parametrize(
    ("dram_ns", "ssd_ns", "blocks"),
    [(1, 1, 12), (1, 16, 12), (1, 17, 4), (17, 25, 0), (17, 1, 12), (16, 30, 4)],
    ids=["both", "ssd saves more", "ssd saves less", "nothing pays", "the sum pays", "equal is enough"],
)
def test_what_is_fetched_saves_time(dram_ns: float, ssd_ns: float, blocks: int) -> None:
    """The end that saves most is chosen: a block of 16 tokens costs 16 ns to compute, tiers are read at once."""
    assert cost(dram_ns, ssd_ns).worthwhile(context=300, cached=0, block_tokens=16, parts=PARTS) == blocks


def test_small_parts_are_not_worth_the_latency() -> None:
    """The overhead of a move decides about few blocks, and not about many."""
    model = cost(1, 1, latency_ns=100)
    assert model.worthwhile(300, 0, 16, [(Tier.DRAM, 4)]) == 0
    assert model.worthwhile(300, 0, 16, [(Tier.DRAM, 12)]) == 12


def test_always_and_never() -> None:
    """The two rules that ask nothing."""
    assert Always().worthwhile(300, 0, 16, PARTS) == 12
    assert Always(False).worthwhile(300, 0, 16, PARTS) == 0


def test_execution_time_is_that_of_the_chunks() -> None:
    """A prompt is computed in chunks of the token budget, each a step of the latency model."""
    time = PrefillTime(Constant(step_s=1.0, prefill_token_s=0.001), token_budget=100)
    assert time(250, 0) == 3 * 10**9 + 250 * 10**6
    assert time(250, 200) == 10**9 + 50 * 10**6
    assert time(250, 250) == 0


def test_longer_contexts_make_fetching_worth_more() -> None:
    """Attention grows with the context: the same 64 blocks far behind are fetched, at the start computed."""

    class Quadratic:
        def step_ns(self, shape: StepShape) -> int:
            return shape.prefill_attention

    model = CostModel(PrefillTime(Quadratic(), 512), TransferTime({Tier.DRAM: TierRate(0, 30_000)}))
    assert model.worthwhile(1024, 0, 16, [(Tier.DRAM, 64)]) == 0
    assert model.worthwhile(9 * 1024, 8 * 1024, 16, [(Tier.DRAM, 64)]) == 64
