"""TE-shell: role, health and drain state of one executor, in front of an engine or of none.

Sans I/O. It reports load, refuses what the executor does not serve, and passes everything else on to the engine. It
needs of an engine only what `Engine` names, so that either can be replaced alone.
"""

from typing import Protocol

import msgspec

from cluster.events import Event, ExecutorDrained, LoadReport, RoleSwitched, TaskFailed, TaskProgress
from cluster.identity import BlockIds
from cluster.request import Task
from cluster.vocabulary import SERVES, ExecutorSpec, FailureReason, Role
from flowserve.core.messages import Dispatch, Drain, KvOffered, KvRequested, Message, SwitchRole
from flowserve.core.outbox import NOTHING, Load, Outbox


class Engine(Protocol):
    """What a shell must know of an engine: messages go in, counts come out. Its answers go to the outbox by itself."""

    def receive(self, message: Message, now: int, ids: BlockIds = ()) -> None:
        """Take one message. `ids`: block identities of the context, with a `Dispatch`."""
        ...

    def serve(self, role: Role) -> None:
        """Work within the limits that hold for this role from here on; tasks of any kind at hand are finished."""
        ...

    def load(self) -> Load:
        """How much there is, by count."""
        ...

    def progress(self) -> dict[str, list[tuple[int, int]]]:
        """(task id, tokens) of what decodes, by the job executor it belongs to."""
        ...

    @property
    def idle(self) -> bool:
        """No task, and no KV cache held for anyone."""
        ...


class TeShell:
    """The outer side of one executor. `engine`: None before it is attached and after it failed, `absence` says why.

    Reports go to `report_to` when something changed, at most every `report_period_ns`: the next at `next_report` ns,
    at the earliest.
    """

    def __init__(
        self, name: str, spec: ExecutorSpec, outbox: Outbox, report_to: tuple[str, ...], report_period_ns: int
    ) -> None:
        self.name = name
        self.spec = spec
        self.draining = False
        self.engine: Engine | None = None
        self.absence = "its engine is not up yet"
        self._outbox = outbox
        self._report_to = report_to
        self._report_period_ns = report_period_ns
        self.next_report = 0
        self._changed = True
        self._drained = False
        self._switched = False

    def attach(self, engine: Engine) -> None:
        """From here on there is an engine behind this shell."""
        self.engine = engine
        engine.serve(self.spec.role)
        self._changed = True

    def detach(self, why: str) -> None:
        """The engine is gone, and with it its tasks, which are whoever noticed its to report."""
        self.engine, self.absence = None, why
        self._changed = True

    # -- messages -------------------------------------------------------------------------------------------------

    def receive(self, message: Message, now: int, ids: BlockIds = ()) -> None:
        """Take one message: what is the shell's own, what must be refused, and for the engine all the rest."""
        match message:
            case Dispatch() if (refusal := self._refusal(message.task)) is not None:
                self._refuse(message, *refusal, now)
            case Dispatch() if self.engine is not None:
                self.engine.receive(message, now, ids)
            case Drain():
                self.draining = True
            case SwitchRole():
                self._switch(message.role, now)
            case _ if self.engine is not None:
                self.engine.receive(message, now, ids)
            case KvRequested():  # whoever waits for KV cache must hear that there is none
                self._outbox.peers.append((message.by, KvOffered(message.task_id, message.for_task, self.name, None)))
        self.observe(now)

    def _refusal(self, task: Task) -> tuple[FailureReason, str] | None:
        if self.draining:
            return FailureReason.NOT_SERVING, ""
        if self.engine is None:
            return FailureReason.NOT_SERVING, f"{self.name} takes no tasks: {self.absence}"
        if task.kind is not SERVES[self.spec.role]:
            # The sender may not have heard of a switch yet: that is nobody's mistake.
            return (FailureReason.ROLE_SWITCHED if self._switched else FailureReason.INVALID), ""
        return None

    def _switch(self, role: Role, now: int) -> None:
        """The cache and the tasks at hand stay as they are: only what is taken from here on differs."""
        self.spec, self._switched = msgspec.structs.replace(self.spec, role=role), True
        if self.engine is not None:
            self.engine.serve(role)
        self._emit(RoleSwitched(to="cm", time=now, occurred=now, executor=self.name, spec=self.spec))

    def _refuse(self, message: Dispatch, reason: FailureReason, detail: str, now: int) -> None:
        task = message.task
        self._outbox.forgotten.append(task.task_id)
        self._emit(
            TaskFailed(
                to=message.job_executor,
                time=now,
                occurred=now,
                request_id=task.request.request_id,
                task_id=task.task_id,
                executor=self.name,
                reason=reason,
                generated=task.generated,
                detail=detail,
            )
        )

    # -- health ---------------------------------------------------------------------------------------------------

    @property
    def report_due(self) -> int | None:
        """When the next load report is due, if anything changed since the last."""
        return self.next_report if self._changed else None

    def changed(self) -> None:
        """The engine went on; `observe` follows when it may be spoken of."""
        self._changed = True

    def observe(self, now: int) -> None:
        """After whatever happened: say so where the executor is drained, and report where a report is due."""
        self._changed = True
        if self.draining and not self._drained and (self.engine is None or self.engine.idle):
            self._drained = True
            self._emit(ExecutorDrained(to="cm", time=now, occurred=now, executor=self.name))
        if now >= self.next_report:
            self.report(now)

    def report(self, now: int) -> None:
        """Send a load report, and the progress of what decodes, if one is due."""
        if not self._changed or now < self.next_report:
            return
        self._changed = False
        self.next_report = now + self._report_period_ns
        load = NOTHING if self.engine is None else self.engine.load()
        for actor in self._report_to:
            self._emit(
                LoadReport(
                    to=actor,
                    time=now,
                    occurred=now,
                    executor=self.name,
                    waiting=load.waiting,
                    running=load.running,
                    waiting_tokens=load.waiting_tokens,
                    free_blocks=load.free_blocks,
                    cached_blocks=load.cached_blocks,
                    total_blocks=load.total_blocks,
                    generated_tokens=load.generated_tokens,
                    preemptions=load.preemptions,
                    busy_ns=load.busy_ns,
                )
            )
        progress = {} if self.engine is None else self.engine.progress()
        for actor, pairs in progress.items():
            self._emit(TaskProgress(to=actor, time=now, occurred=now, executor=self.name, generated=tuple(pairs)))

    def _emit(self, event: Event) -> None:
        self._outbox.events.append(event)
