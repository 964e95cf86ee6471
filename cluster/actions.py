"""Everything the control plane can ask for. An action returns nothing: its outcome comes back as an event."""

import msgspec

from cluster.request import Answer, Request, Task
from cluster.vocabulary import ExecutorSpec, ExecutorState, Outcome, Role
from cluster.work import Truth, WorkRequest, WorkTask


class SetTimer(msgspec.Struct, frozen=True, tag=True, gc=False):
    """Wake `actor` with `TimerFired(name)` at `at_ns`, or at once where that is past."""

    actor: str
    name: str
    at_ns: int


class SubmitRequest(msgspec.Struct, frozen=True, tag=True, gc=False):
    """The client sends a request to a job executor: `RequestArrived`, and in the end one `RequestEnded`.

    `answer`: how the sampler's side will go on, in replays and simulations; None where a real model finds out.
    """

    job_executor: str
    request: Request
    answer: Answer | None


class CancelRequest(msgspec.Struct, frozen=True, tag=True):
    """The client gives a request up: `CancelRequested` at the job executor."""

    job_executor: str
    request_id: int


class DispatchTask(msgspec.Struct, frozen=True, tag=True, gc=False):
    """Hand a task to an executor: in the end one of `TaskFinished`, `TaskFailed`, `TaskAborted`, to `job_executor`."""

    job_executor: str
    executor: str
    task: Task


class AbortTask(msgspec.Struct, frozen=True, tag=True):
    """Let go of a task at any moment, or of the KV cache that a finished prefill task holds."""

    executor: str
    task_id: int


class EndRequest(msgspec.Struct, frozen=True, tag=True, gc=False):
    """The job executor's last word on a request: `RequestEnded` at the client; the frontend may forget it."""

    request_id: int
    outcome: Outcome
    generated: int
    reason: str = ""


class ReportDemand(msgspec.Struct, frozen=True, tag=True):
    """Tell the cluster manager how many requests wait at this job executor for an executor: `DemandReported`."""

    job_executor: str
    model: str
    parked: int


class LaunchExecutor(msgspec.Struct, frozen=True, tag=True):
    """Start an executor: one `StageFinished` per stage, then `ExecutorReady`; or `ExecutorFailed`."""

    executor: str
    spec: ExecutorSpec


class DrainExecutor(msgspec.Struct, frozen=True, tag=True):
    """Take no more tasks, finish those at hand: `ExecutorDrained`."""

    executor: str


class ReleaseKvContext(msgspec.Struct, frozen=True, tag=True):
    """Let an executor forget an explicitly cached context (`Request.context`), where it knows it. No answer."""

    executor: str
    context: str


class SwitchRole(msgspec.Struct, frozen=True, tag=True):
    """Let an executor serve another role from here on, with what it has cached: `RoleSwitched`.

    Tasks at hand are finished where they are; of the old kind, no more are taken (`FailureReason.ROLE_SWITCHED`).
    """

    executor: str
    role: Role


class RetireExecutor(msgspec.Struct, frozen=True, tag=True):
    """Stop an executor and free its NPUs: `ExecutorRetired`. Tasks it still has come back as `TaskFailed`.

    Of one that has died meanwhile nothing more is heard than its `ExecutorFailed`.
    """

    executor: str


class AnnounceExecutor(msgspec.Struct, frozen=True, tag=True):
    """Push a change of the executor list to a job executor: `ExecutorAnnounced`."""

    job_executor: str
    executor: str
    spec: ExecutorSpec
    state: ExecutorState
    kv_blocks: int
    max_sequences: int


class DeclareNoCapacity(msgspec.Struct, frozen=True, tag=True):
    """Tell a job executor that no executor of this model will come: `NoCapacity`."""

    job_executor: str
    model: str
    reason: str


class OpenDoors(msgspec.Struct, frozen=True, tag=True):
    """Tell the client that the executors a run starts with are ready: `FleetReady`."""


class EndRun(msgspec.Struct, frozen=True, tag=True):
    """Nothing is left to do: `Cluster.next_event` returns None from here on."""


class SubmitWork(msgspec.Struct, frozen=True, tag=True):
    """The client asks for work other than serving: `WorkArrived`, and in the end one `WorkEnded`."""

    job_executor: str
    request: WorkRequest
    truth: Truth


class SubmitCall(msgspec.Struct, frozen=True, tag=True):
    """A job makes an LLM call: `CallArrived` at a serving job executor, and in the end one `CallEnded` at `caller`.

    `work`, `step`: of which request, and which of its steps, so that the sampler's side knows the answer.
    """

    job_executor: str
    caller: str
    request: Request
    work: int
    step: int


class EndCall(msgspec.Struct, frozen=True, tag=True):
    """The serving job executor's last word on a call: `CallEnded` at `caller`; the frontend may forget it."""

    caller: str
    request_id: int
    outcome: Outcome
    generated: int
    reason: str = ""


class DispatchWork(msgspec.Struct, frozen=True, tag=True):
    """Hand a task to a worker: in the end one of `WorkFinished`, `WorkFailed`, `WorkAborted`, to `job_executor`."""

    job_executor: str
    executor: str
    task: WorkTask


class EndWork(msgspec.Struct, frozen=True, tag=True):
    """The last word on a request for work: `WorkEnded` at the client."""

    request_id: int
    outcome: Outcome
    reason: str = ""


Action = (
    SetTimer
    | SubmitRequest
    | CancelRequest
    | DispatchTask
    | AbortTask
    | EndRequest
    | ReportDemand
    | LaunchExecutor
    | DrainExecutor
    | ReleaseKvContext
    | SwitchRole
    | RetireExecutor
    | AnnounceExecutor
    | DeclareNoCapacity
    | OpenDoors
    | EndRun
    | SubmitWork
    | SubmitCall
    | EndCall
    | DispatchWork
    | EndWork
)
