"""Blocks of the KV cache that nobody uses, and which of them to hand out so that transfers need few copies."""

from abc import ABC, abstractmethod
from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from typing import Final, Literal

AllocatorKind = Literal["segment", "stack"]
NOWHERE: Final = -2
"""No block: nothing is behind it."""
FEWEST_LEFT = 64
"""So many entries of segments that are gone may always be left in the order of lengths."""

# Block numbers that were handed out, once for all caches of a process: numbers of their own take four times the memory.
_numbers: Final[list[int]] = []


class BlockAllocator(ABC):
    """Free block numbers of `0 … total-1`. Callers never take more than is `free`, nor return what they do not hold.

    `free`: how many blocks are.
    """

    total: int
    free: int

    @abstractmethod
    def take(self, count: int, after: int | None = None, runs: Sequence[int] = ()) -> list[int]:
        """Exactly `count` blocks, which must be free.

        `after`: the block that they continue, so that the best first block is `after + 1`. `runs`: lengths of the
        contiguous runs of the blocks that will be copied into these, in order; where the result must be cut into pieces
        too, cuts at the same places cost no further copy.
        """

    @abstractmethod
    def take_one(self, after: int) -> int:
        """What `take(1, after)` hands out, faster; `after`: `NOWHERE` where it continues nothing."""

    @abstractmethod
    def give_back(self, blocks: list[int]) -> None:
        """Return blocks, in any order."""

    @abstractmethod
    def free_blocks(self) -> Iterable[int]:
        """The free block numbers, for integrity checks."""


def make_allocator(kind: AllocatorKind, total: int) -> BlockAllocator:
    """The allocator of that name, with all blocks free."""
    return SegmentAllocator(total) if kind == "segment" else StackAllocator(total)


def _consecutive(start: int, end: int) -> list[int]:
    """start … end-1, the same objects at every call."""
    if end > len(_numbers):
        _numbers.extend(range(len(_numbers), end))
    return _numbers[start:end]


