"""Allocators of free KV cache blocks."""

from collections.abc import Sequence
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowserve.core.allocator import AllocatorKind, BlockAllocator, SegmentAllocator, StackAllocator, make_allocator
from flowserve.core.transfer import contiguous_runs, run_lengths

KINDS: tuple[AllocatorKind, ...] = ("segment", "stack")


def fragmented(free: Sequence[bool]) -> SegmentAllocator:
    """One in which the blocks marked are free."""
    allocator = SegmentAllocator(len(free))
    blocks = allocator.take(len(free))
    allocator.give_back([block for block in blocks if free[block]])
    return allocator


def segments(allocator: BlockAllocator) -> list[int]:
    """Lengths of the maximal free segments."""
    return run_lengths(sorted(allocator.free_blocks()))


@pytest.mark.parametrize("kind", KINDS)
@given(
    total=st.integers(1, 40),
    steps=st.lists(st.tuples(st.booleans(), st.integers(0, 12), st.booleans()), max_size=60),
)
def test_every_block_is_in_one_place(kind: AllocatorKind, total: int, steps: list[tuple[bool, int, bool]]) -> None:
    """Whatever is taken, appended and given back in part, free and taken blocks together are all, each once."""
    allocator = make_allocator(kind, total)
    taken: list[list[int]] = []
    for give_back, size, whole in steps:
        if give_back and taken:
            blocks = taken.pop(size % len(taken))
            kept = [] if whole else blocks[::2]
            taken.append(kept)
            allocator.give_back([block for block in blocks if block not in kept])
        elif size <= allocator.free:
            after = taken[-1][-1] if taken and taken[-1] else None
            taken.append(allocator.take(size, after, [1, 2, 3]))
            assert len(taken[-1]) == size
        held = [block for blocks in taken for block in blocks]
        assert sorted([*allocator.free_blocks(), *held]) == list(range(total))
        assert allocator.free == total - len(held)


@pytest.mark.parametrize("kind", KINDS)
@given(total=st.integers(1, 40), data=st.data())
def test_a_fresh_cache_hands_out_ascending_runs(kind: AllocatorKind, total: int, data: st.DataObject) -> None:
    """Without any return, blocks come in ascending order, so that transfers move in few runs."""
    allocator, got = make_allocator(kind, total), list[int]()
    while allocator.free:
        got += allocator.take(data.draw(st.integers(1, allocator.free)))
    assert got == list(range(total))


@pytest.mark.parametrize("kind", KINDS)
def test_more_than_is_free_cannot_be_taken(kind: AllocatorKind) -> None:
    """Taking more than there is breaks an invariant of the caller, and nothing is handed out."""
    allocator = make_allocator(kind, 3)
    allocator.take(2)
    with pytest.raises(AssertionError, match="taking 2 of 1 free blocks"):
        allocator.take(2)
    assert allocator.free == 1


# -- the stack -----------------------------------------------------------------------------------------------------


@given(first=st.integers(0, 9), count=st.integers(1, 9))
def test_the_stack_hands_out_in_the_same_order_what_came_back(first: int, count: int) -> None:
    """What one sequence returns, the next of equal length gets in the same order: a run stays a run."""
    allocator = StackAllocator(20)
    allocator.take(first)
    blocks = allocator.take(count)
    allocator.give_back(blocks)
    assert allocator.take(count) == blocks


# -- segments ------------------------------------------------------------------------------------------------------

states = st.lists(st.booleans(), min_size=1, max_size=24)


@given(states, st.randoms(use_true_random=False))
def test_what_comes_back_merges_with_its_neighbours(free: list[bool], order: object) -> None:
    """Free segments are maximal at any time, and when all is back, in any order, there is one again."""
    allocator = fragmented(free)
    assert sorted(allocator.free_blocks()) == [block for block, is_free in enumerate(free) if is_free]
    held = [block for block, is_free in enumerate(free) if not is_free]
    order.shuffle(held)  # type: ignore[attr-defined]
    allocator.give_back(held[::2])
    allocator.give_back(held[1::2])
    assert allocator.take(len(free)) == list(range(len(free)))


