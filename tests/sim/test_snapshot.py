"""A run pickled in the middle and gone on from is the run it was, whatever was under way at that moment."""

import pickle
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.actions import Action
from cluster.control import ControlPlane
from cluster.events import Event
from cluster.manager import GroupPlan
from cluster.request import Answer, Arrival
from cluster.vocabulary import Role, Stage
from experiments.snapshot import State, pickled
from experiments.task_log import TaskLog
from flowserve.core.config import EngineConfig
from flowserve.core.tiers import TierConfig
from flowserve.core.transfer import KvTransfer
from policies.dispatch.least_outstanding import LeastOutstanding
from policies.dispatch.round_robin import RoundRobin
from policies.scaling.fixed import Fixed
from sim.cluster import SimCluster
from sim.node import Failure
from sim.topology import Wire
from tests.builders import (
    disaggregated,
    make_agent,
    make_arrival,
    make_request,
    make_tuning,
    run_sim,
    tier_wires,
    workers,
)
from tests.sim import test_coalesced as coalesced

pytestmark = pytest.mark.pure

Decisions = list[tuple[Event, list[Action]]]
When = Callable[[ControlPlane, SimCluster, int], bool]


def snapshot_of(
    workload: list[Arrival], arguments: dict[str, Any], when: When
) -> tuple[bytes, Decisions, dict[str, Any]]:
    """A run that is pickled after the first event where `when` says so: the pickle, all that was decided after it, and
    what the run left.
    """
    after: Decisions = []
    taken: list[bytes] = []
    events = 0

    def watch(event: Event, actions: list[Action], cluster: SimCluster) -> None:
        if taken:
            after.append((event, actions))

    def between(control: ControlPlane, cluster: SimCluster) -> None:
        nonlocal events
        events += 1
        if not taken and when(control, cluster, events):
            taken.append(pickled(State(cluster, control, TaskLog(0))))

    made = {**arguments, "scaling": arguments.get("scaling", Fixed)()}
    run = run_sim(workload, watch=watch, between=between, **made)
    assert taken, "there was no such moment"
    return taken[0], after, left_by(run.control, run.executors)


def left_by(control: ControlPlane, executors: dict[str, Any]) -> dict[str, Any]:
    recorder, work = control.recorder, control.work
    return {
        "requests": {name: list(column) for name, column in recorder.requests.items()},
        "texts": (recorder.outcomes, recorder.reasons, recorder.executors),
        "gaps": list(recorder.gaps),
        "scaling": recorder.scaling,
        "loads": list(recorder.loads),
        "steps": {name: executor.steps for name, executor in executors.items()},
        "jobs": [] if work is None else [[getattr(row, name) for name in row.__slots__] for row in work.recorder.rows],
    }


def gone_on(taken: bytes, workload: list[Arrival]) -> tuple[Decisions, dict[str, Any]]:
    """What is decided after a snapshot, and what the run leaves."""
    cluster, control, _ = pickle.loads(taken)
    control.client.resume(workload)
    decided: Decisions = []
    while (event := cluster.next_event()) is not None:
        decided.append((event, control.on_event(event)))
        for action in decided[-1][1]:
            cluster.submit(action)
    for executor in cluster.executors.values():
        executor.shell.core.check_integrity()
    control.recorder.censor()
    return decided, left_by(control, cluster.executors)


def check(workload: list[Arrival], arguments: dict[str, Any], when: When) -> None:
    taken, after, left = snapshot_of(workload, arguments, when)
    assert gone_on(taken, workload) == (after, left)


@given(workload=coalesced.workloads(), arguments=coalesced.clusters(), share=st.floats(0, 1))
@settings(max_examples=60)
def test_a_resumed_run_is_the_run_it_was(workload: list[Arrival], arguments: dict[str, Any], share: float) -> None:
    """After a share of its events, any run goes on from a pickle to the same events, decisions, records and steps."""
    whole = coalesced.run(workload, arguments)
    at = 1 + int(share * (len(whole.events) - 1))
    check(workload, arguments, lambda control, cluster, events: events == at)


SLOW = {"groups": disaggregated(2, 1), "wire": Wire(1e6, 0.01), "stages": [(Stage.TE_LOAD, 10_000_000)]}
MANY = [make_arrival(number, at_s=0.03 * number, prompt=90, output=40) for number in range(30)]


