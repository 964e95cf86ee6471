"""The radix tree of cached blocks, against a model that knows each cached block by its id."""

from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cluster import identity
from cluster.identity import BlockIds
from flowserve.core.rtc import Node, Rtc
from flowserve.core.tiers import Tier
from tests.builders import chain


class User(NamedTuple):
    """What a sequence would hold: its context's ids, its lock, and its own blocks behind the `at` cached ones."""

    ids: BlockIds
    node: Node
    at: int
    cached: list[int]
    private: list[int]


class RtcModel(RuleBasedStateMachine):
    """Every operation on the tree beside the same one on a dictionary from id to block.

    In the dictionary an id's parent is the id before it in the chain, a leaf is an id without cached children, and
    eviction takes the unlocked leaf that was unlocked the longest ago, one block at a time.
    """

    @initialize(total=st.integers(1, 24))
    def start(self, total: int) -> None:
        self.rtc = Rtc(total)
        self.users: list[User] = []
        self.block_of: dict[int, int] = {}
        self.parent_of: dict[int, int | None] = {}
        self.locks: dict[int, int] = {}
        self.last_use: dict[int, int] = {}
        self.uses = 0

    # -- the model ------------------------------------------------------------------------------------------------

    def model_lock(self, path: BlockIds, change: int) -> None:
        self.uses += change < 0
        for block_id in path:
            self.locks[block_id] += change
            if change < 0 and not self.locks[block_id]:
                self.last_use[block_id] = self.uses

    def model_evict(self, count: int) -> list[int]:
        blocks = []
        for _ in range(count):
            parents = set(self.parent_of.values())
            leaves = [each for each in self.block_of if each not in parents and not self.locks[each]]
            oldest = min(leaves, key=lambda each: self.last_use[each])
            blocks.append(self.block_of.pop(oldest))
            del self.parent_of[oldest], self.locks[oldest], self.last_use[oldest]
        return blocks

    def cached_prefix(self, ids: BlockIds, limit: int) -> int:
        depth = 0
        while depth < min(limit, len(ids)) and ids[depth] in self.block_of:
            depth += 1
        return depth

    # -- what a sequence does -------------------------------------------------------------------------------------

    @rule(path=st.lists(st.integers(0, 1), max_size=7), unique=st.integers(0, 5), cut=st.integers(0, 7))
    def match(self, path: list[int], unique: int, cut: int) -> None:
        """A prompt looks for its longest cached prefix; ids as tuples or, without a path, as a range."""
        ids: BlockIds = chain(*path) if path else identity.unique(unique)
        limit = min(cut, len(ids))
        depth = self.cached_prefix(ids, limit)
        node, cached, _ = self.rtc.match_by_prefix_token(ids, limit)
        assert cached == [self.block_of[each] for each in ids[:depth]]
        self.model_lock(ids[:depth], +1)
        self.users.append(User(ids, node, depth, cached, []))

    @precondition(lambda self: self.users)
    @rule(which=st.integers(0, 99), count=st.integers(0, 9))
    def alloc(self, which: int, count: int) -> None:
        """A sequence gets blocks of its own; exactly the least recently used unlocked leaves make room."""
        user = self.users[which % len(self.users)]
        free = self.rtc.allocator.free
        evictable = sum(not locks for locks in self.locks.values())
        assert self.rtc.available == free + evictable
        blocks = self.rtc.alloc_blocks(count)
        if count > free + evictable:
            assert blocks is None
            return
        evicted = self.model_evict(max(0, count - free))
        assert blocks is not None
        assert len(blocks) == count
        if evicted:
            assert set(evicted) <= set(blocks)
        user.private.extend(blocks)

    @precondition(lambda self: self.users)
    @rule(which=st.integers(0, 99), count=st.integers(1, 9))
    def insert(self, which: int, count: int) -> None:
        """A sequence caches what it computed; blocks whose content is cached already stay its own."""
        place = which % len(self.users)
        user = self.users[place]
        end = min(len(user.ids), user.at + min(count, len(user.private)))
        if end == user.at:
            return
        own = user.private[: end - user.at]
        blocks = [*user.cached, *user.private]
        node, duplicates = self.rtc.insert(user.node, user.at, end, user.ids, blocks)
        expected = []
        for at, block in zip(range(user.at, end), own, strict=True):
            block_id = user.ids[at]
            if block_id in self.block_of:
                expected.append(block)
            else:
                self.block_of[block_id] = block
                self.parent_of[block_id] = user.ids[at - 1] if at else None
                self.locks[block_id] = 0
                self.last_use[block_id] = 0
        assert duplicates == expected
        self.model_lock(user.ids[:end], +1)
        self.model_lock(user.ids[: user.at], -1)
        rest = user.private[end - user.at :]
        # Its own copies of what is cached stay private; they are given back in the end like all private blocks.
        self.users[place] = User(user.ids[:end] if rest == [] else user.ids, node, end, blocks[:end], [])
        self.rtc.free([*duplicates, *rest])

    @precondition(lambda self: self.users)
    @rule(which=st.integers(0, 99))
    def end(self, which: int) -> None:
        """A sequence ends: its private blocks are free, its path is unlocked."""
        user = self.users.pop(which % len(self.users))
        self.rtc.free(user.private)
        self.rtc.unlock(user.node)
        self.model_lock(user.ids[: user.at], -1)

    # -- what always holds ----------------------------------------------------------------------------------------

    @invariant()
    def tree_is_the_model(self) -> None:
        """The tree holds exactly the model's blocks, with the model's locks, and loses none."""
        if not hasattr(self, "rtc"):
            return
        self.rtc.check_integrity([block for user in self.users for block in user.private])
        blocks, locks = {}, {}
        for node in self.rtc.nodes():
            for block_id, block in zip(node.ids[node.start :], node.blocks, strict=False):
                assert block_id not in blocks
                blocks[block_id], locks[block_id] = block, node.locks
        assert blocks == self.block_of
        assert locks == self.locks

    def teardown(self) -> None:
        """When all sequences are gone, every block can be had again."""
        if not hasattr(self, "rtc"):
            return
        while self.users:
            self.end(0)
        assert self.rtc.available == self.rtc.total_blocks
        everything = self.rtc.alloc_blocks(self.rtc.total_blocks)
        assert everything is not None
        assert sorted(everything) == list(range(self.rtc.total_blocks))
        assert self.rtc.cached_blocks == 0


