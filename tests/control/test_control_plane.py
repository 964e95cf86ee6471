"""The control plane as a whole: its log reads back, replays bit for bit, and says who hears what."""

import io
from typing import Any, get_args

import msgspec
import numpy as np
import pytest

from cluster import actions as act
from cluster import events as ev
from cluster.actions import Action
from cluster.client import Client
from cluster.control import ControlPlane
from cluster.decision_log import LOG_SCHEMA, Decision, LogHeader
from cluster.events import Event
from cluster.job_executor import JobExecutor
from cluster.manager import ClusterManager, GroupPlan
from cluster.recorder import Recorder
from cluster.relay import relayed
from cluster.request import Answer, Arrival, KvSource, Task, Trigger
from cluster.streams import stream
from cluster.vocabulary import ExecutorState, FailureReason, Outcome, Role, Stage, TaskKind, to_ns
from cluster.work import Train, WorkTask
from policies.dispatch.least_outstanding import LeastOutstanding
from policies.scaling.fixed import Fixed
from sim.node import Failure
from tests.builders import (
    MODEL,
    Run,
    disaggregated,
    load_report,
    make_agent,
    make_arrival,
    make_request,
    make_spec,
    make_tuning,
    run_sim,
)

AT: dict[str, Any] = {"to": "je-0", "time": 2**60 + 1, "occurred": 7}
TASK: dict[str, Any] = {"request_id": 3, "task_id": (5 << 40) + 2, "executor": "te-1"}
REQUEST = make_request(3, ids=(1, 2**64 - 1))
AGENT = make_agent(3, [(20, 4), 0.5], [(40, 5)], ids=(1, 2**64 - 1))
TUNING = make_tuning(4, checkpoint_steps=2, evaluation=[(9, 2)])
LATE = 12_345

EVENTS: list[Event] = [
    ev.RunStarted(**AT),
    ev.FleetReady(**AT),
    ev.TimerFired(**AT, name="cancel:3"),
    ev.RequestArrived(**AT, request=REQUEST),
    ev.CancelRequested(**AT, request_id=3),
    ev.FirstToken(**AT, **TASK),
    ev.PrefillStarted(**AT, **TASK, kv_runs=(2, 1)),
    ev.TaskProgress(**AT, executor="te-1", generated=((1, 2), (3, 4))),
    ev.TaskFinished(
        **AT,
        **TASK,
        generated=9,
        stopped=True,
        tokens=3,
        last_token_ns=6,
        token_times=ev.pack_times((3, 4, 6)),
    ),
    ev.TaskFailed(**AT, **TASK, reason=FailureReason.KV_LOST, generated=4, detail="said “no”\n"),
    ev.TaskAborted(**AT, **TASK, generated=4),
    ev.RequestEnded(**AT, request_id=3, outcome=Outcome.REFUSED, generated=0, reason="full"),
    ev.StageFinished(**AT, executor="te-1", stage=Stage.TE_LOAD, took_ns=5),
    ev.ExecutorReady(
        **AT, executor="te-1", spec=make_spec(Role.DECODE, npus=4), kv_blocks=9, block_tokens=128, max_sequences=8
    ),
    ev.ExecutorAnnounced(
        **AT, executor="te-1", spec=make_spec(), state=ExecutorState.DRAINING, kv_blocks=9, max_sequences=8
    ),
    ev.NoCapacity(**AT, model=MODEL, reason="no NPUs"),
    load_report("te-1", 5, waiting=2, running=1, free=30),
    ev.DemandReported(**AT, job_executor="je-0", model=MODEL, parked=4),
    ev.ExecutorDrained(**AT, executor="te-1"),
    ev.RoleSwitched(**AT, executor="te-1", spec=make_spec(Role.DECODE)),
    ev.ExecutorRetired(**AT, executor="te-1"),
    ev.ExecutorFailed(**AT, executor="te-1", reason="signal 9"),
    ev.WorkArrived(**AT, request=AGENT.request),
    ev.CallArrived(**AT, request=REQUEST, caller="je-work"),
    ev.CallEnded(**AT, request_id=3, outcome=Outcome.FAILED, generated=2, reason="lost"),
    ev.WorkFinished(**AT, **TASK, started=5),
    ev.WorkFailed(**AT, **TASK, reason=FailureReason.EXECUTOR_LOST, detail="said “no”"),
    ev.WorkAborted(**AT, **TASK),
    ev.WorkEnded(**AT, request_id=3, outcome=Outcome.REFUSED, reason="no worker"),
]
"""One of every kind, with values that a careless encoding would lose."""

