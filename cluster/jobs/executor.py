"""The job executor for work other than serving: from requests to jobs, tasks and LLM calls, and to their ends.

Sans I/O like every actor. LLM calls go to a serving job executor as requests, always the same for one request, so that
it knows what is cached of its context. All other tasks wait here, not at the workers, until one has a free slot: in
order of priority, then of the requests' arrival. A task that fails is run again elsewhere; training then goes on from
the state that was saved last.
"""

import heapq

import msgspec
import numpy as np

from cluster import events as ev
from cluster.actions import (
    AbortTask,
    Action,
    CancelRequest,
    DispatchWork,
    EndWork,
    ReportDemand,
    SubmitCall,
)
from cluster.fleet import Fleet
from cluster.jobs.job import CallStep, Job
from cluster.jobs.plan import jobs_of
from cluster.jobs.record import JobRecorder, JobRow
from cluster.request import Request
from cluster.vocabulary import WORKERS, ExecutorState, FailureReason, Outcome, Role
from cluster.work import FIRST_CALL, RUNS_ON, WORK, Operation, RunTool, Train, WorkRequest, WorkTask, block_ids

_FIRST_TASK = 1 << 60
"""Task ids of serving job executors are below."""


class _Open:
    """A request under way. `steps`: calls and tasks of the round that are not back yet; `home`: the worker that trained
    it last; `stopping`: what is outstanding has been told to stop.
    """

    __slots__ = (
        "arrived_ns",
        "cancelled",
        "failure",
        "home",
        "jobs",
        "number",
        "request",
        "row",
        "steps",
        "stopping",
    )

    def __init__(self, request: WorkRequest, number: int, arrived_ns: int) -> None:
        self.request = request
        self.number = number
        self.arrived_ns = arrived_ns
        self.jobs: list[Job] = jobs_of(request)
        self.row: JobRow | None = None
        self.steps: dict[int, _Task | int] = {}  # task or call id: the task, or when the call was made
        self.home = ""
        self.cancelled = False
        self.stopping = False
        self.failure: tuple[Outcome, str] | None = None

    @property
    def job(self) -> Job:
        return self.jobs[0]


class _Task:
    """One task, from being asked for to being back; a retry is the same one under another id."""

    __slots__ = ("asked_ns", "attempts", "executor", "npus", "open", "operation", "sent_ns", "task_id")

    def __init__(self, task_id: int, open: _Open, operation: Operation, asked_ns: int) -> None:
        self.task_id = task_id
        self.open = open
        self.operation = operation
        self.asked_ns = asked_ns
        self.sent_ns = asked_ns
        self.executor = ""
        self.npus = 0
        self.attempts = 0

    @property
    def role(self) -> Role:
        return RUNS_ON[type(self.operation)]


