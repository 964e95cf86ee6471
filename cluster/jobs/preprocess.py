"""Preprocessing of a data set: tokenising and packing, in shards side by side."""

from cluster.jobs.job import CallStep, Job
from cluster.work import FineTuning, Operation
from cluster.work import Preprocess as Shard


class Preprocess(Job):
    """One task per shard, of equal size but for a token."""

    kind = "preprocess"

    def __init__(self, work: FineTuning) -> None:
        self._work = work
        self._started = False

    def next(self) -> list[CallStep | Operation]:
        if self._started:
            return []
        self._started = True
        tokens, shards = self._work.tokens, min(self._work.shards, self._work.tokens)
        return [Shard(tokens * (number + 1) // shards - tokens * number // shards) for number in range(shards)]

    @property
    def tokens(self) -> int:
        return self._work.tokens if self._started else 0