DISPATCHED = Task((5 << 40) + 2, REQUEST, TaskKind.DECODE, 1, KvSource("te-0", 1))

RELAYED: list[tuple[Action, Event]] = [
    (
        act.SubmitRequest("je-1", REQUEST, Answer(8, (1, 2))),
        ev.RequestArrived(to="je-1", time=LATE, occurred=LATE, request=REQUEST),
    ),
    (act.CancelRequest("je-1", 3), ev.CancelRequested(to="je-1", time=LATE, occurred=LATE, request_id=3)),
    (
        act.EndRequest(3, Outcome.FAILED, 4, "lost"),
        ev.RequestEnded(
            to="client", time=LATE, occurred=LATE, request_id=3, outcome=Outcome.FAILED, generated=4, reason="lost"
        ),
    ),
    (
        act.ReportDemand("je-0", MODEL, 6),
        ev.DemandReported(to="cm", time=LATE, occurred=LATE, job_executor="je-0", model=MODEL, parked=6),
    ),
    (
        act.AnnounceExecutor("je-1", "te-1", make_spec(Role.PREFILL), ExecutorState.GONE, 9, 8),
        ev.ExecutorAnnounced(
            to="je-1",
            time=LATE,
            occurred=LATE,
            executor="te-1",
            spec=make_spec(Role.PREFILL),
            state=ExecutorState.GONE,
            kv_blocks=9,
            max_sequences=8,
        ),
    ),
    (
        act.DeclareNoCapacity("je-1", MODEL, "no NPUs"),
        ev.NoCapacity(to="je-1", time=LATE, occurred=LATE, model=MODEL, reason="no NPUs"),
    ),
    (act.OpenDoors(), ev.FleetReady(to="client", time=LATE, occurred=LATE)),
    (
        act.SubmitWork("je-work", TUNING.request, TUNING.answer),
        ev.WorkArrived(to="je-work", time=LATE, occurred=LATE, request=TUNING.request),
    ),
    (
        act.SubmitCall("je-1", "je-work", REQUEST, 3, 0),
        ev.CallArrived(to="je-1", time=LATE, occurred=LATE, request=REQUEST, caller="je-work"),
    ),
    (
        act.EndCall("je-work", 3, Outcome.FINISHED, 4, ""),
        ev.CallEnded(to="je-work", time=LATE, occurred=LATE, request_id=3, outcome=Outcome.FINISHED, generated=4),
    ),
    (
        act.EndWork(3, Outcome.CANCELLED, ""),
        ev.WorkEnded(to="client", time=LATE, occurred=LATE, request_id=3, outcome=Outcome.CANCELLED),
    ),
]
"""Actions that are only messages, and what the addressed actor hears."""

PERFORMED: list[Action] = [
    act.SetTimer("client", "next", 2**60 + 1),
    act.DispatchTask("je-0", "te-1", DISPATCHED),
    act.AbortTask("te-1", 2),
    act.LaunchExecutor("te-1", make_spec()),
    act.DrainExecutor("te-1"),
    act.ReleaseKvContext("te-1", "t\x1fa\x1fdoc"),
    act.SwitchRole("te-1", Role.DECODE),
    act.RetireExecutor("te-1"),
    act.EndRun(),
    act.DispatchWork("je-work", "te-1", WorkTask(7, 3, Train(MODEL, 2, 100, 10, 0.5, False))),
]
"""Actions that executors, timers or the cluster itself have to carry out."""

