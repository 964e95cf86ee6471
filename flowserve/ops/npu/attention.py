"""Paged attention on Ascend: which operators serve a model on a chip is decided once, when its KV cache is laid out.

Contracts (shapes, dtypes, limits) are those of op-plugin's documentation of each operator; nothing here has run on
hardware, tests hold it to the contracts.
"""

import math
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from flowserve.ops.npu_driver import Family
from flowserve.ops.step import StepContext

BLOCK_TOKENS = 128
"""KV cache blocks are multiples of this, up to MAX_BLOCK_TOKENS."""
MAX_BLOCK_TOKENS = 512
PACKED_HEAD_SIZES = (128, 192)
"""Head sizes that the fused operator takes in packed (TND) layout."""
MAX_HEAD_SIZE = 512
MAX_KV_WIDTH = 65535
MAX_PACKED_SEQUENCES = 4096
MASK_SIZE = 2048
NZ_FORMAT, NZ_WIDTH = 29, 16
"""FRACTAL_NZ: number of the memory format, and width of its columns in 16-bit elements."""


class Attention(ABC):
    """One choice of operators. `about` says it in a line. `shares_memory`: caches are views of what they come from."""

    about: str
    shares_memory = True

    @abstractmethod
    def layer_cache(self, key: Tensor, value: Tensor) -> "LayerCache":
        """From the K and V of a layer, [blocks, block_tokens, K, D] each."""

    @abstractmethod
    def prepare(self, step: StepContext) -> object:
        """What all layers of a step share."""

    @abstractmethod
    def store(self, key: Tensor, value: Tensor, cache: "LayerCache", slots: Tensor) -> None:
        """key, value [T, K, D] contiguous; slots int32 [T], all different."""

    @abstractmethod
    def attend(self, query: Tensor, cache: "LayerCache", prepared: object) -> Tensor:
        """query [T, H, D], `prepared` from `prepare`; returns [T, H, D]."""


class LayerCache(NamedTuple):
    """K and V of one layer as the operators of `attention` take them, and the number of KV heads."""

    key: Tensor
    value: Tensor
    kv_heads: int
    attention: Attention


def choose(torch_npu: Any, family: Family, kv: Tensor) -> Attention:
    """The operators for a KV cache (layers, 2, blocks, block_tokens, K, D) on this chip.

    Raises ValueError where none of them takes it.
    """
    block_tokens, kv_heads, size = kv.shape[3:]
    dtypes = [torch.float16] if family is Family.INFERENCE else [torch.float16, torch.bfloat16]
    if kv.dtype not in dtypes:
        allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"attention on an Ascend {family} takes {allowed}, not {kv.dtype}: set the engine's dtype")
    if block_tokens % BLOCK_TOKENS or block_tokens > MAX_BLOCK_TOKENS:
        raise ValueError(
            f"block_tokens is {block_tokens}: attention on an NPU takes multiples of {BLOCK_TOKENS} up to "
            f"{MAX_BLOCK_TOKENS}, {BLOCK_TOKENS} is fastest"
        )
    if not kv[0, 0].is_contiguous():
        raise ValueError(
            "kv_layout is block_major: attention on an NPU takes each layer's keys and values in one piece"
        )
    if size % 16 or size > MAX_HEAD_SIZE or kv_heads * size > MAX_KV_WIDTH:
        raise ValueError(
            f"the model has {kv_heads} KV heads of size {size}: attention on an NPU takes sizes that are multiples of "
            f"16 up to {MAX_HEAD_SIZE}, all heads together up to {MAX_KV_WIDTH}"
        )
    if family is Family.INFERENCE:
        return AtbAttention(torch_npu, kv.device)
    if size in PACKED_HEAD_SIZES:
        return PackedAttention(torch_npu, kv.device, family, size)
    return SingleAttention(torch_npu, kv.device, family, size)


class _Lengths(NamedTuple):
    """`tables` int32 [N, width] on the device; lists with one number per sequence: where its rows end, its context."""

    num_chunks: int
    tables: Tensor
    row_ends: list[int]
    contexts: list[int]


