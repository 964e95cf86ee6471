"""JE, the job executor: turns requests into jobs and tasks, places tasks, and sees every request to its end.

Sans I/O: `on_event(event) → actions`. Chat on a colocated executor is one job of one task; on a prefill executor it is
one job of two, the second placed when the first is done or, where the executor says so, has begun. A task that fails is
tried again elsewhere, from the token the frontend holds.
"""

from collections.abc import Callable
from typing import Any, Final

import msgspec

from cluster import events as ev
from cluster.actions import AbortTask, Action, DispatchTask, EndCall, EndRequest, ReleaseKvContext, ReportDemand
from cluster.fleet import Fleet
from cluster.policy import DispatchPolicy
from cluster.request import KvSource, Request, Task
from cluster.vocabulary import SERVES, ExecutorState, FailureReason, Outcome, TaskKind

_TASK_BITS = 40


class Job:
    """One serving job under way. `task` is None while it waits for an executor.

    `ahead`: the decode task on `ahead_executor`, placed while the prefill is under way; `dropped`: it is not wanted any
    more and was asked back. `end`: how the job ends as soon as that is back.
    """

    __slots__ = (
        "ahead",
        "ahead_executor",
        "attempts",
        "cancelled",
        "deadline_ns",
        "dropped",
        "end",
        "executor",
        "generated",
        "held",
        "kind",
        "queued_tokens",
        "request",
        "task",
    )

    def __init__(self, request: Request, arrived_ns: int) -> None:
        self.request = request
        self.deadline_ns = None if request.deadline_ns is None else arrived_ns + request.deadline_ns
        self.kind = TaskKind.SERVE
        self.task: Task | None = None
        self.executor = ""
        self.held: KvSource | None = None
        self.generated = 0
        self.attempts = 0
        self.queued_tokens = 0
        self.cancelled = False
        self.ahead: Task | None = None
        self.ahead_executor = ""
        self.dropped = False
        self.end: tuple[Outcome, str] | None = None


