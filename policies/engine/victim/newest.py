"""The newest sequence is preempted."""

from cluster.engine_policy import VictimPolicy


class Newest(VictimPolicy):
    """The one admitted last, so that the oldest always come to their end: what the base class does."""
