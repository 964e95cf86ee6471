"""A fixed number of prompt tokens per step."""

from cluster.engine_policy import ChunkPolicy


class Fixed(ChunkPolicy):
    """At most `tokens` prompt tokens per step, and the whole budget where nothing decodes (Sarathi-Serve's chunks)."""

    def __init__(self, tokens: int) -> None:
        if tokens < 1:
            raise ValueError(f"tokens is {tokens}: allowed are 1 prompt token per step and more")
        self._tokens = tokens

    def prompt_tokens(self, budget: int, decodes: int, decode_context: int) -> int:
        return min(budget, self._tokens) if decodes else budget
