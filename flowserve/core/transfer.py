"""How KV cache blocks are grouped into few large copies when they move between engines."""

from collections.abc import Sequence


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
