"""Segmented LRU: what was never used again goes first."""

from cluster.engine_policy import CachedRun, EvictionPolicy

_PROTECTED = 2.0**40
"""More than there ever are uses to count."""


class SegmentedLru(EvictionPolicy):
    """Two segments (Karedla, Love and Wherry, 1994): blocks nobody came back for, then the others; LRU within each.

    Keeps shared prefixes through a burst of prompts that are seen once.
    """

    def key(self, run: CachedRun) -> float:
        return run.last_use + (_PROTECTED if run.hits else 0.0)
