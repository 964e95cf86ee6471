"""Random numbers for sampling that depend on nothing but the request's seed and the token's place in the output.

So a draw is the same alone or in a batch, before or after a preemption, and on every device.
"""

import numpy as np
import numpy.typing as npt

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def gumbel(seeds: list[int], indices: list[int], count: int) -> npt.NDArray[np.float32]:
    """Standard Gumbel noise [len(seeds), count], float32; row i for output token `indices[i]` of a request.

    Counter-based: SplitMix64 (Steele, Lea, Flood 2014) of the row's key and the column.
    """
    keys = np.array([seed & 0xFFFFFFFFFFFFFFFF for seed in seeds], dtype=np.uint64)
    keys = _mix(_mix(keys + _GOLDEN) + np.array(indices, dtype=np.uint64) * _GOLDEN)
    bits = _mix(keys[:, None] + np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN)
    # 23 bits and a half: the open interval (0, 1), exact in float32, so that neither logarithm meets 0.
    uniform = ((bits >> np.uint64(41)).astype(np.float32) + np.float32(0.5)) * np.float32(2**-23)
    noise: npt.NDArray[np.float32] = -np.log(-np.log(uniform))
    return noise


def _mix(bits: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))