TestRtcModel = RtcModel.TestCase
TestRtcModel.settings = settings(max_examples=150, stateful_step_count=40)


def cache(rtc: Rtc, ids: BlockIds) -> list[int]:
    """Compute a context and leave it in the cache, unlocked; returns the blocks that hold it."""
    node, cached, _ = rtc.match_by_prefix_token(ids, len(ids))
    blocks = rtc.alloc_blocks(len(ids) - len(cached))
    assert blocks is not None
    node, duplicates = rtc.insert(node, len(cached), len(ids), ids, [*cached, *blocks])
    assert duplicates == []
    rtc.unlock(node)
    return [*cached, *blocks]


@given(
    first=st.lists(st.integers(0, 1), min_size=1, max_size=12),
    second=st.lists(st.integers(0, 1), min_size=1, max_size=12),
    limit=st.integers(0, 12),
)
def test_the_longest_common_prefix_is_found(first: list[int], second: list[int], limit: int) -> None:
    """A match ends exactly where two contexts part, or at the limit, wherever in a run that is."""
    rtc = Rtc(20)
    blocks = cache(rtc, chain(*first))
    common = 0
    while common < min(len(first), len(second)) and first[common] == second[common]:
        common += 1
    node, found, _ = rtc.match_by_prefix_token(chain(*second), min(limit, len(second)))
    assert found == blocks[: min(limit, common)]
    rtc.unlock(node)
    rtc.check_integrity([])


