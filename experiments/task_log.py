"""Which executor worked on which task when, for the timeline: kept while a run goes on, for its first requests only."""

from collections.abc import Sequence
from dataclasses import dataclass

from cluster import events as ev
from cluster.actions import Action, DispatchTask, DispatchWork
from cluster.work import Preprocess, RunTool, Train

WORK_KINDS = {RunTool: "tool", Preprocess: "preprocess", Train: "train"}


@dataclass(slots=True)
class TaskSpan:
    """One task: placed at `start_ns`, its request's first token at `first_ns`, over at `end_ns`; None: not so far.

    `kind`: a `TaskKind`, or one of WORK_KINDS. `failed`: why it did not finish.
    """

    request_id: int
    task_id: int
    kind: str
    executor: str
    start_ns: int
    first_ns: int | None = None
    end_ns: int | None = None
    failed: str = ""


_SILENT = frozenset({ev.LoadReport, ev.TaskProgress, ev.RequestEnded, ev.TimerFired})


class TaskLog:
    """The tasks of the first `most` requests to arrive, in order of being placed. `requests`: their ids."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.requests: dict[int, None] = {}
        self.tasks: list[TaskSpan] = []
        self._open: dict[int, TaskSpan] = {}

    def record(self, event: ev.Event, actions: Sequence[Action]) -> None:
        """Note what an event, and what was decided on it, say of tasks."""
        if type(event) in _SILENT:
            return
        match event:
            case ev.RequestArrived() if len(self.requests) < self.most:
                self.requests[event.request.request_id] = None
            case ev.FirstToken():
                if (span := self._open.get(event.task_id)) is not None:
                    span.first_ns = event.occurred
            case ev.TaskFinished():
                self._end(event.task_id, event.occurred, "")
            case ev.TaskFailed():
                self._end(event.task_id, event.occurred, str(event.reason))
            case ev.TaskAborted() | ev.WorkAborted():
                self._end(event.task_id, event.occurred, "aborted")
            case ev.CallArrived() | ev.WorkArrived() if len(self.requests) < self.most:
                self.requests[event.request.request_id] = None
            case ev.WorkFinished():
                self._end(event.task_id, event.occurred, "")
            case ev.WorkFailed():
                self._end(event.task_id, event.occurred, str(event.reason))
            case _:
                pass
        for action in actions:
            if type(action) is DispatchTask and action.task.request.request_id in self.requests:
                task = action.task
                span = TaskSpan(task.request.request_id, task.task_id, task.kind, action.executor, event.time)
                self._begin(span)
            elif type(action) is DispatchWork and action.task.request_id in self.requests:
                work = action.task
                kind = WORK_KINDS[type(work.operation)]
                self._begin(TaskSpan(work.request_id, work.task_id, kind, action.executor, event.time))

    def _begin(self, span: TaskSpan) -> None:
        self._open[span.task_id] = span
        self.tasks.append(span)

    def _end(self, task_id: int, at: int, failed: str) -> None:
        if (span := self._open.pop(task_id, None)) is not None:
            span.end_ns, span.failed = at, failed
