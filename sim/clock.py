"""SimPy's environment, with timeouts that cost less and can be cancelled."""

from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count
from typing import Any

import simpy
from simpy.core import EmptySchedule
from simpy.events import NORMAL, EventPriority

NEVER = float("inf")


class Alarm:
    """Calls something when it is due, unless it is cancelled. `callback`: None afterwards."""

    __slots__ = ("callback",)

    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None


class Clock(simpy.Environment):
    """Time in integer ns. Alarms stand in SimPy's own queue, by (time, priority, insertion) like its events."""

    now: int = 0

    def alarm(self, delay: int, callback: Callable[[], None], priority: EventPriority = NORMAL) -> Alarm:
        """Have `callback` called in `delay` ns."""
        alarm = Alarm(callback)
        queue: list[Any] = self._queue
        heappush(queue, (self.now + delay, priority, next(self._eid), alarm))
        return alarm

    def schedule(self, event: simpy.Event, priority: EventPriority = NORMAL, delay: float = 0) -> None:
        """SimPy's own, by this clock's time."""
        heappush(self._queue, (self.now + delay, priority, next(self._eid), event))

    def peek(self) -> float:
        """When the next event is due; infinity: there is none."""
        queue: list[Any] = self._queue
        return NEVER if not queue else queue[0][0]

    def step(self) -> None:
        """Process the next event. EmptySchedule: there is none."""
        queue: list[Any] = self._queue
        if not queue:
            raise EmptySchedule
        if type(queue[0][3]) is not Alarm:
            self.now = queue[0][0]
            super().step()
            return
        time, _, _, alarm = heappop(queue)
        self.now = time
        callback, alarm.callback = alarm.callback, None  # whoever keeps the alarm makes no cycle with it
        if callback is not None:
            callback()

    def __getstate__(self) -> dict[str, object]:
        """Without the classes that SimPy binds to itself."""
        following = next(self._eid)
        self._eid = count(following)
        return {"now": self.now, "_queue": self._queue, "_eid": count(following)}

    def __setstate__(self, state: dict[str, object]) -> None:
        super().__init__()
        self.__dict__.update(state)
