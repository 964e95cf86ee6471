"""Device code behind one seam: what a model and a runner ask of a device, each device in the file of its name.

Shapes follow the operators that serving accelerators offer (packed tokens, slot mapping, block table, lengths per
sequence), so that a device file is a thin layer over its vendor's calls and `cpu` is the reference for all of them.
T: packed tokens of a step, H and K: query and KV heads, D: head size, S: sampled rows, V: vocabulary, E: experts of a
layer, F: intermediate size of an MLP.
"""

import importlib
from typing import Any, Protocol, cast

from torch import Tensor

from flowserve.ops.matrix import Matrix
from flowserve.ops.step import StepContext

DEVICES = ("cpu", "cuda", "npu")


class Ops(Protocol):
    """Operators of one device. Tensors are on that device and of the model's dtype unless said otherwise."""

    KV_BLOCK_TOKENS: int
    """Blocks of the KV cache must have a multiple of this many tokens."""
    KV_ALIGNMENT_BYTES: int
    """The memory of the KV cache must start at a multiple of this."""

    def layer_caches(self, kv: Tensor) -> list[Any]:
        """Per layer, the device's view of `kv` (layers, 2, blocks, block_tokens, K, D), for `store_kv`, `attention`.

        Raises ValueError for sizes or a dtype that the device has no attention for.
        """
        ...

    def shares_memory(self, caches: list[Any]) -> bool:
        """Whether these caches are views of the `kv` they were made from, not copies in the device's own format."""
        ...

    def describe(self, caches: list[Any]) -> str:
        """One line: how attention on these caches is computed."""
        ...

    def prepare(self, step: StepContext) -> object:
        """What all layers of a step share (device copies of tables, masks); `StepContext.prepared` from then on."""
        ...

    def graph_updates(self, prepared: object) -> list[dict[str, Any]]:
        """Of a step of decodes, what a captured graph must be told on the host before it is replayed: per operator, or
        once for all, its keyword arguments. Empty where all is in tensors. Raises ValueError for a device that has no
        graphs.
        """
        ...

    def pack(self, weight: Tensor) -> Any:
        """The device's own form of a weight [in, out], for `Matrix.packed`; None where `linear` takes it as it is."""
        ...

    def linear(self, x: Tensor, matrix: Matrix, add: Tensor | None = None) -> Tensor:
        """x [T, in] @ weight [in, out] + `add`, which is [out] or [T, out]; returns [T, out]."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x [T, hidden] / sqrt(mean(x^2) + eps) * weight [hidden]."""
        ...

    def norm_heads(self, x: Tensor, weight: Tensor, eps: float) -> None:
        """`rms_norm` of every head of x [T, heads, D] by itself, with weight [D], in place: x is a view of a wider
        tensor (its last dimension is contiguous).
        """
        ...

    def rotary(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of a step in the form that `rotate` takes, from rows [T, 2, D] of a model's table: cosines,
        and sines with their first half negated.
        """
        ...

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> None:
        """Rotary embedding of x [T, heads, D], in place, halves layout; cos and sin from `rotary`."""
        ...

    def swiglu(self, x: Tensor) -> Tensor:
        """silu(gate) * up for x [T, 2F] = (gate, up); returns [T, F]."""
        ...

    def experts(self, x: Tensor, weights: Tensor, chosen: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        """Mixture of experts behind its router: for each token t of x [T, hidden], the sum over j of
        weights[t, j] * swiglu(x[t] @ gate_up[e]) @ down[e], where e = chosen[t, j]; returns [T, hidden].

        weights [T, k]; chosen [T, k] int64, k different experts of E per token in any order; gate_up [E, hidden, 2F] =
        (gate, up) and down [E, F, hidden], all contiguous. Experts that no token chose cost nothing, or little.
        """
        ...

    def store_kv(self, kv: Tensor, cache: Any, step: StepContext) -> None:
        """Write kv [T, 2K, D] (K heads of keys, then of values) to the slots of the step's tokens."""
        ...

    def attention(self, query: Tensor, kv: Tensor, cache: Any, step: StepContext) -> Tensor:
        """Causal attention of query [T, H, D] over all cached positions of each sequence; returns [T, H * D].

        `kv` [T, 2K, D]: what `store_kv` was given for this layer, already in the cache.
        """
        ...

    def best(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Per row of logits [S, V]: the largest (NaN where any is NaN) and its index, both [S]."""
        ...


def load(device: str) -> Ops:
    """The operators for a device type, imported only when asked for. Raises ValueError where there are none."""
    if device not in DEVICES:
        raise ValueError(f"no operators for device {device!r}: there are {', '.join(DEVICES)}")
    return cast(Ops, importlib.import_module(f"flowserve.ops.{device}"))