class StackAllocator(BlockAllocator):
    """A stack of free block numbers: n blocks cost one slice; what was returned last is handed out first."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.free = total
        self._free = _consecutive(0, total)[::-1]

    def take(self, count: int, after: int | None = None, runs: Sequence[int] = ()) -> list[int]:
        """Without regard to `after` and `runs`."""
        assert 0 <= count <= self.free, f"taking {count} of {self.free} free blocks"
        self.free -= count
        split = len(self._free) - count
        taken = self._free[split:]
        del self._free[split:]
        taken.reverse()
        return taken

    def take_one(self, after: int) -> int:
        self.free -= 1
        return self._free.pop()

    def give_back(self, blocks: list[int]) -> None:
        """The next `take` of as many hands them out in the same order."""
        self.free += len(blocks)
        self._free.extend(reversed(blocks))

    def free_blocks(self) -> Iterable[int]:
        return iter(self._free)


class SegmentAllocator(BlockAllocator):
    """Free blocks as maximal segments of consecutive numbers, found by size (FlowKV, arXiv 2504.03775, section 3).

    A request gets the fewest runs that the free segments allow: the rest of the segment that it continues, else the
    smallest segment that holds it all, else the largest ones. What is returned merges with its neighbours.

    Single blocks come from the smallest segment until it is used up, so that one is kept apart, as [next, limit), and
    costs an addition per block; it is counted among the others again before a request for many.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.free = total
        # The maximal free segments [start, end), by start and by end.
        self._ends = {0: total}
        self._starts = {total: 0}
        # length * total + start of each, in order. Of a segment that has grown or gone an entry may be left.
        self._by_length = [total * total]
        self._next = 0
        self._limit = 0

    def take(self, count: int, after: int | None = None, runs: Sequence[int] = ()) -> list[int]:
        assert 0 <= count <= self.free, f"taking {count} of {self.free} free blocks"
        if count == 1:
            return [self.take_one(NOWHERE if after is None else after)]
        self._put_back()
        blocks: list[int] = []
        if after is not None and (end := self._ends.get(after + 1)) is not None:
            room = end - after - 1
            if room >= count or count > self._longest():
                blocks = self._cut(after + 1, min(room, count))
        while (left := count - len(blocks)) > 0:
            piece = left if self._longest() >= left else _aligned(self._longest(), runs, len(blocks))
            cut = self._cut(self._pop(bisect_left(self._by_length, piece * self.total)), piece)
            blocks = blocks + cut if blocks else cut
        return blocks

    def give_back(self, blocks: list[int]) -> None:
        self.free += len(blocks)
        blocks, found, at, end = sorted(blocks), list[int](), 0, len(blocks)
        while at < end:
            # Sorted numbers without a gap: as far from each other as their places are.
            start, reach = blocks[at], 1
            while at + reach < end and blocks[at + reach] - start == reach:
                reach *= 2
            low, high = at + reach // 2, min(at + reach, end)
            while high - low > 1:
                middle = (low + high) // 2
                if blocks[middle] - start == middle - at:
                    low = middle
                else:
                    high = middle
            found.append(self._merge(start, blocks[low] + 1))
            at = low + 1
        if len(found) == 1:
            insort(self._by_length, found[0])
        elif found:
            if len(self._by_length) > FEWEST_LEFT + 2 * len(self._ends):
                found = [(end - start) * self.total + start for start, end in self._ends.items()]
                self._by_length.clear()
            self._by_length += found
            self._by_length.sort()

    def free_blocks(self) -> Iterable[int]:
        self._put_back()
        return [block for start, end in self._ends.items() for block in range(start, end)]

    def take_one(self, after: int) -> int:
        """The block behind `after`, else one of the smallest free segment, to its end."""
        self.free -= 1
        if after + 1 in self._ends:
            block = after + 1
            self._set(block + 1, self._ends.pop(block))
            return block
        block = self._next
        if block == self._limit:
            block = self._pop(0)
            self._limit = self._ends.pop(block)
            del self._starts[self._limit]
        self._next = block + 1
        return block

    def _put_back(self) -> None:
        """Count the segment that is kept apart among the others again."""
        if self._next < self._limit:
            insort(self._by_length, self._merge(self._next, self._limit))
            self._next = self._limit = 0

    def _longest(self) -> int:
        """Length of the largest free segment."""
        while True:
            entry = self._by_length[-1]
            start, length = entry % self.total, entry // self.total
            if self._ends.get(start) == start + length:
                return length
            self._by_length.pop()

    def _pop(self, place: int) -> int:
        """Start of the first free segment from this place on in the order of lengths, which it leaves."""
        while True:
            entry = self._by_length.pop(place)
            start = entry % self.total
            if self._ends.get(start) == start + entry // self.total:
                return start

    def _cut(self, start: int, count: int) -> list[int]:
        """Take the first `count` blocks of the free segment at `start`."""
        self.free -= count
        self._set(start + count, self._ends.pop(start))
        return _consecutive(start, start + count)

    def _set(self, start: int, end: int) -> None:
        """[start, end) is what is left of a free segment."""
        if start < end:
            insort(self._by_length, self._note(start, end))
        else:
            del self._starts[end]

    def _merge(self, start: int, end: int) -> int:
        """Make [start, end) free, as one segment with what is free on both sides of it. Returns its entry."""
        starts, ends = self._starts, self._ends
        if start in starts:
            start = starts.pop(start)
        if end in ends:
            end = ends.pop(end)
        return self._note(start, end)

    def _note(self, start: int, end: int) -> int:
        """[start, end) is a free segment. Returns its entry in the order of lengths."""
        self._ends[start] = end
        self._starts[end] = start
        return (end - start) * self.total + start


def _aligned(room: int, runs: Sequence[int], at: int) -> int:
    """The longest piece of at most `room` blocks from place `at` on that ends where a run does; `room` without one."""
    piece = end = 0
    for run in runs:
        end += run
        if end - at > room:
            break
        piece = max(piece, end - at)
    return piece or room
