"""Work other than serving: requests for it, what they are made of, and its tasks. Plain data.

A request for work becomes jobs, a job becomes tasks (DeepServe section 3). Fine-tuning: the jobs preprocess, train and
evaluate, one after the other. Agent: one job that loops LLM calls and tool calls. An LLM call is a serving request of
its own, placed by a serving job executor like any other; every other task takes a slot of a worker.
"""

from collections.abc import Callable

import msgspec

from cluster.request import Answer, Arrival, Request, Trigger
from cluster.vocabulary import BLOCK_TOKENS, ExecutorSpec, Role

WORK = "je-work"
"""Name of the job executor for work other than serving."""

FIRST_CALL = 1 << 38
"""Request ids from here up are those of LLM calls that jobs make; a workload's own are below."""


class Call(msgspec.Struct, frozen=True, tag=True):
    """An LLM call: its prompt, the limit on its answer, and in which of the request's contexts it lies.

    A context's block ids cover prompt and answer, and whatever later calls of the same context add. None: what the
    call shares with nobody.
    """

    prompt_tokens: int
    max_tokens: int
    context: int | None = None


class Tool(msgspec.Struct, frozen=True, tag=True):
    """A tool call: takes a slot of a CPU worker for as long as it takes, which is in the request's `Truth`."""

    name: str = "tool"


Step = Call | Tool


class Agent(msgspec.Struct, frozen=True, tag=True):
    """One user turn of an agent: rounds one after the other, the steps of a round side by side.

    The rounds are the agent's programme, which its job executor runs without looking ahead; how long answers and tools
    really are, is known to the executors alone. A later turn of the session is a request of its own, with a trigger
    and a think time, whose contexts begin with these.

    Raises ValueError for a turn without steps, or calls of contexts that are not there.
    """

    rounds: tuple[tuple[Step, ...], ...]
    contexts: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        if not self.rounds or not all(self.rounds):
            raise ValueError("an agent's turn has a round without steps: allowed is at least one call or tool in each")
        for step in self.steps:
            if isinstance(step, Call) and step.context is not None and not 0 <= step.context < len(self.contexts):
                raise ValueError(f"{step} lies in a context that is not among the {len(self.contexts)} of the request")

    @property
    def steps(self) -> tuple[Step, ...]:
        """All steps, in the order that `Truth.lengths` has."""
        return tuple(step for steps in self.rounds for step in steps)


