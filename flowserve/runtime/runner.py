"""What the engine loop needs of a device, and the data that reaches the sampler's side beside the control plane."""

from collections.abc import Collection
from typing import NamedTuple, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from cluster.request import Answer
from flowserve.core.plan import Plan
from flowserve.core.tiers import Move
from flowserve.core.transfer import KvLayout
from flowserve.runtime.sampling import Sampling


class Payload(msgspec.Struct, frozen=True):
    """The tokens of a task and what its sampler must know.

    `tokens`: prompt and the `generated` tokens of output before this task. `answer`: in a trace replay, where to stop
    (counted over the whole request). `forced`: tokens the sampler must yield, by output index, where the trace fixes
    their content.
    """

    tokens: list[int]
    sampling: Sampling
    answer: Answer | None = None
    forced: list[int] | None = None
    generated: int = 0

    def ends(self, eos: Collection[int]) -> frozenset[int]:
        """Tokens that end the output, in a model with these end-of-sequence tokens. In a trace replay none does."""
        if self.answer is not None:
            return frozenset()
        return frozenset(self.sampling.stop_token_ids) | frozenset(() if self.sampling.ignore_eos else eos)


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Natural logarithms of probabilities by the model alone: of a sampled token, and of the most likely ones."""

    chosen: float
    top: list[tuple[int, float]]


class KvHandle(msgspec.Struct, frozen=True):
    """How another process reads this engine's KV cache: a file to map, and the layout of what is in it.

    `shape`: (layers, 2, blocks, block_tokens, kv_heads, head_dim), whatever the order in memory, which `layout` says.
    `draft`: the same of the model that guesses, where one does: its blocks go with those of the same numbers.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    layout: KvLayout
    draft: "KvHandle | None" = None


class StepOutput(NamedTuple):
    """What a plan gave, on the host.

    For the S sequences of `plan.sampling`, in that order: `tokens` int64 [S, most], of which each has its first
    `counts` [S] (0 where it has failed). `failed`: task id → why it has no usable token; the others are unharmed.
    `logprobs`: task id → one for each of its tokens or more, where they were asked for.
    """

    tokens: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
    failed: dict[int, str]
    logprobs: dict[int, list[TokenLogprobs]] | None = None

    def accepted(self, plan: Plan) -> dict[int, int]:
        """By task id the tokens of those that speculate."""
        first = len(self.counts) - len(plan.verifies)
        ids = [verify.sequence.task_id for verify in plan.verifies]
        return dict(zip(ids, self.counts[first:].tolist(), strict=True))


class Runner(Protocol):
    """Runs the plans of one engine. Calls come from one thread. `about`: a line for the log on how it computes.
    `kv_blocks`: of the KV cache, where it measured how many fit; None: as many as it was told.
    """

    about: str
    kv_blocks: int | None

    def add(self, task_id: int, payload: Payload) -> None:
        """A task that plans may name from now on. Raises ValueError where its tokens are not the model's."""
        ...

    def remove(self, task_id: int) -> None:
        """No later plan names this task; those in flight may. Unknown ids are ignored."""
        ...

    def warm_up(self) -> None:
        """Before the first task: run what makes a first step slow."""
        ...

    def launch(self, plan: Plan) -> None:
        """Start computing a plan, behind those launched before it.

        Called right after `schedule()`: positions and block tables are read off the sequences now, and not later.
        A plan with more room for guesses than there are guesses is narrowed to what is computed.
        """
        ...

    def collect(self) -> StepOutput:
        """Wait for the oldest plan that was launched and not collected, and return what it gave."""
        ...

    @property
    def eos(self) -> Collection[int]:
        """The model's end-of-sequence tokens."""
        ...

    @property
    def kv_handle(self) -> KvHandle | None:
        """Where peers find the KV cache; None where there is nothing to move."""
        ...

    def stage(self, blocks: list[int]) -> None:
        """Peers are about to read these blocks: bring them where they can, if they cannot read the device's memory."""
        ...

    def fetch(self, source: KvHandle | None, source_blocks: list[int], blocks: list[int]) -> int:
        """Copy a peer's KV cache blocks into ours, block for block; returns the number of copies it took.

        Raises OSError where the peer's KV cache is gone.
        """
        ...

    def move(self, move: Move) -> None:
        """Copy KV cache blocks between tiers, pair by pair. Raises OSError where that fails.

        The one call that comes from another thread, while plans run; they do not touch these blocks.
        """
        ...

    def close(self) -> None:
        """Free the device and shared memory."""
        ...
