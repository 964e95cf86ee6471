"""What one engine step computes."""

from typing import NamedTuple

from cluster.latency import StepShape
from flowserve.core.sequence import Sequence


class Chunk(NamedTuple):
    """`tokens` prompt tokens of a sequence from position `start`. `samples`: the last one yields a token."""

    sequence: Sequence
    start: int
    tokens: int
    samples: bool


class Plan:
    """A numbered step: prompt chunks, and one token for each sequence in `decodes`.

    `clock`: the decode clock after this plan was issued. `last`: sequences that may have no further token after this
    plan's (they reach the client's limit). Runners read positions off the sequences right after `schedule()`.
    """

    __slots__ = ("chunks", "clock", "decodes", "last", "number", "shape")

    def __init__(
        self,
        number: int,
        chunks: list[Chunk],
        decodes: tuple[Sequence, ...],
        last: list[Sequence],
        clock: int,
        shape: StepShape,
    ) -> None:
        self.number = number
        self.chunks = chunks
        self.decodes = decodes
        self.last = last
        self.clock = clock
        self.shape = shape

    @property
    def sampling(self) -> list[Sequence]:
        """Sequences that get a token from this plan, in the order a runner returns them."""
        return [chunk.sequence for chunk in self.chunks if chunk.samples] + list(self.decodes)


class Fetch(NamedTuple):
    """KV cache to be brought from another engine: positions `[skip, tokens)` into `blocks[skip // block_tokens :]`."""

    sequence: Sequence
    skip: int
    tokens: int


class Finished(NamedTuple):
    """A sequence that is done here. `held`: its KV cache waits to be fetched."""

    sequence: Sequence
    held: bool


class StepResult(NamedTuple):
    """What `complete` found: sequences that got the first token of their task here, and those that are done."""

    first_tokens: list[Sequence]
    finished: list[Finished]
