"""torch_npu's operators as op-plugin documents them: every constraint is asserted, the result computed in float32.

Signatures are those of the wheel's schemas, without the parameters that nothing here uses. `calls` records what was
called when it is a list.
"""

import functools
import inspect
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.flowserve.npu_tensor import ND, NZ, NpuTensor, capturing, host

SHORT = (torch.float16, torch.bfloat16)
FLOATS = (*SHORT, torch.float32)
SOC_VERSIONS = {"A2": 224, "A3": 252, "310P": 202, "A5": 260}
MASK = torch.ones(2048, 2048, dtype=torch.int8).triu_(1)


class ContractError(RuntimeError):
    """A call that the operator's documentation does not allow."""


class Call(NamedTuple):
    name: str
    arguments: dict[str, Any]
    result: Any


recording: list[Call] | None = None
OPERATORS: dict[str, Callable[..., Any]] = {}
__all__ = ["OPERATORS", "ContractError"]


def operator(function: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        arguments = signature.bind(*args, **kwargs).arguments
        result = function(*args, **kwargs)
        if recording is not None:
            recording.append(Call(function.__name__, arguments, result))
        graph = capturing()
        if graph is not None:
            graph.record(function, (), dict(arguments), result)
        return result

    OPERATORS[function.__name__] = call
    __all__.append(function.__name__)
    return call


def need(condition: bool, what: str) -> None:
    if not condition:
        operator_name = next(frame.function for frame in inspect.stack() if frame.function in OPERATORS)
        raise ContractError(f"{operator_name}: {what}")


def family() -> str:
    """As the SoC number of the torch_npu that was imported says."""
    version = sys.modules["torch_npu"].npu.get_soc_version()
    return next(name for name, number in SOC_VERSIONS.items() if number == version)


def on_device(name: str, tensor: Tensor, dtypes: Sequence[torch.dtype], dims: int | None = None) -> Tensor:
    """The host tensor behind a contiguous device tensor of one of these dtypes."""
    need(isinstance(tensor, NpuTensor), f"{name} is not on the device")
    need(tensor.dtype in dtypes, f"{name} is {tensor.dtype}")
    need(tensor.dtype is not torch.bfloat16 or family() != "310P", f"{name} is bfloat16 on 310P")
    need(tensor.is_contiguous(), f"{name} is not contiguous: shape {list(tensor.shape)}, strides {tensor.stride()}")
    need(dims is None or tensor.dim() == dims, f"{name} has shape {list(tensor.shape)}")
    return host(tensor)


def on_host(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    need(not isinstance(tensor, NpuTensor) and tensor.device.type == "cpu", f"{name} is not on the host")
    need(tensor.dtype is dtype and tensor.is_contiguous(), f"{name} is {tensor.dtype}, strides {tensor.stride()}")
    return tensor


def integers(name: str, values: Any) -> list[int]:
    """A list of plain ints: these operators read lengths on the host."""
    need(
        type(values) is list and all(type(value) is int for value in values), f"{name} is not a list of ints: {values}"
    )
    need(all(value >= 0 for value in values), f"{name} has negative values")
    return list(values)


# -- attention -----------------------------------------------------------------------------------------------------


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> Tensor:
    """query [S, N, D], key and value [C, KVN, D]; the last query sees every key, each earlier one a key less."""
    count, heads, _ = query.shape
    key, value = (each.float().repeat_interleave(heads // each.shape[1], 1) for each in (key, value))
    scores = torch.einsum("snd,cnd->nsc", query.float(), key) * scale
    if causal:
        last = torch.arange(count)[:, None] + (len(key) - count)
        scores = scores.masked_fill(torch.arange(len(key)) > last, -math.inf)
    return torch.einsum("nsc,cnd->snd", scores.softmax(-1), value).to(query.dtype)


def check_table(table: Tensor, batch: int, contexts: list[int], blocks: int, block_size: int) -> Tensor:
    table = on_device("block_table", table, [torch.int32], 2)
    need(len(contexts) == batch, f"{len(contexts)} KV lengths for {batch} sequences: not one plain length each")
    need(table.shape[0] == batch, f"block_table has {table.shape[0]} rows for {batch} sequences")
    for row, context in zip(table, contexts, strict=True):
        used = -(-context // block_size)
        need(table.shape[1] >= used, f"block_table has {table.shape[1]} columns, a context of {context} needs {used}")
        need(bool(((row[:used] >= 0) & (row[:used] < blocks)).all()), "block_table names blocks that do not exist")
    return table


@operator
def npu_fused_infer_attention_score(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    atten_mask: Tensor | None = None,
    actual_seq_lengths: list[int] | None = None,
    actual_seq_lengths_kv: list[int] | None = None,
    block_table: Tensor | None = None,
    num_heads: int = 1,
    scale: float = 1.0,
    pre_tokens: int = 2147483647,
    next_tokens: int = 2147483647,
    input_layout: str = "BSH",
    num_key_value_heads: int = 0,
    sparse_mode: int = 0,
    inner_precise: int = 0,
    block_size: int = 0,
    softmax_lse_flag: bool = False,
) -> tuple[Tensor, Tensor]:
    need(family() in ("A2", "A3"), f"not on {family()}")
    need(input_layout in ("TND", "BSND", "BSH"), f"layout {input_layout}")
    q = on_device("query", query, SHORT, 4 if input_layout == "BSND" else 3)
    k, v = on_device("key", key, [query.dtype]), on_device("value", value, [query.dtype])
    need(key.shape == value.shape, "key and value differ in shape")
    kv_heads = num_key_value_heads or num_heads
    need(num_heads % kv_heads == 0 and num_heads // kv_heads <= 64, f"{num_heads} heads on {kv_heads} KV heads")
    need(num_heads <= 256, f"{num_heads} heads")
    if input_layout == "TND":
        batch, longest = len(integers("actual_seq_lengths", actual_seq_lengths)), 0
        heads, size = q.shape[1:]
        ends = integers("actual_seq_lengths", actual_seq_lengths)
        need(size in (128, 192), f"head size {size} in TND")
        need(0 < batch <= 4096, f"{batch} sequences in TND")
        need(sorted(ends) == ends and ends[0] > 0, f"actual_seq_lengths {ends} is not cumulative")
        need(ends[-1] == len(q), f"actual_seq_lengths ends with {ends[-1]}, there are {len(q)} rows (561002)")
        starts = [0, *ends[:-1]]
        rows = [q[start:end] for start, end in zip(starts, ends, strict=True)]
    elif input_layout == "BSND":
        batch, _, heads, size = q.shape
        lengths = (
            [q.shape[1]] * batch if actual_seq_lengths is None else integers("actual_seq_lengths", actual_seq_lengths)
        )
        need(len(lengths) == batch and max(lengths) <= q.shape[1], f"actual_seq_lengths {lengths} for {list(q.shape)}")
        rows = [q[index, :length] for index, length in enumerate(lengths)]
    else:
        batch, length, width = q.shape
        heads, size = num_heads, width // num_heads
        need(width == num_heads * size, f"width {width} of {num_heads} heads")
        rows = list(q.view(batch, length, heads, size))
    need(heads == num_heads, f"num_heads is {num_heads}, query has {heads}")
    need(size % 16 == 0 and size <= 512, f"head size {size}")
    longest = max(map(len, rows))
    need(input_layout == "TND" or longest == 1 or num_heads * size < 65535, f"width {num_heads * size}")
    need(type(scale) is float and scale != 1.0, f"scale {scale}")

    contexts = integers("actual_seq_lengths_kv", actual_seq_lengths_kv)
    if block_table is None:
        need(input_layout == "TND", "contiguous keys are used in TND only here")
        need(block_size == 0, "block_size without block_table")
        need(k.shape[1:] == (kv_heads, size) and sorted(contexts) == contexts, "keys are not [T, KVN, D] with ends")
        need(len(contexts) == batch and contexts[-1] == len(k), f"KV ends {contexts} for {len(k)} keys")
        bounds = list(zip([0, *contexts[:-1]], contexts, strict=True))
        keys, values = [k[a:b] for a, b in bounds], [v[a:b] for a, b in bounds]
    else:
        need(k.dim() == 3, f"key has shape {list(k.shape)}: [blocks, block_size, KVN * D] is what is used here")
        blocks, tokens, width = k.shape
        need(tokens == block_size, f"block_size is {block_size}, blocks have {tokens} tokens")
        if input_layout == "TND":
            need(block_size % 16 == 0 and block_size <= 1024, f"block_size {block_size} in TND")
        elif longest > 1:
            need(block_size % 128 == 0 and 128 <= block_size <= 512, f"block_size {block_size}")
        else:
            need(block_size % 16 == 0 and 0 < block_size <= 512, f"block_size {block_size}")
        need(width == kv_heads * size and width <= 65535, f"keys are {width} wide for {kv_heads} KV heads of {size}")
        table = check_table(block_table, batch, contexts, blocks, block_size)
        shape = (-1, kv_heads, size)
        gathered = [row[: -(-context // block_size)].long() for row, context in zip(table, contexts, strict=True)]
        keys = [k[row].view(shape)[:context] for row, context in zip(gathered, contexts, strict=True)]
        values = [v[row].view(shape)[:context] for row, context in zip(gathered, contexts, strict=True)]

    need(sparse_mode in (0, 3), f"sparse_mode {sparse_mode} is not used here")
    if sparse_mode == 3:
        need(atten_mask is not None, "sparse_mode 3 without atten_mask")
        mask = on_device("atten_mask", atten_mask, [torch.int8, torch.uint8, torch.bool])
        need(list(mask.shape) in ([2048, 2048], [1, 2048, 2048], [1, 1, 2048, 2048]), f"mask {list(mask.shape)}")
        need(torch.equal(mask.view(2048, 2048).to(torch.int8), MASK), "mask is not 1 above the diagonal, else 0")
        need(all(len(r) <= len(c) for r, c in zip(rows, keys, strict=True)), "more queries than keys, causal")
    else:
        need(atten_mask is None, "a mask with sparse_mode 0 would have to be whole")
    parts = [
        attend(row, own_key, own_value, scale, sparse_mode == 3)
        for row, own_key, own_value in zip(rows, keys, values, strict=True)
    ]
    out = torch.cat(parts).view(query.shape)
    return NpuTensor(out), NpuTensor(torch.zeros(1))


@operator
def npu_scatter_pa_kv_cache(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    compress_lens: Tensor | None = None,
    compress_seq_offsets: Tensor | None = None,
    seq_lens: Tensor | None = None,
    cache_mode: str | None = "PA_NZ",
) -> None:
    need(family() in ("A2", "A3"), f"not on {family()}")
    need(cache_mode == "Norm", f"cache_mode is {cache_mode}, the cache is ND")
    need((compress_lens, compress_seq_offsets, seq_lens) == (None, None, None), "arguments of the 4-D case")
    k, v = on_device("key", key, FLOATS, 3), on_device("value", value, [key.dtype], 3)
    caches = on_device("key_cache", key_cache, [key.dtype], 4), on_device("value_cache", value_cache, [key.dtype], 4)
    need(key_cache.format == ND and value_cache.format == ND, "the cache is in NZ format")
    need(k.shape[:2] == v.shape[:2], f"key {list(k.shape)}, value {list(v.shape)}")
    slots = on_device("slot_mapping", slot_mapping, [torch.int32, torch.int64], 1).long()
    for new, cache in zip((k, v), caches, strict=True):
        need(cache.shape[2:] == new.shape[1:], f"cache {list(cache.shape)} for {list(new.shape)}")
        store(new, cache.view(-1, *new.shape[1:]), slots)


def store(new: Tensor, by_slot: Tensor, slots: Tensor) -> None:
    need(len(slots) == len(new), f"{len(slots)} slots for {len(new)} tokens")
    need(bool(((slots >= 0) & (slots < len(by_slot))).all()), "slots outside the cache")
    need(len(slots.unique()) == len(slots), "slots are not all different")
    by_slot[slots] = new


# -- 310P: the transformer library ----------------------------------------------------------------------------------


def from_nz(name: str, cache: Tensor, kv_heads: int, dtype: torch.dtype) -> Tensor:
    """A copy [blocks, block_size, KVN, D] of an NZ cache [blocks, KVN * D / 16, block_size, 16]."""
    raw = on_device(name, cache, [dtype], 4)
    need(cache.format == NZ and cache.shape[3] == 16, f"{name} is not in NZ format: {list(cache.shape)}")
    blocks, _, tokens, _ = raw.shape
    return raw.transpose(1, 2).reshape(blocks, tokens, kv_heads, -1).contiguous()


def atb_query(query: Tensor, out: Tensor, num_heads: int) -> Tensor:
    need(family() == "310P", f"used on 310P only here, this is {family()}")
    q = on_device("query", query, [torch.float16], 3)
    need(on_device("out", out, [query.dtype], 3).shape == q.shape and q.shape[1] == num_heads, "out or num_heads")
    need(q.shape[2] <= 256, f"head size {q.shape[2]}")
    return q


def atb_attend(
    q: Tensor,
    counts: list[int],
    caches: tuple[Tensor, Tensor],
    kv_heads: int,
    scale: float,
    table: Tensor,
    lens: Tensor,
) -> Tensor:
    contexts = on_device("context_lens", lens, [torch.int32], 1).tolist()
    k, v = (from_nz("cache", cache, kv_heads, q.dtype) for cache in caches)
    blocks, tokens = k.shape[:2]
    raw = check_table(table, len(counts), contexts, blocks, tokens)
    parts, start = [], 0
    for count, context, row in zip(counts, contexts, raw, strict=True):
        need(count <= context, f"{count} new tokens in a context of {context}")
        used = row[: -(-context // tokens)].long()
        own = (each[used].flatten(0, 1)[:context] for each in (k, v))
        parts.append(attend(q[start : start + count], *own, scale, True))
        start += count
    need(start == len(q), f"lengths add up to {start}, there are {len(q)} rows")
    return torch.cat(parts)


@operator
def _npu_reshape_and_cache(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_indices: Tensor
) -> None:
    need(family() == "310P", f"used on 310P only here, this is {family()}")
    slots = on_device("slot_indices", slot_indices, [torch.int32], 1).long()
    for new, cache in ((key, key_cache), (value, value_cache)):
        raw = on_device("key or value", new, [torch.float16], 3)
        by_token = from_nz("cache", cache, raw.shape[1], raw.dtype)
        blocks, tokens, heads, size = by_token.shape
        need(raw.shape[1:] == (heads, size), f"cache {list(cache.shape)} for {list(raw.shape)}")
        store(raw, by_token.view(-1, heads, size), slots)
        host(cache).copy_(by_token.view(blocks, tokens, -1, 16).transpose(1, 2))


@operator
def _npu_paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    num_kv_heads: int,
    num_heads: int,
    scale_value: float,
    block_table: Tensor,
    context_lens: Tensor,
    out: Tensor,
    *,
    workspace: Tensor | None = None,
) -> None:
    q = atb_query(query, out, num_heads)
    caches = key_cache, value_cache
    host(out).copy_(atb_attend(q, [1] * len(q), caches, num_kv_heads, scale_value, block_table, context_lens))


@operator
def _npu_paged_attention_splitfuse(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    mask: Tensor,
    seq_len: Tensor,
    num_kv_heads: int,
    num_heads: int,
    scale_value: float,
    out: Tensor,
) -> None:
    q = atb_query(query, out, num_heads)
    counts = on_host("seq_len", seq_len, torch.int32).tolist()
    raw = on_device("mask", mask, [torch.float16], 2)
    need(torch.equal(raw, MASK.to(torch.float16) * -10000), "mask is not -10000 above the diagonal, else 0")
    caches = key_cache, value_cache
    host(out).copy_(atb_attend(q, counts, caches, num_kv_heads, scale_value, block_table, context_lens))


@operator
def npu_format_cast(input: Tensor, acl_format: int) -> Tensor:
    need(acl_format in (ND, NZ), f"format {acl_format}")
    raw = on_device("input", input, FLOATS)
    need(acl_format == ND or (raw.shape[-1] % 16 == 0 and raw.shape[-2] % 16 == 0), f"NZ of {list(raw.shape)}")
    return NpuTensor(raw.clone(), acl_format)


# -- the rest of a layer -------------------------------------------------------------------------------------------


@operator
def npu_rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    x = on_device("input", input, FLOATS)
    weight = on_device("gamma", gamma, [input.dtype], 1)
    need(2 <= x.dim() <= 8 and weight.shape == x.shape[-1:], f"gamma {list(weight.shape)} for {list(x.shape)}")
    rstd = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + epsilon)
    return NpuTensor((x.float() * rstd * weight.float()).to(x.dtype)), NpuTensor(rstd)


@operator
def npu_rotary_mul(
    input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None
) -> Tensor:
    x = on_device("input", input, FLOATS, 4)
    cos, sin = on_device("r1", r1, [input.dtype], 4), on_device("r2", r2, [input.dtype], 4)
    batch, tokens, heads, size = x.shape
    need(rotary_mode == "half" and rotate is None, f"mode {rotary_mode}")
    need(size % 2 == 0 and size < 896 and size * x.element_size() % 32 == 0, f"head size {size}")
    need(batch < 1000 and heads < 1000, f"batch {batch}, {heads} heads")
    allowed = ((1, tokens, 1, size), (batch, tokens, 1, size))
    need(cos.shape == sin.shape and tuple(cos.shape) in allowed, f"cosines {list(cos.shape)} for {list(x.shape)}")
    need(float(cos.abs().max()) <= 1 and float(sin.abs().max()) <= 1, "cosines or sines beyond 1")
    need(torch.equal(sin[..., : size // 2], sin[..., size // 2 :]), "the halves of sin differ")
    first, second = x.float().chunk(2, -1)
    return NpuTensor((x.float() * cos.float() + torch.cat((-second, first), -1) * sin.float()).to(x.dtype))


@operator
def npu_swiglu(input: Tensor, dim: int = -1) -> Tensor:
    x = on_device("input", input, FLOATS)
    need(dim == -1 and x.shape[-1] % (32 if family() == "310P" else 2) == 0, f"{list(x.shape)} along {dim}")
    gate, up = x.float().chunk(2, -1)
    return NpuTensor((F.silu(gate) * up).to(x.dtype))


# -- mixture of experts ---------------------------------------------------------------------------------------------


@operator
def npu_moe_init_routing_v2(
    x: Tensor,
    expert_idx: Tensor,
    *,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
    active_num: int = -1,
    expert_capacity: int = -1,
    expert_num: int = -1,
    drop_pad_mode: int = 0,
    expert_tokens_num_type: int = 0,
    expert_tokens_num_flag: bool = False,
    quant_mode: int = -1,
    active_expert_range: Sequence[int] = (),
    row_idx_type: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    need(family() in ("A2", "A3"), f"not on {family()}")
    rows = on_device("x", x, FLOATS, 2)
    chosen = on_device("expert_idx", expert_idx, [torch.int32], 2)
    need(len(chosen) == len(rows), f"{len(chosen)} rows of experts for {len(rows)} tokens")
    need(0 < expert_num <= 10240 and bool(((chosen >= 0) & (chosen < expert_num)).all()), "experts out of range")
    need(expert_tokens_num_flag is True and expert_tokens_num_type == 1, "counts per expert are what is used here")
    need(quant_mode == -1 and drop_pad_mode == 0 and row_idx_type == 0, "quant, drop or scatter modes")
    need((scale, offset) == (None, None), "scale and offset belong to quantisation")
    need(list(active_expert_range) == [0, expert_num], f"active_expert_range {active_expert_range}")
    need(active_num in (-1, 0, chosen.numel()), f"active_num {active_num}")
    order = chosen.flatten().argsort(stable=True)
    places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    counts = torch.bincount(chosen.flatten(), minlength=expert_num)
    expanded = rows[order // chosen.shape[1]]
    return NpuTensor(expanded), NpuTensor(places.int()), NpuTensor(counts), NpuTensor(torch.zeros(len(order)))


@operator
def npu_grouped_matmul(
    x: list[Tensor],
    weight: list[Tensor],
    *,
    bias: list[Tensor] | None = None,
    group_list: Tensor | None = None,
    split_item: int = 0,
    group_type: int | None = None,
    group_list_type: int = 0,
    act_type: int = 0,
) -> list[Tensor]:
    need(
        type(x) is list and type(weight) is list and len(x) == 1 and len(weight) == 1, "one tensor of each is used here"
    )
    need(group_type == 0 and split_item in (2, 3) and bias is None and act_type == 0, "groups of rows into one result")
    dtypes = (torch.float16,) if family() == "310P" else FLOATS
    rows = on_device("x", x[0], dtypes, 2)
    matrices = on_device("weight", weight[0], [rows.dtype], 3)
    sizes = on_device("group_list", group_list, [torch.int64], 1)
    need(matrices.shape[1] == rows.shape[1], f"x {list(rows.shape)}, weight {list(matrices.shape)}")
    need(max(rows.shape[1], matrices.shape[2]) < 65536, "inner sizes beyond 65535")
    need(len(sizes) == len(matrices) and 1 < len(sizes) <= 1024, f"{len(sizes)} groups, {len(matrices)} matrices")
    need(group_list_type == 1 and bool((sizes >= 0).all()) and int(sizes.sum()) == len(rows), f"group sizes {sizes}")
    parts = [part.float() @ matrix.float() for part, matrix in zip(rows.split(sizes.tolist()), matrices, strict=True)]
    return [NpuTensor(torch.cat(parts).to(rows.dtype))]


@operator
def npu_moe_finalize_routing(
    expanded_permuted_rows: Tensor,
    skip1: Tensor | None,
    skip2: Tensor | None,
    bias: Tensor | None,
    scales: Tensor | None,
    expanded_src_to_dst_row: Tensor,
    export_for_source_row: Tensor | None,
    drop_pad_mode: int = 0,
    k: int = 1,
) -> Tensor:
    need(family() in ("A2", "A3"), f"not on {family()}")
    rows = on_device("expanded_permuted_rows", expanded_permuted_rows, FLOATS, 2)
    need((skip1, skip2, bias, export_for_source_row) == (None,) * 4, "sums and biases are not used here")
    need(drop_pad_mode == 2, f"drop_pad_mode {drop_pad_mode}: nothing dropped, row by row, is what is used here")
    need(scales is not None, "no scales")
    weights = on_device("scales", scales, [rows.dtype], 2)
    places = on_device("expanded_src_to_dst_row", expanded_src_to_dst_row, [torch.int32], 1).long()
    need(places.sort().values.equal(torch.arange(weights.numel())), "places are not a permutation of the rows")
    chosen = rows[places].view(*weights.shape, -1).float()
    return NpuTensor((chosen * weights.float()[..., None]).sum(1).to(rows.dtype))
