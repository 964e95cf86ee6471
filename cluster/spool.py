"""Append-only columns of integers: in memory, or, of a long run, mostly in a file that whoever records has opened."""

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
KEPT = 1 << 20
"""So many numbers are kept in memory before they are written."""
AT_ONCE = 1 << 22
"""So many are read at a time."""

OpenFile = Callable[[], IO[bytes]]


class Spool:
    """64-bit integers in the order they came. `open_file`: makes an empty file for what is too much for memory."""

    def __init__(self, open_file: OpenFile | None = None) -> None:
        self._open_file = open_file
        self._file: IO[bytes] | None = None
        self._written = 0
        self._kept = array("q")

    def __len__(self) -> int:
        return self._written + len(self._kept)

    def extend(self, values: Iterable[int]) -> None:
        self._kept.extend(values)
        if self._open_file is not None and len(self._kept) >= KEPT:
            self._write(self._open_file)

    def extend_bytes(self, values: bytes) -> None:
        """The same of integers as they lie in memory."""
        self._kept.frombytes(values)
        if self._open_file is not None and len(self._kept) >= KEPT:
            self._write(self._open_file)

    def _write(self, open_file: OpenFile) -> None:
        if self._file is None:
            self._file = open_file()
        self._file.write(self._kept.tobytes())
        self._written += len(self._kept)
        del self._kept[:]

    def array(self) -> Ints:
        """All of them. What is in the file is mapped, not read."""
        if self._file is None:
            return np.frombuffer(self._kept.tobytes(), np.int64)
        if len(self._kept):
            assert self._open_file is not None
            self._write(self._open_file)
        self._file.flush()
        return np.memmap(self._file, np.int64, "r", shape=(self._written,))


def order_statistics(parts: Callable[[], Iterator[Ints]], count: int, ranks: Sequence[int]) -> list[int]:
    """The values at some `ranks` (from 0) of the `count` numbers that `parts` yields, each time in the same pieces.

    Reads them twice and sorts only what falls together with a rank: exact, in little memory.
    """
    low = min(int(part.min()) for part in parts() if len(part))
    high = max(int(part.max()) for part in parts() if len(part))
    bins = 1 << 16
    width = (high - low) // bins + 1
    counts = np.zeros(bins, np.int64)
    for part in parts():
        counts += np.bincount((part - low) // width, minlength=bins)
    ends = np.cumsum(counts)
    assert int(ends[-1]) == count
    wanted = [int(np.searchsorted(ends, rank, side="right")) for rank in ranks]
    found: dict[int, list[Ints]] = {place: [] for place in wanted}
    for part in parts():
        places = (part - low) // width
        for place, pieces in found.items():
            pieces.append(part[places == place])
    ordered = {place: np.sort(np.concatenate(pieces)) for place, pieces in found.items()}
    before = ends - counts
    return [int(ordered[place][rank - int(before[place])]) for place, rank in zip(wanted, ranks, strict=True)]
