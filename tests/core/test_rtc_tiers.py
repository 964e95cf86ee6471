"""Tiers of the cache: random use beside a model of what every block of every tier contains, and each rule by itself."""

import time
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cluster.identity import BlockIds
from flowserve.core.rtc import Node, Rtc
from flowserve.core.tiers import Move, State, Tier, TierConfig, Transit
from tests.builders import chain

HBM, DRAM, SSD = Tier


class User(NamedTuple):
    """A sequence: its context, its lock, how many of its blocks are the tree's, its private ones, its populate."""

    ids: BlockIds
    node: Node
    at: int
    private: list[int]
    populate: Transit | None = None


class TieredMachine(RuleBasedStateMachine):
    """Contents are written as sequences compute and as moves end; whatever is matched must contain what its id says."""

    @initialize(
        total=st.integers(2, 16),
        dram=st.integers(0, 12),
        ssd=st.integers(0, 12),
        low=st.sampled_from([0.0, 0.2, 0.5, 1.0]),
        high=st.sampled_from([0.5, 1.0]),
        step=st.integers(1, 5),
    )
    def start(self, total: int, dram: int, ssd: int, low: float, high: float, step: int) -> None:
        self.rtc = Rtc(total, TierConfig(dram, ssd, min(low, high), high, step))
        self.users: list[User] = []
        self.moving: dict[int, Move] = {}
        self.contents: dict[tuple[Tier, int], int] = {}
        self.names: dict[str, BlockIds] = {}

    def take_moves(self) -> None:
        for move in self.rtc.moves:
            assert len(move.source_blocks) == len(move.target_blocks) > 0
            assert move.ticket not in self.moving
            self.moving[move.ticket] = move
        self.rtc.moves.clear()

    def check_contents(self, ids: BlockIds, blocks: list[int]) -> None:
        assert [self.contents[HBM, block] for block in blocks] == list(ids[: len(blocks)])

    @rule(path=st.lists(st.integers(0, 1), min_size=1, max_size=7), cut=st.integers(1, 7), fetch=st.integers(0, 7))
    def match(self, path: list[int], cut: int, fetch: int) -> None:
        """A prompt takes what is in HBM and may populate what follows in lower tiers."""
        ids = chain(*path)
        found = self.rtc.match_by_prefix_token(ids, min(cut, len(ids)))
        self.check_contents(ids, found.blocks)
        at = len(found.blocks)
        for node in found.lower:
            assert node.state is State.STABLE
            assert [self.contents[node.tier, block] for block in node.blocks] == list(ids[at : at + len(node.blocks)])
            at += len(node.blocks)
        assert sum(count for _, count in found.parts) == at <= cut
        assert [tier for tier, _ in found.parts] == sorted({tier for tier, _ in found.parts})
        count = min(fetch, at - len(found.blocks))
        blocks = self.rtc.alloc_blocks(count) if count else None
        if blocks is None:
            self.users.append(User(ids, found.node, len(found.blocks), []))
            return
        transit = self.rtc.populate(found, blocks)
        assert self.rtc.query_populate(transit) is None
        assert all(node.state is State.SWAPPING_IN for node in transit.nodes)
        again = self.rtc.match_by_prefix_token(ids, len(ids))
        assert len(again.blocks) == len(found.blocks)
        assert not again.lower
        self.rtc.unlock(again.node)
        self.users.append(User(ids, transit.nodes[-1], len(found.blocks) + count, [], transit))
        self.take_moves()

    @precondition(lambda self: any(user.populate is None for user in self.users))
    @rule(which=st.integers(0, 99), count=st.integers(1, 7))
    def compute(self, which: int, count: int) -> None:
        """A sequence computes more of its context and caches it."""
        ready = [place for place, user in enumerate(self.users) if user.populate is None]
        place = ready[which % len(ready)]
        user = self.users[place]
        end = min(len(user.ids), user.at + count)
        blocks = self.rtc.alloc_blocks(end - user.at)
        if blocks is None:
            assert self.rtc.available < end - user.at
            return
        for at, block in zip(range(user.at, end), blocks, strict=True):
            self.contents[HBM, block] = user.ids[at]
        node, duplicates = self.rtc.insert(user.node, user.at, end, user.ids, [*[-1] * user.at, *blocks])
        self.users[place] = User(user.ids, node, end, [*user.private, *duplicates])
        self.check_contents(user.ids, self.rtc.path_blocks(node))

    @precondition(lambda self: any(user.populate is None for user in self.users))
    @rule(which=st.integers(0, 99), name=st.sampled_from("ab"))
    def keep(self, which: int, name: str) -> None:
        """A sequence has its context preserved under an ID."""
        ready = [user for user in self.users if user.populate is None]
        user = ready[which % len(ready)]
        self.rtc.keep(name, user.node, user.ids[: user.at])
        self.names[name] = user.ids[: user.at]

    @rule(name=st.sampled_from("ab"))
    def release(self, name: str) -> None:
        """An ID is released, whether it is known or not."""
        assert self.rtc.release(name) == (self.names.pop(name, None) is not None)

    @precondition(lambda self: self.users)
    @rule(which=st.integers(0, 99), swap=st.booleans())
    def end(self, which: int, swap: bool) -> None:
        """A sequence ends, whether its populate has or not; what it leaves may be swapped out at once."""
        user = self.users.pop(which % len(self.users))
        self.rtc.free(user.private)
        self.rtc.unlock(user.node)
        if swap and DRAM in self.rtc.pools and user.populate is None:
            self.rtc.copy(user.node)
            self.take_moves()

    @rule()
    def swap_out(self) -> None:
        """Between steps, blocks move down."""
        steady = self.rtc.steady_blocks
        before = len(self.rtc.moves)
        self.rtc.swap_out()
        assert steady <= 0 or len(self.rtc.moves) == before
        assert sum(len(move.source_blocks) for move in self.rtc.moves if move.source is HBM) <= self.rtc._step_blocks
        self.take_moves()

    @precondition(lambda self: self.moving)
    @rule(which=st.integers(0, 99), success=st.sampled_from([True, True, True, False]))
    def moved(self, which: int, success: bool) -> None:
        """The data plane ends some move: in any order, and not always well."""
        move = self.moving.pop(sorted(self.moving)[which % len(self.moving)])
        if success:
            for source, target in zip(move.source_blocks, move.target_blocks, strict=True):
                self.contents[move.target, target] = self.contents[move.source, source]
        done = self.rtc.moved(move.ticket, success)
        if done is None:
            return
        for place, user in enumerate(self.users):
            if user.populate is not done:
                continue
            if self.rtc.query_populate(done):
                self.users[place] = user._replace(populate=None)
                self.check_contents(user.ids, self.rtc.path_blocks(user.node))
                assert len(self.rtc.path_blocks(user.node)) == user.at
            else:
                self.rtc.unlock(user.node)
                self.users[place] = User(user.ids, self.rtc.root, 0, [])
            return

    @invariant()
    def nothing_is_lost(self) -> None:
        """Blocks are conserved per tier, none is in two places, and what is available can be had."""
        if hasattr(self, "rtc"):
            self.rtc.check_integrity([block for user in self.users for block in user.private])
            assert len(self.moving) == self.rtc.moving

    def teardown(self) -> None:
        """When all sequences, moves and IDs are gone, every block can be had again."""
        if not hasattr(self, "rtc"):
            return
        while self.moving:
            self.moved(0, True)
        while self.users:
            self.end(0, False)
        for name in list(self.names):
            self.release(name)
        assert self.rtc.available == self.rtc.total_blocks
        assert self.rtc.alloc_blocks(self.rtc.total_blocks) is not None
        for node in list(self.rtc.root.children.values()):
            self.rtc._drop(node)
        assert all(pool.cached == 0 for pool in self.rtc.pools.values())
        self.rtc.check_integrity(list(range(self.rtc.total_blocks)))


