"""How KV cache blocks lie in memory, when they move between engines, and how they are grouped into few large copies."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

KvLayout = Literal["layer_major", "block_major"]
"""(layers, 2, blocks, ...): each layer has its keys, and its values, of all blocks together; (blocks, layers, 2, ...):
each block has all its layers together (FlowKV, arXiv 2504.03775, section 3).
"""

KvTransfer = Literal["by_request", "by_chunk", "by_layer"]
"""When a prefilled KV cache is sent: when all of it is computed; each chunk of the prompt when it is computed; or so,
and the last chunk layer by layer while it is (by request and by layer: DeepServe, arXiv 2501.14417, section 4.5).
"""


def pieces_per_run(layout: KvLayout, layers: int) -> int:
    """Pieces of memory over which a run of consecutive blocks is scattered."""
    return 1 if layout == "block_major" else 2 * layers


def pieces_by_layer(layout: KvLayout, layers: int, runs: Sequence[int]) -> int:
    """Pieces of memory that runs of such lengths are sent in layer by layer: each layer's keys and values by themselves
    or, where they lie side by side in each block, each layer of each block.
    """
    return 2 * layers * len(runs) if layout == "layer_major" else layers * sum(runs)


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