@pytest.mark.parametrize(
    ("policy", "kv_transfer"),
    [
        (LeastOutstanding, "by_request"),
        (RoundRobin, "by_request"),
        (coalesced.deepflow, "by_request"),
        (RoundRobin, "by_chunk"),
        (RoundRobin, "by_layer"),
    ],
)
def test_in_the_middle_of_a_transfer(policy: Any, kv_transfer: KvTransfer) -> None:
    """KV cache that is under way at the snapshot arrives after it, and is decoded."""

    def under_way(control: ControlPlane, cluster: SimCluster, events: int) -> bool:
        masters = [executor.shell.master for executor in cluster.executors.values()]
        return any(each.copying for master in masters for each in master._fetches.values())

    engine = EngineConfig(kv_blocks=1000, kv_transfer=kv_transfer)
    check(MANY, {**SLOW, "policy": policy, "engine": engine, "layers": 4}, under_way)


def test_in_the_middle_of_a_segment() -> None:
    """Decode steps that are one event are cut at the same places by what arrives after the snapshot."""

    def segment(control: ControlPlane, cluster: SimCluster, events: int) -> bool:
        now = cluster.now()
        return any(len(each._ends) > 2 and each._ends[0] < now for each in cluster.executors.values())

    workload = [Arrival(make_request(0, 10, 900), Answer(900)), make_arrival(1, at_s=3.0), make_arrival(2, at_s=5.0)]
    check(workload, {"report_period_s": 100.0, "executors": 1}, segment)


def test_in_the_middle_of_a_launch_and_of_a_drain() -> None:
    """An executor that is starting at the snapshot gets ready after it; one that drains is retired."""
    arguments = {
        "groups": [GroupPlan(plan.spec, 2, 1, 6) for plan in disaggregated(0, 0, 2)],
        "stages": [(Stage.SCALER_PRE, 40_000_000), (Stage.TE_LOAD, 70_000_000)],
        "scaling": coalesced.scaling,
        "engine": EngineConfig(kv_blocks=100, max_sequences=4),
        "failures": [Failure(0.5, "te-1")],
    }

    def launching(control: ControlPlane, cluster: SimCluster, events: int) -> bool:
        return any(load.ready and load.pending for load in control.manager.loads().values())

    def draining(control: ControlPlane, cluster: SimCluster, events: int) -> bool:
        return any(load.draining for load in control.manager.loads().values())

    check(MANY, arguments, launching)
    check(MANY, arguments, draining)


def test_in_the_middle_of_a_copy_between_tiers() -> None:
    """Blocks that are on their way to DRAM or back at the snapshot are there after it."""
    workload = [
        make_arrival(number, at_s=0.05 * number, prompt=96, ids=tuple(range(number % 7 * 100, number % 7 * 100 + 6)))
        for number in range(40)
    ]
    arguments = {
        "engine": EngineConfig(kv_blocks=20, max_sequences=2, tiers=TierConfig(dram_blocks=60, fetch="always")),
        "tiers": tier_wires(1e6, 1e6),
    }

    def on_their_way(control: ControlPlane, cluster: SimCluster, events: int) -> bool:
        return any(executor.shell.core.rtc._transits for executor in cluster.executors.values())

    check(workload, arguments, on_their_way)


def test_in_the_middle_of_jobs() -> None:
    """A tool and a training task that run at the snapshot end after it, and what waits for their workers goes on."""
    workload: list[Any] = [
        make_tuning(0, steps=6, checkpoint_steps=2, evaluation=[(20, 5)]),
        *(make_agent(number, [(32, 4)], [0.5, 0.3], [(64, 8)], at_s=0.1 * number) for number in range(1, 12)),
        *(make_arrival(number, at_s=0.1 * number, output=40) for number in range(12, 40)),
    ]
    arguments = {"groups": [*disaggregated(0, 0, 1), *workers(1, 1)]}

    def busy(control: ControlPlane, cluster: SimCluster, events: int) -> bool:
        running = [worker.worker.slots.running for worker in cluster.workers.values()]
        assert control.work is not None
        return len(running) == 2 and all(running) and control.work.parked(Role.CPU) > 1

    check(workload, arguments, busy)


def test_deep_trees_are_no_obstacle() -> None:
    """A conversation of thousands of turns is a path as long in the tree of cached prefixes."""
    turns = 3000
    ids = tuple(range(1, turns + 2))
    workload = [
        make_arrival(number, at_s=0.02 * number, prompt=16 * (number + 1), output=1, ids=ids[: number + 1])
        for number in range(turns)
    ]
    check(workload, {"engine": EngineConfig(kv_blocks=turns + 100)}, lambda _, __, events: events > 4 * turns)
