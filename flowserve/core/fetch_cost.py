"""Whether preserved KV cache in a lower tier is fetched or computed again (DeepServe section 4.2)."""

from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from cluster.latency import StepShape, StepTime
from flowserve.core.tiers import Tier, TierConfig

Parts = Sequence[tuple[Tier, int]]
"""(tier, number of blocks) of consecutive parts of a context."""


class FetchCost(Protocol):
    """Decides how much to populate."""

    def worthwhile(self, context: int, cached: int, block_tokens: int, parts: Parts) -> int:
        """Blocks of `parts`, which follow `cached` tokens in HBM, to fetch for a prompt of `context` tokens."""
        ...


class Always:
    """Fetch all that is preserved, or nothing."""

    def __init__(self, fetch: bool = True) -> None:
        self._fetch = fetch

    def worthwhile(self, context: int, cached: int, block_tokens: int, parts: Parts) -> int:
        return sum(count for _, count in parts) if self._fetch else 0


class CostModel:
    """Fetch only where transfer(y, y') <= exec(x, y) - exec(x, y').

    x: tokens of the context, y: those in HBM, y': those there after the fetch. Of the ends of parts that satisfy it,
    the one that saves the most time is chosen, the longest where several do. `execution_ns(x, y)`: time to compute a
    prompt of x tokens of which y are cached. `transfer_ns(parts)`: time to bring parts into HBM.
    """

    def __init__(self, execution_ns: Callable[[int, int], float], transfer_ns: Callable[[Parts], float]) -> None:
        self._execution_ns = execution_ns
        self._transfer_ns = transfer_ns

    def worthwhile(self, context: int, cached: int, block_tokens: int, parts: Parts) -> int:
        best, most, blocks = 0, 0.0, 0
        computed = self._execution_ns(context, cached)
        for end in range(1, len(parts) + 1):
            blocks += parts[end - 1][1]
            after = min(cached + blocks * block_tokens, context)
            saved = computed - self._execution_ns(context, after) - self._transfer_ns(parts[:end])
            if saved >= most:
                best, most = blocks, saved
        return best


def fetch_rule(tiers: TierConfig, cost: FetchCost | None) -> FetchCost:
    """What decides for these tiers. ValueError: by cost, but there is no cost model."""
    if tiers.fetch != "cost" or not tiers.blocks:
        return Always(tiers.fetch == "always")
    if cost is None:
        raise ValueError("tiers.fetch is cost, but nothing is known of costs here: set it to always or never")
    return cost


class PrefillTime:
    """execution(x, y) of a latency model: the chunks of a prompt that has the engine to itself."""

    def __init__(self, latency: StepTime, token_budget: int) -> None:
        self._latency = latency
        self._budget = token_budget

    def __call__(self, context: int, cached: int) -> float:
        total = 0
        while cached < context:
            count = min(self._budget, context - cached)
            total += self._latency.step_ns(StepShape(count, cached * count + count * (count + 1) // 2, 1, 0, 0))
            cached += count
        return total


class TierRate(msgspec.Struct, frozen=True):
    """How long blocks take from one tier to the next: a latency per move, and a time per block, in ns."""

    latency_ns: float
    block_ns: float


class TransferTime:
    """transfer(y, y') at constant rates, parts of different tiers at the same time."""

    def __init__(self, rates: dict[Tier, TierRate]) -> None:
        self._rates = rates

    def __call__(self, parts: Parts) -> float:
        counts = {tier: sum(count for at, count in parts if at is tier) for tier, _ in parts}
        times = [self._rates[tier].latency_ns + count * self._rates[tier].block_ns for tier, count in counts.items()]
        return max(times, default=0.0)