ACTIONS = [*(action for action, _ in RELAYED), *PERFORMED]


def named(value: object) -> str:
    return type(value).__name__


# -- the log --------------------------------------------------------------------------------------------------------


def test_every_kind_of_event_and_action_is_here() -> None:
    """The lists of this module hold each kind once, so a new kind cannot go untested."""
    assert [type(event) for event in EVENTS] == list(get_args(Event))
    assert sorted(map(named, ACTIONS)) == sorted(kind.__name__ for kind in get_args(Action))


@pytest.mark.parametrize("event", EVENTS, ids=named)
def test_events_read_back(event: Event) -> None:
    """An event survives its line of the log, type and all."""
    decision = Decision(4, event, [])
    assert msgspec.json.decode(msgspec.json.encode(decision), type=Decision) == decision


@pytest.mark.parametrize("action", ACTIONS, ids=named)
def test_actions_read_back(action: Action) -> None:
    """An action survives its line of the log, type and all."""
    decision = Decision(0, EVENTS[0], [action, action])
    assert msgspec.json.decode(msgspec.json.encode(decision), type=Decision) == decision


def plane(workload: list[Arrival], groups: list[GroupPlan], number: int, seed: int) -> ControlPlane:
    """New actors, of the kind that `run_sim` makes."""
    names = tuple(f"je-{place}" for place in range(number))
    client = Client(workload, names, np.random.default_rng(seed), closed_loop=True)
    job_executors = [JobExecutor(name, place, LeastOutstanding()) for place, name in enumerate(names)]
    return ControlPlane(client, job_executors, ClusterManager(tuple(groups), Fixed(), names), Recorder())


def workload() -> list[Arrival]:
    """Timed and triggered requests, some of them given up."""
    timed = [
        make_arrival(n, 0.03 * n, output=5 + n % 7, cancel_after_s=0.05 if n % 5 == 0 else None) for n in range(30)
    ]
    after = Trigger("first_token", 3, delay_ns=to_ns(0.01))
    return [*timed, make_arrival(30, after=after), make_arrival(31, after=Trigger("ended", count=9))]


GROUPS = [*disaggregated(2, 2), GroupPlan(make_spec(), 1, 1, 2)]


@pytest.fixture(scope="module")
def run() -> Run:
    """One run with two job executors, both kinds of groups, lost executors and requests given up."""
    failures = [Failure(0.2, "te-0"), Failure(0.3, "te-2"), Failure(0.4, "te-4")]
    run = run_sim(workload(), groups=GROUPS, num_job_executors=2, failures=failures, seed=3)
    assert run.of(ev.TaskFailed) and run.of(ev.ExecutorFailed) and run.of(ev.TaskAborted)
    return run


@pytest.fixture(scope="module")
def log(run: Run) -> bytes:
    """Its decisions."""
    return run.log


def decisions(log: bytes) -> list[Decision]:
    return [msgspec.json.decode(line, type=Decision) for line in log.splitlines()[1:]]


def test_the_log_has_a_header_and_numbered_lines(log: bytes) -> None:
    """The schema comes first; then every decision, counted from 0."""
    assert msgspec.json.decode(log.splitlines()[0], type=LogHeader).schema == LOG_SCHEMA
    assert [decision.sequence for decision in decisions(log)] == list(range(len(log.splitlines()) - 1))


def test_a_log_replays_to_the_same_log(log: bytes) -> None:
    """New actors that hear the events read back take the same actions, and write the same bytes."""
    control, again = plane(workload(), GROUPS, 2, seed=3), io.BytesIO()
    control.log_to(again)
    for decision in decisions(log):
        assert control.on_event(decision.event) == decision.actions
    assert again.getvalue() == log


