"""A simulated engine, given the step durations and message order of a real one, schedules the same, plan by plan."""

import random

import msgspec
import pytest

from cluster.request import Answer, Arrival, Request
from cluster.vocabulary import Role, to_ns
from flowserve.core.record import TurnRecord, read_turns
from flowserve.core.scheduler import EngineConfig
from policies.dispatch.round_robin import RoundRobin
from sim.lockstep import Lockstep
from tests.parity import clusters

SMALL = EngineConfig(kv_blocks=60, block_tokens=16, token_budget=64, max_sequences=32)


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


@pytest.fixture(scope="module", params=["colocated", "disaggregated"])
def recorded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[TurnRecord]]:
    """The turns of two real engines, by name and role."""
    folder = tmp_path_factory.mktemp(request.param)
    groups = (
        [clusters.group(Role.COLOCATED, 2)]
        if request.param == "colocated"
        else [clusters.group(Role.PREFILL, 1), clusters.group(Role.DECODE, 1)]
    )
    clusters.run(clusters.real(SMALL, record=True), folder, workload(), groups, RoundRobin())
    roles = [group.spec.role for group in groups for _ in range(group.initial)]
    return {
        f"te-{number}:{role}": list(read_turns(folder / f"te-{number}.turns.jsonl"))
        for number, role in enumerate(roles)
    }


def _lockstep(name: str, turns: list[TurnRecord]) -> Lockstep:
    executor, _, role = name.partition(":")
    answers = {arrival.request.request_id: arrival.answer for arrival in workload()}
    spec = clusters.group(Role(role), 1).spec
    return Lockstep(executor, spec, SMALL, turns, answers, to_ns(clusters.REPORT_S))


def test_identical_schedule(recorded: dict[str, list[TurnRecord]]) -> None:
    """Plans, prefix hits (where chunks start), preemptions and transfers come out the same in every turn."""
    for name, turns in recorded.items():
        lockstep = _lockstep(name, turns)
        assert lockstep.run() is None
        assert lockstep.compared == sum(turn.plan is not None or bool(turn.messages) for turn in turns)


def test_the_record_has_what_is_compared(recorded: dict[str, list[TurnRecord]]) -> None:
    """The recorded run did hit prefixes, chunk prompts, and preempt or transfer: there was something to get wrong."""
    turns = [turn for each in recorded.values() for turn in each]
    chunks = [chunk for turn in turns if turn.plan is not None for chunk in turn.plan.chunks]
    first_start: dict[int, int] = {}
    for task_id, start, _ in chunks:
        first_start.setdefault(task_id, start)
    assert any(start > 0 for start in first_start.values())
    assert len(chunks) > len(first_start)
    assert max(turn.preemptions for turn in turns) > 0
    if any(name.endswith("decode") for name in recorded):
        assert any(turn.transfers for turn in turns)


def test_lockstep_can_fail(recorded: dict[str, list[TurnRecord]]) -> None:
    """A record that one plan was changed in, or an engine with other limits, is found to differ."""
    name, turns = next(iter(recorded.items()))
    place = next(n for n, turn in enumerate(turns) if n > 20 and turn.plan is not None and turn.plan.chunks)
    plan = turns[place].plan
    assert plan is not None
    task_id, start, tokens = plan.chunks[0]
    changed = list(turns)
    changed[place] = msgspec.structs.replace(
        turns[place], plan=msgspec.structs.replace(plan, chunks=[(task_id, start + 1, tokens), *plan.chunks[1:]])
    )
    difference = _lockstep(name, changed).run()
    assert difference is not None
    assert (difference.turn, difference.what) == (place, "plan")
    lockstep = _lockstep(name, turns)
    lockstep.executor.shell.core.config = msgspec.structs.replace(SMALL, token_budget=48)
    assert lockstep.run() is not None
