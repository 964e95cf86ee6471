"""A worker: a TE-shell in front of slots that run timed tasks. What executors for work other than serving are inside.

Sans I/O: the simulator and the process of a real worker run the same object, and only pass the time differently.
"""

from typing import NamedTuple

from cluster.events import WorkAborted, WorkFailed, WorkFinished
from cluster.identity import BlockIds
from cluster.vocabulary import ExecutorSpec, FailureReason, Role
from cluster.work import RUNS_ON, WorkTask
from flowserve.core.messages import Abort, Dispatch, DispatchWork, Message
from flowserve.core.outbox import NOTHING, Load, Outbox
from flowserve.core.shell import TeShell


class Started(NamedTuple):
    """A task that takes a slot from now on; `end_ns`: when it is done, if nothing comes between."""

    task_id: int
    end_ns: int


class Slots:
    """Tasks at hand, at most `number` of them running, the others in order of arrival. An engine to its TE-shell."""

    def __init__(self, name: str, number: int, outbox: Outbox) -> None:
        self.name = name
        self.number = number
        self.running: dict[int, int] = {}
        """By task id: since when, in ns."""
        self._tasks: dict[int, DispatchWork] = {}
        self._waiting: dict[int, None] = {}
        self._outbox = outbox
        self._now = 0
        self._busy_ns = 0
        self._busy_since: int | None = None

    # -- an engine to the shell -----------------------------------------------------------------------------------

    def receive(self, message: Message, now: int, ids: BlockIds = ()) -> None:
        """Take a task or let go of one; other messages are for engines that serve."""
        self._now = now
        match message:
            case DispatchWork():
                self._tasks[message.task.task_id] = message
                self._waiting[message.task.task_id] = None
            case Abort() if (dispatch := self._tasks.pop(message.task_id, None)) is not None:
                self._waiting.pop(message.task_id, None)
                self._stop(message.task_id)
                self._outbox.events.append(
                    WorkAborted(
                        to=dispatch.job_executor,
                        time=now,
                        occurred=now,
                        request_id=dispatch.task.request_id,
                        task_id=message.task_id,
                        executor=self.name,
                    )
                )
            case _:
                pass

    def serve(self, role: Role) -> None:
        """A worker's limits do not depend on its role."""

    def load(self) -> Load:
        """How much there is, by count; a worker holds no KV cache."""
        busy = self._busy_ns + (0 if self._busy_since is None else self._now - self._busy_since)
        return NOTHING._replace(waiting=len(self._waiting), running=len(self.running), busy_ns=busy)

    def progress(self) -> dict[str, list[tuple[int, int]]]:
        """No tokens come of a worker."""
        return {}

    @property
    def idle(self) -> bool:
        """No task at hand."""
        return not self._tasks

    # -- what passes the time -------------------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """Tasks without a slot."""
        return len(self._waiting)

    def start(self, now: int) -> list[Started]:
        """Give free slots to what waits."""
        self._now = now
        started = []
        while self._waiting and len(self.running) < self.number:
            task_id = next(iter(self._waiting))
            del self._waiting[task_id]
            self.running[task_id] = now
            started.append(Started(task_id, now + self._tasks[task_id].took_ns))
        if started and self._busy_since is None:
            self._busy_since = now
        return started

    def finish(self, task_id: int, now: int) -> None:
        """A task's time is up; nothing where it was aborted meanwhile."""
        self._now = now
        since = self._stop(task_id)
        if since is None:
            return
        dispatch = self._tasks.pop(task_id)
        self._outbox.events.append(
            WorkFinished(
                to=dispatch.job_executor,
                time=now,
                occurred=now,
                request_id=dispatch.task.request_id,
                task_id=task_id,
                executor=self.name,
                started=since,
            )
        )

    def _stop(self, task_id: int) -> int | None:
        """A task gives its slot back, if it had one: since when."""
        since = self.running.pop(task_id, None)
        if not self.running and self._busy_since is not None:
            self._busy_ns, self._busy_since = self._busy_ns + self._now - self._busy_since, None
        return since

    def tasks(self) -> list[WorkTask]:
        """Tasks at hand, in order of arrival."""
        return [dispatch.task for dispatch in self._tasks.values()]


class Worker:
    """One executor whose slots are up. Load reports go to `report_to`, at most every `report_period_ns`."""

    def __init__(
        self, name: str, spec: ExecutorSpec, slots: int, report_to: tuple[str, ...], report_period_ns: int
    ) -> None:
        if slots < 1:
            raise ValueError(f"a worker with {slots} slots: allowed are 1 and more")
        self._outbox = Outbox()
        self.shell = TeShell(name, spec, self._outbox, report_to, report_period_ns)
        self.slots = Slots(name, slots, self._outbox)
        self.shell.attach(self.slots)

    def receive(self, message: Message, now: int) -> None:
        """Take one message; what this worker does not run, or no more, is given back."""
        if isinstance(message, DispatchWork):
            runs_here = RUNS_ON[type(message.task.operation)] is self.shell.spec.role
            if self.shell.draining or not runs_here:
                self._refuse(message, now, FailureReason.NOT_SERVING if runs_here else FailureReason.INVALID)
                return
        elif isinstance(message, Dispatch):
            raise ValueError(f"{self.shell.name} is a worker: a job executor dispatched task {message.task} to it")
        self.shell.receive(message, now)

    def _refuse(self, message: DispatchWork, now: int, reason: FailureReason) -> None:
        self._outbox.events.append(
            WorkFailed(
                to=message.job_executor,
                time=now,
                occurred=now,
                request_id=message.task.request_id,
                task_id=message.task.task_id,
                executor=self.shell.name,
                reason=reason,
            )
        )

    def start(self, now: int) -> list[Started]:
        """Give free slots to what waits; the caller passes the time and says `finish`."""
        started = self.slots.start(now)
        if started:
            self.shell.observe(now)
        return started

    def finish(self, task_id: int, now: int) -> None:
        """A task's time is up."""
        self.slots.finish(task_id, now)
        self.shell.observe(now)

    def outbox(self) -> Outbox:
        """Everything since the last call; the caller delivers it."""
        return self._outbox.take()
