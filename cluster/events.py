"""Everything the control plane hears. An event is addressed to one actor, and says when it occurred and was delivered.

Times are integer nanoseconds from the start of the run. Actors read the time from `event.time` and from nowhere else.
"""

from array import array
from collections.abc import Iterable
from itertools import pairwise

import msgspec

from cluster.request import Request
from cluster.vocabulary import ExecutorSpec, ExecutorState, FailureReason, Outcome, Stage
from cluster.work import WorkRequest

TIME_BYTES = 8
"""Of each packed time."""


def pack_times(times_ns: Iterable[int]) -> bytes:
    """Times in ns as 8-byte integers, the first one first: the hundreds of an answer are copied at once."""
    return array("q", times_ns).tobytes()


class EventBase(msgspec.Struct, frozen=True, tag=True, kw_only=True, gc=False):
    """`time`: when the actor hears of it; `occurred`: when it happened (never later than `time`)."""

    to: str
    time: int
    occurred: int


class RunStarted(EventBase, frozen=True, tag=True, kw_only=True):
    """The first event of every actor."""


class FleetReady(EventBase, frozen=True, tag=True, kw_only=True):
    """The executors a run starts with are ready (or will not be): a client that waits for them may begin."""


class TimerFired(EventBase, frozen=True, tag=True, kw_only=True):
    """A `SetTimer` of this actor is due."""

    name: str


class RequestArrived(EventBase, frozen=True, tag=True, kw_only=True):
    """The frontend accepted a request for this job executor."""

    request: Request


class CancelRequested(EventBase, frozen=True, tag=True, kw_only=True):
    """The client no longer wants the answer."""

    request_id: int


class FirstToken(EventBase, frozen=True, tag=True, kw_only=True):
    """A request's first token reached its frontend. Heard by the job executor and the client."""

    request_id: int
    task_id: int
    executor: str


class PrefillStarted(EventBase, frozen=True, tag=True, kw_only=True):
    """A prefill task has its blocks and a place in the batch, on an executor that sends KV cache while it computes: its
    decode task may be placed now. `kv_runs`: see `KvSource.runs`.
    """

    request_id: int
    task_id: int
    executor: str
    kv_runs: tuple[int, ...]


class TaskProgress(EventBase, frozen=True, tag=True, kw_only=True):
    """Tokens so far of the tasks that decode on one executor, sent with its load reports: (task id, tokens) pairs."""

    executor: str
    generated: tuple[tuple[int, int], ...]


class TaskFinished(EventBase, frozen=True, tag=True, kw_only=True):
    """A task is done. `stopped`: the request is complete; a prefill task that is not stopped holds its KV cache.

    `tokens`: how many this task produced; `token_times`: when, see `pack_times`; `last_token_ns`: the last of these.
    `cached_tokens`: of the prompt, not computed; of these, `dram_tokens` and `ssd_tokens` were fetched from those
    tiers. `kv_runs`: of a held KV cache, see `KvSource.runs`.
    Of an engine that speculates: `draft_tokens` it guessed, `accepted_tokens` of these, and `draft_rejections`: how
    often a guess was wrong or missing where the output went on.
    """

    request_id: int
    task_id: int
    executor: str
    generated: int
    stopped: bool
    tokens: int
    last_token_ns: int
    token_times: bytes
    cached_tokens: int = 0
    dram_tokens: int = 0
    ssd_tokens: int = 0
    preemptions: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    draft_rejections: int = 0
    kv_runs: tuple[int, ...] = ()

    @property
    def token_gaps_ns(self) -> tuple[int, ...]:
        """Times between the tokens."""
        return tuple(later - earlier for earlier, later in pairwise(array("q", self.token_times)))


class TaskFailed(EventBase, frozen=True, tag=True, kw_only=True):
    """A task was refused or lost. `generated`: tokens of the request that its frontend holds, from any attempt."""

    request_id: int
    task_id: int
    executor: str
    reason: FailureReason
    generated: int
    detail: str = ""


class TaskAborted(EventBase, frozen=True, tag=True, kw_only=True):
    """The answer to `AbortTask`: the executor has let go of the task and its blocks."""

    request_id: int
    task_id: int
    executor: str
    generated: int


class RequestEnded(EventBase, frozen=True, tag=True, kw_only=True):
    """What the client hears: exactly one for every request it submitted."""

    request_id: int
    outcome: Outcome
    generated: int
    reason: str = ""


class StageFinished(EventBase, frozen=True, tag=True, kw_only=True, omit_defaults=True):
    """A launching executor got through one stage. `source`: where its weights came from, if that is known."""

    executor: str
    stage: Stage
    took_ns: int
    source: str = ""


