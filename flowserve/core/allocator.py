"""Blocks of the KV cache that nobody uses, and which of them to hand out so that transfers need few copies."""

from abc import ABC, abstractmethod
from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from typing import Literal

AllocatorKind = Literal["segment", "stack"]


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
    def take_one(self, after: int | None) -> int:
        """What `take(1, after)` hands out, faster."""

    @abstractmethod
    def give_back(self, blocks: list[int]) -> None:
        """Return blocks, in any order."""

    @abstractmethod
    def free_blocks(self) -> Iterable[int]:
        """The free block numbers, for integrity checks."""


def make_allocator(kind: AllocatorKind, total: int) -> BlockAllocator:
    """The allocator of that name, with all blocks free."""
    return SegmentAllocator(total) if kind == "segment" else StackAllocator(total)


class StackAllocator(BlockAllocator):
    """A stack of free block numbers: n blocks cost one slice; what was returned last is handed out first."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.free = total
        self._free = list(range(total - 1, -1, -1))

    def take(self, count: int, after: int | None = None, runs: Sequence[int] = ()) -> list[int]:
        """Without regard to `after` and `runs`."""
        assert 0 <= count <= self.free, f"taking {count} of {self.free} free blocks"
        self.free -= count
        split = len(self._free) - count
        taken = self._free[split:]
        del self._free[split:]
        taken.reverse()
        return taken

    def take_one(self, after: int | None) -> int:
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
    costs an addition per block; whatever else is asked puts it back first.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.free = total
        # The maximal free segments [start, end), three times: by start, by end, and in order of (length, start).
        self._ends = {0: total}
        self._starts = {total: 0}
        self._by_length = [total * total]  # length * total + start
        self._next = 0
        self._limit = 0

    def take(self, count: int, after: int | None = None, runs: Sequence[int] = ()) -> list[int]:
        assert 0 <= count <= self.free, f"taking {count} of {self.free} free blocks"
        if count == 1:
            return [self.take_one(after)]
        self._put_back()
        blocks: list[int] = []
        if after is not None and (end := self._ends.get(after + 1)) is not None:
            room = end - after - 1
            if room >= count or count * self.total > self._by_length[-1]:
                blocks = self._cut(after + 1, min(room, count))
        while (left := count - len(blocks)) > 0:
            longest = self._by_length[-1] // self.total
            piece = left if longest >= left else _aligned(longest, runs, len(blocks))
            best = bisect_left(self._by_length, piece * self.total)
            blocks += self._cut(self._by_length[best] % self.total, piece)
        return blocks

    def give_back(self, blocks: list[int]) -> None:
        if not blocks:
            return
        self._put_back()
        self.free += len(blocks)
        blocks = sorted(blocks)
        at, end = 0, len(blocks)
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
            self._merge(start, blocks[low] + 1)
            at = low + 1

    def free_blocks(self) -> Iterable[int]:
        self._put_back()
        return [block for start, end in self._ends.items() for block in range(start, end)]

    def take_one(self, after: int | None) -> int:
        """The block behind `after`, else the first one of the smallest free segment, which stays the smallest."""
        if after is not None and after + 1 in self._ends:
            self._put_back()
            self._cut(after + 1, 1)
            return after + 1
        block = self._next
        if block == self._limit:
            block = self._by_length.pop(0) % self.total
            self._limit = self._ends.pop(block)
            del self._starts[self._limit]
        self._next = block + 1
        self.free -= 1
        return block

    def _put_back(self) -> None:
        """Count the segment that is kept apart among the others again."""
        start, end = self._next, self._limit
        if start < end:
            self._ends[start] = end
            self._starts[end] = start
            insort(self._by_length, (end - start) * self.total + start)
            self._next = self._limit = 0

    def _cut(self, start: int, count: int) -> list[int]:
        """Take the first `count` blocks of the free segment at `start`."""
        end, rest = self._ends.pop(start), start + count
        by_length, total = self._by_length, self.total
        del by_length[bisect_left(by_length, (end - start) * total + start)]
        if rest < end:
            self._ends[rest] = end
            self._starts[end] = rest
            insort(by_length, (end - rest) * total + rest)
        else:
            del self._starts[end]
        self.free -= count
        return list(range(start, rest))

    def _merge(self, start: int, end: int) -> None:
        """Make [start, end) free, as one segment with what is free on both sides of it."""
        by_length, total = self._by_length, self.total
        before = self._starts.pop(start, None)
        if before is not None:
            del by_length[bisect_left(by_length, (start - before) * total + before)]
            start = before
        behind = self._ends.pop(end, None)
        if behind is not None:
            del by_length[bisect_left(by_length, (behind - end) * total + end)]
            end = behind
        self._ends[start] = end
        self._starts[end] = start
        insort(by_length, (end - start) * total + start)


def _aligned(room: int, runs: Sequence[int], at: int) -> int:
    """The longest piece of at most `room` blocks from place `at` on that ends where a run does; `room` without one."""
    piece = end = 0
    for run in runs:
        end += run
        if end - at > room:
            break
        piece = max(piece, end - at)
    return piece or room
