"""The whole control plane on both backends: whatever happens, every request ends once, and the run replays."""

import io
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import msgspec
import numpy as np
import pytest

from cluster import events as ev
from cluster.actions import Action, LaunchExecutor
from cluster.client import Client
from cluster.control import ControlPlane
from cluster.decision_log import Decision, LogHeader
from cluster.job_executor import JobExecutor
from cluster.manager import ClusterManager, GroupPlan
from cluster.metrics import Slo, summarise
from cluster.policy import ScalingPolicy
from cluster.recorder import Recorder
from cluster.request import Arrival, Trigger
from cluster.seam import Cluster
from cluster.vocabulary import Role
from flowserve.core.config import EngineConfig
from policies.dispatch.least_outstanding import LeastOutstanding
from policies.scaling.fixed import Fixed
from policies.scaling.target_utilisation import TargetUtilisation
from tests.builders import disaggregated, make_arrival, make_spec
from tests.contract.backends import kill, present

COLOCATED = [GroupPlan(make_spec(), 2, 0, 2)]
PAIR = disaggregated(1, 1)
MIXED = disaggregated(1, 1, colocated=1)


class Finished(NamedTuple):
    """A run that is over."""

    control: ControlPlane
    events: list[ev.Event]
    log: bytes

    @property
    def ends(self) -> dict[int, tuple[str, int]]:
        recorder = self.control.recorder
        numbers, tokens = (recorder.requests[name] for name in ("request_id", "output_tokens"))
        return {n: (outcome, t) for n, outcome, t in zip(numbers, recorder.outcomes, tokens, strict=True)}

    def of(self, *kinds: type) -> list[ev.Event]:
        return [event for event in self.events if isinstance(event, kinds)]


def make_control(
    workload: Iterable[Arrival], groups: Sequence[GroupPlan], scaling: ScalingPolicy | None, job_executors: int
) -> ControlPlane:
    names = tuple(f"je-{number}" for number in range(job_executors))
    client = Client(workload, names, np.random.default_rng(0), closed_loop=True)
    placing = [JobExecutor(name, number, LeastOutstanding()) for number, name in enumerate(names)]
    return ControlPlane(client, placing, ClusterManager(tuple(groups), scaling or Fixed(), names), Recorder())


def run(
    make_cluster: Callable[..., Cluster],
    workload: Iterable[Arrival],
    groups: Sequence[GroupPlan] = COLOCATED,
    scaling: ScalingPolicy | None = None,
    job_executors: int = 1,
    watch: Callable[[ev.Event, list[Action], Cluster], None] | None = None,
) -> Finished:
    """Drive a new control plane to the end of its run."""
    control = make_control(workload, groups, scaling, job_executors)
    log, events = io.BytesIO(), []
    control.log_to(log)
    actors = ("client", *(actor.name for actor in control.job_executors), "cm")
    limits = EngineConfig(kv_blocks=400, token_budget=64, max_sequences=16, max_in_flight=2)
    with make_cluster(actors=actors, engine=limits) as cluster:
        while (event := cluster.next_event()) is not None:
            events.append(event)
            actions = control.on_event(event)
            for action in actions:
                cluster.submit(action)
            if watch is not None:
                watch(event, actions, cluster)
    control.recorder.censor()
    return Finished(control, events, log.getvalue())


def workload(count: int = 16) -> list[Arrival]:
    return [make_arrival(n, at_s=0.001 * n, prompt=20 + 37 * n % 160, output=10 + 31 * n % 50) for n in range(count)]


def served(arrivals: list[Arrival]) -> dict[int, tuple[str, int]]:
    return {arrival.request.request_id: ("finished", arrival.answer.output_tokens) for arrival in arrivals}


@pytest.mark.parametrize("job_executors", [1, 3])
@pytest.mark.parametrize("groups", [COLOCATED, PAIR, MIXED], ids=["colocated", "pair", "mixed"])
def test_every_request_ends_once(
    make_cluster: Callable[..., Cluster], groups: list[GroupPlan], job_executors: int
) -> None:
    """Every request finishes with its tokens, is heard of once by the client, and has its metrics."""
    finished = run(make_cluster, workload(), groups, job_executors=job_executors)
    assert finished.ends == served(workload())
    ended = [event.request_id for event in finished.of(ev.RequestEnded) if isinstance(event, ev.RequestEnded)]
    assert sorted(ended) == list(range(16))
    assert {event.to for event in finished.of(ev.LoadReport)} == {"cm", *(f"je-{n}" for n in range(job_executors))}
    assert all(actor.open_jobs == 0 for actor in finished.control.job_executors)
    summary = summarise(finished.control.recorder, Slo())
    assert summary["finished"] == summary["requests"] == 16
    assert summary["slo_attainment"] == 1
    assert 0 < summary["ttft_p50_s"] < summary["e2e_p50_s"]
    assert summary["tpot_p50_s"] > 0


