"""The KV cache of one engine as one tensor in shared memory, which other processes may map and read one-sidedly.

The memory is an anonymous file (memfd) that peers open as `/proc/<pid>/fd/<n>`: there is no name to clean up, so a
process that is killed leaves nothing behind.
"""

import fcntl
import mmap
import os
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from flowserve.core.transfer import contiguous_runs
from flowserve.runtime.runner import KvHandle

MEMFD_NAME = "deepflow-kv"


class _Peer(NamedTuple):
    """A mapped peer. `file` identifies the memory: (device, inode), because a path may come back as another file."""

    file: tuple[int, int]
    tensor: Tensor


class KvPool:
    """`tensor`: (layers, 2, blocks, block_tokens, kv_heads, head_dim), index 0 of the second axis K, 1 V; all zeros."""

    def __init__(
        self, layers: int, blocks: int, block_tokens: int, kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> None:
        shape = (layers, 2, blocks, block_tokens, kv_heads, head_dim)
        size = _num_bytes(shape, dtype)
        self._fd = os.memfd_create(MEMFD_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self._fd, size)
        # A file that cannot shrink cannot kill a reading peer with SIGBUS.
        fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        self.tensor = torch.frombuffer(mmap.mmap(self._fd, size), dtype=dtype).view(shape)
        self.handle = KvHandle(f"/proc/{os.getpid()}/fd/{self._fd}", shape, str(dtype).removeprefix("torch."))
        self._peers: dict[str, _Peer] = {}

    def peer(self, handle: KvHandle) -> Tensor:
        """The KV cache of another engine, read-only by agreement: same shape as ours but for the number of blocks.

        Mapped once per path. Raises OSError where it is gone (also when it was mapped before: a dead peer's blocks are
        nobody's promise), ValueError where its layout is not ours.
        """
        self._check_layout(handle)
        known = self._peers.pop(handle.path, None)
        status = os.stat(handle.path)
        file = (status.st_dev, status.st_ino)
        if known is None or known.file != file or known.tensor.shape != handle.shape:
            known = _Peer(file, self._map(handle))
            # A mapping keeps a dead peer's memory alive: forget those that are gone when a new one comes.
            self._peers = {path: peer for path, peer in self._peers.items() if os.path.exists(path)}
        self._peers[handle.path] = known
        return known.tensor

    def copy_blocks(self, source: Tensor, source_blocks: list[int], blocks: list[int]) -> int:
        """Copy `source_blocks` of a tensor that `peer` returned into our `blocks`, pair by pair.

        Returns the number of runs contiguous on both sides; each is one copy (of layers x 2 segments in this layout).
        """
        runs = contiguous_runs(source_blocks, blocks)
        for start, target, length in runs:
            self.tensor[:, :, target : target + length].copy_(source[:, :, start : start + length])
        return len(runs)

    def close(self) -> None:
        """Let go of the memory: peers cannot open it any more. It is freed with the last tensor that looks at it."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1
        self._peers.clear()
        self.tensor = torch.empty(0)

    def _check_layout(self, handle: KvHandle) -> None:
        ours = self.handle
        same = len(handle.shape) == len(ours.shape) and all(
            axis == 2 or size == ours.shape[axis] for axis, size in enumerate(handle.shape)
        )
        if not same or handle.dtype != ours.dtype:
            raise ValueError(
                f"the peer's KV cache is {list(handle.shape)} {handle.dtype}, ours {list(ours.shape)} {ours.dtype}: "
                "all but the number of blocks (third axis) must agree, so run both with one model, dtype and block size"
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
            return torch.frombuffer(memory, dtype=self.tensor.dtype).view(handle.shape)


def _num_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return int(torch.Size(shape).numel()) * dtype.itemsize
