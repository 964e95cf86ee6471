"""Requests and models that the engine benchmarks share."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments import build
from experiments.config import compose

MODEL = "llama_101m"
"""Of conf/model: 100.7 M parameters, 403 MB in float32."""
VOCABULARY = 8192


class Load(NamedTuple):
    """One request: the prompt, and how many tokens to generate whatever they are."""

    prompt: list[int]
    output: int


def checkpoint(model: str = MODEL) -> Path:
    """The folder of an option of conf/model, its random weights in the user's cache, made once."""
    return Path(build.model_folder(compose([f"model={model}"])))


def mixed_load(
    requests: int, prompt: tuple[int, int], output: tuple[int, int], vocabulary: int = VOCABULARY, seed: int = 0
) -> list[Load]:
    """Lengths drawn evenly on a logarithmic scale between the ends of `prompt` and `output`, both included."""
    rng = np.random.default_rng(seed)

    def length(low: int, high: int) -> int:
        return min(high, int(np.exp(rng.uniform(np.log(low), np.log(high + 1)))))

    loads = []
    for _ in range(requests):
        count = length(*prompt)
        loads.append(Load([int(token) for token in rng.integers(0, vocabulary, count)], length(*output)))
    return loads
