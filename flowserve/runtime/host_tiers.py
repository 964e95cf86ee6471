"""Host memory and disk behind a KV cache: where its blocks are swapped to."""

import os
import tempfile

import torch
from torch import Tensor

from flowserve.core.tiers import Move, Tier, TierConfig
from flowserve.core.transfer import contiguous_runs


class HostTiers:
    """Blocks in host memory (pinned, where the KV cache is a device's) and in a file.

    `hbm`: the KV cache, whose blocks lie along `axis`; a block is the same in every tier. The file has no name: it is
    gone with the process, however that ends. It is written through the page cache, so on a host with much free memory a
    disk looks as fast as that. Raises OSError where the disk has no room for it.
    """

    def __init__(self, hbm: Tensor, axis: int, config: TierConfig, folder: str | None = None) -> None:
        self._axis = axis
        shape = list(hbm.shape)
        shape[axis] = config.dram_blocks
        dram = torch.empty(shape, dtype=hbm.dtype, pin_memory=config.dram_blocks > 0 and hbm.device.type != "cpu")
        self._tensors = {Tier.HBM: hbm, Tier.DRAM: dram}
        self._block_shape = [size for place, size in enumerate(hbm.shape) if place != axis]
        self._block_bytes = hbm[(slice(None),) * axis + (0,)].numel() * hbm.element_size()
        self._file = tempfile.TemporaryFile(dir=folder) if config.ssd_blocks else None  # noqa: SIM115 (closed in `close`)
        if self._file is not None:
            os.posix_fallocate(self._file.fileno(), 0, config.ssd_blocks * self._block_bytes)

    def move(self, move: Move) -> None:
        """Copy blocks, pair by pair. Raises OSError where the disk fails.

        Called from a thread beside the one that computes: nobody else writes the target blocks, or reads them before
        the move has been reported.
        """
        for source, target, count in contiguous_runs(move.source_blocks, move.target_blocks):
            if move.target is Tier.SSD:
                self._write(target, self._run(move.source, source, count))
            elif move.source is Tier.SSD:
                self._run(move.target, target, count).copy_(self._read(source, count))
            else:
                self._run(move.target, target, count).copy_(self._run(move.source, source, count))

    def close(self) -> None:
        """Let go of memory and file."""
        self._tensors.clear()
        if self._file is not None:
            self._file.close()

    def _run(self, tier: Tier, start: int, count: int) -> Tensor:
        return self._tensors[tier].narrow(self._axis, start, count).movedim(self._axis, 0)

    def _write(self, start: int, blocks: Tensor) -> None:
        assert self._file is not None
        data: memoryview = blocks.to("cpu").contiguous().view(-1).view(torch.uint8).numpy().data
        at = start * self._block_bytes
        while data:
            written = os.pwrite(self._file.fileno(), data, at)
            data, at = data[written:], at + written

    def _read(self, start: int, count: int) -> Tensor:
        assert self._file is not None
        data, at = bytearray(count * self._block_bytes), start * self._block_bytes
        view = memoryview(data)
        while view:
            got = os.preadv(self._file.fileno(), [view], at)
            if not got:
                raise OSError(f"the file of the SSD tier ends at byte {at}")
            view, at = view[got:], at + got
        return torch.frombuffer(data, dtype=self._tensors[Tier.HBM].dtype).view(count, *self._block_shape)