def graph_updates_of(prepared: object) -> list[dict[str, Any]]:
    """One for all layers: the fused operator takes the contexts of its decodes under this name.

    Raises ValueError for operators that no graph here replays.
    """
    if not isinstance(prepared, _Lengths):
        raise ValueError("graphs of decode steps are not for 310P: leave graph_sizes empty")
    return [{"actual_seq_lengths_kv": prepared.contexts}]


class _FusedAttention(Attention):
    """npu_fused_infer_attention_score on an ND cache [blocks, block_tokens, K, D] by npu_scatter_pa_kv_cache.

    A step of decodes alone is one call in BSH layout, without a mask, which any head size may use and a graph may
    replay with other lengths.
    """

    def __init__(self, torch_npu: Any, device: torch.device) -> None:
        self._npu = torch_npu
        # 1 where a key lies after the query. With sparse_mode 3 the operator shifts it to each sequence's last row.
        self._mask = torch.ones(MASK_SIZE, MASK_SIZE, dtype=torch.int8).triu_(1).to(device)

    def layer_cache(self, key: Tensor, value: Tensor) -> LayerCache:
        return LayerCache(key, value, key.shape[2], self)

    def prepare(self, step: StepContext) -> _Lengths:
        return _Lengths(
            step.num_chunks, _tables(step), step.counts.cumsum().tolist(), (step.starts + step.counts).tolist()
        )

    def store(self, key: Tensor, value: Tensor, cache: LayerCache, slots: Tensor) -> None:
        self._npu.npu_scatter_pa_kv_cache(key, value, cache.key, cache.value, slots, cache_mode="Norm")

    def _decode(self, query: Tensor, cache: LayerCache, tables: Tensor, contexts: list[int]) -> Tensor:
        """query [B, H, D], one row per sequence."""
        batch, heads, size = query.shape
        flat = query.contiguous().view(batch, 1, heads * size)
        out = self._fused(flat, cache, "BSH", heads, size, tables, actual_seq_lengths_kv=contexts)
        return out.view(batch, heads, size)

    def _fused(
        self, query: Tensor, cache: LayerCache, layout: str, heads: int, size: int, tables: Tensor, **options: Any
    ) -> Tensor:
        out: Tensor = self._npu.npu_fused_infer_attention_score(
            query,
            cache.key.flatten(2),
            cache.value.flatten(2),
            input_layout=layout,
            num_heads=heads,
            num_key_value_heads=cache.kv_heads,
            scale=1 / math.sqrt(size),
            block_table=tables,
            block_size=cache.key.shape[1],
            **options,
        )[0]
        return out


class PackedAttention(_FusedAttention):
    """Steps with prompt chunks, fresh, continued or mixed with decodes, are one call in TND layout."""

    def __init__(self, torch_npu: Any, device: torch.device, family: Family, size: int) -> None:
        super().__init__(torch_npu, device)
        self.about = (
            f"attention on {family}, head size {size}: npu_fused_infer_attention_score, TND for steps with chunks and "
            "BSH for decodes; cache by npu_scatter_pa_kv_cache"
        )

    def attend(self, query: Tensor, cache: LayerCache, prepared: object) -> Tensor:
        assert isinstance(prepared, _Lengths)
        lengths = prepared
        if not lengths.num_chunks:
            return self._decode(query, cache, lengths.tables, lengths.contexts)
        if len(lengths.contexts) > MAX_PACKED_SEQUENCES:
            raise ValueError(
                f"a step has {len(lengths.contexts)} sequences, the operator takes {MAX_PACKED_SEQUENCES}: lower "
                "engine.max_sequences"
            )
        _, heads, size = query.shape
        return self._fused(
            query.contiguous(),
            cache,
            "TND",
            heads,
            size,
            lengths.tables,
            actual_seq_lengths=lengths.row_ends,
            actual_seq_lengths_kv=lengths.contexts,
            atten_mask=self._mask,
            sparse_mode=3,
        )


