"""Least recently used."""

from cluster.engine_policy import EvictionPolicy


class Lru(EvictionPolicy):
    """What was used last goes last: what the base class does."""
