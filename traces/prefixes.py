"""The set of context prefixes that have been seen: what a prefix cache without a size would hold."""

from array import array
from collections.abc import Sequence


class PrefixSet:
    """Remembers block-id lists as runs, 8 bytes per distinct block.

    A run is found by its first id alone: ids are chained, so an id occurs behind one prefix only.
    """

    def __init__(self) -> None:
        self._runs: dict[int, Sequence[int]] = {}

    def add(self, ids: tuple[int, ...]) -> int:
        """Add a context; returns how many of its leading blocks were there already."""
        at = 0
        while at < len(ids) and (run := self._runs.get(ids[at])) is not None:
            common = _common(run, ids, at)
            if common < len(run):
                self._runs[ids[at]] = run[:common]
                self._runs[run[common]] = run[common:]
            at += common
        if at < len(ids):
            self._runs[ids[at]] = _compact(ids[at:])
        return at


def _common(run: Sequence[int], ids: Sequence[int], at: int) -> int:
    """How many leading ids of `run` equal `ids[at:]`; the first does. Ids are chained, so bisection finds it."""
    low, high = 1, min(len(run), len(ids) - at)
    while low < high:
        middle = (low + high + 1) // 2
        if run[middle - 1] == ids[at + middle - 1]:
            low = middle
        else:
            high = middle - 1
    return low


def _compact(ids: tuple[int, ...]) -> Sequence[int]:
    try:
        return array("Q", ids)
    except OverflowError:  # ids that a request shares with nobody are negative
        return ids