@pytest.mark.parametrize("victim", ["te-0", "te-1"])
@pytest.mark.parametrize("groups", [COLOCATED, PAIR], ids=["colocated", "pair"])
def test_a_death_in_the_middle(make_cluster: Callable[..., Cluster], groups: list[GroupPlan], victim: str) -> None:
    """Whichever executor dies in mid-run, every request still ends once, with all of its tokens."""
    seen = 0

    def watch(event: ev.Event, actions: list[Action], cluster: Cluster) -> None:
        nonlocal seen
        if isinstance(event, ev.FirstToken | ev.TaskFinished) and event.executor == victim:
            seen += 1
            if seen == 3:
                kill(cluster, victim)

    finished = run(make_cluster, workload(), groups, watch=watch)
    assert [event.executor for event in finished.of(ev.ExecutorFailed)] == [victim]  # type: ignore[union-attr]
    assert finished.ends == served(workload())
    assert len(finished.of(ev.FirstToken)) == len(finished.of(ev.RequestEnded)) == 16


@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE])
def test_half_a_pair_cannot_start(make_cluster: Callable[..., Cluster], role: Role) -> None:
    """Where all executors of a role die while they start, no request waits for ever: each is reported failed."""
    doomed: set[str] = set()

    def watch(event: ev.Event, actions: list[Action], cluster: Cluster) -> None:
        doomed.update(each.executor for each in actions if isinstance(each, LaunchExecutor) and each.spec.role is role)
        for executor in doomed.intersection(present(cluster)):
            kill(cluster, executor)
            doomed.remove(executor)

    finished = run(make_cluster, workload(5), PAIR, watch=watch)
    assert len(finished.of(ev.ExecutorFailed)) == 3
    assert finished.ends == dict.fromkeys(range(5), ("failed", finished.ends[0][1]))
    assert all("could be launched" in reason for reason in finished.control.recorder.reasons)


def test_closed_loop_and_cancelled_requests(make_cluster: Callable[..., Cluster]) -> None:
    """Arrivals that wait for others come after them, and a client that gives up gets its last word."""
    arrivals = [
        make_arrival(0, output=4),
        make_arrival(1, output=4, after=Trigger("first_token", request_id=0)),
        make_arrival(2, output=4, after=Trigger("ended", count=2, delay_ns=2_000_000)),
        make_arrival(3, output=6000, cancel_after_s=0.05),
    ]
    finished = run(make_cluster, arrivals)
    assert {number: finished.ends[number] for number in range(3)} == served(arrivals[:3])
    assert finished.ends[3][0] == "cancelled"
    assert finished.ends[3][1] < 6000


def test_scaling_from_nothing(make_cluster: Callable[..., Cluster]) -> None:
    """Requests that find no executor wait, have one launched, and are served; it is retired when nothing comes."""
    groups = [GroupPlan(make_spec(), 0, 0, 2)]
    scaling = TargetUtilisation(period_s=0.02, down_delay_s=0.1)
    arrivals = [make_arrival(0), make_arrival(1, after=Trigger("ended", request_id=0, delay_ns=600_000_000))]
    finished = run(make_cluster, arrivals, groups, scaling)
    assert finished.ends == served(arrivals)
    assert len(finished.of(ev.ExecutorReady)) == 2
    assert len(finished.of(ev.ExecutorDrained)) >= 1
    assert len(finished.of(ev.ExecutorRetired)) >= 1
    assert finished.of(ev.TaskFailed, ev.ExecutorFailed) == []


@pytest.mark.parametrize("groups", [COLOCATED, PAIR], ids=["colocated", "pair"])
def test_the_log_replays(make_cluster: Callable[..., Cluster], groups: list[GroupPlan]) -> None:
    """Fed with the logged events, a new control plane decides the same, bit for bit, deaths included."""
    deaths = iter(["te-0"])

    def watch(event: ev.Event, actions: list[Action], cluster: Cluster) -> None:
        if isinstance(event, ev.FirstToken) and event.request_id >= 2 and (victim := next(deaths, None)):
            kill(cluster, victim)

    finished = run(make_cluster, workload(), groups, watch=watch)
    assert finished.of(ev.ExecutorFailed)
    header, *lines = finished.log.splitlines()
    assert msgspec.json.decode(header, type=LogHeader) == LogHeader()
    again = make_control(workload(), groups, None, 1)
    decisions = [msgspec.json.decode(line, type=Decision) for line in lines]
    assert [decision.event for decision in decisions] == finished.events
    actions: list[Action] = []
    for decision in decisions:
        now = again.on_event(decision.event)
        assert now == decision.actions
        actions += now
    assert sum(isinstance(action, LaunchExecutor) for action in actions) == 3