TestTieredMachine = TieredMachine.TestCase
TestTieredMachine.settings = settings(max_examples=150, stateful_step_count=50)


def cache(rtc: Rtc, ids: BlockIds) -> Node:
    """Compute a context and leave it in the cache, unlocked; returns its end."""
    match = rtc.match_by_prefix_token(ids, len(ids))
    blocks = rtc.alloc_blocks(len(ids) - len(match.blocks))
    assert blocks is not None
    node, duplicates = rtc.insert(match.node, len(match.blocks), len(ids), ids, [*match.blocks, *blocks])
    rtc.free(duplicates)
    rtc.unlock(node)
    return node


def finish_moves(rtc: Rtc, success: bool = True) -> list[Move]:
    """Let all moves end, in order."""
    moves = list(rtc.moves)
    rtc.moves.clear()
    for move in moves:
        rtc.moved(move.ticket, success)
    return moves


def parts(rtc: Rtc, ids: BlockIds) -> list[tuple[Tier, int]]:
    """What a match finds where, without leaving a lock."""
    match = rtc.match_by_prefix_token(ids, len(ids))
    rtc.unlock(match.node)
    return match.parts


def test_the_least_recently_used_leaves_move_down_between_the_watermarks() -> None:
    """Below the low watermark blocks move until the high one is reached, oldest leaves first, ends of runs first."""
    rtc = Rtc(10, TierConfig(dram_blocks=10, swap_low=0.3, swap_high=0.5))
    cache(rtc, chain(1, 1, 1, 1))
    cache(rtc, chain(2, 2, 2))
    rtc.swap_out()
    assert rtc.moves == []  # three blocks are free: not below the watermark
    cache(rtc, chain(3, 3))
    rtc.swap_out()
    (move,) = finish_moves(rtc)
    assert (move.source, move.target, len(move.source_blocks)) == (HBM, DRAM, 4)
    assert rtc.allocator.free == 5
    assert parts(rtc, chain(1, 1, 1, 1)) == [(DRAM, 4)]
    assert parts(rtc, chain(2, 2, 2)) == [(HBM, 3)]