class FineTuning(msgspec.Struct, frozen=True, tag=True):
    """Training a model further on a data set of `tokens`, `epochs` times, or for so many `steps` where they are given.

    A step takes `batch_sequences` of `sequence_tokens`. `trainable`: share of the parameters that are trained, 1 for
    all of them, some 0.001 to 0.01 for adapters. The state is saved every `checkpoint_steps` (None: at the end only):
    these steps are one task, and what a failure costs is the task under way. `shards`: the data set is preprocessed in
    so many tasks side by side. `evaluation`: LLM calls made of the model in the end, all at once.

    Raises ValueError for sizes that make no sense.
    """

    tokens: int
    epochs: float = 1.0
    steps: int | None = None
    sequence_tokens: int = 2048
    batch_sequences: int = 32
    trainable: float = 1.0
    checkpoint_steps: int | None = None
    shards: int = 1
    evaluation: tuple[Call, ...] = ()

    def __post_init__(self) -> None:
        for name in ("tokens", "sequence_tokens", "batch_sequences", "shards"):
            if getattr(self, name) < 1:
                raise ValueError(f"fine-tuning: {name} is {getattr(self, name)}: allowed are 1 and more")
        for name in ("steps", "checkpoint_steps"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"fine-tuning: {name} is {getattr(self, name)}: allowed are 1 and more, or none")
        if not self.epochs > 0:
            raise ValueError(f"fine-tuning: epochs is {self.epochs}: allowed is a number above 0")
        if not 0 < self.trainable <= 1:
            raise ValueError(f"fine-tuning: trainable is {self.trainable}: allowed is a share above 0 and up to 1")

    @property
    def step_tokens(self) -> int:
        return self.sequence_tokens * self.batch_sequences

    @property
    def num_steps(self) -> int:
        """The last step of an epoch may be short of sequences; it is counted whole."""
        return self.steps or max(1, -(-round(self.tokens * self.epochs) // self.step_tokens))


class WorkRequest(msgspec.Struct, frozen=True):
    """What a client asks for beside answers. `model`: which model is called or trained. `priority`: as in `Request`."""

    request_id: int
    work: Agent | FineTuning
    model: str
    tenant: str = ""
    priority: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.request_id < FIRST_CALL:
            raise ValueError(
                f"request {self.request_id} asks for work: allowed are ids from 0 to {FIRST_CALL - 1}, those above are "
                "kept for the LLM calls of jobs"
            )


class Truth(msgspec.Struct, frozen=True):
    """How long every step of a request really is, in order: tokens of a call's answer, ns of a tool.

    Known to the executors' side of a backend alone. For fine-tuning: of its evaluation's calls.
    """

    lengths: tuple[int, ...] = ()


class WorkArrival(msgspec.Struct, frozen=True):
    """A row of a workload, as `Arrival` is for serving."""

    request: WorkRequest
    answer: Truth
    at_ns: int = 0
    after: Trigger | None = None
    cancel_after_ns: int | None = None

    def __post_init__(self) -> None:
        wanted = len(calls_and_tools(self.request))
        if len(self.answer.lengths) != wanted or min(self.answer.lengths, default=1) < 0:
            raise ValueError(
                f"request {self.request.request_id} has {wanted} steps and the lengths {self.answer.lengths}: needed "
                "is one length of 0 or more for each"
            )


AnyArrival = Arrival | WorkArrival


def calls_and_tools(request: WorkRequest) -> tuple[Step, ...]:
    """The steps of a request that `Truth.lengths` speaks of."""
    return request.work.steps if isinstance(request.work, Agent) else request.work.evaluation


# -- tasks --------------------------------------------------------------------------------------------------------


class RunTool(msgspec.Struct, frozen=True, tag=True):
    """Run a tool: `step` is its place in `Truth.lengths`."""

    name: str
    step: int


class Preprocess(msgspec.Struct, frozen=True, tag=True):
    """Tokenise and pack so many tokens of a data set."""

    tokens: int


class Train(msgspec.Struct, frozen=True, tag=True):
    """Train `steps` steps and save the state; `restore`: load it first, where the worker does not have it.

    The other fields are those of `FineTuning`.
    """

    model: str
    steps: int
    sequence_tokens: int
    batch_sequences: int
    trainable: float
    restore: bool = True

    @property
    def tokens(self) -> int:
        return self.steps * self.sequence_tokens * self.batch_sequences


Operation = RunTool | Preprocess | Train

RUNS_ON: dict[type, Role] = {RunTool: Role.CPU, Preprocess: Role.CPU, Train: Role.TRAINING}
"""The role of the workers that run each operation."""


class WorkTask(msgspec.Struct, frozen=True):
    """One operation on one slot of one worker."""

    task_id: int
    request_id: int
    operation: Operation


OperationTime = Callable[[ExecutorSpec, Operation], int]
"""How long an operation takes on a worker, in ns; tools are not asked about, they have a `Truth`."""


# -- what backends do with the truth ------------------------------------------------------------------------------


class Secrets:
    """The executors' side of the open requests for work: what their calls will answer, how long their tools take."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[WorkRequest, Truth]] = {}

    def add(self, request: WorkRequest, truth: Truth) -> None:
        self._known[request.request_id] = (request, truth)

    def forget(self, request_id: int) -> None:
        """The request has ended."""
        del self._known[request_id]

    def answer(self, request_id: int, step: int, call: Request) -> Answer:
        """What the sampler will do with a call that is step `step` of a request."""
        request, truth = self._known[request_id]
        return Answer(truth.lengths[step], _presented(request, step, call, truth.lengths[step]))

    def duration_ns(self, task: WorkTask, spec: ExecutorSpec, time: OperationTime) -> int:
        """How long a task takes on a worker; at least 1."""
        operation = task.operation
        if isinstance(operation, RunTool):
            return max(1, self._known[task.request_id][1].lengths[operation.step])
        return max(1, time(spec, operation))


def _presented(request: WorkRequest, step: int, call: Request, output: int) -> tuple[int, ...] | None:
    """Block ids of prompt and answer, where the next call of the context (or its end) presents both again."""
    steps = calls_and_tools(request)
    here = steps[step]
    if not isinstance(request.work, Agent) or not isinstance(here, Call) or here.context is None:
        return None
    context, end = request.work.contexts[here.context], here.prompt_tokens + output
    later = (each for each in steps[step + 1 :] if isinstance(each, Call) and each.context == here.context)
    following = next(later, None)
    goes_on = following is None or following.prompt_tokens >= end
    return context[: end // BLOCK_TOKENS] if goes_on else call.block_ids


def block_ids(request: WorkRequest, call: Call) -> tuple[int, ...] | None:
    """Identities of the full blocks of a call's prompt, where they are known."""
    if call.context is None or not isinstance(request.work, Agent):
        return None
    return request.work.contexts[call.context][: call.prompt_tokens // BLOCK_TOKENS]
