"""The stack of free KV cache blocks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowserve.core.allocator import BlockAllocator


@given(total=st.integers(1, 40), sizes=st.lists(st.tuples(st.booleans(), st.integers(0, 12)), max_size=40))
def test_every_block_is_in_one_place(total: int, sizes: list[tuple[bool, int]]) -> None:
    """Whatever is taken and given back, free and taken blocks together are all blocks, each once."""
    allocator = BlockAllocator(total)
    taken: list[list[int]] = []
    for give_back, size in sizes:
        if give_back and taken:
            allocator.give_back(taken.pop(size % len(taken)))
        elif size <= allocator.free:
            taken.append(allocator.take(size))
            assert len(taken[-1]) == size
        held = [block for blocks in taken for block in blocks]
        assert sorted([*allocator.free_blocks(), *held]) == list(range(total))
        assert allocator.free == total - len(held)


@given(total=st.integers(1, 40), data=st.data())
def test_a_fresh_cache_hands_out_ascending_runs(total: int, data: st.DataObject) -> None:
    """Without any return, blocks come in ascending order, so that transfers move in few runs."""
    allocator, got = BlockAllocator(total), []
    while allocator.free:
        got += allocator.take(data.draw(st.integers(1, allocator.free)))
    assert got == list(range(total))


@given(first=st.integers(0, 9), count=st.integers(1, 9))
def test_blocks_given_back_are_handed_out_in_the_same_order(first: int, count: int) -> None:
    """What one sequence returns, the next of equal length gets in the same order: a run stays a run."""
    allocator = BlockAllocator(20)
    allocator.take(first)
    blocks = allocator.take(count)
    allocator.give_back(blocks)
    assert allocator.take(count) == blocks


def test_more_than_is_free_cannot_be_taken() -> None:
    """Taking more than there is breaks an invariant of the caller, and nothing is handed out."""
    allocator = BlockAllocator(3)
    allocator.take(2)
    with pytest.raises(AssertionError, match="taking 2 of 1 free blocks"):
        allocator.take(2)
    assert allocator.free == 1
