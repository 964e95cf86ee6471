"""Simulated time: SimPy's environment in integer ns, with timeouts that cost less and can be cancelled."""

from collections.abc import Callable, Iterator
from heapq import heappop, heappush
from itertools import count
from typing import Any

import simpy
from simpy.core import EmptySchedule
from simpy.events import NORMAL, URGENT, EventPriority


class Alarm:
    """Calls something when it is due, unless it is cancelled. `callback`: None afterwards."""

    __slots__ = ("callback",)

    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None


class Clock:
    """Alarms stand in the queue of `env`, by (time, priority, insertion) like SimPy's own events. `now`: in ns."""

    def __init__(self) -> None:
        self.now = 0
        self.env = simpy.Environment()
        self._queue: list[Any] = self.env._queue
        self._numbers: Iterator[int] = self.env._eid

    def alarm(self, delay: int, callback: Callable[[], None], priority: EventPriority = NORMAL) -> Alarm:
        """Have `callback` called in `delay` ns."""
        alarm = Alarm(callback)
        heappush(self._queue, (self.now + delay, priority, next(self._numbers), alarm))
        return alarm

    def is_due(self) -> bool:
        """Whether anything is left to happen at this time."""
        queue = self._queue
        return bool(queue) and queue[0][0] == self.now

    @property
    def next_ns(self) -> int | None:
        """When the next event is due; None: there is none."""
        return self._queue[0][0] if self._queue else None

    def step(self) -> None:
        """Process the next event. EmptySchedule: there is none."""
        queue = self._queue
        if not queue:
            raise EmptySchedule
        entry = heappop(queue)
        alarm = entry[3]
        self.now = self.env._now = entry[0]
        if type(alarm) is not Alarm:
            heappush(queue, entry)
            self.env.step()
            return
        callback, alarm.callback = alarm.callback, None  # whoever keeps the alarm makes no cycle with it
        if callback is not None:
            callback()

    def run_until(self, time: int) -> None:
        """Process all that happens before `time`, and what comes ahead of everything else then."""
        queue = self._queue
        while queue:
            due: int = queue[0][0]
            if due > time or (due == time and queue[0][1] >= URGENT):
                break
            self.step()
        self.now = self.env._now = time

    def __getstate__(self) -> dict[str, Any]:
        """Without the environment, which binds SimPy's classes to itself."""
        following = next(self._numbers)
        self.env._eid = self._numbers = count(following)
        return {"now": self.now, "queue": self._queue, "following": following}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.now = state["now"]
        self.env = simpy.Environment(self.now)
        self.env._queue = self._queue = state["queue"]
        self.env._eid = self._numbers = count(state["following"])