def test_a_log_of_another_seed_does_not_replay(log: bytes) -> None:
    """The replay would notice: with other draws requests go to other job executors."""
    control = plane(workload(), GROUPS, 2, seed=4)
    known = next(
        (decision.sequence, actions)
        for decision in decisions(log)
        if (actions := control.on_event(decision.event)) != decision.actions
    )
    assert any(isinstance(action, act.SubmitRequest) for action in known[1])


def test_a_first_token_is_heard_by_two() -> None:
    """The job executor first, then the client, whose actions are part of the same decision."""
    follow = make_arrival(1, after=Trigger("first_token", 0))
    control, log = plane([make_arrival(0), follow], [GroupPlan(make_spec(), 1, 1, 1)], 1, seed=0), io.BytesIO()
    control.log_to(log)
    start = {"time": 0, "occurred": 0}
    control.on_event(ev.FleetReady(to="client", **start))
    control.on_event(ev.TimerFired(to="client", **start, name="next"))
    control.on_event(ev.RequestArrived(to="je-0", **start, request=make_request(0)))
    first = ev.FirstToken(to="je-0", time=9, occurred=8, request_id=0, task_id=0, executor="te-0")
    expected = [act.SubmitRequest("je-0", follow.request, follow.answer)]
    assert control.on_event(first) == expected
    assert decisions(log.getvalue())[-1] == Decision(3, first, list(expected))


def test_an_event_for_nobody_is_an_error() -> None:
    """An event addressed to an actor that this run does not have is not dropped."""
    control = plane([], [GroupPlan(make_spec(), 1, 1, 1)], 1, seed=0)
    with pytest.raises(KeyError, match="je-7"):
        control.on_event(ev.RunStarted(to="je-7", time=0, occurred=0))


def test_the_books_are_empty_at_the_end(run: Run) -> None:
    """Whatever was lost, aborted or tried again: no task or queued token stays on any executor's account."""
    for job_executor in run.control.job_executors:
        assert job_executor.open_jobs == 0
        assert sum(map(len, job_executor.fleet)) == len(run.executors)
        for group in job_executor.fleet:
            assert not group.outstanding.any() and not group.queued_tokens.any()


# -- messages -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("action", "heard"), RELAYED, ids=lambda value: named(value))
def test_messages_are_relayed(action: Action, heard: Event) -> None:
    """A message reaches its actor when it was sent, with all it says; an answer stays hidden from schedulers."""
    assert relayed(action, LATE) == heard


@pytest.mark.parametrize("action", PERFORMED, ids=named)
def test_what_has_to_be_done_is_not_a_message(action: Action) -> None:
    """What an executor, a timer or the cluster must carry out is not relayed."""
    assert relayed(action, LATE) is None


# -- random streams -------------------------------------------------------------------------------------------------


def test_a_stream_is_a_function_of_seed_and_name() -> None:
    """Equal seed and name give equal draws; another seed or another name gives others."""
    draws = stream(7, "client").random(8).tolist()
    assert stream(7, "client").random(8).tolist() == draws
    for seed, name in ((8, "client"), (7, "clients"), (7, "")):
        assert stream(seed, name).random(8).tolist() != draws


def test_streams_of_one_seed_are_independent() -> None:
    """Draws from one do not move another, and the two are not correlated."""
    alone = stream(7, "a").random(20_000)
    first, second = stream(7, "a"), stream(7, "b")
    mixed = np.empty(20_000)
    other = np.empty(20_000)
    for start in range(0, 20_000, 100):
        mixed[start : start + 100] = first.random(100)
        other[start : start + 100] = second.random(100)
    assert np.array_equal(mixed, alone)
    assert abs(np.corrcoef(mixed, other)[0, 1]) < 0.03


def test_a_negative_seed_is_refused() -> None:
    """The error names the seed and what is allowed."""
    with pytest.raises(ValueError, match="seed is -1: allowed is a whole number from 0 up"):
        stream(-1, "client")
