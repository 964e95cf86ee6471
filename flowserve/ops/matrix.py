"""Weights that activations are multiplied by."""

from typing import Any

import torch
from torch import Tensor


class Matrix:
    """A weight [in, out], and `packed`: the form of it that a device multiplies fastest, where it has one of its own.

    The weight itself stays: checkpoints are loaded into it and peers read it. Whoever changes it packs it anew.
    """

    __slots__ = ("packed", "weight")

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.packed: Any = None


def product(x: Tensor, weight: Tensor, add: Tensor | None) -> Tensor:
    """`Ops.linear` with a plain weight."""
    return torch.mm(x, weight) if add is None else torch.addmm(add, x, weight)