def test_a_step_moves_no_more_than_its_share() -> None:
    """The cap holds per call; the next call goes on with the same run, from its end."""
    rtc = Rtc(8, TierConfig(dram_blocks=8, swap_low=0.5, swap_high=1.0, swap_step_blocks=3))
    cache(rtc, chain(1, 1, 1, 1, 1, 1, 1))
    rtc.swap_out()
    assert [len(move.source_blocks) for move in finish_moves(rtc)] == [3]
    assert parts(rtc, chain(1, 1, 1, 1, 1, 1, 1)) == [(HBM, 4), (DRAM, 3)]


def test_what_is_being_moved_cannot_be_used() -> None:
    """A match ends before a node that is not stable, on its way out and on its way in."""
    rtc = Rtc(6, TierConfig(dram_blocks=6))
    ids = chain(1, 1, 1, 1)
    rtc.copy(cache(rtc, ids))
    assert parts(rtc, ids) == []
    finish_moves(rtc)
    match = rtc.match_by_prefix_token(ids, 4)
    assert match.parts == [(DRAM, 4)]
    blocks = rtc.alloc_blocks(3)
    assert blocks is not None
    transit = rtc.populate(match, blocks)
    assert parts(rtc, ids) == []
    assert rtc.query_populate(transit) is None
    finish_moves(rtc)
    assert rtc.query_populate(transit) is True
    assert parts(rtc, ids) == [(HBM, 3), (DRAM, 1)]
    assert rtc.path_blocks(transit.nodes[-1]) == blocks


def test_blocks_being_copied_out_are_free_only_when_the_copy_has_ended() -> None:
    """HBM blocks belong to the copy until then: nobody overwrites what is being read."""
    rtc = Rtc(4, TierConfig(dram_blocks=4))
    rtc.copy(cache(rtc, chain(1, 1, 1)))
    assert rtc.available == 1
    assert rtc.alloc_blocks(2) is None
    changes = rtc.changes
    finish_moves(rtc)
    assert rtc.available == 4
    assert rtc.changes != changes


def test_computing_again_frees_the_lower_copy() -> None:
    """Insertion over a node in DRAM puts it into HBM with the caller's blocks."""
    rtc = Rtc(8, TierConfig(dram_blocks=4))
    ids = chain(1, 1, 1)
    rtc.copy(cache(rtc, ids))
    finish_moves(rtc)
    match = rtc.match_by_prefix_token(ids, 0)
    blocks = rtc.alloc_blocks(2)
    assert blocks is not None
    node, duplicates = rtc.insert(match.node, 0, 2, ids, blocks)
    assert duplicates == []
    assert parts(rtc, ids) == [(HBM, 2), (DRAM, 1)]
    assert rtc.path_blocks(node) == blocks
    assert rtc.pools[DRAM].allocator.free == 3


