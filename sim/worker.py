"""One simulated worker: the real TE-shell and slots, with SimPy's time where the work would be."""

from collections.abc import Callable
from functools import partial

from flowserve.core.messages import Message
from flowserve.core.outbox import Outbox
from flowserve.core.worker import Worker
from sim.clock import Clock


class SimWorker:
    """Runs one worker in simulated time. `deliver`: called with what it says."""

    def __init__(self, clock: Clock, worker: Worker, deliver: Callable[[Outbox], None]) -> None:
        self.worker = worker
        self.dead = False
        self._clock = clock
        self._deliver = deliver
        self._reporting: int | None = None

    def receive(self, message: Message) -> None:
        """A message reaches the worker."""
        self.worker.receive(message, self._now)
        self._go_on()

    def kill(self) -> None:
        """Stop in the middle of whatever it does."""
        self.dead = True

    @property
    def _now(self) -> int:
        return self._clock.now

    def _go_on(self) -> None:
        for task_id, end in self.worker.start(self._now):
            self._at(end, partial(self._finish, task_id))
        due = self.worker.shell.report_due
        if due is not None and self._reporting is None:
            self._reporting = max(due, self._now)
            self._at(self._reporting, self._report)
        outbox = self.worker.outbox()
        if outbox:
            self._deliver(outbox)

    def _finish(self, task_id: int) -> None:
        if not self.dead:
            self.worker.finish(task_id, self._now)
            self._go_on()

    def _report(self) -> None:
        self._reporting = None
        if not self.dead:
            self.worker.shell.report(self._now)
            self._go_on()

    def _at(self, time: int, action: Callable[[], None]) -> None:
        self._clock.alarm(time - self._now, action)