class ExecutorReady(EventBase, frozen=True, tag=True, kw_only=True):
    """An executor can run tasks. Its KV cache: `kv_blocks` of `block_tokens` tokens; its batch: `max_sequences`."""

    executor: str
    spec: ExecutorSpec
    kv_blocks: int
    block_tokens: int
    max_sequences: int


class ExecutorAnnounced(EventBase, frozen=True, tag=True, kw_only=True):
    """The cluster manager tells a job executor of a change in the list of executors, or in the role of one."""

    executor: str
    spec: ExecutorSpec
    state: ExecutorState
    kv_blocks: int
    max_sequences: int


class NoCapacity(EventBase, frozen=True, tag=True, kw_only=True):
    """The cluster manager has given up launching executors for a model: requests that wait for one must fail."""

    model: str
    reason: str


class LoadReport(EventBase, frozen=True, tag=True, kw_only=True):
    """An executor's own account of its load. It is as old as `time - occurred`.

    Since its start: `generated_tokens`, `preemptions`, and `busy_ns`, for how long it had a step to compute.
    """

    executor: str
    waiting: int
    running: int
    waiting_tokens: int
    free_blocks: int
    cached_blocks: int
    total_blocks: int
    generated_tokens: int
    preemptions: int
    busy_ns: int = 0


class DemandReported(EventBase, frozen=True, tag=True, kw_only=True):
    """A job executor tells the cluster manager how many of its requests wait for any executor of a model."""

    job_executor: str
    model: str
    parked: int


class ExecutorDrained(EventBase, frozen=True, tag=True, kw_only=True):
    """A draining executor has no task and holds no KV cache for anyone."""

    executor: str


class RoleSwitched(EventBase, frozen=True, tag=True, kw_only=True):
    """An executor takes the tasks of another role from here on; `spec` says which."""

    executor: str
    spec: ExecutorSpec


class ExecutorRetired(EventBase, frozen=True, tag=True, kw_only=True):
    """An executor has stopped and its NPUs are free."""

    executor: str


class ExecutorFailed(EventBase, frozen=True, tag=True, kw_only=True, omit_defaults=True):
    """An executor died or could not start. Its tasks are reported one by one as `TaskFailed` before this event.

    `permanent`: it could not start, and another launch would meet the same (a model that is not there, say).
    """

    executor: str
    reason: str
    permanent: bool = False


class WorkArrived(EventBase, frozen=True, tag=True, kw_only=True):
    """The frontend accepted a request for work other than serving."""

    request: WorkRequest


class CallArrived(EventBase, frozen=True, tag=True, kw_only=True):
    """A job makes an LLM call: to this job executor a request like any other, but that `caller` hears of its end."""

    request: Request
    caller: str


class CallEnded(EventBase, frozen=True, tag=True, kw_only=True):
    """What the caller hears: exactly one for every call it made. `generated`: tokens of the answer."""

    request_id: int
    outcome: Outcome
    generated: int
    reason: str = ""


class WorkFinished(EventBase, frozen=True, tag=True, kw_only=True):
    """A worker is done with a task, which it began at `started`."""

    request_id: int
    task_id: int
    executor: str
    started: int


class WorkFailed(EventBase, frozen=True, tag=True, kw_only=True):
    """A worker gave a task back, or died with it."""

    request_id: int
    task_id: int
    executor: str
    reason: FailureReason
    detail: str = ""


class WorkAborted(EventBase, frozen=True, tag=True, kw_only=True):
    """The answer to `AbortTask` from a worker."""

    request_id: int
    task_id: int
    executor: str


class WorkEnded(EventBase, frozen=True, tag=True, kw_only=True):
    """What the client hears: exactly one for every request for work that it submitted."""

    request_id: int
    outcome: Outcome
    reason: str = ""


Event = (
    RunStarted
    | FleetReady
    | TimerFired
    | RequestArrived
    | CancelRequested
    | FirstToken
    | PrefillStarted
    | TaskProgress
    | TaskFinished
    | TaskFailed
    | TaskAborted
    | RequestEnded
    | StageFinished
    | ExecutorReady
    | ExecutorAnnounced
    | NoCapacity
    | LoadReport
    | DemandReported
    | ExecutorDrained
    | RoleSwitched
    | ExecutorRetired
    | ExecutorFailed
    | WorkArrived
    | CallArrived
    | CallEnded
    | WorkFinished
    | WorkFailed
    | WorkAborted
    | WorkEnded
)
