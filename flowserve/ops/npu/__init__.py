"""Operators of Ascend NPUs, by torch_npu's own; `flowserve.ops` says what each promises."""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowserve.ops import cpu
from flowserve.ops.matrix import Matrix, product
from flowserve.ops.npu.attention import BLOCK_TOKENS, LayerCache, choose, graph_updates_of
from flowserve.ops.npu_driver import Family, chip_family, load_torch_npu
from flowserve.ops.step import StepContext

KV_BLOCK_TOKENS = BLOCK_TOKENS
KV_ALIGNMENT_BYTES = 2 * 2**20
"""Memory that transfers between NPUs may register starts at a multiple of this."""

torch_npu = load_torch_npu()


class _Prepared(NamedTuple):
    """`slots` int32 [T] on the device, and the attention operators' own."""

    slots: Tensor
    attention: object


def layer_caches(kv: Tensor) -> list[LayerCache]:
    attention = choose(torch_npu, chip_family(torch_npu), kv)
    return [attention.layer_cache(*layer.unbind(0)) for layer in kv.unbind(0)]


def shares_memory(caches: list[LayerCache]) -> bool:
    return caches[0].attention.shares_memory


def describe(caches: list[LayerCache]) -> str:
    return caches[0].attention.about


def prepare(step: StepContext) -> _Prepared:
    cache: LayerCache = step.caches[0]
    return _Prepared(step.slot_mapping.to(torch.int32), cache.attention.prepare(step))


def graph_updates(prepared: object) -> list[dict[str, Any]]:
    assert isinstance(prepared, _Prepared)
    return graph_updates_of(prepared.attention)


def pack(weight: Tensor) -> None:
    """Matrices stay as they are; in NZ format some multiplications would be faster, which needs an NPU to measure."""


def linear(x: Tensor, matrix: Matrix, add: Tensor | None = None) -> Tensor:
    return product(x, matrix.weight, add)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out: Tensor = torch_npu.npu_rms_norm(x, weight, epsilon=eps)[0]
    return out


def norm_heads(x: Tensor, weight: Tensor, eps: float) -> None:
    x.copy_(torch_npu.npu_rms_norm(x.contiguous(), weight, epsilon=eps)[0])


def rotary(rows: Tensor) -> tuple[Tensor, Tensor]:
    # [1, T, 1, D], and plain sines: the operator negates the first half itself.
    cos, sin = (rows * _signs(rows.shape[-1], rows.dtype, rows.device)).unbind(1)
    return cos[None, :, None].contiguous(), sin[None, :, None].contiguous()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    x.copy_(torch_npu.npu_rotary_mul(x.unsqueeze(0).contiguous(), cos, sin)[0])


def swiglu(x: Tensor) -> Tensor:
    if x.shape[-1] % 32:  # which the operator does not take on every chip
        gate, up = x.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate).mul_(up)
    out: Tensor = torch_npu.npu_swiglu(x)
    return out


def experts(x: Tensor, weights: Tensor, chosen: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    if chip_family(torch_npu) is Family.INFERENCE:  # which has no operators for the routing
        return cpu.experts(x, weights, chosen, gate_up, down)
    count, num_experts = chosen.numel(), len(gate_up)
    # Rows in the order of their experts; `places` [T * k]: where each choice of each token went; rows per expert.
    rows, places, sizes, _ = torch_npu.npu_moe_init_routing_v2(
        x,
        chosen.to(torch.int32),
        active_num=count,
        expert_num=num_experts,
        expert_tokens_num_type=1,
        expert_tokens_num_flag=True,
        active_expert_range=[0, num_experts],
        row_idx_type=0,
    )
    rows = swiglu(_grouped_matmul(rows, gate_up, sizes))
    # Mode 2: nothing was dropped, and `places` runs token by token.
    out: Tensor = torch_npu.npu_moe_finalize_routing(
        _grouped_matmul(rows, down, sizes), None, None, None, weights.contiguous(), places, None, drop_pad_mode=2
    )
    return out


def store_kv(kv: Tensor, cache: LayerCache, step: StepContext) -> None:
    prepared = step.prepared
    assert isinstance(prepared, _Prepared)
    key, value = kv[:, : cache.kv_heads].contiguous(), kv[:, cache.kv_heads :].contiguous()
    cache.attention.store(key, value, cache, prepared.slots)


def attention(query: Tensor, kv: Tensor, cache: LayerCache, step: StepContext) -> Tensor:
    prepared = step.prepared
    assert isinstance(prepared, _Prepared)
    return cache.attention.attend(query, cache, prepared.attention).view(len(query), -1)


def best(logits: Tensor) -> tuple[Tensor, Tensor]:
    found = logits.max(dim=-1)
    return found.values, found.indices


def _grouped_matmul(rows: Tensor, weight: Tensor, sizes: Tensor) -> Tensor:
    """rows [R, I] in groups of `sizes` int64 [E], times weight [E, I, O]: one matrix per group."""
    out: Tensor = torch_npu.npu_grouped_matmul(
        [rows], [weight], group_list=sizes, split_item=2, group_type=0, group_list_type=1
    )[0]
    return out


@functools.cache
def _signs(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[2, size]: undoes the negation of the sines' first half."""
    signs = torch.ones(2, size, dtype=dtype)
    signs[1, : size // 2] = -1
    return signs.to(device)
