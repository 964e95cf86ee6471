"""Relational Tensor Cache: block table, allocation, and an index of blocks by content (DeepServe section 4.3, table 1).

The index is a radix tree over block identities; explicit IDs name paths in it. It keeps KV cache blocks whose content
is known, for reuse by later prompts, in device memory (HBM) or swapped out to host DRAM and SSD. An edge holds a run
of consecutive blocks in one tier; because identities are chained, one comparison of last ids tells whether a whole run
matches, and because they are salted with model, adapter and tenant, those never share. A sequence locks the path it
uses; what nobody locks leaves HBM leaf by leaf, least recently used first, so no node is in a nearer tier than its
parent.

Nothing is copied here: what shall move is written to `moves` for a data plane, which answers with `moved`.
"""

import heapq
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Final, NamedTuple

from cluster.identity import BlockIds
from flowserve.core.allocator import NOWHERE, AllocatorKind
from flowserve.core.tiers import Move, Pool, State, Tier, TierConfig, Transit

HBM: Final = Tier.HBM


class Node:
    """A run of cached blocks below its parent, all in one tier, whose identities are those of `ids` from `start` on.

    `locks` counts the sequences, and `pins` the IDs, that use it or anything below it. `hits`: how often a sequence
    found it cached. `peers`: children in the same tier. `away`: with a `transit`, the blocks at its other end.
    """

    __slots__ = (
        "away",
        "blocks",
        "children",
        "hits",
        "ids",
        "last_use",
        "locks",
        "parent",
        "peers",
        "pins",
        "start",
        "tier",
        "transit",
    )

    def __init__(self, ids: BlockIds, start: int, blocks: list[int], parent: "Node | None") -> None:
        self.ids = ids
        self.start = start
        self.blocks = blocks
        self.parent = parent
        self.children: dict[int, Node] = {}
        self.tier = HBM
        self.transit: Transit | None = None
        self.away: list[int] = []
        self.locks = 0
        self.pins = 0
        self.peers = 0
        self.last_use = 0
        self.hits = 0

    @property
    def first(self) -> int:
        """Identity of the first block, by which its parent knows it."""
        return self.ids[self.start]

    @property
    def state(self) -> State:
        if self.transit is None:
            return State.STABLE
        return State.SWAPPING_IN if self.transit.inward else State.SWAPPING_OUT


class Match(NamedTuple):
    """Preserved KV cache for the start of a context.

    `node`: end of what is in HBM, locked for the caller, with its `blocks`; `lower`: what follows in lower tiers, which
    `populate` can bring in.
    """

    node: Node
    blocks: list[int]
    lower: tuple[Node, ...] = ()

    @property
    def parts(self) -> list[tuple[Tier, int]]:
        """(tier, number of blocks) of consecutive parts, in order; their sum is the hit length."""
        parts = [(HBM, len(self.blocks))] if self.blocks else []
        for node in self.lower:
            if parts and parts[-1][0] is node.tier:
                parts[-1] = (node.tier, parts[-1][1] + len(node.blocks))
            else:
                parts.append((node.tier, len(node.blocks)))
        return parts


class _Context(NamedTuple):
    """What an ID names."""

    ids: BlockIds
    node: Node


EvictionKey = Callable[[Node], float]


def least_recently_used(node: Node) -> float:
    """The default eviction key: what was used the longest ago goes first."""
    return node.last_use