@pytest.mark.parametrize("success", [True, False])
def test_computing_what_is_being_fetched_serves_both(success: bool) -> None:
    """Who populates finds the other's blocks in the end, even where the copy fails; the targets are free again."""
    rtc = Rtc(8, TierConfig(dram_blocks=4))
    ids = chain(1, 1, 1)
    rtc.copy(cache(rtc, ids))
    finish_moves(rtc)
    targets = rtc.alloc_blocks(3)
    assert targets is not None
    rtc.populate(waiting := rtc.match_by_prefix_token(ids, 3), targets)
    own = rtc.alloc_blocks(3)
    assert own is not None
    node, duplicates = rtc.insert(rtc.match_by_prefix_token(ids, 3).node, 0, len(ids), ids, own)
    assert (duplicates, waiting.parts) == ([], [(HBM, 3)])
    rtc.check_integrity([])
    finish_moves(rtc, success)
    assert rtc.path_blocks(node) == own
    rtc.check_integrity([])
    assert rtc.allocator.free == 5


def test_a_failed_copy_out_loses_the_content_and_no_block() -> None:
    """What could not be written is forgotten, with what follows it in the tree."""
    rtc = Rtc(4, TierConfig(dram_blocks=4))
    rtc.copy(cache(rtc, chain(1, 1, 1)))
    finish_moves(rtc, success=False)
    assert parts(rtc, chain(1, 1, 1)) == []
    assert rtc.allocator.free == rtc.pools[DRAM].allocator.free == 4


def test_a_failed_copy_in_leaves_the_lower_copy() -> None:
    """The content is still in DRAM, the target blocks are free, and the handle says that it failed."""
    rtc = Rtc(4, TierConfig(dram_blocks=4))
    ids = chain(1, 1, 1)
    rtc.copy(cache(rtc, ids))
    finish_moves(rtc)
    blocks = rtc.alloc_blocks(3)
    assert blocks is not None
    transit = rtc.populate(rtc.match_by_prefix_token(ids, 3), blocks)
    finish_moves(rtc, success=False)
    assert rtc.query_populate(transit) is False
    rtc.unlock(transit.nodes[-1])
    assert parts(rtc, ids) == [(DRAM, 3)]
    assert rtc.allocator.free == 4


def test_three_tiers_in_one_path() -> None:
    """DRAM overflows to SSD; a match names all three parts, and one populate fetches from both lower tiers."""
    rtc = Rtc(8, TierConfig(dram_blocks=4, ssd_blocks=8, swap_low=1.0, swap_high=1.0, swap_step_blocks=2))
    ids = chain(1, 1, 1, 1, 1, 1)
    cache(rtc, ids)
    for _ in range(2):
        rtc.swap_out()
        finish_moves(rtc)
    assert parts(rtc, ids) == [(HBM, 2), (DRAM, 2), (SSD, 2)]
    match = rtc.match_by_prefix_token(ids, 6)
    blocks = rtc.alloc_blocks(4)
    assert blocks is not None
    transit = rtc.populate(match, blocks)
    first, second = rtc.moves
    assert (first.source, first.target_blocks) == (DRAM, blocks[:2])
    assert (second.source, second.target_blocks) == (SSD, blocks[2:])
    assert rtc.moved(second.ticket, True) is None
    assert rtc.query_populate(transit) is None
    assert rtc.moved(first.ticket, True) is transit
    assert parts(rtc, ids) == [(HBM, 6)]


def test_without_room_below_the_oldest_copy_there_is_dropped() -> None:
    """The last tier forgets its least recently used content for what comes from above."""
    rtc = Rtc(6, TierConfig(dram_blocks=3))
    rtc.copy(cache(rtc, chain(1, 1)))
    finish_moves(rtc)
    rtc.copy(cache(rtc, chain(2, 2)))
    finish_moves(rtc)
    assert parts(rtc, chain(1, 1)) == [(DRAM, 1)]
    assert parts(rtc, chain(2, 2)) == [(DRAM, 2)]


def test_dropping_from_hbm_takes_what_hangs_below() -> None:
    """Without its prefix a lower part is worth nothing: its blocks are freed with it."""
    rtc = Rtc(4, TierConfig(dram_blocks=4, swap_low=0.5, swap_high=0.5))
    cache(rtc, chain(1, 1, 1, 1))
    rtc.swap_out()
    finish_moves(rtc)
    assert parts(rtc, chain(1, 1, 1, 1)) == [(HBM, 2), (DRAM, 2)]
    assert rtc.alloc_blocks(3) is not None
    assert parts(rtc, chain(1, 1, 1, 1)) == [(HBM, 1)]
    assert rtc.pools[DRAM].allocator.free == 4


