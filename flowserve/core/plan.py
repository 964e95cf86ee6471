"""What one engine step computes."""

from typing import Final, NamedTuple

from cluster.latency import StepShape
from flowserve.core.sequence import Sequence

_new_tuple: Final = tuple.__new__


class Chunk:
    """`tokens` prompt tokens of a sequence from position `start`. `samples`: the last one yields a token."""

    __slots__ = ("samples", "sequence", "start", "tokens")

    def __init__(self, sequence: Sequence, start: int, tokens: int, samples: bool) -> None:
        self.sequence = sequence
        self.start = start
        self.tokens = tokens
        self.samples = samples


class Verify(NamedTuple):
    """One step of a sequence that speculates: its last token and `draft` guesses behind it, from position `start`.

    It yields the model's token behind the last right guess, and the right guesses: 1 to draft + 1 tokens. What wrong
    guesses leave in the KV cache is overwritten by the next step.
    """

    sequence: Sequence
    start: int
    draft: int


class Plan:
    """A numbered step: prompt chunks, one token for each sequence in `decodes`, and a verification for each that
    speculates, of which each sequence has at most one in flight.

    `clock`: the decode clock after this plan was issued. `last`: sequences that may have no further token after this
    plan's (they reach the client's limit). Runners read positions off the sequences right after `schedule()`.
    """

    __slots__ = ("_shape", "_steps", "chunks", "clock", "decodes", "last", "number", "verifies")

    def __init__(
        self,
        number: int,
        chunks: list[Chunk],
        decodes: tuple[Sequence, ...],
        verifies: list[Verify],
        last: list[Sequence],
        clock: int,
        shape: StepShape,
    ) -> None:
        self.number = number
        self.chunks = chunks
        self.decodes = decodes
        self.verifies = verifies
        self.last = last
        self.clock = clock
        self._shape = shape
        self._steps = 0

    @property
    def shape(self) -> StepShape:
        """What it consists of."""
        return self.shape_after(0) if self._steps else self._shape

    def advance(self, steps: int) -> None:
        """Become the plan that many steps on, see `EngineCore.advance`, which goes on with the prompt."""
        self.number += steps
        self._steps += steps
        if self.decodes:
            self.clock += steps

    def narrow(self, drafts: list[int]) -> None:
        """What a runner has found to guess, by verification, where that is less than there is room for."""
        wide = self.verifies
        self.verifies = [verify._replace(draft=draft) for verify, draft in zip(wide, drafts, strict=True)]
        less = sum(verify.draft for verify in wide) - sum(drafts)
        shape = self.shape
        self._steps = 0
        self._shape = shape._replace(decode_context=shape.decode_context - less, draft_tokens=shape.draft_tokens - less)

    def shape_after(self, steps: int) -> StepShape:
        """Of what `EngineCore.advance` makes of this plan: decodes a token further each step, and of a prompt the next
        chunk.
        """
        tokens, attention, chunks, sequences, context, draft = self._shape
        if tokens and (steps or self._steps):
            chunk = self.chunks[0]
            start = chunk.start + steps * chunk.tokens
            tokens = min(chunk.tokens, chunk.sequence.target - start)
            attention = start * tokens + tokens * (tokens + 1) // 2
        context += (self._steps + steps) * sequences
        # Like StepShape(...), without the detour through its own __new__: this is asked in every step.
        return _new_tuple(StepShape, (tokens, attention, chunks, sequences, context, draft))

    @property
    def sampling(self) -> list[Sequence]:
        """Sequences that get tokens from this plan, in the order a runner returns them."""
        return [
            *(chunk.sequence for chunk in self.chunks if chunk.samples),
            *self.decodes,
            *(verify.sequence for verify in self.verifies),
        ]


class Fetch(NamedTuple):
    """KV cache to be brought from another engine: positions `[skip, tokens)` into `blocks[skip // block_tokens :]`. In
    place there is nothing to bring, and `skip` is not below `tokens`.
    """

    sequence: Sequence
    skip: int
    tokens: int


class StepResult:
    """What `complete` found: sequences that got the first token of their task here, or a token behind a preemption;
    those that speculate, with how many tokens they got; and those that are done, with whether their KV cache waits here
    to be fetched.
    """

    __slots__ = ("finished", "first_tokens", "verified")

    def __init__(
        self,
        first_tokens: list[Sequence],
        verified: list[tuple[Sequence, int]],
        finished: list[tuple[Sequence, bool]],
    ) -> None:
        self.first_tokens = first_tokens
        self.verified = verified
        self.finished = finished

    def __bool__(self) -> bool:
        """Whether there is anything."""
        return bool(self.first_tokens or self.verified or self.finished)
