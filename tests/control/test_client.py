"""The client: when each request of a workload is sent, and when the run is over."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster import events as ev
from cluster.actions import Action, CancelRequest, EndRun, SetTimer, SubmitRequest
from cluster.client import Client
from cluster.request import Arrival, Trigger
from cluster.vocabulary import Outcome, to_ns
from tests.builders import make_arrival, run_sim


class World:
    """Timers and requests of one client, played out: every request is answered `first_s` and `end_s` after it came."""

    def __init__(
        self,
        workload: list[Arrival],
        first_s: float = 1.0,
        end_s: float = 2.0,
        job_executors: tuple[str, ...] = ("je-0",),
        closed_loop: bool = True,
        wait_for_fleet: bool = False,
        fleet_at_s: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.client = Client(workload, job_executors, np.random.default_rng(seed), closed_loop, wait_for_fleet)
        self._first, self._end = to_ns(first_s), to_ns(end_s)
        self._queue: list[tuple[int, int, ev.Event]] = []
        self._pushed = 0
        self.sent: dict[int, int] = {}
        self.due: dict[int, int] = {}
        self.targets: dict[int, str] = {}
        self.cancelled: dict[int, int] = {}
        self.ends: list[int] = []
        self.push(ev.RunStarted(to="client", time=0, occurred=0))
        at = to_ns(fleet_at_s)
        self.push(ev.FleetReady(to="client", time=at, occurred=at))

    def push(self, event: ev.Event) -> None:
        self._queue.append((event.time, self._pushed, event))
        self._pushed += 1

    def run(self) -> "World":
        while self._queue:
            self._queue.sort(key=lambda entry: entry[:2])
            now, _, event = self._queue.pop(0)
            for action in self.client.on_event(event):
                self.perform(action, now)
        return self

    def perform(self, action: Action, now: int) -> None:
        match action:
            case SetTimer():
                at = max(now, action.at_ns)
                self.push(ev.TimerFired(to="client", time=at, occurred=at, name=action.name))
            case SubmitRequest():
                number = action.request.request_id
                assert number not in self.sent, "sent twice"
                self.sent[number], self.due[number] = now, self.client.due[number]
                self.targets[number] = action.job_executor
                first, end = now + self._first, now + self._end
                self.push(
                    ev.FirstToken(
                        to="je-0", time=first, occurred=first, request_id=number, task_id=number, executor="te-0"
                    )
                )
                self.push(self.ended(number, end))
            case CancelRequest():
                assert action.job_executor == self.targets[action.request_id]
                self.cancelled[action.request_id] = now
            case EndRun():
                self.ends.append(now)
            case _:
                raise AssertionError(action)

    @staticmethod
    def ended(number: int, time: int) -> ev.RequestEnded:
        return ev.RequestEnded(
            to="client", time=time, occurred=time, request_id=number, outcome=Outcome.FINISHED, generated=1
        )


def seconds(times: dict[int, int]) -> dict[int, float]:
    return {number: time / 1e9 for number, time in times.items()}


# -- open loop ------------------------------------------------------------------------------------------------------


def test_timed_requests_are_sent_when_they_are_due() -> None:
    """In order, at their times, ties in the order of the workload; the run ends with the last answer."""
    world = World([make_arrival(n, at_s=at) for n, at in ((1, 0.0), (3, 0.5), (5, 0.5), (7, 4.0))]).run()
    assert seconds(world.sent) == {1: 0.0, 3: 0.5, 5: 0.5, 7: 4.0}
    assert list(world.sent) == [1, 3, 5, 7]
    assert world.due == world.sent
    assert world.ends == [to_ns(6.0)]


def test_a_workload_is_read_one_timed_request_ahead() -> None:
    """A trace of any length is not read into memory: what is due later stays in the reader."""
    read = []

    def workload() -> "object":
        for number in range(5):
            read.append(number)
            yield make_arrival(number, at_s=float(number))

    client = Client(workload(), ("je-0",), np.random.default_rng(0), wait_for_fleet=False)  # type: ignore[arg-type]
    client.on_event(ev.RunStarted(to="client", time=0, occurred=0))
    assert read == [0]
    client.on_event(ev.TimerFired(to="client", time=0, occurred=0, name="next"))
    assert read == [0, 1]


def test_the_clock_starts_with_the_fleet() -> None:
    """A client that waits for the first executors counts its times from when they are ready."""
    workload = [make_arrival(0, at_s=1.0), make_arrival(1, at_s=2.5)]
    waiting = World(workload, wait_for_fleet=True, fleet_at_s=10.0).run()
    assert seconds(waiting.sent) == {0: 11.0, 1: 12.5}
    assert waiting.due == waiting.sent
    assert seconds(World(workload, fleet_at_s=10.0).run().sent) == {0: 1.0, 1: 2.5}


def test_an_empty_workload_ends_at_once() -> None:
    """Nothing to send is nothing to wait for."""
    assert World([]).run().ends == [0]
    assert World([], wait_for_fleet=True, fleet_at_s=3.0).run().ends == [to_ns(3.0)]


def test_requests_are_spread_over_job_executors() -> None:
    """With several job executors each gets its share, drawn from the generator that was passed in."""
    names = ("je-0", "je-1", "je-2")
    workload = [make_arrival(n, at_s=0.1 * n) for n in range(300)]
    targets = World(workload, job_executors=names).run().targets
    assert all(70 < list(targets.values()).count(name) < 130 for name in names)
    assert targets == World(workload, job_executors=names).run().targets
    assert targets != World(workload, job_executors=names, seed=1).run().targets


# -- closed loop ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("event", "after"), [("first_token", 1.0), ("ended", 2.0)])
@pytest.mark.parametrize("delay_s", [0.0, 0.7])
@pytest.mark.parametrize("by_count", [True, False])
def test_triggers(event: str, after: float, delay_s: float, by_count: bool) -> None:
    """A request comes a think time after another, or the n-th, got its first token or its end."""
    trigger = Trigger(event, None if by_count else 0, 1 if by_count else None, to_ns(delay_s))  # type: ignore[arg-type]
    world = World([make_arrival(0, at_s=3.0), make_arrival(1, after=trigger)]).run()
    assert seconds(world.sent) == pytest.approx({0: 3.0, 1: 3.0 + after + delay_s})
    assert world.due == world.sent
    assert world.ends == [world.sent[1] + to_ns(2.0)]


def test_the_count_of_all_requests_triggers() -> None:
    """The n-th end of any request is the cue, whichever it is, and one cue may call several."""
    workload = [make_arrival(n, at_s=float(n)) for n in range(3)]
    workload += [make_arrival(3 + n, after=Trigger("ended", count=2)) for n in range(2)]
    assert seconds(World(workload).run().sent) == {0: 0.0, 1: 1.0, 2: 2.0, 3: 3.0, 4: 3.0}


@pytest.mark.parametrize("by_count", [True, False])
def test_a_cue_that_was_before_the_request_was_read(by_count: bool) -> None:
    """The think time counts from the cue: what is past comes at once, what is not yet due comes when it is."""
    for delay_s, at in ((0.5, 10.0), (20.0, 22.0)):
        trigger = Trigger("ended", None if by_count else 0, 1 if by_count else None, to_ns(delay_s))
        workload = [make_arrival(0), make_arrival(1, at_s=10.0), make_arrival(2, after=trigger)]
        world = World(workload).run()
        assert seconds(world.sent) == {0: 0.0, 1: 10.0, 2: at}
        assert len(world.ends) == 1


def test_a_session_is_a_chain_of_triggers() -> None:
    """Each turn comes after the one before; the run ends with the last."""
    turns = [make_arrival(0)] + [
        make_arrival(n, after=Trigger("ended", n - 1, delay_ns=to_ns(1.5))) for n in range(1, 5)
    ]
    world = World(turns).run()
    assert seconds(world.sent) == {n: 3.5 * n for n in range(5)}
    assert world.ends == [to_ns(3.5 * 4 + 2.0)]


def test_what_waits_for_what_never_happens_is_never_sent() -> None:
    """The run ends without it, and it is counted."""
    workload = [
        make_arrival(0),
        make_arrival(1, after=Trigger("ended", 77)),
        make_arrival(2, after=Trigger("ended", count=9)),
    ]
    world = World(workload).run()
    assert list(world.sent) == [0]
    assert world.ends == [to_ns(2.0)]
    assert world.client.never_sent == 2


@given(
    rows=st.lists(
        st.tuples(
            st.sampled_from([0, 0, 5, 1000]),
            st.none() | st.tuples(st.sampled_from(["first_token", "ended"]), st.booleans(), st.integers(0, 8)),
            st.sampled_from([0, 0, 300]),
            st.none() | st.sampled_from([0, 500, 5000]),
        ),
        max_size=10,
    )
)
def test_the_run_ends_once_when_all_is_answered(rows: list[tuple]) -> None:  # type: ignore[type-arg]
    """Whatever waits for whatever: everything sent is answered before the one end, and the rest is counted."""
    workload, at = [], 0.0
    for number, (gap_ms, cue, delay_ms, cancel_ms) in enumerate(rows):
        at += gap_ms / 1000
        after = None
        if cue is not None:
            event, by_count, target = cue
            after = Trigger(event, None if by_count else target, target + 1 if by_count else None, delay_ms * 10**6)
        workload.append(
            make_arrival(number, at_s=at, after=after, cancel_after_s=None if cancel_ms is None else cancel_ms / 1000)
        )
    world = World(workload).run()
    assert len(world.ends) == 1
    assert world.ends[0] == max((sent + to_ns(2.0) for sent in world.sent.values()), default=0)
    assert len(world.sent) + world.client.never_sent == len(workload)
    assert world.client.due == {}
    for arrival in workload:
        number = arrival.request.request_id
        cancel = arrival.cancel_after_ns
        expected = cancel is not None and number in world.sent and cancel < to_ns(2.0)
        assert (number in world.cancelled) == expected
        if expected:
            assert cancel is not None
            assert world.cancelled[number] == world.sent[number] + cancel
        if number in world.sent and arrival.after is None:
            assert world.sent[number] == arrival.at_ns


# -- cancellation and errors ----------------------------------------------------------------------------------------


def test_patience_ends() -> None:
    """A request is given up so long after it was due, unless it has ended before."""
    workload = [make_arrival(0, at_s=1.0, cancel_after_s=1.5), make_arrival(1, at_s=1.0, cancel_after_s=2.5)]
    world = World(workload).run()
    assert seconds(world.cancelled) == {0: 2.5}


@pytest.mark.parametrize("second", [4, 3])
def test_ids_must_rise(second: int) -> None:
    """A number that was used, or that is out of order, is refused, even if the first request has ended long since."""
    with pytest.raises(ValueError, match=f"request id {second} comes after 4"):
        World([make_arrival(4), make_arrival(second, at_s=500.0)]).run()


@pytest.mark.parametrize("names", [{}, {"request_id": 0, "count": 1}])
def test_a_trigger_names_one_cue(names: dict[str, int]) -> None:
    """A request waits for one request or for a count of them, not for both and not for nothing."""
    with pytest.raises(ValueError, match="a trigger names a request_id or a count"):
        Trigger("ended", **names)


def test_a_first_token_is_heard_through_the_control_plane() -> None:
    """In a whole run too, a request that waits for another's first token comes in the middle of its answer."""
    workload = [
        make_arrival(0, output=20),
        make_arrival(1, output=2, after=Trigger("first_token", 0, delay_ns=25_000_000)),
    ]
    rows = run_sim(workload).rows
    assert rows[1]["arrival_ns"] == rows[0]["first_token_ns"] + 25_000_000
    assert rows[1]["arrival_ns"] < rows[0]["last_token_ns"]
