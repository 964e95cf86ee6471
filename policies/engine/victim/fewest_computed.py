"""The sequence with the least to recompute is preempted."""

from collections.abc import Iterator

from cluster.engine_policy import EngineSequence, VictimPolicy


class FewestComputed(VictimPolicy):
    """The one with the shortest computed context, the newest of equals: the least work is thrown away.

    Preemption recomputes, so its price is the context of the victim. The others have longer contexts and keep them.
    """

    def choose(self, newest_first: Iterator[EngineSequence]) -> EngineSequence:
        return min(newest_first, key=lambda sequence: sequence.position)
