"""Earliest deadline first."""

from math import inf

from cluster.engine_policy import EngineSequence, Key, QueueOrder


class EarliestDeadline(QueueOrder):
    """By the time at which the whole answer is due; who has no deadline comes last, in order of arrival.

    EDF meets all deadlines where any order does, and under overload spends itself on those it will miss.
    """

    def key(self, sequence: EngineSequence) -> Key:
        deadline = sequence.task.deadline_ns
        return (inf if deadline is None else deadline,)
