"""Preprocessing of a data set: tokenising and packing, in shards side by side."""

from cluster.jobs.job import CallStep, OneRound
from cluster.work import Operation
from cluster.work import Preprocess as Shard


class Preprocess(OneRound):
    """One task per shard, of equal size but for a token."""

    kind = "preprocess"

    def round(self) -> list[CallStep | Operation]:
        tokens, shards = self._work.tokens, min(self._work.shards, self._work.tokens)
        return [Shard(tokens * (number + 1) // shards - tokens * number // shards) for number in range(shards)]

    @property
    def tokens(self) -> int:
        return self._work.tokens if self._started else 0
