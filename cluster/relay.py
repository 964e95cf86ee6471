"""What is the same on every backend: the events that actions become which are only messages, and that of lost work."""

from cluster import events as ev
from cluster.actions import (
    Action,
    AnnounceExecutor,
    CancelRequest,
    DeclareNoCapacity,
    EndCall,
    EndRequest,
    EndWork,
    OpenDoors,
    ReportDemand,
    SubmitCall,
    SubmitRequest,
    SubmitWork,
)
from cluster.vocabulary import FailureReason
from cluster.work import WorkTask


def relayed(action: Action, now: int) -> ev.Event | None:
    """What the addressed actor hears of an action taken at `now`; None where executors or timers have to act."""
    match action:
        case SubmitRequest():
            return ev.RequestArrived(to=action.job_executor, time=now, occurred=now, request=action.request)
        case EndRequest():
            return ev.RequestEnded(
                to="client",
                time=now,
                occurred=now,
                request_id=action.request_id,
                outcome=action.outcome,
                generated=action.generated,
                reason=action.reason,
            )
        case CancelRequest():
            return ev.CancelRequested(to=action.job_executor, time=now, occurred=now, request_id=action.request_id)
        case ReportDemand():
            return ev.DemandReported(
                to="cm",
                time=now,
                occurred=now,
                job_executor=action.job_executor,
                model=action.model,
                parked=action.parked,
            )
        case AnnounceExecutor():
            return ev.ExecutorAnnounced(
                to=action.job_executor,
                time=now,
                occurred=now,
                executor=action.executor,
                spec=action.spec,
                state=action.state,
                kv_blocks=action.kv_blocks,
                max_sequences=action.max_sequences,
            )
        case DeclareNoCapacity():
            return ev.NoCapacity(
                to=action.job_executor, time=now, occurred=now, model=action.model, reason=action.reason
            )
        case SubmitWork():
            return ev.WorkArrived(to=action.job_executor, time=now, occurred=now, request=action.request)
        case SubmitCall():
            return ev.CallArrived(
                to=action.job_executor, time=now, occurred=now, request=action.request, caller=action.caller
            )
        case EndCall():
            return ev.CallEnded(
                to=action.caller,
                time=now,
                occurred=now,
                request_id=action.request_id,
                outcome=action.outcome,
                generated=action.generated,
                reason=action.reason,
            )
        case EndWork():
            return ev.WorkEnded(
                to="client",
                time=now,
                occurred=now,
                request_id=action.request_id,
                outcome=action.outcome,
                reason=action.reason,
            )
        case OpenDoors():
            return ev.FleetReady(to="client", time=now, occurred=now)
        case _:
            return None


def work_lost(now: int, executor: str, job_executor: str, task: WorkTask, invalid: str = "") -> ev.WorkFailed:
    """What a job executor hears of a task whose worker is gone; or that no worker can run, and `invalid` says why."""
    return ev.WorkFailed(
        to=job_executor,
        time=now,
        occurred=now,
        request_id=task.request_id,
        task_id=task.task_id,
        executor=executor,
        reason=FailureReason.INVALID if invalid else FailureReason.EXECUTOR_LOST,
        detail=invalid,
    )