class SingleAttention(_FusedAttention):
    """Head sizes that TND refuses: a call in BSND layout for each prompt chunk, one for all decodes."""

    def __init__(self, torch_npu: Any, device: torch.device, family: Family, size: int) -> None:
        super().__init__(torch_npu, device)
        self.about = (
            f"attention on {family}, head size {size}: npu_fused_infer_attention_score, BSND chunk by chunk (TND takes "
            f"head sizes {' and '.join(map(str, PACKED_HEAD_SIZES))} only) and BSH for decodes; cache by "
            "npu_scatter_pa_kv_cache"
        )

    def attend(self, query: Tensor, cache: LayerCache, prepared: object) -> Tensor:
        assert isinstance(prepared, _Lengths)
        lengths = prepared
        if not lengths.num_chunks:
            return self._decode(query, cache, lengths.tables, lengths.contexts)
        _, heads, size = query.shape
        parts, start = [], 0
        for index in range(lengths.num_chunks):
            end = lengths.row_ends[index]
            rows = query[start:end].unsqueeze(0).contiguous()
            tables, contexts = lengths.tables[index : index + 1], lengths.contexts[index : index + 1]
            options = {"actual_seq_lengths": [end - start], "actual_seq_lengths_kv": contexts}
            causal = {"atten_mask": self._mask, "sparse_mode": 3}
            parts.append(self._fused(rows, cache, "BSND", heads, size, tables, **options, **causal)[0])
            start = end
        if lengths.num_chunks < len(lengths.contexts):
            tables, contexts = lengths.tables[lengths.num_chunks :], lengths.contexts[lengths.num_chunks :]
            parts.append(self._decode(query[start:], cache, tables, contexts))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class _AtbLengths(NamedTuple):
    """`tables` int32 [N, width] and `contexts` int32 [N] on the device, `counts` int32 [N] rows per sequence on the
    host.
    """

    num_chunks: int
    tables: Tensor
    contexts: Tensor
    counts: Tensor


class AtbAttention(Attention):
    """310P: operators of the transformer library, cache in NZ format [blocks, K * D / 16, block_tokens, 16]."""

    about = (
        "attention on 310P: _npu_paged_attention_splitfuse for steps with chunks, _npu_paged_attention for decodes; "
        "cache in NZ format by _npu_reshape_and_cache"
    )
    shares_memory = False

    def __init__(self, torch_npu: Any, device: torch.device) -> None:
        self._npu = torch_npu
        self._mask = torch.full((MASK_SIZE, MASK_SIZE), -10000.0, dtype=torch.float16).triu_(1).to(device)

    def layer_cache(self, key: Tensor, value: Tensor) -> LayerCache:
        """The format is a property of a whole memory, so that the cache is a copy: it does not share the pool's."""
        blocks, block_tokens, heads, size = key.shape
        shape = (blocks, heads * size // NZ_WIDTH, block_tokens, NZ_WIDTH)
        cast = self._npu.npu_format_cast
        return LayerCache(cast(key.view(shape), NZ_FORMAT), cast(value.view(shape), NZ_FORMAT), heads, self)

    def prepare(self, step: StepContext) -> _AtbLengths:
        device = step.slot_mapping.device
        return _AtbLengths(
            step.num_chunks,
            _tables(step),
            torch.from_numpy(step.starts + step.counts).to(device, torch.int32),
            torch.from_numpy(step.counts).to(torch.int32),
        )

    def store(self, key: Tensor, value: Tensor, cache: LayerCache, slots: Tensor) -> None:
        self._npu._npu_reshape_and_cache(key, value, cache.key, cache.value, slots)

    def attend(self, query: Tensor, cache: LayerCache, prepared: object) -> Tensor:
        assert isinstance(prepared, _AtbLengths)
        lengths = prepared
        _, heads, size = query.shape
        query = query.contiguous()
        out = torch.empty_like(query)
        shared = {"num_kv_heads": cache.kv_heads, "num_heads": heads, "scale_value": 1 / math.sqrt(size)}
        caches = {"query": query, "key_cache": cache.key, "value_cache": cache.value}
        tables = {"block_table": lengths.tables, "context_lens": lengths.contexts}
        if lengths.num_chunks:
            chunks = {"mask": self._mask, "seq_len": lengths.counts}
            self._npu._npu_paged_attention_splitfuse(**caches, **tables, **chunks, **shared, out=out)
        else:
            self._npu._npu_paged_attention(**caches, **tables, **shared, out=out)
        return out


def _tables(step: StepContext) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(step.block_tables)).to(step.slot_mapping.device)
