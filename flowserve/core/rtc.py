"""Relational Tensor Cache: block table, allocation, and a radix tree over block identities (DeepServe section 4.3).

The tree keeps KV cache blocks whose content is known by identity, for reuse by later prompts. An edge holds a run of
consecutive blocks; because identities are chained, one comparison of last ids tells whether a whole run matches.
A sequence locks the path it uses; what nobody locks is evicted leaf by leaf, least recently used first.
"""

import heapq
from collections.abc import Iterator, Sequence

from cluster.identity import BlockIds
from flowserve.core.allocator import BlockAllocator


class Node:
    """A run of cached blocks below its parent. `locks` counts the sequences that use it or anything below it."""

    __slots__ = ("blocks", "children", "ids", "last_use", "locks", "parent")

    def __init__(self, ids: BlockIds, blocks: list[int], parent: "Node | None") -> None:
        self.ids = ids
        self.blocks = blocks
        self.parent = parent
        self.children: dict[int, Node] = {}
        self.locks = 0
        self.last_use = 0


class Rtc:
    """KV cache blocks of one engine: free ones, cached ones (in the tree), and private ones (held by sequences).

    `changes` moves whenever a prompt that did not fit before might fit now.
    """

    def __init__(self, total_blocks: int) -> None:
        self.allocator = BlockAllocator(total_blocks)
        self.root = Node((), [], None)
        self.cached_blocks = 0
        self.evictable_blocks = 0
        self.evicted_blocks = 0
        self.changes = 0
        # (last use, tie-breaker, leaf); entries go stale and are skipped. Two leaves never share a last use.
        self._leaves: list[tuple[int, int, Node]] = []
        self._uses = 0

    @property
    def total_blocks(self) -> int:
        return self.allocator.total

    @property
    def available(self) -> int:
        """Blocks that `alloc_blocks` can hand out: free or evictable."""
        return self.allocator.free + self.evictable_blocks

    def match_by_prefix(self, ids: BlockIds, limit: int) -> tuple[Node, list[int]]:
        """Longest cached prefix of `ids[:limit]`: its end node, locked for the caller, and its blocks."""
        node, blocks, at = self.root, [], 0
        while at < limit and (child := node.children.get(ids[at])) is not None:
            run = self._common(child.ids, ids, at, limit)
            if run < len(child.ids):
                child = self._split(child, run)
            blocks += child.blocks
            node, at = child, at + run
        self.lock(node)
        return node, blocks

    def alloc_blocks(self, count: int) -> list[int] | None:
        """`count` private blocks, evicting cached ones if needed; None, and nothing evicted, where too few are left."""
        short = count - self.allocator.free
        if short > 0:
            if short > self.evictable_blocks:
                return None
            self._evict(short)
        return self.allocator.take(count)

    def insert(self, node: Node, at: int, ids: BlockIds, blocks: Sequence[int]) -> tuple[Node, list[int]]:
        """Cache `blocks[at:len(ids)]` below `node`, which the caller has locked and which covers `at` blocks.

        Moves the caller's lock to the new end node. Returns it with the caller's blocks that stay private because
        the same content is cached already.
        """
        end, start = len(ids), node
        duplicates: list[int] = []
        while at < end and (child := node.children.get(ids[at])) is not None:
            run = self._common(child.ids, ids, at, end)
            if run < len(child.ids):
                child = self._split(child, run)
            duplicates += blocks[at : at + run]
            node, at = child, at + run
        if at < end:
            leaf = Node(ids[at:end], list(blocks[at:end]), node)
            node.children[ids[at]] = leaf
            self.cached_blocks += end - at
            self.evictable_blocks += end - at
            node = leaf
            self.changes += 1
        if node is not start:
            self.lock(node)
            self.unlock(start)
        return node, duplicates

    def free(self, blocks: list[int]) -> None:
        """Give private blocks back."""
        self.changes += 1
        self.allocator.give_back(blocks)

    def lock(self, node: Node) -> None:
        """Keep the path from the root to `node` from eviction."""
        while node.parent is not None:
            if node.locks == 0:
                self.evictable_blocks -= len(node.blocks)
            node.locks += 1
            node = node.parent

    def unlock(self, node: Node) -> None:
        """Undo one `lock`; what nobody locks any more becomes most recently used."""
        self._uses += 1
        self.changes += 1
        while node.parent is not None:
            node.locks -= 1
            if node.locks == 0:
                self.evictable_blocks += len(node.blocks)
                node.last_use = self._uses
                if not node.children:
                    heapq.heappush(self._leaves, (node.last_use, id(node), node))
            node = node.parent
        if len(self._leaves) > 2 * self.total_blocks:  # there are at most as many leaves as blocks
            self._leaves = [entry for entry in self._leaves if not _is_stale(*entry)]
            heapq.heapify(self._leaves)

    def _common(self, run: BlockIds, ids: BlockIds, at: int, limit: int) -> int:
        """How many leading ids of `run` equal `ids[at:limit]`; the first is known to. Chained ids allow bisection."""
        longest = min(len(run), limit - at)
        if run[longest - 1] == ids[at + longest - 1]:
            return longest
        low, high = 1, longest - 1
        while low < high:
            middle = (low + high + 1) // 2
            if run[middle - 1] == ids[at + middle - 1]:
                low = middle
            else:
                high = middle - 1
        return low

    def _split(self, node: Node, run: int) -> Node:
        """Cut a node after its first `run` blocks; returns the new upper part."""
        assert node.parent is not None
        upper = Node(node.ids[:run], node.blocks[:run], node.parent)
        upper.locks, upper.last_use = node.locks, node.last_use
        node.parent.children[node.ids[0]] = upper
        node.ids, node.blocks, node.parent = node.ids[run:], node.blocks[run:], upper
        upper.children[node.ids[0]] = node
        return upper

    def _evict(self, count: int) -> None:
        """Free `count` evictable blocks, from the ends of the least recently used leaves."""
        self.evicted_blocks += count
        while count > 0:
            entry = heapq.heappop(self._leaves)
            if _is_stale(*entry):
                continue
            last_use, _, node = entry
            taken = min(count, len(node.blocks))
            keep = len(node.blocks) - taken
            self.allocator.give_back(node.blocks[keep:])
            self.cached_blocks -= taken
            self.evictable_blocks -= taken
            count -= taken
            if keep:
                node.ids, node.blocks = node.ids[:keep], node.blocks[:keep]
                heapq.heappush(self._leaves, (last_use, id(node), node))
                continue
            parent, node.parent = node.parent, None
            assert parent is not None
            del parent.children[node.ids[0]]
            if not parent.children and not parent.locks and parent.parent is not None:
                heapq.heappush(self._leaves, (parent.last_use, id(parent), parent))

    def nodes(self) -> Iterator[Node]:
        """Every node but the root, parents first."""
        stack = list(self.root.children.values())
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    def check_integrity(self, private: list[int]) -> None:
        """free + cached + private == total, each block in one place, locks and counters consistent."""
        cached = [block for node in self.nodes() for block in node.blocks]
        everything = sorted([*self.allocator.free_blocks(), *cached, *private])
        assert everything == list(range(self.total_blocks)), "a KV cache block is lost or in two places"
        assert len(cached) == self.cached_blocks
        assert sum(len(node.blocks) for node in self.nodes() if not node.locks) == self.evictable_blocks
        for node in self.nodes():
            assert node.parent is not None
            assert node.locks >= sum(child.locks for child in node.children.values())
            assert node.parent.children[node.ids[0]] is node
            assert len(node.ids) == len(node.blocks)


def _is_stale(last_use: int, _: int, node: Node) -> bool:
    """A queued leaf that was used again, has grown or is gone since it was queued."""
    return bool(node.locks or node.children or node.parent is None or node.last_use != last_use)
