"""A simulated engine, given the step durations and message order of a real one, schedules the same, plan by plan."""

import random
from collections import Counter
from typing import NamedTuple

import msgspec
import pytest

from cluster.request import Answer, Arrival, Request
from cluster.vocabulary import Role, to_ns
from flowserve.core.config import EngineConfig
from flowserve.core.record import TurnRecord, read_turns
from flowserve.core.tiers import Tier, TierConfig
from policies.dispatch.round_robin import RoundRobin
from sim.lockstep import Lockstep
from tests.parity import clusters

SMALL = EngineConfig(kv_blocks=60, block_tokens=16, token_budget=64, max_sequences=32)
TIERED = msgspec.structs.replace(
    SMALL,
    kv_blocks=40,
    tiers=TierConfig(24, 40, 0.2, 0.4, swap_step_blocks=16, fetch="always"),
    preemption="swap",
)


def workload() -> list[Arrival]:
    """Shared prefixes, prompts of several chunks, cancellations, and more than the KV cache holds."""
    rng, at, arrivals = random.Random(7), 0.0, []
    for number in range(110):
        at += rng.expovariate(130)
        prompt, family = rng.randint(20, 200), rng.randrange(4)
        shared = min(prompt // 16, 5)
        ids = tuple(1000 * family + block for block in range(shared)) + tuple(
            10**6 + 100 * number + block for block in range(prompt // 16 - shared)
        )
        arrivals.append(
            Arrival(
                Request(number, prompt, 512, clusters.MODEL, ids),
                Answer(rng.randint(1, 70)),
                to_ns(at),
                cancel_after_ns=to_ns(0.1) if number % 17 == 3 else None,
            )
        )
    return arrivals


class Recorded(NamedTuple):
    """What engines with these limits did: their turns, by name and role."""

    limits: EngineConfig
    engines: dict[str, list[TurnRecord]]


@pytest.fixture(
    scope="module",
    params=[
        ("colocated", 1, 0),
        ("disaggregated", 1, 0),
        ("tiered", 1, 0),
        ("colocated", 2, 0),
        ("disaggregated", 3, 0),
        ("tiered", 2, 0),
        ("colocated", 1, 3),
        ("disaggregated", 2, 2),
        ("by chunk", 1, 0),
        ("by chunk", 3, 0),
    ],
    ids=lambda param: f"{param[0]}, {param[1]} in flight, {param[2]} guesses",
)
def recorded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """Two real engines have served the workload, one plan at a time or with plans in flight."""
    kind, in_flight, guesses = request.param
    folder = tmp_path_factory.mktemp(kind)
    limits = msgspec.structs.replace(TIERED if kind == "tiered" else SMALL, max_in_flight=in_flight)
    if kind == "by chunk":
        limits = msgspec.structs.replace(limits, kv_transfer="by_chunk")
    if guesses:  # fewer blocks: with guesses the same load is done sooner
        limits = msgspec.structs.replace(limits, kv_blocks=36, token_budget=128, speculative_tokens=guesses)
    groups = (
        [clusters.group(Role.PREFILL, 1), clusters.group(Role.DECODE, 1)]
        if kind in ("disaggregated", "by chunk")
        else [clusters.group(Role.COLOCATED, 2)]
    )
    clusters.run(clusters.real(limits, record=True), folder, workload(), groups, RoundRobin())
    roles = [group.spec.role for group in groups for _ in range(group.initial)]
    turns = {
        f"te-{number}:{role}": list(read_turns(folder / f"te-{number}.turns.jsonl"))
        for number, role in enumerate(roles)
    }
    return Recorded(limits, turns)


def _lockstep(name: str, limits: EngineConfig, turns: list[TurnRecord]) -> Lockstep:
    executor, _, role = name.partition(":")
    answers = {arrival.request.request_id: arrival.answer for arrival in workload()}
    spec = clusters.group(Role(role), 1).spec
    return Lockstep(executor, spec, limits, turns, answers, to_ns(clusters.REPORT_S))


def test_identical_schedule(recorded: Recorded) -> None:
    """Plans, prefix hits (where chunks start), preemptions and transfers come out the same in every turn."""
    for name, turns in recorded.engines.items():
        lockstep = _lockstep(name, recorded.limits, turns)
        assert lockstep.run() is None
        assert lockstep.compared == sum(turn.done is not None or bool(turn.messages) for turn in turns)


def test_the_record_has_what_is_compared(recorded: Recorded) -> None:
    """The recorded run did hit prefixes, chunk prompts, and preempt or transfer: there was something to get wrong."""
    turns = [turn for each in recorded.engines.values() for turn in each]
    chunks = [chunk for turn in turns for plan in turn.plans for chunk in plan.chunks]
    first_start: dict[int, int] = {}
    for task_id, start, _ in chunks:
        first_start.setdefault(task_id, start)
    assert any(start > 0 for start in first_start.values())
    assert len(chunks) > len(first_start)
    assert max(turn.preemptions for turn in turns) > 0
    if recorded.limits.speculative_tokens:
        assert {tokens for turn in turns for tokens in turn.accepted.values()} == {
            *range(1, recorded.limits.speculative_tokens + 2)
        }
    ahead = max(plan.number - turn.done for turn in turns if turn.done is not None for plan in turn.plans)
    assert ahead == recorded.limits.max_in_flight - 1
    if any(name.endswith("decode") for name in recorded.engines):
        asked = Counter(task_id for turn in turns for task_id, _, _ in turn.transfers)
        assert asked
        assert (max(asked.values()) > 1) == (recorded.limits.kv_transfer == "by_chunk")
    if recorded.limits.tiers.blocks:
        moved = {(move.source, move.target) for turn in turns for move in turn.moves}
        assert {(Tier.HBM, Tier.DRAM), (Tier.DRAM, Tier.HBM), (Tier.DRAM, Tier.SSD)} <= moved


def test_lockstep_can_fail(recorded: Recorded) -> None:
    """A record that one plan was changed in, or an engine with other limits, is found to differ."""
    name, turns = next(iter(recorded.engines.items()))
    place = next(n for n, turn in enumerate(turns) if n > 20 and turn.plans and turn.plans[0].chunks)
    plan = turns[place].plans[0]
    task_id, start, tokens = plan.chunks[0]
    changed = list(turns)
    changed[place] = msgspec.structs.replace(
        turns[place],
        plans=[msgspec.structs.replace(plan, chunks=[(task_id, start + 1, tokens), *plan.chunks[1:]])],
    )
    difference = _lockstep(name, recorded.limits, changed).run()
    assert difference is not None
    assert (difference.turn, difference.what) == (place, "plans")
    lockstep = _lockstep(name, recorded.limits, turns)
    lockstep.executor.shell.core.token_budget = 48
    assert lockstep.run() is not None
