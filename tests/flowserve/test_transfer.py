"""Grouping of KV cache blocks into runs."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowserve.core.transfer import contiguous_runs

# Few distinct values, so that accidental neighbours are common.
pairs = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=40)


@given(pairs)
def test_runs_are_the_two_lists_cut_at_every_gap(pairs: list[tuple[int, int]]) -> None:
    """Laid end to end the runs give back both lists, and no two neighbouring runs could have been one."""
    runs = contiguous_runs([source for source, _ in pairs], [block for _, block in pairs])
    assert [(s + i, d + i) for s, d, length in runs for i in range(length)] == pairs
    for (source, block, length), (next_source, next_block, _) in pairwise(runs):
        assert (source + length, block + length) != (next_source, next_block)


@pytest.mark.parametrize(
    ("source", "blocks", "runs"),
    [
        ([], [], []),
        ([4, 5, 6], [0, 1, 2], [(4, 0, 3)]),
        ([4, 5, 6], [0, 1, 9], [(4, 0, 2), (6, 9, 1)]),
        ([4, 7, 8], [0, 1, 2], [(4, 0, 1), (7, 1, 2)]),
        ([6, 5, 4], [2, 1, 0], [(6, 2, 1), (5, 1, 1), (4, 0, 1)]),
    ],
)
def test_a_gap_on_either_side_ends_a_run(
    source: list[int], blocks: list[int], runs: list[tuple[int, int, int]]
) -> None:
    """A run continues only where both sides go up by one."""
    assert contiguous_runs(source, blocks) == runs


def test_lists_must_pair_up() -> None:
    """Lists of different length are refused with both lengths."""
    with pytest.raises(ValueError, match="2 source blocks for 1 destination"):
        contiguous_runs([1, 2], [3])
