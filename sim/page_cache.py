"""A host's page cache: which models' weights lie in its DRAM, least recently used ones leave first."""

from collections import OrderedDict


class PageCache:
    """Files by name, up to `capacity` bytes less what is `pinned` (None: everything fits). A file is there whole or not
    at all; one that does not fit is read past the cache.
    """

    def __init__(self, capacity: float | None) -> None:
        self._capacity = float("inf") if capacity is None else capacity
        self._files: OrderedDict[str, int] = OrderedDict()
        self.used = 0
        self.pinned = 0

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def touch(self, name: str) -> bool:
        """Whether the file is there; if so, it was just used."""
        if name in self._files:
            self._files.move_to_end(name)
            return True
        return False

    def insert(self, name: str, num_bytes: int) -> None:
        """The file was read from disk."""
        if name in self._files or num_bytes + self.pinned > self._capacity:
            return
        self._files[name] = num_bytes
        self.used += num_bytes
        self._shrink()

    def pin(self, num_bytes: int) -> None:
        """Memory that is not the cache's any more; given back with a number below 0."""
        self.pinned += num_bytes
        self._shrink()

    def _shrink(self) -> None:
        while self._files and self.used + self.pinned > self._capacity:
            _, num_bytes = self._files.popitem(last=False)
            self.used -= num_bytes
