"""Reference operators in plain torch, tuned for one thread and small models, where the number of calls is the cost."""

import functools
import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from flowserve.ops.matrix import Matrix, product
from flowserve.ops.step import StepContext

KV_BLOCK_TOKENS = 1
KV_ALIGNMENT_BYTES = 64

MAX_GROUP_BYTES = 2**19
"""Keys and values gathered at once for decodes: what one core's cache still has when attention reads it."""
MAX_GROUP_PADDING = 24
"""Blocks of padding in a group of decodes at which a group of its own costs less (about 30 us against 1.4 us each)."""

PACKED_SIZE = 2**20
"""Elements of a float32 matrix from which on oneDNN's blocked form pays: what a call costs more (15 us) is less than
what is saved. In bfloat16 it always pays, because a plain matrix is reordered in every call.
"""


class LayerCache(NamedTuple):
    """The KV cache from this layer's first keys on, as rows: one token's keys or values [rows, K * D], and one block's
    [rows, block_tokens * K * D].

    In block rows: the keys of block b are at `b * stride`, its values `to_values` further, whatever the layout.
    """

    tokens: Tensor
    blocks: Tensor
    stride: int
    to_values: int
    kv_heads: int


class _Chunk(NamedTuple):
    """A prompt chunk. `blocks` int32 [2n], rows of keys, then of values, and `mask` [count, context]: None where it
    starts at position 0.
    """

    rows: slice
    context: int
    blocks: Tensor | None
    mask: Tensor | None


class _Decodes(NamedTuple):
    """Decodes of similar length. `blocks` int32 [2 * B * width], rows of keys, then of values, `mask` [B, 1, 1, width *
    block_tokens], `gathered` [2 * B * width, block_tokens * K * D]: where their KV cache is gathered layer by layer,
    and how attention looks at it: `key`, `value` [B, K, width * block_tokens, D].
    """

    rows: slice
    blocks: Tensor
    mask: Tensor
    gathered: Tensor
    key: Tensor
    value: Tensor


class _Prepared(NamedTuple):
    """`slots` int64 [2T]: rows of each token's keys and values, in turn."""

    slots: Tensor
    chunks: list[_Chunk]
    decodes: list[_Decodes]


