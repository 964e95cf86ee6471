"""The global prompt tree of a job executor: which executors have probably cached which prefixes (DeepServe 5.2)."""

from itertools import islice

from cluster.identity import BlockIds


class PromptTree:
    """Block identity → set of executors, the set as bits of an integer.

    Identities are chained, so a flat table is a tree: an executor has a prefix if it has the prefix's last block.
    It is the job executor's belief, from what it sent where; engines evict without telling. At most `max_blocks` are
    kept, the least recently presented go first, a sixteenth at a time.
    """

    def __init__(self, max_blocks: int = 1_000_000) -> None:
        if max_blocks < 1:
            raise ValueError(f"max_blocks is {max_blocks}: a prompt tree keeps at least one block")
        self._max_blocks = max_blocks
        self._holders: dict[int, int] = {}  # the least recently presented first
        self._bits: dict[str, int] = {}
        self._names: list[str] = []
        self._asked: list[str] = []
        self._asked_mask = 0
        self._places: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._holders)

    def insert(self, ids: BlockIds, executor: str) -> None:
        """`executor` has computed a context with these blocks."""
        bit = self._bit(executor)
        holders, pop = self._holders, self._holders.pop
        for block in reversed(ids):  # the deepest block ends up oldest, so a prefix outlives what extends it
            holders[block] = pop(block, 0) | bit
        excess = len(holders) - self._max_blocks
        if excess > 0:  # some more than that, because a dictionary is slow to find its oldest entry
            for block in list(islice(holders, max(excess, self._max_blocks // 16))):
                del holders[block]

    def holds(self, ids: BlockIds, executor: str) -> bool:
        """Whether `executor` has the whole context."""
        return bool(self._holders.get(ids[-1], 0) & self._bits.get(executor, 0))

    def longest_match(self, ids: BlockIds, executors: list[str]) -> tuple[int, list[str]]:
        """The longest prefix that any of `executors` has, in blocks, and all of them that have it."""
        holders, among = self._holders.get, self._mask(executors)
        depth, best = 0, 0
        for block in ids:
            among &= holders(block, 0)
            if not among:
                break
            depth, best = depth + 1, among
        found = []
        while best:
            lowest = best & -best
            found.append(self._names[lowest.bit_length() - 1])
            best ^= lowest
        found.sort(key=self._places.__getitem__)
        return depth, found

    def _mask(self, executors: list[str]) -> int:
        """The bits of these executors, which are mostly those of the last time: then it is the same list."""
        if executors is not self._asked:
            self._asked = executors
            self._places = {executor: place for place, executor in enumerate(executors)}
            self._asked_mask = sum(self._bits.get(executor, 0) for executor in executors)
        return self._asked_mask

    def forget(self, executor: str) -> None:
        """The executor and its cache are gone. Its bit is never used again, so nothing has to be searched."""
        self._bits.pop(executor, None)
        self._asked = []

    def _bit(self, executor: str) -> int:
        if executor not in self._bits:
            self._bits[executor] = 1 << len(self._names)
            self._names.append(executor)
            self._asked = []
        return self._bits[executor]
