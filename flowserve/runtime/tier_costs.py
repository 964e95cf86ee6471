"""What computing and fetching cost on this machine, measured at start-up, for the cost model of populating."""

import time
from collections.abc import Callable

import msgspec

from cluster import identity
from cluster.latency import StepShape
from cluster.request import Request, Task
from cluster.vocabulary import TaskKind
from flowserve.core.config import EngineConfig
from flowserve.core.fetch_cost import CostModel, PrefillTime, TierRate, TransferTime
from flowserve.core.scheduler import EngineCore
from flowserve.core.tiers import Move, Tier, TierConfig
from flowserve.runtime.runner import Payload, Runner
from flowserve.runtime.sampling import Sampling

_REPEATS = 3
_BLOCKS = 32
_NO_TICKET = 0


class PerToken(msgspec.Struct, frozen=True):
    """A latency model of prompts alone: a time per step and per token. Attention to what is cached is not in it."""

    step: float
    token: float

    def step_ns(self, shape: StepShape) -> int:
        return max(1, round(self.step + self.token * shape.prefill_tokens))


def measured(runner: Runner, config: EngineConfig) -> CostModel:
    """Prompts of two lengths, and copies of two sizes from each tier that there is. Before the first task."""
    longest = min(config.token_budget, (config.kv_blocks - 1) * config.block_tokens)
    short, long = max(1, longest // 4), max(2, longest)
    step, token = _line(short, long, lambda count: _prompt(runner, config, count))
    rates = {
        tier: TierRate(*_line(1, max(2, min(_BLOCKS, size, config.kv_blocks)), _mover(runner, tier)))
        for tier, size in ((Tier.DRAM, config.tiers.dram_blocks), (Tier.SSD, config.tiers.ssd_blocks))
        if size > 1
    }
    rates.setdefault(Tier.DRAM, TierRate(0.0, 0.0))
    rates.setdefault(Tier.SSD, rates[Tier.DRAM])
    return CostModel(PrefillTime(PerToken(step, token), config.token_budget), TransferTime(rates))


def _line(low: int, high: int, took_ns: Callable[[int], int]) -> tuple[float, float]:
    """(at 0, per unit) of the line through the fastest of a few measurements at two sizes, neither below 0."""
    at_low, at_high = (min(took_ns(size) for _ in range(_REPEATS)) for size in (low, high))
    slope = max(0.0, (at_high - at_low) / (high - low))
    return max(0.0, at_low - slope * low), slope


def _prompt(runner: Runner, config: EngineConfig, tokens: int) -> int:
    core = EngineCore(msgspec.structs.replace(config, tiers=TierConfig(), preemption="recompute"))
    task = Task(-2, Request(-2, tokens, 1, ""), TaskKind.SERVE)
    core.add(task, identity.unique(0))
    runner.add(-2, Payload([0] * tokens, Sampling()))
    start = time.perf_counter_ns()
    while (plan := core.schedule()) is not None:
        runner.launch(plan)
        runner.collect()
        core.complete(plan, ())
    took = time.perf_counter_ns() - start
    runner.remove(-2)
    return took


def _mover(runner: Runner, tier: Tier) -> Callable[[int], int]:
    def took_ns(count: int) -> int:
        blocks = list(range(count))
        runner.move(Move(_NO_TICKET, Tier.HBM, blocks, tier, blocks))  # so that what comes back is finite numbers
        start = time.perf_counter_ns()
        runner.move(Move(_NO_TICKET, tier, blocks, Tier.HBM, blocks))
        return time.perf_counter_ns() - start

    return took_ns
