"""Blocks of the KV cache that nobody uses."""

from collections.abc import Iterable


class BlockAllocator:
    """A stack of free block numbers `0 … total-1`; taking n blocks costs one slice and prefers ascending runs."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = list(range(total - 1, -1, -1))

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """Exactly `count` blocks, which must be free."""
        assert 0 <= count <= len(self._free), f"taking {count} of {len(self._free)} free blocks"
        if count == 1:
            return [self._free.pop()]
        split = len(self._free) - count
        taken = self._free[split:]
        del self._free[split:]
        taken.reverse()
        return taken

    def give_back(self, blocks: list[int]) -> None:
        """Return blocks; the next `take` of as many hands them out in the same order."""
        self._free.extend(reversed(blocks))

    def free_blocks(self) -> Iterable[int]:
        """The free block numbers, for integrity checks."""
        return iter(self._free)
