"""How KV cache blocks lie in memory, and are grouped into few large copies when they move between engines."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

KvLayout = Literal["layer_major", "block_major"]
"""(layers, 2, blocks, ...): each layer has its keys, and its values, of all blocks together; (blocks, layers, 2, ...):
each block has all its layers together (FlowKV, arXiv 2504.03775, section 3).
"""


def pieces_per_run(layout: KvLayout, layers: int) -> int:
    """Pieces of memory over which a run of consecutive blocks is scattered."""
    return 1 if layout == "block_major" else 2 * layers


def run_lengths(blocks: Sequence[int]) -> list[int]:
    """Lengths of the maximal runs of consecutive ascending numbers, in order."""
    starts = [place for place, (before, block) in enumerate(pairwise(blocks), 1) if block != before + 1]
    return [end - start for start, end in pairwise([0, *starts, len(blocks)])] if blocks else []


def runs_from(lengths: Sequence[int], skip: int) -> Sequence[int]:
    """The lengths of what is left of the runs without the first `skip` blocks."""
    for number, length in enumerate(lengths):
        if skip < length:
            return [length - skip, *lengths[number + 1 :]] if skip else lengths[number:]
        skip -= length
    return ()


def contiguous_runs(source_blocks: Sequence[int], blocks: Sequence[int]) -> list[tuple[int, int, int]]:
    """Maximal runs `(source start, destination start, length)` that ascend without a gap on both sides.

    Every transfer pays an overhead per call, so a run that is contiguous only at one end helps nobody: it must be
    aligned at both (FlowKV, arXiv 2504.03775, bidirectional segment alignment). Order is kept: the runs laid end to end
    are the two lists. Raises ValueError where the lists differ in length.
    """
    if len(source_blocks) != len(blocks):
        raise ValueError(f"{len(source_blocks)} source blocks for {len(blocks)} destination blocks: they must pair up")
    runs: list[tuple[int, int, int]] = []
    first_source = first = length = 0
    for source, block in zip(source_blocks, blocks, strict=True):
        if length and source == first_source + length and block == first + length:
            length += 1
            continue
        if length:
            runs.append((first_source, first, length))
        first_source, first, length = source, block, 1
    if length:
        runs.append((first_source, first, length))
    return runs
