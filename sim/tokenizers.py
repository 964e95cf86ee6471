"""The frontend's tokenizers: workers that requests queue for, in order of arrival."""

import heapq

from cluster.vocabulary import NS_PER_S


class Tokenizers:
    """So many workers, each of which takes `token_s` seconds per token of a prompt."""

    def __init__(self, workers: int, token_s: float) -> None:
        self._free_at = [0] * workers
        self._ns_per_token = token_s * NS_PER_S

    def encode(self, now: int, tokens: int) -> int:
        """When a prompt that comes now is encoded, in ns: by the worker that is free first."""
        done = max(now, self._free_at[0]) + round(tokens * self._ns_per_token)
        heapq.heapreplace(self._free_at, done)
        return done
