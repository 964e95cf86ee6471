"""The global prompt tree of a job executor: which executors have probably cached which prefixes (DeepServe 5.2)."""

from collections import OrderedDict

from cluster.identity import BlockIds


class PromptTree:
    """Block identity → set of executors, the set as bits of an integer.

    Identities are chained, so a flat table is a tree: an executor has a prefix if it has the prefix's last block.
    It is the job executor's belief, from what it sent where; engines evict without telling. At most `max_blocks` are
    kept, the least recently presented go first.
    """

    def __init__(self, max_blocks: int = 1_000_000) -> None:
        if max_blocks < 1:
            raise ValueError(f"max_blocks is {max_blocks}: a prompt tree keeps at least one block")
        self._max_blocks = max_blocks
        self._holders: OrderedDict[int, int] = OrderedDict()
        self._bits: dict[str, int] = {}
        self._next_bit = 0

    def __len__(self) -> int:
        return len(self._holders)

    def insert(self, ids: BlockIds, executor: str) -> None:
        """`executor` has computed a context with these blocks."""
        bit = self._bit(executor)
        holders = self._holders
        for block in reversed(ids):  # the deepest block ends up oldest, so a prefix outlives what extends it
            holders[block] = holders.get(block, 0) | bit
            holders.move_to_end(block)
        for _ in range(len(holders) - self._max_blocks):
            holders.popitem(last=False)

    def longest_match(self, ids: BlockIds, executors: list[str]) -> tuple[int, list[str]]:
        """The longest prefix that any of `executors` has, in blocks, and all of them that have it."""
        mask = sum(self._bits.get(executor, 0) for executor in executors)
        depth, best = 0, 0
        for block in ids:
            mask &= self._holders.get(block, 0)
            if not mask:
                break
            depth, best = depth + 1, mask
        return depth, [executor for executor in executors if self._bits.get(executor, 0) & best]

    def forget(self, executor: str) -> None:
        """The executor and its cache are gone. Its bit is never used again, so nothing has to be searched."""
        self._bits.pop(executor, None)

    def _bit(self, executor: str) -> int:
        if executor not in self._bits:
            self._bits[executor] = 1 << self._next_bit
            self._next_bit += 1
        return self._bits[executor]
