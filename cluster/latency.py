"""The latency interface: what a step consists of, and what a model of its duration must answer."""

from typing import NamedTuple, Protocol


class StepShape(NamedTuple):
    """What one engine step computes; everything a latency model may look at.

    `prefill_tokens`: prompt tokens in the step. `prefill_attention`: sum over chunks of tokens x keys each attends
    to (causal, so start·n + n(n+1)/2). `prefill_chunks`: how many chunks. `decode_sequences`: sequences that decode
    one token. `decode_context`: sum of their context lengths, in tokens. `draft_tokens`: guesses that are verified
    beside them, which go through the model like prompt tokens but read no more context.
    """

    prefill_tokens: int
    prefill_attention: int
    prefill_chunks: int
    decode_sequences: int
    decode_context: int
    draft_tokens: int = 0

    @property
    def rows(self) -> int:
        """Tokens that go through the matrices together."""
        return self.prefill_tokens + self.decode_sequences + self.draft_tokens


class StepTime(Protocol):
    """How long a step takes."""

    def step_ns(self, shape: StepShape) -> int:
        """Duration of one step, from scheduling it to having its tokens, in integer nanoseconds (at least 1)."""
        ...


class LatencyModel(StepTime, Protocol):
    """How long steps take on one executor. Models derive from this, for what it adds to `step_ns`.

    `stages`: of the executor's pipeline; steps on end overlap in it, so that each takes `step_ns` behind another one,
    and `fill_ns` more where none is ahead of it. `varies`: steps of the same shape may take different times, by their
    number; then one object serves one executor. `reshape_ns`: what a step takes longer whose rows are not as many as
    those of the executor's step before, because something is made anew for each shape; never what `step_ns` says.
    """

    stages: int = 1
    varies: bool = False
    reshape_ns: int = 0

    def seek(self, step: int) -> None:
        """What is asked next is of the executor's steps from this number on, in their order."""
        return

    def decode_ns(self, sequences: int, context: int, steps: int) -> list[int]:
        """Durations of `steps` steps on end in which `sequences` decode, the first with `context` tokens in all.

        By definition what `step_ns` says of each, one by one; a model overrides it where it can say so faster.
        """
        contexts = range(context, context + steps * sequences, sequences)
        return [self.step_ns(StepShape(0, 0, 0, sequences, context)) for context in contexts]

    def fill_ns(self, shape: StepShape) -> int:
        """What the step takes longer where no other is ahead of it, because the pipeline is not full yet."""
        return 0
