"""Random numbers for sampling that depend on nothing but the request's seed, the token's id and place in the output.

So a draw is the same alone or in a batch, before or after a preemption, among few candidates or all tokens, and on
every device. Counter-based: SplitMix64 (Steele, Lea, Flood 2014) of a row's key and the token id.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_FACTORS = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def row_keys(seeds: Sequence[int], indices: Sequence[int]) -> npt.NDArray[np.uint64]:
    """Keys [R] of the draws of output token `indices[i]` of requests with these seeds (0 to 2^64 - 1)."""
    golden = np.uint64(_GOLDEN)
    keys = _mix(np.array(seeds, dtype=np.uint64) + golden)
    return _mix(keys + np.array(indices, dtype=np.uint64) * golden)


def gumbel(keys: npt.NDArray[np.uint64], tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """Standard Gumbel noise [R, K], float32, for keys [R] and token ids [R, K], or [K] where all rows have the same."""
    bits = _mix(keys[:, None] + (tokens + 1).astype(np.uint64) * np.uint64(_GOLDEN))
    # 23 bits and a half: the open interval (0, 1), exact in float32, so that neither logarithm meets 0.
    uniform = ((bits >> np.uint64(41)).astype(np.float32) + np.float32(0.5)) * np.float32(2**-23)
    noise: npt.NDArray[np.float32] = -np.log(-np.log(uniform))
    return noise


def gumbel_on_device(keys: Tensor, tokens: Tensor) -> Tensor:
    """`gumbel` in torch, where the logits are: keys int64 [R] (the same bits), tokens int64.

    The very same uniform numbers; the logarithms are the device's own, so the last bit of the noise may differ. Takes
    two to three times as long as numpy on a CPU (measured there).
    """
    bits = keys[:, None] + (tokens + 1) * _signed(_GOLDEN)
    bits = (bits ^ _shift(bits, 30)) * _signed(_FACTORS[0])
    bits = (bits ^ _shift(bits, 27)) * _signed(_FACTORS[1])
    bits = bits ^ _shift(bits, 31)
    uniform = (_shift(bits, 41).float() + 0.5) * 2**-23
    return -torch.log(-torch.log(uniform))


def _mix(bits: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(_FACTORS[0])
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(_FACTORS[1])
    return bits ^ (bits >> np.uint64(31))


def _signed(bits: int) -> int:
    """torch has no unsigned 64-bit arithmetic; products and sums of int64 wrap to the same bits."""
    return bits - (1 << 64)


def _shift(bits: Tensor, count: int) -> Tensor:
    """Logical shift to the right: torch's repeats the sign."""
    return (bits >> count) & ((1 << (64 - count)) - 1)
