"""Request → Job → Task, and what a workload says about a request that no scheduler may know.

A request is an outside trigger, a job is the unit of work it becomes, a task is the operation that one executor
runs (DeepServe section 3). Chat on a colocated executor: one job, one task; disaggregated: one job, two tasks.

What is made by the million and never changed is in no reference cycle, and not tracked as if it could be (gc=False).
"""

from typing import Literal

import msgspec

from cluster import identity
from cluster.vocabulary import TaskKind


class Request(msgspec.Struct, frozen=True, gc=False):
    """What a client sends, and all that schedulers and policies may see of it.

    `block_ids` name the full 16-token blocks of the prompt; None means content shared with nobody.
    `max_tokens` is the client's limit; the true output length is in `Answer`. `adapter`: weights on top of the model's.
    `context_id`: preserve this prompt in the caches under an ID, or, where it begins with what the ID names, use that.
    `release_context`: let go of the ID when this request has ended.
    `priority`: the larger, the more important. `deadline_ns`: the whole answer is due so long after the request arrived
    at the frontend, where the counting of every metric begins too; waiting anywhere and failed attempts count.

    Raises ValueError for numbers that no request has.
    """

    request_id: int
    prompt_tokens: int
    max_tokens: int
    model: str
    block_ids: tuple[int, ...] | None = None
    tenant: str = ""
    priority: int = 0
    deadline_ns: int | None = None
    adapter: str = ""
    context_id: str | None = None
    release_context: bool = False

    def __post_init__(self) -> None:
        if self.prompt_tokens < 1 or self.max_tokens < 1:
            raise ValueError(
                f"request {self.request_id} has prompt_tokens {self.prompt_tokens} and max_tokens {self.max_tokens}: "
                "allowed are 1 and more of each"
            )
        if self.deadline_ns is not None and self.deadline_ns < 1:
            raise ValueError(
                f"request {self.request_id} has a deadline {self.deadline_ns} ns after its arrival: allowed are 1 and "
                "more, or none"
            )

    @property
    def context(self) -> str | None:
        """The ID that a cache knows the context by: IDs of different tenants and adapters are different ones."""
        return None if self.context_id is None else "\x1f".join((self.tenant, self.adapter, self.context_id))

    @property
    def prompt_ids(self) -> identity.BlockIds:
        """Identities of the prompt's full blocks; at least that many, in order."""
        return identity.unique(self.request_id) if self.block_ids is None else self.block_ids


class Answer(msgspec.Struct, frozen=True, gc=False):
    """What the sampler will do: known to the sampler's side of a backend alone (an oracle must say that it is one).

    `block_ids` name the full blocks of prompt and output together, where a later turn of the session presents them.
    """

    output_tokens: int
    block_ids: tuple[int, ...] | None = None


class Trigger(msgspec.Struct, frozen=True):
    """A closed-loop arrival: `delay_ns` after request `request_id`, or after the `count`-th request, got there."""

    event: Literal["first_token", "ended"]
    request_id: int | None = None
    count: int | None = None
    delay_ns: int = 0

    def __post_init__(self) -> None:
        if (self.request_id is None) == (self.count is None):
            raise ValueError(f"{self}: a trigger names a request_id or a count, one of the two")


class Arrival(msgspec.Struct, frozen=True, gc=False):
    """One row of a workload: a request that comes at a time (from the start of the run) or after a trigger."""

    request: Request
    answer: Answer
    at_ns: int = 0
    after: Trigger | None = None
    cancel_after_ns: int | None = None


class KvSource(msgspec.Struct, frozen=True, gc=False):
    """Where the prefilled KV cache of a request lies: held for that task until it is fetched or released.

    `runs`: lengths in blocks of its contiguous pieces, in order; whoever fetches it takes matching ones. Empty where
    the executor does not say.
    """

    executor: str
    task_id: int
    runs: tuple[int, ...] = ()


class Task(msgspec.Struct, frozen=True, gc=False):
    """One operation on one executor. `generated` tokens are with the frontend already, it goes on behind them.
    `deadline_ns`: when the request's answer is due, in the time of the run.

    A retry is a new task: prompt and generated tokens are prefilled again, so nothing is repeated or skipped.
    """

    task_id: int
    request: Request
    kind: TaskKind
    generated: int = 0
    kv: KvSource | None = None
    deadline_ns: int | None = None

    @property
    def context_tokens(self) -> int:
        return self.request.prompt_tokens + self.generated