class WorkJobExecutor:
    """Runs agents and fine-tuning. `serving`: the job executors that take calls. `roles`: of the workers the fleet may
    have; what needs another one is refused. `max_attempts`: runs of one task lost to failures before it is given up.
    """

    name = WORK

    def __init__(
        self,
        serving: tuple[str, ...],
        roles: tuple[Role, ...] = WORKERS,
        max_attempts: int = 4,
        recorder: JobRecorder | None = None,
    ) -> None:
        if max_attempts < 1:
            raise ValueError(f"max_attempts is {max_attempts}: allowed are 1 (no retry) and more")
        self.recorder = recorder or JobRecorder()
        self.fleet = Fleet()
        self._serving = serving
        self._roles = roles
        self._max_attempts = max_attempts
        self._open: dict[int, _Open] = {}
        self._calls: dict[int, _Open] = {}
        self._tasks: dict[int, _Task] = {}
        self._waiting: dict[Role, list[tuple[int, int, int]]] = {role: [] for role in WORKERS}
        self._parked: dict[int, _Task] = {}
        self._num_parked = dict.fromkeys(WORKERS, 0)
        self._reported = dict.fromkeys(WORKERS, 0)
        self._no_capacity: dict[Role, str] = {}
        self._npus: dict[str, int] = {}
        self._loaded: dict[str, int] = {}
        """Whose training state each worker has, by request."""
        self._requests = 0
        self._next_call = FIRST_CALL
        self._next_task = _FIRST_TASK

    def on_event(self, event: ev.Event) -> list[Action]:
        """The actions this event calls for."""
        match event:
            case ev.WorkArrived():
                actions = self._arrived(event)
            case ev.CallEnded():
                actions = self._call_ended(event)
            case ev.WorkFinished():
                actions = self._finished(event)
            case ev.WorkFailed():
                actions = self._failed(event)
            case ev.WorkAborted():
                actions = self._aborted(event)
            case ev.CancelRequested():
                actions = self._cancel(event)
            case ev.ExecutorAnnounced():
                actions = self._announced(event)
            case ev.NoCapacity():
                actions = self._give_up(event)
            case _:
                return []
        return [*actions, *self._demands()]

    @property
    def open_requests(self) -> int:
        """Requests accepted and not ended."""
        return len(self._open)

    def parked(self, role: Role) -> int:
        """Tasks that wait for a worker of this role."""
        return self._num_parked[role]

    # -- the life of a request ------------------------------------------------------------------------------------

    def _arrived(self, event: ev.WorkArrived) -> list[Action]:
        open = _Open(event.request, self._requests, event.occurred)
        self._requests += 1
        self._open[event.request.request_id] = open
        return self._start_job(open, event.time)

    def _start_job(self, open: _Open, now: int) -> list[Action]:
        request = open.request
        open.row = self.recorder.started(request.request_id, request.tenant, open.job.kind, open.arrived_ns, now)
        return self._next_round(open, now)

    def _next_round(self, open: _Open, now: int) -> list[Action]:
        """Nothing is outstanding: start what comes next, of this job or of the one behind it."""
        steps = open.job.next()
        row = open.row
        assert row is not None
        row.tokens, row.steps = open.job.tokens, open.job.steps
        if not steps:
            self.recorder.ended(row, Outcome.FINISHED, "", now)
            del open.jobs[0]
            open.row = None
            return self._start_job(open, now) if open.jobs else self._end(open, Outcome.FINISHED, "", now)
        actions: list[Action] = []
        for step in steps:
            actions += self._call(open, step, now) if isinstance(step, CallStep) else self._ask(open, step, now)
        return [*actions, *self._wind_up(open, now)]

    def _call(self, open: _Open, step: CallStep, now: int) -> list[Action]:
        request, call = open.request, step.call
        number, self._next_call = self._next_call, self._next_call + 1
        self._calls[number] = open
        open.steps[number] = now
        self._row(open).calls += 1
        made = Request(
            request_id=number,
            prompt_tokens=call.prompt_tokens,
            max_tokens=call.max_tokens,
            model=request.model,
            block_ids=block_ids(request, call),
            tenant=request.tenant,
            priority=request.priority,
        )
        return [SubmitCall(self._target(open), self.name, made, request.request_id, step.step)]

    def _ask(self, open: _Open, operation: Operation, now: int) -> list[Action]:
        """A task: to a worker, or into the queue for one."""
        task = _Task(self._number(), open, operation, now)
        open.steps[task.task_id] = task
        self._row(open).tasks += 1
        role = task.role
        reason = self._no_capacity.get(role)
        if role not in self._roles:
            reason = f"the fleet has no workers of role {role}: give it a group of them"
        if reason is not None:
            del open.steps[task.task_id]
            outcome = Outcome.FAILED if role in self._roles else Outcome.REFUSED
            open.failure = open.failure or (outcome, reason)
            return []
        self._park(task)
        return self._place(role, now)

    def _wind_up(self, open: _Open, now: int) -> list[Action]:
        """After anything that may have been the last of a round, or has failed the request: go on, or end."""
        if not (open.cancelled or open.failure):
            return [] if open.steps else self._next_round(open, now)
        actions: list[Action] = []
        if not open.stopping:
            open.stopping = True
            for number, step in list(open.steps.items()):
                if not isinstance(step, _Task):
                    actions.append(CancelRequest(self._target(open), number))
                elif step.executor:
                    actions.append(AbortTask(step.executor, number))
                else:
                    self._unpark(step)
                    del open.steps[number]
        if open.steps:
            return actions
        outcome, reason = open.failure or (Outcome.CANCELLED, "")
        return [*actions, *self._end(open, outcome, reason, now)]

    def _end(self, open: _Open, outcome: Outcome, reason: str, now: int) -> list[Action]:
        del self._open[open.request.request_id]
        if open.row is not None:
            self.recorder.ended(open.row, outcome, reason, now)
        return [EndWork(open.request.request_id, outcome, reason)]

    # -- what comes back ------------------------------------------------------------------------------------------

    def _call_ended(self, event: ev.CallEnded) -> list[Action]:
        open = self._calls.pop(event.request_id)
        made = open.steps.pop(event.request_id)
        assert isinstance(made, int)
        self._row(open).generated_tokens += event.generated
        if event.outcome is Outcome.FINISHED:
            self.recorder.call_ns.append(event.time - made)
        elif not open.cancelled and open.failure is None:
            open.failure = (event.outcome, f"a call {event.outcome}{event.reason and ': ' + event.reason}")
        return self._wind_up(open, event.time)

    def _finished(self, event: ev.WorkFinished) -> list[Action]:
        task = self._tasks.get(event.task_id)
        if task is None:
            return []
        row = self._row(task.open)
        row.waited_ns += event.started - task.asked_ns
        row.ran_ns += event.occurred - event.started
        row.npu_ns += task.npus * (event.occurred - event.started)
        self.recorder.waits[task.role].append(event.started - task.asked_ns)
        if isinstance(task.operation, RunTool):
            self.recorder.tool_waits.append(event.started - task.asked_ns)
        role = self._over(task)
        # First what the request goes on with, so that it may keep its worker.
        return [*self._wind_up(task.open, event.time), *self._place(role, event.time)]

    def _failed(self, event: ev.WorkFailed) -> list[Action]:
        task = self._tasks.get(event.task_id)
        if task is None:
            return []
        open, executor = task.open, task.executor
        role = self._over(task)
        self._row(open).failed_tasks += 1
        if event.reason is FailureReason.EXECUTOR_LOST:
            self._row(open).npu_ns += task.npus * (event.occurred - task.sent_ns)
        if event.reason in (FailureReason.EXECUTOR_LOST, FailureReason.NOT_SERVING):
            self._lose_worker(executor)  # the cluster manager's word may still be on its way
        if event.reason is not FailureReason.NOT_SERVING:  # a refusal costs nothing
            task.attempts += 1
        if not (open.cancelled or open.failure):
            if not event.reason.retriable:
                open.failure = (Outcome.FAILED, event.detail or str(event.reason))
            elif task.attempts >= self._max_attempts:
                reason = f"gave up after {task.attempts} attempts of a task, the last: {event.reason}"
                open.failure = (Outcome.FAILED, reason)
            else:
                task.task_id = self._number()
                open.steps[task.task_id] = task
                self._park(task)
        return [*self._wind_up(open, event.time), *self._place(role, event.time)]

    def _aborted(self, event: ev.WorkAborted) -> list[Action]:
        task = self._tasks.get(event.task_id)
        if task is None:
            return []
        self._row(task.open).npu_ns += task.npus * (event.occurred - task.sent_ns)
        role = self._over(task)
        return [*self._wind_up(task.open, event.time), *self._place(role, event.time)]

    def _cancel(self, event: ev.CancelRequested) -> list[Action]:
        open = self._open.get(event.request_id)
        if open is None or open.cancelled:
            return []
        open.cancelled = True
        return self._wind_up(open, event.time)

    # -- workers --------------------------------------------------------------------------------------------------

    def _park(self, task: _Task) -> None:
        task.executor = ""
        self._parked[task.task_id] = task
        self._num_parked[task.role] += 1
        request = task.open.request
        heapq.heappush(self._waiting[task.role], (-request.priority, task.open.number, task.task_id))

    def _unpark(self, task: _Task) -> None:
        del self._parked[task.task_id]
        self._num_parked[task.role] -= 1

    def _place(self, role: Role, now: int) -> list[Action]:
        """Hand waiting tasks to free slots: each to the worker with most of them, the first of equals."""
        waiting, group = self._waiting[role], self.fleet.group(str(role), role)
        actions: list[Action] = []
        while waiting:
            task = self._parked.get(waiting[0][2])
            if task is None:
                heapq.heappop(waiting)  # given up meanwhile
                continue
            free = group.max_sequences - group.outstanding
            place = int(np.argmax(free)) if len(free) else -1
            if place < 0 or free[place] <= 0:
                break
            heapq.heappop(waiting)
            home = group.index.get(task.open.home)
            if home is not None and free[home] > 0:
                place = home
            actions.append(self._dispatch(task, group.names[place], now))
        return actions

    def _dispatch(self, task: _Task, executor: str, now: int) -> DispatchWork:
        self._unpark(task)
        self._tasks[task.task_id] = task
        task.executor, task.npus, task.sent_ns = executor, self._npus[executor], now
        self.fleet.count(executor, 1, 0)
        operation, number = task.operation, task.open.request.request_id
        if isinstance(operation, Train):
            operation = msgspec.structs.replace(operation, restore=self._loaded.get(executor) != number)
            self._loaded[executor], task.open.home = number, executor
        return DispatchWork(self.name, executor, WorkTask(task.task_id, number, operation))

    def _announced(self, event: ev.ExecutorAnnounced) -> list[Action]:
        if event.state is not ExecutorState.READY:
            self._lose_worker(event.executor)
            return []
        self._npus[event.executor] = event.spec.npus
        self.fleet.announced(event)
        self._no_capacity.pop(event.spec.role, None)
        return self._place(event.spec.role, event.time)

    def _lose_worker(self, executor: str) -> None:
        self.fleet.remove(executor)
        self._loaded.pop(executor, None)

    def _give_up(self, event: ev.NoCapacity) -> list[Action]:
        role = Role(event.model)
        self._no_capacity[role] = event.reason
        actions: list[Action] = []
        for task in [task for task in self._parked.values() if task.role is role]:
            task.open.failure = task.open.failure or (Outcome.FAILED, event.reason)
        for open in [open for open in self._open.values() if open.failure]:
            actions += self._wind_up(open, event.time)
        return actions

    def _demands(self) -> list[Action]:
        """Tell the cluster manager how many tasks wait, where that has changed."""
        changed = [role for role in WORKERS if self._num_parked[role] != self._reported[role]]
        for role in changed:
            self._reported[role] = self._num_parked[role]
        return [ReportDemand(self.name, str(role), self._num_parked[role]) for role in changed]

    # -- bookkeeping ----------------------------------------------------------------------------------------------

    def _over(self, task: _Task) -> Role:
        """A task is back from its worker."""
        del self._tasks[task.task_id], task.open.steps[task.task_id]
        self.fleet.count(task.executor, -1, 0)
        task.executor = ""
        return task.role

    def _number(self) -> int:
        """Of the next task."""
        self._next_task += 1
        return self._next_task

    def _target(self, open: _Open) -> str:
        return self._serving[open.request.request_id % len(self._serving)]

    def _row(self, open: _Open) -> JobRow:
        assert open.row is not None
        return open.row
