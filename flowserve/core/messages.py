"""What reaches a task executor, from job executors (through the backend) and from other executors."""

import msgspec

from cluster.request import Task
from cluster.vocabulary import BLOCK_TOKENS, Role
from cluster.work import WorkTask


class Dispatch(msgspec.Struct, frozen=True, tag=True, gc=False):
    """Run this task and report to `job_executor`."""

    job_executor: str
    task: Task


class DispatchWork(msgspec.Struct, frozen=True, tag=True):
    """Run this task, if this is a worker, and report to `job_executor`. `took_ns`: how long it is to take."""

    job_executor: str
    task: WorkTask
    took_ns: int


class Abort(msgspec.Struct, frozen=True, tag=True):
    """Let go of a task, or of the KV cache that it holds."""

    task_id: int


class Drain(msgspec.Struct, frozen=True, tag=True):
    """Take no more tasks; say when the last is gone."""


class SwitchRole(msgspec.Struct, frozen=True, tag=True):
    """Take the tasks of another role from here on; those at hand are finished."""

    role: Role


class KvRequested(msgspec.Struct, frozen=True, tag=True):
    """Executor `by` wants the KV cache held for `task_id`, for its own task `for_task`."""

    task_id: int
    for_task: int
    by: str


class KvOffered(msgspec.Struct, frozen=True, tag=True):
    """The answer: the blocks, leased until `KvReleased`; None where the KV cache is not held (any more).

    `block_tokens`: positions per block, the same at both ends of a transfer.

    Of a prefill in progress several come, each with the blocks from place `first` of the context on that are new. With
    `more`, others follow; the one without it says that the prefill is done. `step`: the plan in which the source
    computes these blocks just now, layer by layer.
    """

    task_id: int
    for_task: int
    source: str
    blocks: list[int] | None
    block_tokens: int = BLOCK_TOKENS
    first: int = 0
    more: bool = False
    step: int | None = None


class KvReleased(msgspec.Struct, frozen=True, tag=True):
    """Executor `by` has what it wanted, or has given up: the lease ends, the blocks are free."""

    task_id: int
    by: str


class KvFetched(msgspec.Struct, frozen=True, tag=True):
    """The data plane of this executor moved, or failed to move, the KV cache for `task_id`."""

    task_id: int
    success: bool


class KvMoved(msgspec.Struct, frozen=True, tag=True):
    """The data plane of this executor ended a copy between tiers, well or not."""

    ticket: int
    success: bool


class ReleaseContext(msgspec.Struct, frozen=True, tag=True):
    """Let go of an explicitly cached context."""

    context: str


class PeerLost(msgspec.Struct, frozen=True, tag=True):
    """An executor died: its leases end, and what was to come from it will not."""

    executor: str


Message = (
    Dispatch
    | DispatchWork
    | Abort
    | Drain
    | SwitchRole
    | KvRequested
    | KvOffered
    | KvReleased
    | KvFetched
    | KvMoved
    | ReleaseContext
    | PeerLost
)