class JobExecutor:
    """One job executor. Each runs the dispatch policy on its own (DeepServe section 5).

    `max_attempts`: tasks per request lost to failures before it is reported failed. `max_parked`: requests that may
    wait for an executor to appear; more are refused.
    """

    def __init__(
        self, name: str, number: int, policy: DispatchPolicy, max_attempts: int = 4, max_parked: int = 1_000_000
    ) -> None:
        if max_attempts < 1:
            raise ValueError(f"max_attempts is {max_attempts}: allowed are 1 (no retry) and more")
        if max_parked < 0:
            raise ValueError(f"max_parked is {max_parked}: allowed are 0 (never wait) and more")
        self.name = name
        self.policy = policy
        self.fleet = Fleet()
        self._max_attempts = max_attempts
        self._max_parked = max_parked
        self._next_task = number << _TASK_BITS
        self._jobs: dict[int, Job] = {}
        self._tasks: dict[int, Job] = {}
        self._parked: dict[str, dict[int, Job]] = {}  # model, request
        self._num_parked = 0
        self._demand: dict[str, int] = {}
        self._no_capacity: dict[str, str] = {}
        self._callers: dict[int, str] = {}
        """Who made a request that is a job's LLM call."""

    def on_event(self, event: ev.Event) -> list[Action]:
        """The actions this event calls for."""
        handler = _HANDLERS.get(type(event))
        return [] if handler is None else handler(self, event)

    @property
    def open_jobs(self) -> int:
        """Requests accepted and not ended."""
        return len(self._jobs)

    # -- the life of a job ----------------------------------------------------------------------------------------

    def _called(self, event: ev.CallArrived) -> list[Action]:
        self._callers[event.request.request_id] = event.caller
        return self._arrived(event)

    def _arrived(self, event: ev.RequestArrived | ev.CallArrived) -> list[Action]:
        job = Job(event.request, event.occurred)
        self._jobs[event.request.request_id] = job
        return self._place(job, event.time)

    def _place(self, job: Job, now: int) -> list[Action]:
        """Hand the job's next task to an executor, or park it, or refuse it where too many are parked."""
        draft = Task(self._next_task, job.request, job.kind, job.generated, job.held, job.deadline_ns)
        placed = self._choose(draft, now)
        if placed is None:
            return self._park(job)
        task, executor = placed
        job.task, job.executor, job.kind = task, executor, task.kind
        job.queued_tokens = 0 if job.kind is TaskKind.DECODE else task.context_tokens
        return self._dispatch(job, task, executor, job.queued_tokens)

    def _choose(self, draft: Task, now: int) -> tuple[Task, str] | None:
        """The executor for a task, and the task with the kind that this executor serves."""
        executor = self.policy.place(draft, self.fleet, now)
        if executor is None:
            return None
        role = self.fleet.role_of(executor)
        if role is None:
            raise ValueError(
                f"{type(self.policy).__name__}.place chose executor {executor!r}, which is not ready; "
                "it must choose from fleet.candidates(task)"
            )
        kind = SERVES[role]
        self._next_task += 1
        return (draft if draft.kind is kind else msgspec.structs.replace(draft, kind=kind)), executor

    def _prefill_started(self, event: ev.PrefillStarted) -> list[Action]:
        """Its KV cache is sent while it is computed: place the decode task, if there is an executor for it."""
        job = self._current(event)
        if job is None or job.task is None or job.ahead is not None or job.cancelled:
            return []
        source, generated = KvSource(event.executor, event.task_id, event.kv_runs), job.task.generated + 1
        draft = Task(self._next_task, job.request, TaskKind.DECODE, generated, source, job.deadline_ns)
        placed = self._choose(draft, event.time)
        if placed is None:
            return []
        job.dropped = False
        job.ahead, job.ahead_executor = task, executor = placed
        return self._dispatch(job, task, executor, 0)

    def _dispatch(self, job: Job, task: Task, executor: str, queued_tokens: int) -> list[Action]:
        self._tasks[task.task_id] = job
        self.fleet.count(executor, 1, queued_tokens)
        self.policy.dispatched(task, executor)
        return [DispatchTask(self.name, executor, task)]

    def _drop(self, job: Job) -> list[Action]:
        """Ask for the task back that was placed ahead."""
        if job.ahead is None or job.dropped:
            return []
        job.dropped = True
        return [AbortTask(job.ahead_executor, job.ahead.task_id)]

    def _ahead_is_back(self, job: Job, event: ev.TaskFinished | ev.TaskFailed | ev.TaskAborted) -> list[Action]:
        """Whatever became of a task that was placed ahead, its prefill goes on, and another is placed behind it."""
        assert job.ahead is not None
        if job.generated >= job.ahead.generated:  # it may have got further before it was asked back
            job.generated = max(job.generated, event.generated)
        self.fleet.count(job.ahead_executor, -1, 0)
        del self._tasks[job.ahead.task_id]
        job.ahead = None
        if isinstance(event, ev.TaskFailed):
            self._believe(event)
        return [] if job.end is None else self._end(job, *job.end)

    def _first_token(self, event: ev.FirstToken) -> list[Action]:
        job = self._current(event)
        if job is not None:
            self._unqueue(job)
            job.generated = max(job.generated, 1)
            self.policy.first_token(job.request, event)
        return []

    def _progress(self, event: ev.TaskProgress) -> list[Action]:
        for task_id, generated in event.generated:
            job = self._tasks.get(task_id)
            if job is not None:
                job.generated = max(job.generated, generated)
        return []

    def _finished(self, event: ev.TaskFinished) -> list[Action]:
        job = self._current(event)
        if job is None:
            return []
        if _is_ahead(job, event):
            return self._ahead_is_back(job, event)
        self._task_over(job)
        self.policy.finished(job.request, event)
        source, job.held = job.held, None
        job.generated = event.generated
        if event.stopped:
            return self._end(job, Outcome.FINISHED)
        assert source is None
        held = KvSource(event.executor, event.task_id, event.kv_runs)
        if job.cancelled:
            return [AbortTask(held.executor, held.task_id), *self._end(job, Outcome.CANCELLED)]
        job.held, job.kind = held, TaskKind.DECODE
        if job.ahead is not None and not job.dropped:
            job.task, job.executor, job.ahead = job.ahead, job.ahead_executor, None
            return []
        return self._place(job, event.time)

    def _failed(self, event: ev.TaskFailed) -> list[Action]:
        job = self._current(event)
        if job is None:
            return []
        if _is_ahead(job, event):
            return self._ahead_is_back(job, event)
        self._task_over(job)
        job.generated = event.generated
        self._believe(event)
        if job.cancelled:
            return [*self._release(job), *self._end(job, Outcome.CANCELLED)]
        if not event.reason.retriable:
            return [*self._release(job), *self._end(job, Outcome.FAILED, event.detail or str(event.reason))]
        refused = event.reason in (FailureReason.NOT_SERVING, FailureReason.ROLE_SWITCHED)
        if not refused:  # a refusal costs the request nothing
            job.attempts += 1
        if job.attempts >= self._max_attempts:
            reason = f"gave up after {job.attempts} attempts, the last: {event.reason}"
            return [*self._release(job), *self._end(job, Outcome.FAILED, reason)]
        # The KV cache of a finished prefill outlives a refused decode; after any other loss, prefill again.
        keep = refused and job.held is not None
        actions = [*self._drop(job), *([] if keep else self._release(job))]
        job.kind = TaskKind.DECODE if keep else TaskKind.SERVE
        return [*actions, *self._place(job, event.time)]

    def _believe(self, event: ev.TaskFailed) -> None:
        """An executor that cannot have tasks is gone: the cluster manager's word may still be on its way."""
        if event.reason in (FailureReason.EXECUTOR_LOST, FailureReason.NOT_SERVING):
            self._lose_executor(event.executor)

    def _aborted(self, event: ev.TaskAborted) -> list[Action]:
        job = self._current(event)
        if job is None:
            return []
        if _is_ahead(job, event):
            return self._ahead_is_back(job, event)
        self._task_over(job)
        job.generated = event.generated
        return [*self._release(job), *self._end(job, Outcome.CANCELLED)]

    def _cancel(self, event: ev.CancelRequested) -> list[Action]:
        job = self._jobs.get(event.request_id)
        if job is None or job.cancelled or job.end is not None:
            return []
        job.cancelled = True
        if job.task is None:
            del self._parked[job.request.model][event.request_id]
            self._num_parked -= 1
            return [*self._release(job), *self._end(job, Outcome.CANCELLED), self._demand_changed(job, -1)]
        return [AbortTask(job.executor, job.task.task_id), *self._drop(job)]

    def _end(self, job: Job, outcome: Outcome, reason: str = "") -> list[Action]:
        """Its end, now or when the last of its tasks is back."""
        if job.ahead is not None:
            job.end = (outcome, reason)
            return self._drop(job)
        number = job.request.request_id
        del self._jobs[number]
        caller = self._callers.pop(number, None) if self._callers else None
        end = (
            EndRequest(number, outcome, job.generated, reason)
            if caller is None
            else EndCall(caller, number, outcome, job.generated, reason)
        )
        return [*self._release_context(job.request), end]

    def _release_context(self, request: Request) -> list[Action]:
        """Wherever an explicitly cached context may lie: any executor may have served a request that named it."""
        if request.context is None or not request.release_context:
            return []
        groups = [self.fleet.group(request.model, role) for role in SERVES]
        return [ReleaseKvContext(name, request.context) for group in groups for name in group.names]

    def _release(self, job: Job) -> list[Action]:
        """Let go of the KV cache a finished prefill holds for this job."""
        held, job.held = job.held, None
        return [] if held is None else [AbortTask(held.executor, held.task_id)]

    # -- waiting for executors ------------------------------------------------------------------------------------

    def _park(self, job: Job) -> list[Action]:
        job.task, job.executor = None, ""
        model = job.request.model
        if model in self._no_capacity:
            return [*self._release(job), *self._end(job, Outcome.FAILED, self._no_capacity[model])]
        if self._num_parked >= self._max_parked:
            reason = f"no executor is ready and {self._num_parked} requests wait already (max_parked)"
            return [*self._release(job), *self._end(job, Outcome.REFUSED, reason)]
        self._parked.setdefault(model, {})[job.request.request_id] = job
        self._num_parked += 1
        return [self._demand_changed(job, +1)]

    def _announced(self, event: ev.ExecutorAnnounced) -> list[Action]:
        if event.state is not ExecutorState.READY:
            self._lose_executor(event.executor)
            return []
        self.fleet.announced(event)
        model = event.spec.model
        self._no_capacity.pop(model, None)
        waiting = self._take_parked(model)
        actions: list[Action] = []
        for job in waiting:
            self._demand[model] -= 1
            actions += self._place(job, event.time)
        # One report of what still waits, not one for each job that was parked again.
        actions = [action for action in actions if not isinstance(action, ReportDemand)]
        return [*actions, ReportDemand(self.name, model, self._demand[model])] if waiting else actions

    def _reported(self, event: ev.LoadReport) -> list[Action]:
        self.fleet.reported(event)
        return []

    def _give_up(self, event: ev.NoCapacity) -> list[Action]:
        self._no_capacity[event.model] = event.reason
        actions: list[Action] = []
        for job in self._take_parked(event.model):
            actions += [*self._release(job), *self._end(job, Outcome.FAILED, event.reason)]
            self._demand[event.model] -= 1
        return [*actions, ReportDemand(self.name, event.model, self._demand[event.model])] if actions else []

    def _take_parked(self, model: str) -> list[Job]:
        jobs = list(self._parked.pop(model, {}).values())
        self._num_parked -= len(jobs)
        return jobs

    def _demand_changed(self, job: Job, change: int) -> ReportDemand:
        model = job.request.model
        self._demand[model] = self._demand.get(model, 0) + change
        return ReportDemand(self.name, model, self._demand[model])

    def _lose_executor(self, executor: str) -> None:
        if self.fleet.remove(executor):
            self.policy.executor_gone(executor)

    # -- bookkeeping ----------------------------------------------------------------------------------------------

    def _current(
        self, event: ev.FirstToken | ev.PrefillStarted | ev.TaskFinished | ev.TaskFailed | ev.TaskAborted
    ) -> Job | None:
        """The job this event is about, unless it speaks of a task that is no longer the job's."""
        return self._tasks.get(event.task_id)

    def _task_over(self, job: Job) -> None:
        self._unqueue(job)
        self.fleet.count(job.executor, -1, 0)
        assert job.task is not None
        del self._tasks[job.task.task_id]
        job.task, job.executor = None, ""

    def _unqueue(self, job: Job) -> None:
        if job.queued_tokens:
            self.fleet.count(job.executor, 0, -job.queued_tokens)
            job.queued_tokens = 0


def _is_ahead(job: Job, event: ev.TaskFinished | ev.TaskFailed | ev.TaskAborted) -> bool:
    return job.ahead is not None and job.ahead.task_id == event.task_id


_HANDLERS: Final[dict[type, Callable[[JobExecutor, Any], list[Action]]]] = {
    ev.RequestArrived: JobExecutor._arrived,
    ev.FirstToken: JobExecutor._first_token,
    ev.PrefillStarted: JobExecutor._prefill_started,
    ev.TaskProgress: JobExecutor._progress,
    ev.TaskFinished: JobExecutor._finished,
    ev.TaskFailed: JobExecutor._failed,
    ev.TaskAborted: JobExecutor._aborted,
    ev.CancelRequested: JobExecutor._cancel,
    ev.LoadReport: JobExecutor._reported,
    ev.ExecutorAnnounced: JobExecutor._announced,
    ev.NoCapacity: JobExecutor._give_up,
    ev.CallArrived: JobExecutor._called,
}
