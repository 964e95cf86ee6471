"""The seam itself, on both backends: start, timers, messages between actors, the end."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster import events as ev
from cluster.actions import (
    AnnounceExecutor,
    CancelRequest,
    DeclareNoCapacity,
    EndRequest,
    EndRun,
    LaunchExecutor,
    OpenDoors,
    ReportDemand,
    SetTimer,
    SubmitRequest,
)
from cluster.request import Answer
from cluster.seam import Cluster
from cluster.vocabulary import ExecutorState, Outcome, Role, to_ns
from tests.builders import MODEL, make_request, make_spec
from tests.contract.backends import ACTORS, Driver, present

Maker = Callable[..., Cluster]


def test_every_actor_hears_of_the_start_first(make_cluster: Maker) -> None:
    """The first event of each actor is RunStarted, at time 0, in the order of the actors."""
    actors = ("client", "je-0", "je-1", "cm")
    with make_cluster(actors=actors) as cluster:
        started = [cluster.next_event() for _ in actors]
    assert [type(event) for event in started] == [ev.RunStarted] * len(actors)
    assert [event.to for event in started if event] == list(actors)
    assert [event.occurred for event in started if event] == [0] * len(actors)
    # A real clock does not stand still while they are delivered.
    assert started[0] is not None
    assert started[0].time < to_ns(1)


def test_timers_fire_in_order_and_never_early(driver: Driver) -> None:
    """Timers fire at or after their time, by time, those of one time in the order they were set."""
    base = to_ns(0.05)
    times = {"d": base + to_ns(0.02), "a": base, "b": base, "c": base + to_ns(0.01)}
    driver.submit(*(SetTimer("je", name, at) for name, at in times.items()))
    fired = [driver.wait(ev.TimerFired, to="je") for _ in times]
    assert [event.name for event in fired] == ["a", "b", "c", "d"]
    assert [event.occurred for event in fired] == sorted(times.values())
    assert all(event.time >= times[event.name] for event in fired)


def test_past_timers_fire_at_once(driver: Driver) -> None:
    """A timer whose time has passed fires next, and does not claim to have been due in the future."""
    driver.pause(0.2)
    driver.submit(SetTimer("je", "never was", -5), SetTimer("je", "long ago", 0), SetTimer("je", "past", driver.now))
    fired = [driver.read() for _ in range(3)]
    assert [event.name for event in fired if isinstance(event, ev.TimerFired)] == ["never was", "long ago", "past"]
    driver.submit(SetTimer("je", "future", driver.now + to_ns(0.02)), SetTimer("je", "now", 0))
    assert driver.wait(ev.TimerFired, to="je", name="now").time < driver.wait(ev.TimerFired, name="future").time


def test_messages_between_actors(driver: Driver) -> None:
    """What one actor tells another arrives as the event the action names, complete, once, in order."""
    request, spec = make_request(7), make_spec(Role.PREFILL)
    driver.submit(
        SubmitRequest("je", request, Answer(3)),
        CancelRequest("je", 7),
        ReportDemand("je-0", MODEL, 4),
        AnnounceExecutor("je", "te-9", spec, ExecutorState.DRAINING, 100, 8),
        DeclareNoCapacity("je", MODEL, "why"),
        OpenDoors(),
        EndRequest(7, Outcome.CANCELLED, 2, "because"),
    )
    driver.pause(0.2)
    heard = [event for event in driver.events if not isinstance(event, ev.RunStarted | ev.TimerFired)]
    assert [(type(event), event.to) for event in heard] == [
        (ev.RequestArrived, "je"),
        (ev.CancelRequested, "je"),
        (ev.DemandReported, "cm"),
        (ev.ExecutorAnnounced, "je"),
        (ev.NoCapacity, "je"),
        (ev.FleetReady, "client"),
        (ev.RequestEnded, "client"),
    ]
    arrived, cancelled, demand, announced, no_capacity, _, ended = heard
    assert isinstance(arrived, ev.RequestArrived)
    assert arrived.request == request
    assert isinstance(cancelled, ev.CancelRequested)
    assert cancelled.request_id == 7
    assert isinstance(demand, ev.DemandReported)
    assert (demand.model, demand.parked) == (MODEL, 4)
    assert isinstance(announced, ev.ExecutorAnnounced)
    assert (announced.executor, announced.spec, announced.state) == ("te-9", spec, ExecutorState.DRAINING)
    assert (announced.kv_blocks, announced.max_sequences) == (100, 8)
    assert isinstance(no_capacity, ev.NoCapacity)
    assert (no_capacity.model, no_capacity.reason) == (MODEL, "why")
    assert isinstance(ended, ev.RequestEnded)
    assert (ended.request_id, ended.outcome, ended.generated, ended.reason) == (7, Outcome.CANCELLED, 2, "because")


def test_an_ended_run_has_no_events(driver: Driver) -> None:
    """After EndRun the next event is None for ever, whatever is still under way."""
    driver.launch("te-0")
    driver.dispatch("te-0", driver.open(0, output=5000), 0)
    driver.wait(ev.FirstToken)
    driver.submit(SetTimer("je", "too late", 0), EndRun(), ReportDemand("je-0", MODEL, 1))
    assert [driver.cluster.next_event() for _ in range(3)] == [None] * 3


def test_closing_ends_the_run(make_cluster: Maker) -> None:
    """A closed cluster has no events, and may be closed again."""
    with make_cluster() as cluster:
        driver = Driver(cluster)
        driver.launch("te-0")
    assert cluster.next_event() is None
    cluster.close()
    assert cluster.next_event() is None
    assert present(cluster) == set()


def test_closing_an_unused_cluster(make_cluster: Maker) -> None:
    """A cluster that nobody used can be closed, with or without a `with` block."""
    cluster = make_cluster()
    cluster.close()
    cluster.close()
    assert cluster.next_event() is None


@pytest.mark.parametrize("busy", [False, True], ids=["launching", "serving"])
def test_an_exception_leaves_nothing_behind(
    make_cluster: Maker, busy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception in the with block passes through, and takes executors and temporary files with it."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    cluster = make_cluster()

    def fail() -> None:
        with cluster:
            driver = Driver(cluster)
            if busy:
                driver.launch("te-0")
                driver.dispatch("te-0", driver.open(0, output=5000), 0)
                driver.wait(ev.FirstToken)
            else:
                driver.submit(LaunchExecutor("te-0", make_spec()))
                driver.read()
            raise RuntimeError("out of the middle")

    with pytest.raises(RuntimeError, match="out of the middle"):
        fail()
    assert present(cluster) == set()
    assert list(tmp_path.iterdir()) == []


def test_actors_of_the_tests_are_known(driver: Driver) -> None:
    """Events are addressed to actors named at construction only."""
    driver.launch("te-0")
    driver.serve("te-0", 0, 0)
    driver.pause(0.1)
    assert {event.to for event in driver.events} == set(ACTORS)
