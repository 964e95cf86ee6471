"""First come, first served."""

from cluster.engine_policy import QueueOrder


class Fcfs(QueueOrder):
    """In order of arrival at the engine, a preempted sequence in its old place: what the base class does."""
