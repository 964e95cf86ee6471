"""What a model's layers and operators need to know of one step beside the tokens."""

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

if TYPE_CHECKING:
    from flowserve.ops import Ops

Ints = npt.NDArray[np.int64]


class StepContext:
    """Tokens of a step are packed without padding: first the prompt chunks, then one token for each decode.

    For its N sequences in that order, on the host: `starts` [N] positions that were in the KV cache before the step,
    `counts` [N] tokens of the step, `block_tables` int32 [N, width] (entries beyond a sequence's blocks are any valid
    block), `num_chunks` how many of the N are chunks. Decodes come in order of ascending length, so that neighbours can
    share a padded gather.
    For its T tokens: `positions` [T] int64 on the host, `slot_mapping` [T] int64 on the device, slot = block *
    block_tokens + offset. `sample_rows` [S] int64: packed rows whose logits are wanted, in the order wanted.
    `caches`, `prepared`: the operators' own views and per-step data.
    """

    __slots__ = (
        "block_tables",
        "block_tokens",
        "caches",
        "counts",
        "num_chunks",
        "ops",
        "positions",
        "prepared",
        "sample_rows",
        "slot_mapping",
        "starts",
    )

    def __init__(
        self,
        ops: "Ops",
        caches: list[Any],
        starts: Ints,
        counts: Ints,
        num_chunks: int,
        block_tables: npt.NDArray[np.int32],
        block_tokens: int,
        sample_rows: Ints,
        device: torch.device,
    ) -> None:
        self.ops = ops
        self.caches = caches
        self.starts = starts
        self.counts = counts
        self.num_chunks = num_chunks
        self.block_tables = block_tables
        self.block_tokens = block_tokens
        owner = np.arange(len(counts))
        self.positions = starts
        if num_chunks:
            owner = np.repeat(owner, counts)
            first = np.cumsum(counts) - counts
            self.positions = np.arange(len(owner)) - (first - starts)[owner]
        block, offset = np.divmod(self.positions, block_tokens)
        slots = block_tables[owner, block] * np.int64(block_tokens) + offset
        self.slot_mapping = torch.from_numpy(slots).to(device)
        self.sample_rows = torch.from_numpy(sample_rows).to(device)
        self.prepared = ops.prepare(self)
