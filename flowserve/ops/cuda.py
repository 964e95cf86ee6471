"""Operators for NVIDIA GPUs: flash attention over the paged cache (one call for prompts and decodes alike), the
element-wise rest fused into one kernel each by torch.compile.

Attention is `torch.nn.attention.varlen` (FlashAttention 2, arXiv 2307.08691), whose paged kernel asks for 16-bit values
and blocks of a multiple of BLOCK_MULTIPLE tokens. Written to its contract and checked on host memory against a stand-in
that asserts it; see docs/decisions.md.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flowserve.ops.matrix import Matrix, product
from flowserve.ops.step import StepContext

BLOCK_MULTIPLE = 256
"""Tokens: the paged kernel loads whole tiles of keys from one block."""
KV_BLOCK_TOKENS = BLOCK_MULTIPLE
KV_ALIGNMENT_BYTES = 512
MAX_HEAD_SIZE = 256
ROW_MULTIPLE = 8
"""16-bit values: grouped multiplication asks for rows of a multiple of 16 bytes."""
DTYPES = (torch.bfloat16, torch.float16)


class LayerCache(NamedTuple):
    """One layer of the KV cache: `key`, `value` [blocks, block_tokens, K, D], and both by place for writing:
    `places` [blocks, block_tokens, 2, K, D].
    """

    key: Tensor
    value: Tensor
    places: Tensor


class _Prepared(NamedTuple):
    """int32 on the device: `query_ends` [N + 1] from 0, `lengths` [N], `tables` [N, width]. int64: where the step's
    tokens go, `block` and `offset` [T]. On the host: the longest query and context.
    """

    query_ends: Tensor
    lengths: Tensor
    tables: Tensor
    block: Tensor
    offset: Tensor
    longest_query: int
    longest_context: int


def layer_caches(kv: Tensor) -> list[LayerCache]:
    """Raises ValueError for a dtype, block size or head size that the attention kernel does not take."""
    _, _, _, block_tokens, _, size = kv.shape
    if kv.dtype not in DTYPES:
        allowed = " or ".join(str(each).removeprefix("torch.") for each in DTYPES)
        raise ValueError(f"dtype is {str(kv.dtype).removeprefix('torch.')}: attention on cuda takes {allowed}")
    if block_tokens % BLOCK_MULTIPLE:
        raise ValueError(
            f"block_tokens is {block_tokens}: attention on cuda takes multiples of {BLOCK_MULTIPLE}, as in engine=cuda"
        )
    if size > MAX_HEAD_SIZE or size % 8:
        raise ValueError(f"head size is {size}: attention on cuda takes multiples of 8 up to {MAX_HEAD_SIZE}")
    return [LayerCache(layer[0], layer[1], layer.permute(1, 2, 0, 3, 4)) for layer in kv]


def shares_memory(caches: list[LayerCache]) -> bool:
    return True


def describe(caches: list[LayerCache]) -> str:
    return "attention on cuda: varlen_attn (FlashAttention 2) on the paged cache, one call for a step"


def prepare(step: StepContext) -> _Prepared:
    """One copy to the device for all that attention reads."""
    count, width = step.block_tables.shape
    lengths = step.starts + step.counts
    packed = np.empty(2 * count + 1 + count * width, dtype=np.int32)
    packed[0] = 0
    np.cumsum(step.counts, out=packed[1 : count + 1])
    packed[count + 1 : 2 * count + 1] = lengths
    packed[2 * count + 1 :] = step.block_tables.ravel()
    host = torch.from_numpy(packed)
    device = step.slot_mapping.device
    there = (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)
    return _Prepared(
        query_ends=there[: count + 1],
        lengths=there[count + 1 : 2 * count + 1],
        tables=there[2 * count + 1 :].view(count, width),
        block=step.slot_mapping // step.block_tokens,
        offset=step.slot_mapping % step.block_tokens,
        longest_query=int(step.counts.max()),
        longest_context=int(lengths.max()),
    )


def graph_updates(prepared: object) -> list[dict[str, Any]]:
    return []


def pack(weight: Tensor) -> None:
    """Matrices stay as they are: cuBLAS takes any layout."""


def linear(x: Tensor, matrix: Matrix, add: Tensor | None = None) -> Tensor:
    return product(x, matrix.weight, add)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def norm_heads(x: Tensor, weight: Tensor, eps: float) -> None:
    x.copy_(rms_norm(x, weight, eps))


def rotary(rows: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = rows.unsqueeze(2).unbind(1)
    return cos, sin


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    fused(_rotate)(x, cos, sin)


def swiglu(x: Tensor) -> Tensor:
    out: Tensor = fused(_swiglu)(x)
    return out


def experts(x: Tensor, weights: Tensor, chosen: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Tokens sorted by expert, all experts in one grouped multiplication; how many rows each has stays on the device.

    Raises ValueError for sizes that its kernel does not take.
    """
    (_, size, hidden), (tokens, count) = down.shape, chosen.shape
    if size % ROW_MULTIPLE or hidden % ROW_MULTIPLE:
        raise ValueError(
            f"experts are of {hidden} x {size}: grouped multiplication on cuda takes multiples of {ROW_MULTIPLE}"
        )
    expert, order = chosen.flatten().sort(stable=True)
    ends = torch.searchsorted(expert, torch.arange(len(down), device=x.device), right=True, out_int32=True)
    inner = swiglu(F.grouped_mm(x.index_select(0, order // count), gate_up, offs=ends))
    out = F.grouped_mm(inner, down, offs=ends)
    by_token = torch.empty_like(out).index_copy_(0, order, out)
    return torch.bmm(weights[:, None], by_token.view(tokens, count, -1))[:, 0]


def store_kv(kv: Tensor, cache: LayerCache, step: StepContext) -> None:
    prepared = step.prepared
    assert isinstance(prepared, _Prepared)
    tokens, heads, size = kv.shape
    cache.places[prepared.block, prepared.offset] = kv.view(tokens, 2, heads // 2, size)


def attention(query: Tensor, kv: Tensor, cache: LayerCache, step: StepContext) -> Tensor:
    prepared = step.prepared
    assert isinstance(prepared, _Prepared)
    out = varlen_attention(
        query,
        cache.key,
        cache.value,
        prepared.query_ends,
        None,
        prepared.longest_query,
        prepared.longest_context,
        window_size=(-1, 0),  # causal, aligned at the end of the context
        enable_gqa=True,
        seqused_k=prepared.lengths,
        block_table=prepared.tables,
    )
    return out.reshape(len(query), -1)


def best(logits: Tensor) -> tuple[Tensor, Tensor]:
    found = logits.max(dim=-1)
    return found.values, found.indices


def draw(logits: Tensor, temperatures: np.ndarray, noise: np.ndarray) -> Tensor:
    there = functools.partial(torch.as_tensor, device=logits.device)
    return torch.addcdiv(there(noise), logits.float(), there(temperatures)[:, None]).argmax(-1)


def varlen_attention(*arguments: Any, **options: Any) -> Tensor:
    """torch's own, imported where it is used: releases before it came are served by the other devices' operators."""
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(*arguments, **options)
    assert isinstance(out, Tensor)  # nothing else was asked for
    return out


@functools.cache
def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled once for all sizes: the number of tokens changes with every step."""
    compiled: Callable[..., Any] = torch.compile(function, dynamic=True)
    return compiled


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    x.copy_(x * cos + x.roll(x.shape[-1] // 2, -1) * sin)


def _swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up