def test_an_id_preserves_its_context() -> None:
    """What an ID names is not evicted, is found by the ID, and is ordinary again once released."""
    rtc = Rtc(4)
    node = cache(rtc, chain(1, 1, 1))
    rtc.keep("doc", node, chain(1, 1, 1))
    assert rtc.available == 1
    assert rtc.alloc_blocks(2) is None
    match = rtc.match_by_id("doc", 99)
    assert match.parts == [(HBM, 3)]
    rtc.unlock(match.node)
    assert rtc.kept("doc") == chain(1, 1, 1)
    assert rtc.release("doc")
    assert not rtc.release("doc")
    assert rtc.match_by_id("doc", 99).parts == []
    assert rtc.alloc_blocks(4) is not None


def test_an_id_may_be_swapped_out_but_not_dropped() -> None:
    """Under pressure a pinned context goes to DRAM, after everything that is not pinned, and stays there."""
    rtc = Rtc(6, TierConfig(dram_blocks=4, swap_low=1.0, swap_high=1.0))
    rtc.keep("doc", cache(rtc, chain(1, 1)), chain(1, 1))
    cache(rtc, chain(2, 2))
    rtc.swap_out()
    finish_moves(rtc)
    assert parts(rtc, chain(1, 1)) == [(DRAM, 2)]
    cache(rtc, chain(3, 3, 3))
    rtc.swap_out()
    finish_moves(rtc)
    match = rtc.match_by_id("doc", 99)
    assert match.parts == [(DRAM, 2)]
    assert parts(rtc, chain(2, 2)) == []


def test_an_id_keeps_what_a_failed_copy_leaves() -> None:
    """Where its content is lost, the ID still names what is left, and can be released."""
    rtc = Rtc(6, TierConfig(dram_blocks=4, swap_low=0.5, swap_high=0.5))
    rtc.keep("doc", cache(rtc, chain(1, 1, 1, 1, 1)), chain(1, 1, 1, 1, 1))
    rtc.swap_out()
    finish_moves(rtc, success=False)
    match = rtc.match_by_id("doc", 99)
    assert match.parts == [(HBM, 3)]
    rtc.unlock(match.node)
    rtc.check_integrity([])
    assert rtc.available == 3
    assert rtc.release_oldest()
    assert not rtc.release_oldest()
    assert rtc.available == 6


def test_a_given_key_decides_what_goes_first() -> None:
    """Eviction and swapping follow the key: here what was found cached most often stays."""
    rtc = Rtc(6, TierConfig(dram_blocks=6, swap_low=0.5, swap_high=0.5), eviction_key=lambda node: node.hits)
    for _ in range(3):
        cache(rtc, chain(1, 1, 1))
    cache(rtc, chain(2, 2, 2))
    rtc.swap_out()
    finish_moves(rtc)
    assert parts(rtc, chain(1, 1, 1)) == [(HBM, 3)]
    assert parts(rtc, chain(2, 2, 2)) == [(DRAM, 3)]


@given(prompt=st.lists(st.integers(0, 1), min_size=1, max_size=8), salts=st.permutations([3, 4]))
def test_identities_of_others_are_not_found_in_any_tier(prompt: list[int], salts: list[int]) -> None:
    """Chains that start differently, as another model's, adapter's or tenant's do, share nothing."""
    rtc = Rtc(20, TierConfig(dram_blocks=20))
    rtc.copy(cache(rtc, chain(salts[0], *prompt)))
    finish_moves(rtc)
    assert parts(rtc, chain(salts[1], *prompt)) == []
    assert parts(rtc, chain(salts[0], *prompt)) == [(DRAM, len(prompt) + 1)]


@pytest.mark.parametrize(
    "values",
    [{"dram_blocks": -1}, {"ssd_blocks": -1}, {"swap_low": 0.5, "swap_high": 0.4}, {"swap_step_blocks": 0}],
)
def test_bad_sizes_are_refused(values: dict[str, float]) -> None:
    """The error names the value and what is allowed."""
    with pytest.raises(ValueError, match="allowed are"):
        TierConfig(**values)  # type: ignore[arg-type]


def test_a_long_prompt_is_found_and_cached_within_the_papers_time() -> None:
    """Match and insertion of 4096 tokens take less than 0.7 ms, as reported for the system this is modelled on."""
    rtc = Rtc(8192, TierConfig(dram_blocks=8192))
    times = []
    for number in range(20):
        ids = tuple(range(1000 * number, 1000 * number + 256))
        start = time.perf_counter()
        match = rtc.match_by_prefix_token(ids, 256)
        blocks = rtc.alloc_blocks(256)
        assert blocks is not None
        rtc.insert(match.node, 0, len(ids), ids, blocks)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.0007
