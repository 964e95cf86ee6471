"""Shortest prompt first."""

from cluster.engine_policy import EngineSequence, Key, QueueOrder


class ShortestPrompt(QueueOrder):
    """The shortest context goes first: the best mean time to first token, paid by long prompts.

    `tokens_per_arrival`: every later arrival counts as so many tokens more, so that a long prompt waits for a bounded
    number of shorter ones; 0 lets it wait for ever.
    """

    def __init__(self, tokens_per_arrival: float = 0.0) -> None:
        super().__init__()
        if tokens_per_arrival < 0:
            raise ValueError(f"tokens_per_arrival is {tokens_per_arrival}: allowed are tokens from 0 up")
        self._tokens_per_arrival = tokens_per_arrival

    def key(self, sequence: EngineSequence) -> Key:
        return (sequence.task.context_tokens + self._tokens_per_arrival * sequence.arrival,)