@given(length=st.integers(1, 15), limit=st.integers(0, 15), stride=st.sampled_from([1, 2, 8]))
def test_ranges_serve_as_ids(length: int, limit: int, stride: int) -> None:
    """Content shared with nobody is named by a range, whole or every n-th id, and found again by an equal one."""
    rtc = Rtc(20)
    blocks = cache(rtc, identity.unique(7)[stride - 1 :: stride][:length])
    found = rtc.match_by_prefix_token(identity.unique(7)[stride - 1 :: stride], limit).blocks
    assert found == blocks[:limit]
    foreign = rtc.match_by_prefix_token(identity.unique(8)[stride - 1 :: stride], limit).blocks
    assert foreign == []


def test_leaves_go_in_order_of_their_last_use() -> None:
    """The context that was used again survives the one that was not, though it was cached first."""
    rtc = Rtc(6)
    cache(rtc, chain(1, 1, 1))
    cache(rtc, chain(2, 2, 2))
    node, *_ = rtc.match_by_prefix_token(chain(1, 1, 1), 3)
    rtc.unlock(node)
    taken = rtc.alloc_blocks(3)
    assert taken is not None
    assert rtc.match_by_prefix_token(chain(1, 1, 1), 3)[1] == [0, 1, 2]
    assert rtc.match_by_prefix_token(chain(2, 2, 2), 3)[1] == []
    assert rtc.evicted_blocks == 3


def test_a_shared_prefix_outlives_its_branches() -> None:
    """Two contexts part in the middle of a run: it is split, and the shared part goes last."""
    rtc = Rtc(8)
    cache(rtc, chain(1, 1, 1, 1))
    cache(rtc, chain(1, 1, 2, 2))
    assert sorted(len(node.blocks) for node in rtc.nodes()) == [2, 2, 2]
    assert rtc.alloc_blocks(8 - 6 + 3) is not None
    assert len(rtc.match_by_prefix_token(chain(1, 1, 1, 1), 4)[1]) == 2  # the branch used longer ago is gone …
    assert len(rtc.match_by_prefix_token(chain(1, 1, 2, 2), 4)[1]) == 3  # … and the end of the other


def test_what_a_sequence_uses_is_not_evicted() -> None:
    """A locked path cannot be taken: an allocation that would need it fails and evicts nothing."""
    rtc = Rtc(4)
    cache(rtc, chain(1, 1))
    cache(rtc, chain(2, 2))
    node, *_ = rtc.match_by_prefix_token(chain(1, 1), 2)
    assert rtc.available == 2
    assert rtc.alloc_blocks(3) is None
    assert rtc.cached_blocks == 4
    rtc.unlock(node)
    assert rtc.alloc_blocks(4) is not None


def test_a_lock_on_part_of_a_run_protects_only_that_part() -> None:
    """A prompt that uses the first blocks of a run leaves the rest of it evictable."""
    rtc = Rtc(4)
    cache(rtc, chain(1, 1, 1, 1))
    rtc.match_by_prefix_token(chain(1, 2), 2)
    assert rtc.available == 3
    assert rtc.alloc_blocks(3) is not None
    assert rtc.match_by_prefix_token(chain(1, 1, 1, 1), 4)[1] == [0]


def test_a_cache_that_is_never_full_keeps_a_short_queue() -> None:
    """Using the same context again and again, without any eviction, does not pile up what is queued for eviction."""
    rtc = Rtc(8)
    for _ in range(1000):
        cache(rtc, chain(1, 2, 3))
    assert len(rtc.pools[Tier.HBM].leaves) <= 2 * 8 + 1
    assert rtc.alloc_blocks(8) is not None
    assert rtc.cached_blocks == 0


def test_lost_blocks_are_noticed() -> None:
    """The integrity check fails when a block is nowhere, in two places, or counted wrongly."""
    rtc = Rtc(4)
    cache(rtc, chain(1, 1))
    blocks = rtc.alloc_blocks(1)
    assert blocks is not None
    rtc.check_integrity(blocks)
    with pytest.raises(AssertionError, match="lost or in two places"):
        rtc.check_integrity([])
    with pytest.raises(AssertionError, match="lost or in two places"):
        rtc.check_integrity([*blocks, 0])
    rtc.evictable_blocks += 1
    with pytest.raises(AssertionError):
        rtc.check_integrity(blocks)
