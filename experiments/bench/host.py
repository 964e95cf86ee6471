"""What scheduling costs the host: engine core and prefix cache without a device, in CPU time of this machine."""

import cProfile
import gc
import pstats
import time
from collections.abc import Callable

from cluster import identity
from cluster.request import Request, Task
from cluster.vocabulary import BLOCK_TOKENS, TaskKind
from experiments.bench.harness.result import Options as CommonOptions
from experiments.bench.harness.result import Row, median_row
from flowserve.core.config import EngineConfig
from flowserve.core.rtc import Rtc
from flowserve.core.scheduler import EngineCore

STEPS = 1000
PROMPT_BLOCKS = 4096 // BLOCK_TOKENS
ALLOCATED = 64
"""Blocks of one request in the allocation row: 1024 tokens."""


class Options(CommonOptions, frozen=True, kw_only=True):
    """`sequences`: running at once."""

    repeats: int = 7
    sequences: int = 256


def run(options: Options) -> list[Row]:
    gc.disable()  # as it would strike one measurement or another at random
    count = options.sequences
    steady = [_steady(count) / STEPS * 1e6 for _ in range(options.repeats)]
    churn = [_churn(count) / STEPS * 1e6 for _ in range(options.repeats)]
    return [
        median_row(
            f"schedule + complete of a step, {count} sequences decode",
            steady,
            "µs",
            _profile(_steady, count),
            at_most=150,
        ),
        median_row(
            f"the same, one of {count} ends and one arrives per step", churn, "µs", _profile(_churn, count), at_most=150
        ),
        median_row(
            "RTC: match and insert a prompt of 4096 tokens",
            [_match_and_insert() * 1e3 for _ in range(options.repeats)],
            "ms",
            "its blocks hashed and allocated, half of it cached",
            at_most=0.7,
        ),
        median_row(
            "RTC: allocate and free, per block",
            [_allocate() * 1e6 for _ in range(options.repeats)],
            "µs",
            f"{ALLOCATED} at a time, half of the cache in use",
            at_most=1,
        ),
    ]


def _core(sequences: int) -> EngineCore:
    """An engine whose sequences are all past their prompts, of 100 to 1000 tokens."""
    config = EngineConfig(kv_blocks=200 * sequences, max_sequences=sequences, token_budget=8192, prefix_cache=True)
    core = EngineCore(config)
    for number in range(sequences):
        _add(core, number, 100 + 900 * number // sequences)
    while core.waiting.count or any(plan.chunks for plan in core.in_flight):
        plan = core.schedule()
        assert plan is not None
        core.complete(plan, ())
    return core


def _add(core: EngineCore, number: int, prompt: int) -> None:
    request = Request(number, prompt, 100_000, "bench")
    core.add(Task(number, request, TaskKind.SERVE), identity.unique(number)[: prompt // BLOCK_TOKENS])


def _steady(sequences: int, profile: cProfile.Profile | None = None) -> float:
    """Seconds of STEPS steps."""
    core = _core(sequences)

    def step(_: int) -> None:
        plan = core.schedule()
        assert plan is not None
        core.complete(plan, ())

    return _timed(step, STEPS, profile)


def _churn(sequences: int, profile: cProfile.Profile | None = None) -> float:
    core = _core(sequences)

    def step(number: int) -> None:
        _add(core, sequences + number, 200)
        plan = core.schedule()
        assert plan is not None
        core.complete(plan, (number,))

    return _timed(step, STEPS, profile)


def _match_and_insert() -> float:
    """Median over many prompts that share their first half."""
    count = 32
    rtc = Rtc(PROMPT_BLOCKS * (count + 2))
    half = PROMPT_BLOCKS * BLOCK_TOKENS // 2

    def serve(number: int) -> None:
        ids = identity.from_tokens([*range(half), *range(number * half, number * half + half)], 0)
        match = rtc.match_by_prefix_token(ids, len(ids))
        blocks = rtc.alloc_blocks(len(ids) - len(match.blocks))
        assert blocks is not None
        node, _ = rtc.insert(match.node, len(match.blocks), len(ids), ids, match.blocks + blocks)
        rtc.unlock(node)

    serve(1)
    return _timed(lambda number: serve(number + 2), count) / count


def _allocate() -> float:
    """Seconds per block that is allocated and freed."""
    rtc = Rtc(100 * ALLOCATED)
    held = [rtc.alloc_blocks(ALLOCATED) or [] for _ in range(50)]

    def turn(number: int) -> None:
        place = number * 7 % len(held)
        rtc.free(held[place])
        held[place] = rtc.alloc_blocks(ALLOCATED) or []

    return _timed(turn, STEPS) / STEPS / ALLOCATED


def _timed(step: Callable[[int], None], times: int, profile: cProfile.Profile | None = None) -> float:
    if profile is not None:
        profile.enable()
    start = time.thread_time()  # of this thread alone: what others do on the machine matters less
    for number in range(times):
        step(number)
    seconds = time.thread_time() - start
    if profile is not None:
        profile.disable()
    return seconds


def _profile(run: Callable[[int, cProfile.Profile | None], float], sequences: int) -> str:
    """The four functions with the most time of their own, as shares."""
    profile = cProfile.Profile()
    run(sequences, profile)
    stats = pstats.Stats(profile).get_stats_profile()
    own = {name: entry.tottime for name, entry in stats.func_profiles.items()}
    most = sorted(own, key=own.__getitem__, reverse=True)[:4]
    return "profile: " + ", ".join(f"{name.strip('<>')} {own[name] / sum(own.values()):.0%}" for name in most)