class Rtc:
    """KV cache blocks of one engine: free ones, cached ones (in the tree), and private ones (held by sequences).

    `changes` moves whenever a prompt that did not fit before might fit now. `moves`: copies to be started, for whoever
    drives the data plane to take. `eviction_key`: of leaves that may go, the one with the lowest key goes first; it may
    depend on what changes when a node is unlocked (`last_use`, `hits`). `evict_at_least`: blocks evicted at a time;
    more than are short leave the allocator a choice of which ones to hand out.
    """

    def __init__(
        self,
        total_blocks: int,
        tiers: TierConfig | None = None,
        eviction_key: EvictionKey = least_recently_used,
        allocator: AllocatorKind = "segment",
        evict_at_least: int = 1,
    ) -> None:
        tiers = tiers or TierConfig()
        sizes = (total_blocks, tiers.dram_blocks, tiers.ssd_blocks)
        self.pools = {
            tier: Pool(tier, size, int(tiers.swap_low * size), int(tiers.swap_high * size), allocator)
            for tier, size in zip(Tier, sizes, strict=True)
            if size or tier is HBM
        }
        self.allocator = self.pools[HBM].allocator
        self.root = Node((), 0, [], None)
        self.evictable_blocks = 0
        self.evicted_blocks = 0
        self.swapped_out_blocks = 0
        self.populated_blocks = 0
        self.changes = 0
        self.moves: list[Move] = []
        self._hbm = self.pools[HBM]
        self._below = {upper.tier: lower for upper, lower in pairwise(self.pools.values())}
        self._swapped = [self.pools[tier] for tier in self._below]
        self._evict_at_least = evict_at_least
        self._step_blocks = tiers.swap_step_blocks
        self._key = eviction_key
        self._contexts: dict[str, _Context] = {}
        self._transits: dict[int, Transit] = {}
        self._tickets = 0
        self._uses = 0
        self._queued = 0

    @property
    def total_blocks(self) -> int:
        return self.allocator.total

    @property
    def cached_blocks(self) -> int:
        """Blocks of HBM that the tree holds."""
        return self._hbm.cached

    @property
    def available(self) -> int:
        """Blocks that `alloc_blocks` can hand out: free or evictable."""
        return self.allocator.free + self.evictable_blocks

    # -- match ----------------------------------------------------------------------------------------------------

    def match_by_prefix_token(self, ids: BlockIds, limit: int) -> Match:
        """Longest preserved prefix of `ids[:limit]`, up to the first node that is not STABLE."""
        node, blocks, at = self.root, [], 0
        child: Node | None = None
        while at < limit and (child := node.children.get(ids[at])) is not None and child.tier is HBM:
            run = self._common(child, ids, at, limit)
            if run < len(child.blocks):
                child = self._split(child, run)
            blocks += child.blocks
            child.hits += 1
            node, at = child, at + run
        lower = self._match_lower(node, ids, at, limit) if self._swapped and at < limit and child is not None else ()
        self.lock(node)
        return Match(node, blocks, lower)

    def match_by_id(self, context_id: str, limit: int) -> Match:
        """What is preserved of the first `limit` blocks of the context that `keep` gave this ID; nothing if unknown."""
        context = self._contexts.get(context_id)
        ids = () if context is None else context.ids
        return self.match_by_prefix_token(ids, min(limit, len(ids)))

    def _match_lower(self, node: Node, ids: BlockIds, at: int, limit: int) -> tuple[Node, ...]:
        found: list[Node] = []
        while at < limit and (child := node.children.get(ids[at])) is not None and child.transit is None:
            run = self._common(child, ids, at, limit)
            if run < len(child.blocks):
                child = self._split(child, run)
            found.append(child)
            node, at = child, at + run
        return tuple(found)

    # -- explicit IDs ---------------------------------------------------------------------------------------------

    def keep(self, context_id: str, node: Node, ids: BlockIds) -> None:
        """Preserve the path to `node`, whose content is `ids`, under an ID until `release`; replaces an earlier one.

        It may be swapped out, but is not dropped: what has nowhere to go stays in HBM.
        """
        self.release(context_id)
        self._contexts[context_id] = _Context(ids, node)
        while node.parent is not None:
            if not node.pins:
                self.evictable_blocks -= self._droppable(node)
                node.pins = 1
                self._enqueue(node)
            else:
                node.pins += 1
            node = node.parent

    def release(self, context_id: str) -> bool:
        """Let go of an ID: its blocks are cached like all others. False where there is no such ID."""
        context = self._contexts.pop(context_id, None)
        if context is None:
            return False
        self._unpin(context.node)
        return True

    def release_oldest(self) -> bool:
        """Let go of the ID that was created first: for a sequence that has no other way to ever run."""
        return bool(self._contexts) and self.release(next(iter(self._contexts)))

    def kept(self, context_id: str) -> BlockIds | None:
        """The content that an ID names, None for an unknown one."""
        context = self._contexts.get(context_id)
        return None if context is None else context.ids

    def _unpin(self, node: Node, upto: Node | None = None) -> None:
        self.changes += 1
        while node.parent is not None and node is not upto:
            node.pins -= 1
            if not node.pins:
                self.evictable_blocks += self._droppable(node)
                self._enqueue(node)
            node = node.parent

    # -- blocks ---------------------------------------------------------------------------------------------------

    def alloc_blocks(self, count: int, after: int | None = None, runs: Sequence[int] = ()) -> list[int] | None:
        """`count` private blocks, evicting cached ones if needed; None, and nothing evicted, where too few are left.

        `after`, `runs`: which blocks are best, see `BlockAllocator.take`.
        """
        short = count - self.allocator.free
        if short > 0:
            if short > self.evictable_blocks:
                return None
            self._evict(min(max(short, self._evict_at_least), self.evictable_blocks))
        return self.allocator.take(count, after, runs)

    def append_block(self, blocks: list[int]) -> bool:
        """One more private block at the end of `blocks`; False where there is none."""
        if not self.allocator.free:
            if not self.evictable_blocks:
                return False
            self._evict(min(max(1, self._evict_at_least), self.evictable_blocks))
        blocks.append(self.allocator.take_one(blocks[-1] if blocks else NOWHERE))
        return True

    def free(self, blocks: list[int]) -> None:
        """Give private blocks back."""
        self.changes += 1
        self.allocator.give_back(blocks)

    def insert(self, node: Node, at: int, end: int, ids: BlockIds, blocks: list[int]) -> tuple[Node, list[int]]:
        """Cache `blocks[at:end]`, whose content is `ids[at:end]`, below `node`, which the caller has locked and which
        covers `at` blocks.

        Moves the caller's lock to the new end node. Returns it with the caller's blocks that stay private because
        the same content is cached already. Where it is cached in a lower tier, or on the way, the caller's blocks
        replace that copy.
        """
        start = node
        duplicates: list[int] = []
        while at < end and (child := node.children.get(ids[at])) is not None:
            run = self._common(child, ids, at, end)
            if run < len(child.blocks):
                child = self._split(child, run)
            if child.tier is HBM:
                duplicates += blocks[at : at + run]
                child.hits += 1
            else:
                self._replace(child, blocks[at : at + run])
            node, at = child, at + run
        if at < end:
            leaf = Node(ids, at, blocks[at:end], node)
            node.children[ids[at]] = leaf
            node.peers += 1
            self._hbm.cached += end - at
            self.evictable_blocks += end - at
            node = leaf
            self.changes += 1
        if node is not start:
            self.lock(node)
            self.unlock(start)
        return node, duplicates

    def _replace(self, node: Node, blocks: list[int]) -> None:
        """Give a node of a lower tier blocks in HBM, and free the copy there."""
        pool = self.pools[node.tier]
        pool.cached -= len(blocks)
        if node.transit is None:
            pool.allocator.give_back(node.blocks)
        else:
            self._abandon(node)
        self._hbm.cached += len(blocks)
        node.blocks = blocks
        self._set_tier(node, HBM)
        self.evictable_blocks += self._droppable(node)
        self.changes += 1

    # -- locks ----------------------------------------------------------------------------------------------------

    def lock(self, node: Node) -> None:
        """Keep the path from the root to `node` where it is."""
        while node.parent is not None:
            if node.locks == 0:
                self.evictable_blocks -= self._droppable(node)
            node.locks += 1
            node = node.parent

    def unlock(self, node: Node) -> None:
        """Undo one `lock`; what nobody locks any more becomes most recently used."""
        self._uses += 1
        self.changes += 1
        while node.parent is not None:
            node.locks -= 1
            if node.locks == 0:
                self.evictable_blocks += self._droppable(node)
                node.last_use = self._uses
                if not node.peers:
                    self._enqueue(node)
            node = node.parent

    def _droppable(self, node: Node) -> int:
        """Blocks of HBM that would be evictable if nobody locked or pinned this node any more."""
        return len(node.blocks) if node.tier is HBM and not node.locks and not node.pins else 0

    def path_blocks(self, node: Node) -> list[int]:
        """Blocks from the root to `node`, which is in HBM."""
        runs = []
        while node.parent is not None:
            assert node.tier is HBM
            runs.append(node.blocks)
            node = node.parent
        return [block for run in reversed(runs) for block in run]

    # -- movement between tiers -----------------------------------------------------------------------------------

    def populate(self, match: Match, blocks: list[int]) -> Transit:
        """Fetch the next `len(blocks)` blocks of `match.lower` into private blocks of the caller, who gives them away.

        The caller's lock moves to their end; `moved` returns the handle when all is done, and `query_populate` tells.
        Then the blocks of the path are those of `path_blocks(transit.nodes[-1])`, which may be others: somebody may
        have computed the same in the meantime.
        """
        transit, at = Transit(HBM, inward=True), 0
        for node in match.lower:
            if at == len(blocks):
                break
            if at + len(node.blocks) > len(blocks):
                node = self._split(node, len(blocks) - at)
            node.transit, node.away = transit, blocks[at : at + len(node.blocks)]
            transit.nodes.append(node)
            at += len(node.blocks)
        assert at == len(blocks) and at, f"populating {len(blocks)} blocks of {match.parts}"
        self.lock(transit.nodes[-1])
        self.unlock(match.node)
        for tier in (Tier.DRAM, Tier.SSD):
            nodes = [node for node in transit.nodes if node.tier is tier]
            self._start(transit, tier, HBM, [b for n in nodes for b in n.blocks], [b for n in nodes for b in n.away])
        return transit

    def query_populate(self, transit: Transit) -> bool | None:
        """None while it is under way, then whether all of it arrived."""
        return None if transit.tickets else transit.success

    def copy(self, node: Node) -> int:
        """Swap the end of the path to `node` out, as far as nobody else uses it and there is room; blocks moved."""
        leaves: list[Node] = []
        while node.parent is not None and node.tier is HBM and not node.locks and node.peers == min(1, len(leaves)):
            leaves.append(node)
            node = node.parent
        return self._swap(self._hbm, iter(leaves), self.total_blocks)

    def swap_out(self) -> None:
        """Move least recently used blocks down where a tier runs short of free ones; at most so many per call."""
        for pool in self._swapped:
            if self._short(pool):
                budget = min(self._step_blocks, pool.high - pool.allocator.free - pool.leaving)
                self._swap(pool, self._leaves(pool), budget)

    @property
    def steady_blocks(self) -> int:
        """How many blocks can be taken one by one before `swap_out` does anything."""
        if not self._swapped:
            return self.available
        if any(self._short(pool) and self._has_leaf(pool) for pool in self._swapped):
            return 0
        if self._short(self._hbm):
            return self.available
        return min(self.available, self.allocator.free + self._hbm.leaving - self._hbm.low)

    def moved(self, ticket: int, success: bool) -> Transit | None:
        """The data plane has ended a move, well or not. Returns the populate that is done with it, if one is."""
        transit = self._transits.pop(ticket)
        transit.tickets.remove(ticket)
        transit.success = success and transit.success is not False
        if transit.tickets:
            return None
        self.changes += 1
        for node in transit.nodes:  # parents first
            away, node.away, node.transit = node.away, [], None
            if transit.inward:
                self._land(node, away, transit.success)
            else:
                self._give_back_left(transit.near, away)
                if transit.success:
                    self._enqueue(node)
        if not transit.inward and not transit.success:
            for node in transit.nodes:
                if node.parent is not None:  # not gone with another
                    self._drop(node)
        for tier, blocks in transit.orphans:
            if tier is transit.near and not transit.inward:
                self._give_back_left(tier, blocks)
            else:
                self.pools[tier].allocator.give_back(blocks)
        return transit if transit.inward else None

    @property
    def moving(self) -> int:
        """Moves under way."""
        return len(self._transits)

    def _short(self, pool: Pool) -> bool:
        return pool.allocator.free + pool.leaving < pool.low

    def _start(self, transit: Transit, source: Tier, target: Tier, blocks: list[int], to: list[int]) -> None:
        if blocks:
            self._tickets += 1
            transit.tickets.add(self._tickets)
            self._transits[self._tickets] = transit
            self.moves.append(Move(self._tickets, source, blocks, target, to))

    def _leaves(self, pool: Pool) -> Iterator[Node]:
        """Leaves of a tier in order of eviction, pinned ones where no other is left; each is out of its queue."""
        while self._has_leaf(pool):
            yield heapq.heappop(pool.leaves or pool.pinned)[3]

    def _has_leaf(self, pool: Pool) -> bool:
        for queue, pinned in ((pool.leaves, False), (pool.pinned, True)):
            while queue and _is_stale(queue[0], pool.tier, pinned):
                heapq.heappop(queue)
            if queue:
                return True
        return False

    def _swap(self, pool: Pool, leaves: Iterator[Node], budget: int) -> int:
        """Start to move up to `budget` blocks at the ends of `leaves` to the next tier; one move. Blocks moved."""
        below = self._below[pool.tier]
        transit, sources, targets = Transit(pool.tier, inward=False), [], []
        while budget and (node := next(leaves, None)) is not None:
            count = min(budget, len(node.blocks))
            count = self._make_room(below, count)
            if not count:
                self._enqueue(node)
                break
            if count < len(node.blocks):
                self._split(node, len(node.blocks) - count)
            self.evictable_blocks -= self._droppable(node)
            node.transit, node.away, node.blocks = transit, node.blocks, below.allocator.take(count)
            self._set_tier(node, below.tier)
            transit.nodes.insert(0, node)
            sources += node.away
            targets += node.blocks
            pool.cached -= count
            below.cached += count
            budget -= count
        pool.leaving += len(sources)
        self.swapped_out_blocks += len(sources)
        self._start(transit, pool.tier, below.tier, sources, targets)
        return len(sources)

    def _make_room(self, pool: Pool, count: int) -> int:
        """Have up to `count` blocks of a lower tier free; returns how many there are.

        The last tier drops what goes first there. The others do not: what they hold moves on by itself.
        """
        if pool.tier in self._below:
            return min(count, pool.allocator.free)
        while pool.allocator.free < count:
            while pool.leaves and _is_stale(pool.leaves[0], pool.tier, pinned=False):
                heapq.heappop(pool.leaves)
            if not pool.leaves:
                return pool.allocator.free
            node = pool.leaves[0][3]
            over = len(node.blocks) - (count - pool.allocator.free)
            if over > 0:
                self._split(node, over)
            self._drop(node)
        return count

    def _land(self, node: Node, blocks: list[int], success: bool) -> None:
        """The copy of a node into HBM has ended: it is there now, or stays where it was."""
        assert node.parent is not None
        if success and node.parent.tier is HBM:  # else the parent was swapped out after a caller gave up
            pool = self.pools[node.tier]
            pool.allocator.give_back(node.blocks)
            pool.cached -= len(blocks)
            self._hbm.cached += len(blocks)
            self.populated_blocks += len(blocks)
            node.hits += 1
            node.blocks = blocks
            self._set_tier(node, HBM)
            self.evictable_blocks += self._droppable(node)
        else:
            self.allocator.give_back(blocks)
        self._enqueue(node)

    def _give_back_left(self, tier: Tier, blocks: list[int]) -> None:
        """Free the source blocks of a move to a lower tier."""
        self.pools[tier].leaving -= len(blocks)
        self.pools[tier].allocator.give_back(blocks)

    def _abandon(self, node: Node) -> None:
        """Take a node out of its transit; the blocks at both ends are freed when the copy has ended."""
        transit = node.transit
        assert transit is not None
        transit.nodes.remove(node)
        transit.orphans += [(node.tier, node.blocks), (transit.near, node.away)]
        node.transit, node.away = None, []

    def _set_tier(self, node: Node, tier: Tier) -> None:
        parent, before = node.parent, node.tier
        assert parent is not None
        node.tier = tier
        node.peers = sum(child.tier is tier for child in node.children.values())
        if parent.tier is tier:
            parent.peers += 1
        elif parent.tier is before:
            parent.peers -= 1
            self._enqueue(parent)

    # -- the tree -------------------------------------------------------------------------------------------------

    def _common(self, node: Node, ids: BlockIds, at: int, limit: int) -> int:
        """How many leading ids of a node equal `ids[at:limit]`; the first is known to. Chained ids allow bisection."""
        run, start = node.ids, node.start
        longest = min(len(node.blocks), limit - at)
        if run[start + longest - 1] == ids[at + longest - 1]:
            return longest
        low, high = 1, longest - 1
        while low < high:
            middle = (low + high + 1) // 2
            if run[start + middle - 1] == ids[at + middle - 1]:
                low = middle
            else:
                high = middle - 1
        return low

    def _split(self, node: Node, run: int) -> Node:
        """Cut a node after its first `run` blocks; returns the new upper part."""
        assert node.parent is not None
        # Copied, because it may outlive by far what it was a beginning of.
        upper = Node(node.ids[node.start : node.start + run], 0, node.blocks[:run], node.parent)
        upper.locks, upper.pins, upper.tier, upper.peers = node.locks, node.pins, node.tier, 1
        upper.last_use, upper.hits = node.last_use, node.hits
        node.parent.children[node.first] = upper
        if node.transit is not None:
            upper.transit, upper.away, node.away = node.transit, node.away[:run], node.away[run:]
            node.transit.nodes.insert(node.transit.nodes.index(node), upper)
        node.start, node.blocks, node.parent = node.start + run, node.blocks[run:], upper
        upper.children[node.first] = node
        return upper

    def _enqueue(self, node: Node) -> None:
        """Queue a node for eviction if it can go."""
        if node.locks or node.peers or node.transit is not None or node.parent is None:
            return
        pool = self.pools[node.tier]
        queue = pool.pinned if node.pins else pool.leaves
        self._queued += 1  # ties: who was queued first
        heapq.heappush(queue, (self._key(node), node.last_use, self._queued, node))
        if len(queue) > 2 * pool.allocator.total:  # there are at most as many leaves as blocks
            queue[:] = [entry for entry in queue if not _is_stale(entry, pool.tier, node.pins > 0)]
            heapq.heapify(queue)

    def _evict(self, count: int) -> None:
        """Free `count` evictable blocks of HBM, from the ends of the leaves that go first."""
        self.evicted_blocks += count
        hbm, queue, given = self._hbm, self._hbm.leaves, list[int]()
        while count > 0:
            entry = heapq.heappop(queue)
            if _is_stale(entry, HBM, False):
                continue
            node = entry[3]
            blocks = node.blocks
            size = len(blocks)
            if size <= count and node.children:
                count -= size
                self._drop(node)
                continue
            taken = min(count, size)
            count -= taken
            hbm.cached -= taken
            self.evictable_blocks -= taken
            if taken == size:  # like `_drop`, of a leaf
                given += blocks
                parent = node.parent
                assert parent is not None
                del parent.children[node.first]
                parent.peers -= 1
                node.parent = None
                if not parent.peers:
                    self._enqueue(parent)
                continue
            keep = size - taken
            for child in list(node.children.values()):
                self._drop(child)
            given += blocks[keep:]
            node.blocks = blocks[:keep]
            heapq.heappush(queue, entry)
        self.allocator.give_back(given)

    def _drop(self, top: Node) -> None:
        """Forget a node and all below it, which nobody locks."""
        parent = top.parent
        assert parent is not None
        if top.pins:  # only a copy that failed loses what an ID names: the ID keeps what is left
            for context_id, (ids, node) in list(self._contexts.items()):
                if _is_below(node, top):
                    self._unpin(node, upto=parent)
                    self._contexts[context_id] = _Context(ids, parent)
        del parent.children[top.first]
        if parent.tier is top.tier:
            parent.peers -= 1
        stack = [top]
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            pool = self.pools[node.tier]
            pool.cached -= len(node.blocks)
            self.evictable_blocks -= self._droppable(node)
            if node.transit is None:
                pool.allocator.give_back(node.blocks)
            else:
                self._abandon(node)
            node.parent, node.children = None, {}
        if not parent.peers:
            self._enqueue(parent)

    def nodes(self) -> Iterator[Node]:
        """Every node but the root, parents first."""
        stack = list(self.root.children.values())
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    def check_integrity(self, private: list[int]) -> None:
        """free + cached + in transit (+ private in HBM) == total in every tier, each block in one place; locks, states
        and counters consistent.
        """
        transits = set(self._transits.values())
        for tier, pool in self.pools.items():
            cached = [block for node in self.nodes() if node.tier is tier for block in node.blocks]
            away = [b for transit in transits if transit.near is tier for node in transit.nodes for b in node.away]
            orphans = [b for transit in transits for at, blocks in transit.orphans if at is tier for b in blocks]
            everything = [*pool.allocator.free_blocks(), *cached, *away, *orphans, *(private if tier is HBM else ())]
            assert sorted(everything) == list(range(pool.allocator.total)), (
                f"a {tier.name} KV cache block is lost or in two places"
            )
            assert len(cached) == pool.cached
        assert sum(self._droppable(node) for node in self.nodes()) == self.evictable_blocks
        for node in self.nodes():
            assert node.parent is not None
            assert node.locks >= sum(child.locks for child in node.children.values())
            assert node.pins >= sum(child.pins for child in node.children.values())
            assert node.peers == sum(child.tier is node.tier for child in node.children.values())
            assert node.parent.children[node.first] is node
            assert node.parent.tier <= node.tier
            assert len(node.ids) >= node.start + len(node.blocks)
            assert len(node.away) == (0 if node.transit is None else len(node.blocks))
            assert node.transit is None or (node in node.transit.nodes and node.transit.near < node.tier)


def _is_stale(entry: tuple[float, int, int, Node], tier: Tier, pinned: bool) -> bool:
    """A queued leaf that was used again, has grown, is moving or is gone since it was queued."""
    _, last_use, _, node = entry
    return bool(
        node.locks
        or node.peers
        or node.parent is None
        or node.last_use != last_use
        or node.tier is not tier
        or node.transit is not None
        or (node.pins > 0) is not pinned
    )


def _is_below(node: Node, top: Node) -> bool:
    """Whether `top` is on the path from the root to `node`."""
    while node is not top and node.parent is not None:
        node = node.parent
    return node is top