@given(states, st.data())
def test_a_request_gets_the_fewest_runs(free: list[bool], data: st.DataObject) -> None:
    """No choice of free segments gives fewer runs than the allocator's, behind a block to follow or without one."""
    allocator = fragmented(free)
    count = data.draw(st.integers(0, allocator.free))
    after = data.draw(st.sampled_from([None, *(block for block, is_free in enumerate(free) if not is_free)]))
    place = len(free) if after is None else after + 1
    behind = [*free[place:], False].index(False)  # free right behind `after`: no new run
    others = segments(allocator)
    options = [
        number
        for number in range(len(others) + 1)
        if any(sum(chosen) >= count for chosen in combinations(others, number))
    ]
    if behind:
        others.remove(behind)
        options += [
            number
            for number in range(len(others) + 1)
            if any(sum(chosen) + behind >= count for chosen in combinations(others, number))
        ]
    blocks = allocator.take(count, after)
    new = run_lengths(blocks) if after is None else run_lengths([after, *blocks])[1:]
    assert len(new) == min(options)


@given(states, st.data())
def test_the_smallest_segment_that_holds_all_is_cut(free: list[bool], data: st.DataObject) -> None:
    """Best fit: large segments stay whole for large requests."""
    allocator = fragmented(free)
    before = segments(allocator)
    count = data.draw(st.integers(1, max(before, default=1)))
    if allocator.free:
        allocator.take(count)
        best = min(length for length in before if length >= count)
        before.remove(best)
        assert sorted(segments(allocator)) == sorted([*before, *([best - count] if best > count else [])])


@given(states, states, st.data())
def test_runs_of_the_source_are_followed_at_no_cost(free: list[bool], other: list[bool], data: st.DataObject) -> None:
    """Blocks cut where the source's are cut take as few copies as blocks chosen without looking, or fewer."""
    source = fragmented(other)
    blind, aligned = fragmented(free), fragmented(free)
    count = data.draw(st.integers(0, min(source.free, blind.free)))
    blocks = source.take(count)
    copies = contiguous_runs(blocks, aligned.take(count, None, run_lengths(blocks)))
    assert len(copies) <= len(contiguous_runs(blocks, blind.take(count)))


def test_cuts_meet_the_cuts_of_the_source() -> None:
    """Runs of 3 and 4 go into free segments of 5 and 4 as two copies, where filling the larger first takes three."""
    free = [*[True] * 5, False, *[True] * 4]
    assert fragmented(free).take(7) == [0, 1, 2, 3, 4, 6, 7]
    blocks = fragmented(free).take(7, None, [3, 4])
    assert blocks == [6, 7, 8, 0, 1, 2, 3]
    assert len(contiguous_runs([50, 51, 52, 60, 61, 62, 63], blocks)) == 2


def test_a_growing_sequence_stays_in_one_run_while_its_next_block_is_free() -> None:
    """A block that continues a sequence is the one behind its last; else the smallest hole is filled."""
    allocator = SegmentAllocator(20)
    one = allocator.take(3)
    two = allocator.take(3)
    assert allocator.take(1, two[-1]) == [6]
    allocator.take(5)
    allocator.give_back([4])
    assert allocator.take(1, one[-1]) == [4]
    assert allocator.take(1, one[-1]) == [12]


def runs_per_request(kind: AllocatorKind) -> float:
    """Mean over requests that come and go while others grow by interleaved single blocks, at most 80 % in use."""
    allocator, live, runs = make_allocator(kind, 1000), list[list[int]](), list[int]()
    for number in range(600):
        prompt = 5 + number * 7 % 31
        while allocator.free < 200 + prompt:
            allocator.give_back(live.pop(number * 5 % len(live)))
        live.append(allocator.take(prompt))
        runs.append(len(run_lengths(live[-1])))
        for sequence in live[number % 3 :: 3]:
            sequence += allocator.take(1, sequence[-1])
    return sum(runs[300:]) / 300


def test_segments_stay_whole_under_churn() -> None:
    """Where the stack scatters a request over a dozen places, segments give nearly each of them one run."""
    assert runs_per_request("stack") > 8
    assert runs_per_request("segment") < 1.5


def test_run_lengths_of_any_blocks() -> None:
    """A run goes up by one; everything else begins a new one."""
    assert run_lengths([]) == []
    assert run_lengths([4]) == [1]
    assert run_lengths([4, 5, 6, 9, 8, 7, 8]) == [3, 1, 1, 2]
