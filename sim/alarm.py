"""Something that is due at a time: SimPy's timeout without the detour through its base class."""

from collections.abc import Callable

import simpy
from simpy.events import NORMAL, EventPriority

__all__ = ["NORMAL", "Alarm"]


class Alarm(simpy.Event):
    """Calls `callback` in `delay` ns, in order of (time, priority, insertion) with all other events."""

    def __init__(
        self, env: simpy.Environment, delay: int, priority: EventPriority, callback: Callable[[simpy.Event], None]
    ) -> None:
        self.env = env
        self.callbacks = [callback]
        self._ok = True
        self._value = None
        env.schedule(self, priority, delay)
