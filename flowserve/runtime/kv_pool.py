"""The KV cache of one engine as one tensor, and the memory from which other processes read it one-sidedly.

That memory is an anonymous file (memfd) that peers open as `/proc/<pid>/fd/<n>`: there is no name to clean up, so a
process that is killed leaves nothing behind. On the CPU it is the KV cache itself. The memory of another device is not
readable from outside: there the file is a copy in host memory, at the same places, of the blocks that were staged.
"""

import fcntl
import mmap
import os
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from flowserve.core.config import EngineConfig
from flowserve.core.transfer import KvLayout, contiguous_runs, pieces_per_run
from flowserve.models import Model
from flowserve.runtime.runner import KvHandle

MEMFD_NAME = "deepflow-kv"


class _Peer(NamedTuple):
    """A mapped peer. `file` identifies the memory: (device, inode), because a path may come back as another file."""

    file: tuple[int, int]
    pieces: Tensor


class KvPool:
    """`tensor`: (layers, 2, blocks, block_tokens, kv_heads, head_dim), index 0 of the second axis K, 1 V; all zeros.

    Its strides follow `layout`. `alignment`: bytes at a multiple of which memory of a device starts, each layer's keys
    and values by themselves where they are apart. `staged`: peers read a copy, always so on a device but the CPU.
    """

    def __init__(
        self,
        layers: int,
        blocks: int,
        block_tokens: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        layout: KvLayout = "layer_major",
        device: torch.device | None = None,
        alignment: int = 64,
        staged: bool = False,
    ) -> None:
        shape = (layers, 2, blocks, block_tokens, kv_heads, head_dim)
        device = device or torch.device("cpu")
        staged = staged or device.type != "cpu"
        size = _num_bytes(shape, dtype)
        self._fd = os.memfd_create(MEMFD_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self._fd, size)
        # A file that cannot shrink cannot kill a reading peer with SIGBUS.
        fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        shared = torch.frombuffer(mmap.mmap(self._fd, size), dtype=dtype)
        self.handle = KvHandle(f"/proc/{os.getpid()}/fd/{self._fd}", shape, str(dtype).removeprefix("torch."), layout)
        # Memory as peers copy it: (pieces of a run, blocks, elements of a piece of one block).
        readable = _pieces(shared, self.handle)
        self._staging = readable if staged else None
        self._memory = _allocate(readable, device, alignment) if staged else readable
        if layout == "block_major":
            self.tensor = self._memory.view(blocks, *shape[:2], *shape[3:]).permute(1, 2, 0, 3, 4, 5)
        else:
            self.tensor = self._memory.view(shape)
        self._peers: dict[str, _Peer] = {}

    @property
    def memory(self) -> Tensor:
        """The same as copies see it: (pieces of a run, blocks, elements of a piece of one block)."""
        return self._memory

    def peer(self, handle: KvHandle) -> Tensor:
        """The KV cache of another engine, for `copy_blocks`, read-only by agreement.

        Mapped once per path. Raises OSError where it is gone (also when it was mapped before: a dead peer's blocks are
        nobody's promise), ValueError where its layout, or its shape but for the number of blocks, is not ours.
        """
        self._check_layout(handle)
        known = self._peers.pop(handle.path, None)
        status = os.stat(handle.path)
        file = (status.st_dev, status.st_ino)
        if known is None or known.file != file or known.pieces.shape[1] != handle.shape[2]:
            known = _Peer(file, _pieces(self._map(handle), handle))
            # A mapping keeps a dead peer's memory alive: forget those that are gone when a new one comes.
            self._peers = {path: peer for path, peer in self._peers.items() if os.path.exists(path)}
        self._peers[handle.path] = known
        return known.pieces

    def stage(self, blocks: list[int]) -> None:
        """Bring what is in these blocks to where peers read them. On the CPU they read the KV cache itself."""
        if self._staging is not None:
            for start, _, length in contiguous_runs(blocks, blocks):
                span = slice(start, start + length)
                self._staging[:, span].copy_(self._memory[:, span])

    def copy_blocks(self, source: Tensor, source_blocks: list[int], blocks: list[int]) -> int:
        """Copy `source_blocks` of what `peer` returned into our `blocks`, pair by pair.

        Returns the number of copies: one for each run that is contiguous on both sides or, between parts of host
        memory, on ours, where one gather moves scattered blocks as fast. Each is of `pieces_per_run` pieces.
        """
        gathers = self._memory.device == source.device
        runs = contiguous_runs(blocks if gathers else source_blocks, blocks)
        done = 0
        for _, target, length in runs:
            into, wanted = self._memory[:, target : target + length], source_blocks[done : done + length]
            done += length
            if wanted == list(range(wanted[0], wanted[0] + length)):
                into.copy_(source[:, wanted[0] : wanted[0] + length])
            else:
                torch.index_select(source, 1, torch.tensor(wanted), out=into)
        return len(runs)

    def close(self) -> None:
        """Let go of the memory: peers cannot open it any more. It is freed with the last tensor that looks at it."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1
        self._peers.clear()
        self.tensor = self._memory = torch.empty(0)
        self._staging = None

    def _check_layout(self, handle: KvHandle) -> None:
        ours = self.handle
        same = len(handle.shape) == len(ours.shape) and all(
            axis == 2 or size == ours.shape[axis] for axis, size in enumerate(handle.shape)
        )
        if not same or handle.dtype != ours.dtype or handle.layout != ours.layout:
            raise ValueError(
                f"the peer's KV cache is {list(handle.shape)} {handle.dtype} {handle.layout}, ours {list(ours.shape)} "
                f"{ours.dtype} {ours.layout}: all but the number of blocks (third axis) must agree, so run both with "
                "one model, dtype, block size and kv_layout"
            )

    def _map(self, handle: KvHandle) -> Tensor:
        fd = os.open(handle.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            # A number in /proc may meanwhile belong to another process and its file to anything.
            if MEMFD_NAME not in os.readlink(f"/proc/self/fd/{fd}"):
                raise FileNotFoundError(f"{handle.path} is no KV cache (any more)")
            size = _num_bytes(handle.shape, self.tensor.dtype)
            if (actual := os.fstat(fd).st_size) != size:
                raise ValueError(f"the peer's KV cache at {handle.path} has {actual} bytes, its layout needs {size}")
            memory = mmap.mmap(fd, size, prot=mmap.PROT_READ)
        finally:
            os.close(fd)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*not writable")  # and nothing here writes to it
            return torch.frombuffer(memory, dtype=self.tensor.dtype)


def _pieces(memory: Tensor, handle: KvHandle) -> Tensor:
    layers, _, blocks, *_ = handle.shape
    return memory.view(pieces_per_run(handle.layout, layers), blocks, -1)


def _allocate(like: Tensor, device: torch.device, alignment: int) -> Tensor:
    """Zeros on the device, each piece at a multiple of `alignment` bytes."""
    pieces, blocks, elements = like.shape
    size = blocks * elements * like.dtype.itemsize
    padded = -(-size // alignment) * alignment
    memory = torch.zeros(pieces * padded + alignment, dtype=torch.uint8, device=device)
    start = -memory.data_ptr() % alignment
    rows = memory[start : start + pieces * padded].view(pieces, padded)[:, :size]
    return rows.view(like.dtype).view(pieces, blocks, elements)


def pool_of(
    model: Model, config: EngineConfig, blocks: int, dtype: torch.dtype, device: torch.device, alignment: int
) -> KvPool:
    """The KV cache of a model inside an engine, of `blocks` blocks; a draft model's has the form of the engine's."""
    sizes = (model.num_kv_heads, model.head_dim)
    return KvPool(model.num_layers, blocks, config.block_tokens, *sizes, dtype, config.kv_layout, device, alignment)


def _num_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return int(torch.Size(shape).numel()) * dtype.itemsize
