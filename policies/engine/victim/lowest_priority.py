"""The least important sequence is preempted."""

from collections.abc import Iterator

from cluster.engine_policy import EngineSequence, VictimPolicy


class LowestPriority(VictimPolicy):
    """The one of the lowest `Request.priority`, the newest of equals."""

    def choose(self, newest_first: Iterator[EngineSequence]) -> EngineSequence:
        return min(newest_first, key=lambda sequence: sequence.task.request.priority)
