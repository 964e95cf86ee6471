"""The client: sends the requests of a workload when they are due, and knows when nothing is left to do.

Sans I/O like every actor, so open and closed loop arrivals are the same code on both backends. How late a real run
was with a request is the difference of `RequestArrived.occurred` and the time in the workload (see metrics).
"""

from array import array
from collections.abc import Callable, Iterable, Iterator
from itertools import dropwhile
from typing import Any, Final, Protocol

import numpy as np

from cluster import events as ev
from cluster.actions import Action, CancelRequest, EndRun, SetTimer, SubmitRequest, SubmitWork
from cluster.request import Trigger
from cluster.work import WORK, AnyArrival, WorkArrival

_NEXT = "next"


class ClientActor(Protocol):
    """What sends requests, as the control plane and its records know it. `due`: when each open one was to come, ns."""

    name: str
    due: dict[int, int]

    def on_event(self, event: ev.Event) -> list[Action]: ...


class Client:
    """Reads a workload in order, one timed arrival ahead; arrivals with a trigger wait for their cue.

    Times in the workload count from the start: with `wait_for_fleet` that is when the first executors are ready, so
    that a run measures serving and not the start of its first executors. `closed_loop`: the workload has triggers
    that name requests, so the ends of all requests are remembered. `takes_work`: the run has a job executor for work
    other than serving.
    """

    name = "client"

    def __init__(
        self,
        workload: Iterable[AnyArrival],
        job_executors: tuple[str, ...],
        rng: np.random.Generator,
        closed_loop: bool = False,
        wait_for_fleet: bool = True,
        takes_work: bool = True,
    ) -> None:
        self._workload: Iterator[AnyArrival] = iter(workload)
        self._job_executors = job_executors
        self._rng = rng
        self._closed_loop = closed_loop
        self._wait_for_fleet = wait_for_fleet
        self._takes_work = takes_work
        self._start_ns = 0
        self._next: AnyArrival | None = None
        self._exhausted = False
        self._last_id = -(1 << 63)
        self._delayed: dict[str, AnyArrival] = {}
        self._cued: dict[tuple[str, int], list[AnyArrival]] = {}
        self._counted: dict[tuple[str, int], list[AnyArrival]] = {}
        self._times = {"first_token": array("q"), "ended": array("q")}
        self._past: dict[tuple[str, int], int] = {}
        self._open: dict[int, str] = {}
        self.due: dict[int, int] = {}
        """When each open request was to arrive, in ns; read by the recorder."""

    def on_event(self, event: ev.Event) -> list[Action]:
        """The actions this event calls for."""
        handler = _HANDLERS.get(type(event))
        return [] if handler is None else handler(self, event)

    def _run_started(self, event: ev.RunStarted) -> list[Action]:
        return [] if self._wait_for_fleet else self._read_on()

    def _fleet_ready(self, event: ev.FleetReady) -> list[Action]:
        self._start_ns = event.time
        return self._read_on() if self._wait_for_fleet else []

    def _first_token(self, event: ev.FirstToken) -> list[Action]:
        """Of a job's call it is not the client's."""
        return self._cue("first_token", event.request_id, event.time) if event.request_id in self._open else []

    def _ended(self, event: ev.RequestEnded | ev.WorkEnded) -> list[Action]:
        del self._open[event.request_id]
        del self.due[event.request_id]
        return [*self._cue("ended", event.request_id, event.time), *self._end_if_done()]

    def resume(self, workload: Iterable[AnyArrival]) -> None:
        """Go on where this client was when it was pickled; of the same workload, what it has read is passed over."""
        self._workload = dropwhile(self._has_read, workload)

    def _has_read(self, arrival: AnyArrival) -> bool:
        return arrival.request.request_id <= self._last_id

    def take_workload(self) -> Iterator[AnyArrival]:
        """What is still to be read, until `give_workload`."""
        workload, self._workload = self._workload, iter(())
        return workload

    def give_workload(self, workload: Iterator[AnyArrival]) -> None:
        """Undo `take_workload`."""
        self._workload = workload

    @property
    def start_ns(self) -> int:
        """When the times of the workload begin."""
        return self._start_ns

    def _timer(self, event: ev.TimerFired) -> list[Action]:
        if event.name == _NEXT:
            arrival, self._next = self._next, None
            assert arrival is not None
            return [*self._submit(arrival, self._start_ns + arrival.at_ns), *self._read_on()]
        kind, _, request_id = event.name.partition(":")
        if kind == "cancel":
            target = self._open.get(int(request_id))
            return [] if target is None else [CancelRequest(target, int(request_id))]
        arrival = self._delayed.pop(event.name)
        return self._submit(arrival, event.time)

    def _submit(self, arrival: AnyArrival, due: int) -> list[Action]:
        number = arrival.request.request_id
        if isinstance(arrival, WorkArrival):
            self._check_work(arrival)
            to = WORK
            action: Action = SubmitWork(to, arrival.request, arrival.answer)
        else:
            among = self._job_executors
            to = among[0] if len(among) == 1 else among[int(self._rng.integers(len(among)))]
            action = SubmitRequest(to, arrival.request, arrival.answer)
        self._open[number] = to
        self.due[number] = due
        if arrival.cancel_after_ns is None:
            return [action]
        return [action, SetTimer(self.name, f"cancel:{number}", due + arrival.cancel_after_ns)]

    def _check_work(self, arrival: WorkArrival) -> None:
        if not self._takes_work:
            raise ValueError(
                f"request {arrival.request.request_id} of the workload asks for {type(arrival.request.work).__name__}, "
                "but nothing here runs that: give fleet.groups executors of role cpu (for tools and data) and training"
            )

    def _read_on(self) -> list[Action]:
        """Read up to and with the next timed arrival; arrivals with a trigger start to wait."""
        actions: list[Action] = []
        for arrival in self._workload:
            if arrival.request.request_id <= self._last_id:
                raise ValueError(
                    f"request id {arrival.request.request_id} comes after {self._last_id} in the workload: "
                    "ids must rise from request to request"
                )
            self._last_id = arrival.request.request_id
            if arrival.after is None:
                self._next = arrival
                return [*actions, SetTimer(self.name, _NEXT, self._start_ns + arrival.at_ns)]
            actions += self._await(arrival, arrival.after)
        self._exhausted = True
        return [*actions, *self._end_if_done()]

    def _await(self, arrival: AnyArrival, trigger: Trigger) -> list[Action]:
        if trigger.request_id is not None:
            past = self._past.get((trigger.event, trigger.request_id))
            if past is not None:
                return [self._delay(arrival, past + trigger.delay_ns)]
            self._cued.setdefault((trigger.event, trigger.request_id), []).append(arrival)
            return []
        assert trigger.count is not None
        times = self._times[trigger.event]
        if len(times) >= trigger.count:
            past = times[trigger.count - 1] if trigger.count else self._start_ns
            return [self._delay(arrival, past + trigger.delay_ns)]
        self._counted.setdefault((trigger.event, trigger.count), []).append(arrival)
        return []

    def _cue(self, kind: str, request_id: int, now: int) -> list[Action]:
        self._times[kind].append(now)
        if self._closed_loop:
            self._past[kind, request_id] = now
        if not self._cued and not self._counted:
            return []
        due = self._cued.pop((kind, request_id), []) + self._counted.pop((kind, len(self._times[kind])), [])
        actions: list[Action] = []
        for arrival in due:
            assert arrival.after is not None
            if arrival.after.delay_ns:
                actions.append(self._delay(arrival, now + arrival.after.delay_ns))
            else:
                actions += self._submit(arrival, now)
        return actions

    def _delay(self, arrival: AnyArrival, at: int) -> SetTimer:
        name = f"delayed:{arrival.request.request_id}"
        self._delayed[name] = arrival
        return SetTimer(self.name, name, at)

    def _end_if_done(self) -> list[Action]:
        """Over when every request ended and none can come: what still waits for a cue then will never get it."""
        if self._exhausted and not self._open and not self._delayed and self._next is None:
            return [EndRun()]
        return []

    @property
    def never_sent(self) -> int:
        """Arrivals whose trigger did not happen."""
        return sum(map(len, self._cued.values())) + sum(map(len, self._counted.values()))


_HANDLERS: Final[dict[type, Callable[[Client, Any], list[Action]]]] = {
    ev.RunStarted: Client._run_started,
    ev.FleetReady: Client._fleet_ready,
    ev.TimerFired: Client._timer,
    ev.FirstToken: Client._first_token,
    ev.RequestEnded: Client._ended,
    ev.WorkEnded: Client._ended,
}