def layer_caches(kv: Tensor) -> list[LayerCache]:
    layers, _, blocks, block_tokens, heads, size = kv.shape
    block_size = block_tokens * heads * size
    layer_rows, to_values, stride = (kv.stride(axis) // block_size for axis in range(3))
    tokens = kv.as_strided((2 * layers * blocks * block_tokens, heads * size), (heads * size, 1))
    rows = kv.as_strided((2 * layers * blocks, block_size), (block_size, 1))
    return [
        LayerCache(tokens[first * block_tokens :], rows[first:], stride, to_values, heads)
        for first in range(0, layers * layer_rows, layer_rows)
    ]


def shares_memory(caches: list[LayerCache]) -> bool:
    return True


def describe(caches: list[LayerCache]) -> str:
    return "attention on the CPU: torch's scaled_dot_product_attention, per prompt chunk and per group of decodes"


def prepare(step: StepContext) -> _Prepared:
    cache: LayerCache = step.caches[0]
    dtype, block_size = cache.blocks.dtype, cache.blocks.shape[1]
    ends = step.starts + step.counts
    chunks, row = [], 0
    for index in range(step.num_chunks):
        start, count, context = int(step.starts[index]), int(step.counts[index]), int(ends[index])
        blocks = mask = None
        if start:
            blocks = _rows(cache, step.block_tables[index, : -(-context // step.block_tokens)])
            mask = torch.full((count, context), -math.inf, dtype=dtype).triu_(start + 1)
        chunks.append(_Chunk(slice(row, row + count), context, blocks, mask))
        row += count
    decodes = []
    lengths = ends[step.num_chunks :]
    most_blocks = MAX_GROUP_BYTES // (2 * block_size * dtype.itemsize)
    groups = _groups((-(-lengths // step.block_tokens)).tolist(), most_blocks)
    if groups:
        most = max((end - start) * width for start, end, width in groups)
        memory = torch.empty(2 * most * block_size, dtype=dtype)
    for start, end, width in groups:
        batch, first = end - start, step.num_chunks + start
        blocks = _rows(cache, step.block_tables[first : first + batch, :width].reshape(-1))
        outside = np.arange(width * step.block_tokens) >= lengths[start:end, None]
        mask = torch.from_numpy(np.where(outside, np.float32(-np.inf), np.float32(0)))[:, None, None].to(dtype)
        gathered = memory[: 2 * batch * width * block_size].view(2 * batch * width, block_size)
        shape = (2, batch, width * step.block_tokens, cache.kv_heads, block_size // step.block_tokens // cache.kv_heads)
        key, value = gathered.view(shape).transpose(2, 3)
        decodes.append(_Decodes(slice(row + start, row + end), blocks, mask, gathered, key, value))
    return _Prepared(_slots(cache, step), chunks, decodes)


def graph_updates(prepared: object) -> list[dict[str, Any]]:
    return []


def pack(weight: Tensor) -> Tensor | None:
    if not torch._C._has_mkldnn:
        return None
    if weight.dtype is torch.bfloat16:
        packs = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    else:
        packs = weight.dtype is torch.float32 and weight.numel() >= PACKED_SIZE
    if not packs:
        return None
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.t(), 64)  # 64: typical rows, hardly matters
    return packed


def linear(x: Tensor, matrix: Matrix, add: Tensor | None = None) -> Tensor:
    if matrix.packed is None or (len(x) == 1 and x.dtype is torch.float32):  # MKL reads a plain one faster for one row
        return product(x, matrix.weight, add)
    out: Tensor
    if add is None or add.dim() == 1:
        out = torch.ops.mkldnn._linear_pointwise(x, matrix.packed, add, "none", [], "")
    else:
        out = torch.ops.mkldnn._linear_pointwise.binary(x, add, matrix.packed, None, "add")
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    # sqrt(n) x w / hypot(|x|, sqrt(n eps)): four kernels, where the textbook's form takes six.
    size = x.shape[-1]
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    zero, floor = _constants(math.sqrt(size * eps))
    return torch.addcmul(zero, x, weight, value=math.sqrt(size)).div_(norm.hypot_(floor))


def norm_heads(x: Tensor, weight: Tensor, eps: float) -> None:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    _, floor = _constants(math.sqrt(x.shape[-1] * eps))
    x.div_(norm.hypot_(floor).mul_(x.shape[-1] ** -0.5)).mul_(weight)


def rotary(rows: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = rows.unsqueeze(2).unbind(1)
    return cos, sin


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin, out=x)


def swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def experts(x: Tensor, weights: Tensor, chosen: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Tokens sorted by expert, so that each expert is two multiplications of the rows that chose it."""
    (tokens, count), chosen = chosen.shape, chosen.flatten()
    order = chosen.argsort(stable=True)
    rows = x.index_select(0, order // count)
    out = torch.empty_like(rows)
    start = 0
    for expert, taken in enumerate(torch.bincount(chosen).tolist()):
        if taken:
            part = slice(start, start := start + taken)
            torch.mm(swiglu(torch.mm(rows[part], gate_up[expert])), down[expert], out=out[part])
    by_token = torch.empty_like(out).index_copy_(0, order, out)
    return torch.bmm(weights[:, None], by_token.view(tokens, count, -1))[:, 0]


def store_kv(kv: Tensor, cache: LayerCache, step: StepContext) -> None:
    prepared = step.prepared
    assert isinstance(prepared, _Prepared)
    tokens, heads, size = kv.shape
    cache.tokens.index_copy_(0, prepared.slots, kv.reshape(2 * tokens, heads // 2 * size))


def attention(query: Tensor, kv: Tensor, cache: LayerCache, step: StepContext) -> Tensor:
    prepared = step.prepared
    assert isinstance(prepared, _Prepared)
    tokens, heads, size = query.shape
    parts = [_attend_chunk(query[chunk.rows], kv[chunk.rows], cache, chunk) for chunk in prepared.chunks]
    parts += [_attend_decodes(query[group.rows], cache, group) for group in prepared.decodes]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(tokens, heads * size)


def best(logits: Tensor) -> tuple[Tensor, Tensor]:
    found = logits.max(dim=-1)
    return found.values, found.indices


def _rows(cache: LayerCache, blocks: npt.NDArray[np.int32]) -> Tensor:
    """Rows of the blocks' keys, then of their values."""
    keys = torch.from_numpy(blocks) * cache.stride
    return torch.cat((keys, keys + cache.to_values))


def _slots(cache: LayerCache, step: StepContext) -> Tensor:
    keys = step.slot_mapping
    if cache.stride > 1:
        keys = keys + keys // step.block_tokens * ((cache.stride - 1) * step.block_tokens)
    return torch.stack((keys, keys + cache.to_values * step.block_tokens), 1).view(-1)


def _attend_chunk(query: Tensor, kv: Tensor, cache: LayerCache, chunk: _Chunk) -> Tensor:
    """[count, H, D]. From position 0 on, the chunk's own keys and values are all there is: the cache is not read."""
    (count, heads, size), kv_heads = query.shape, cache.kv_heads
    if chunk.blocks is None:
        key, value = kv[:, :kv_heads], kv[:, kv_heads:]
    else:
        gathered = cache.blocks.index_select(0, chunk.blocks).view(2, -1, kv_heads, size)[:, : chunk.context]
        key, value = gathered.unbind(0)
    # KV heads stand in as the batch, with their query heads as heads that share one cache (expanded, not copied).
    shared = (kv_heads, heads // kv_heads, chunk.context, size)
    out = F.scaled_dot_product_attention(
        query.view(count, kv_heads, -1, size).permute(1, 2, 0, 3),
        key.transpose(0, 1)[:, None].expand(shared),
        value.transpose(0, 1)[:, None].expand(shared),
        attn_mask=chunk.mask,
        is_causal=chunk.mask is None,
    )
    return out.permute(2, 0, 1, 3).reshape(count, heads, size)


def _attend_decodes(query: Tensor, cache: LayerCache, group: _Decodes) -> Tensor:
    """[B, H, D]. The query heads of one KV head stand in as queries of one sequence, so its cache is read once."""
    batch, heads, size = query.shape
    torch.index_select(cache.blocks, 0, group.blocks, out=group.gathered)
    shared = query.view(batch, cache.kv_heads, -1, size)
    out = F.scaled_dot_product_attention(shared, group.key, group.value, attn_mask=group.mask)
    return out.reshape(batch, heads, size)


def _groups(widths: list[int], most_blocks: int) -> list[tuple[int, int, int]]:
    """Cut ascending widths (in blocks) into groups `(start, end, width)` that waste little on padding.

    From the longest down: a group ends where its padding, or its size (`most_blocks`), would pass the limit.
    """
    groups = []
    end = len(widths)
    while end:
        width, padding, start = widths[end - 1], 0, end - 1
        while start and (end - start + 1) * width <= most_blocks:
            padding += width - widths[start - 1]
            if padding > MAX_GROUP_PADDING:
                break
            start -= 1
        groups.append((start, end, width))
        end = start
    return groups[::-1]


@functools.cache
def _constants(floor: float) -> tuple[Tensor, Tensor]:
    """0-dimensional tensors; making them anew would cost as much as the kernel they feed."""
    return torch.zeros(()), torch.tensor(floor)
