"""One seed, many named random streams: a new consumer does not shift the draws of the others."""

import numpy as np
import xxhash


def stream(seed: int, name: str) -> np.random.Generator:
    """The random stream `name` of `seed`; equal arguments give equal draws. ValueError: a negative seed."""
    if seed < 0:
        raise ValueError(f"seed is {seed}: allowed is a whole number from 0 up")
    return np.random.default_rng([seed, xxhash.xxh3_64_intdigest(name.encode())])
