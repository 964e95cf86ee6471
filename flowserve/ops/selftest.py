"""Every operator of a device against its definition, computed in float64 on the host: what `deepflow doctor` runs."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flowserve import ops
from flowserve.ops import Ops
from flowserve.ops.device import Device
from flowserve.ops.matrix import Matrix
from flowserve.ops.step import StepContext

LIMITS = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Largest error allowed, as a share of the largest result: some eight units in the last place of the short floats."""
DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16, torch.float16)}
HEADS, KV_HEADS, BLOCKS = 4, 2, 12
# Steps as (positions in the cache before, tokens) per sequence, chunks first.
STEPS = {
    "prompts": ((0, 5), (0, 150)),
    "continued prompts": ((128, 60), (37, 1)),
    "chunks and decodes": ((0, 9), (130, 20), (3, 1), (300, 1)),
    "decodes": ((0, 1), (17, 1), (255, 1)),
}


class Check(NamedTuple):
    """One operator on one device. `error`: None where it could not be computed, for the `reason` given."""

    operator: str
    dtype: str
    shapes: str
    error: float | None
    limit: float
    reason: str = ""

    @property
    def passed(self) -> bool:
        return self.error is not None and self.error <= self.limit


class Case(NamedTuple):
    """`compute` on the device; `expected` in float64 on the host."""

    operator: str
    shapes: str
    compute: Callable[[], Tensor]
    expected: Callable[[], Tensor]


def dtypes_of(device: Device) -> tuple[torch.dtype, ...]:
    """Those that the device serves models in."""
    if device.device.type == "npu":
        return (torch.float16,) if device.name().startswith("Ascend310P") else (torch.float16, torch.bfloat16)
    return DTYPES[device.device.type]


def attention_paths(device: Device) -> list[str]:
    """How attention is computed, a line for each choice that head sizes make."""
    operators = ops.load(device.device.type)
    dtype, found = dtypes_of(device)[0], []
    for size in (64, 128):
        said = operators.describe(operators.layer_caches(_empty_cache(operators, device, dtype, size)))
        if said not in found:
            found.append(said)
    return found


def check(device: Device) -> Iterator[Check]:
    """Results as they come. A failing operator does not stop the others."""
    operators = ops.load(device.device.type)
    device.set()
    for dtype in dtypes_of(device):
        name, limit = str(dtype).removeprefix("torch."), LIMITS[dtype]
        for case in _cases(operators, device, dtype):
            try:
                with torch.inference_mode():
                    got = case.compute().cpu().double()
            except Exception as error:  # whatever a vendor's operator raises is the finding
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                yield Check(case.operator, name, case.shapes, None, limit, reason[:400])
                continue
            yield Check(case.operator, name, case.shapes, _error(got, case.expected()), limit)


def _error(got: Tensor, expected: Tensor) -> float:
    if got.shape != expected.shape or not bool(got.isfinite().all()):
        return math.inf
    return float((got - expected).abs().max() / expected.abs().max().clamp(min=1))


def _cases(operators: Ops, device: Device, dtype: torch.dtype) -> Iterator[Case]:
    random = torch.Generator().manual_seed(0)

    def make(*shape: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """The same numbers on the device and, in float64, on the host."""
        values = (torch.randn(shape, generator=random) * scale).to(dtype)
        return values.to(device.device), values.double()

    for tokens, hidden in ((1, 64), (33, 1024)):
        yield from _element_wise(operators, make, tokens, hidden)
    for tokens, experts in ((1, 4), (40, 8)):
        yield _experts(operators, make, device, tokens, experts)
    for size in (64, 128):
        for title, step in STEPS.items():
            yield _attention(operators, device, make, dtype, size, title, step)


Make = Callable[..., tuple[Tensor, Tensor]]


def _element_wise(operators: Ops, make: Make, tokens: int, hidden: int) -> Iterator[Case]:
    x, x_ = make(tokens, hidden)
    weight, weight_ = make(hidden)
    yield Case(
        "rms_norm",
        f"[{tokens}, {hidden}]",
        lambda: operators.rms_norm(x, weight, 1e-5),
        lambda: _norm(x_, weight_),
    )
    heads, heads_ = make(tokens, HEADS + KV_HEADS, 64)
    part, part_ = make(64)

    def norm_heads() -> Tensor:
        wide = torch.cat((heads, heads), 1)
        operators.norm_heads(wide[:, : HEADS + KV_HEADS], part, 1e-5)
        return wide[:, : HEADS + KV_HEADS]

    yield Case("norm_heads", str(list(heads.shape)), norm_heads, lambda: _norm(heads_, part_))
    rows, rows_ = make(tokens, 2, 64, scale=0.3)
    rows.clamp_(-1, 1), rows_.clamp_(-1, 1)
    rows[:, 1, :32], rows_[:, 1, :32] = -rows[:, 1, 32:], -rows_[:, 1, 32:]

    def rotate() -> Tensor:
        turned = heads.clone()
        operators.rotate(turned, *operators.rotary(rows))
        return turned

    yield Case(
        "rotate",
        str(list(heads.shape)),
        rotate,
        lambda: heads_ * rows_[:, None, 0] + heads_.roll(32, -1) * rows_[:, None, 1],
    )
    gates, gates_ = make(tokens, 2 * hidden)
    yield Case("swiglu", f"[{tokens}, {2 * hidden}]", lambda: operators.swiglu(gates), lambda: _swiglu(gates_))
    matrix, matrix_ = make(hidden, 96, scale=hidden**-0.5)
    bias, bias_ = make(tokens, 96)

    def linear() -> Tensor:
        packed = Matrix(matrix)
        packed.packed = operators.pack(matrix)
        return operators.linear(x, packed, bias)

    yield Case("linear", f"[{tokens}, {hidden}] @ [{hidden}, 96]", linear, lambda: x_ @ matrix_ + bias_)

    def best() -> Tensor:
        values, places = operators.best(x)
        return torch.stack((values, x.gather(1, places[:, None])[:, 0]))

    yield Case("best", f"[{tokens}, {hidden}]", best, lambda: x_.amax(-1).expand(2, -1))


def _experts(operators: Ops, make: Make, device: Device, tokens: int, count: int) -> Case:
    hidden, inner, chosen_each = 64, 48, 2
    x, x_ = make(tokens, hidden)
    up, up_ = make(count, hidden, 2 * inner, scale=hidden**-0.5)
    down, down_ = make(count, inner, hidden, scale=inner**-0.5)
    weights, weights_ = make(tokens, chosen_each)
    order = torch.rand(tokens, count, generator=torch.Generator().manual_seed(1)).argsort(-1)[:, :chosen_each]

    def expected() -> Tensor:
        each = torch.einsum("tkf,tkfh->tkh", _swiglu(torch.einsum("th,tkhf->tkf", x_, up_[order])), down_[order])
        return (each * weights_[..., None]).sum(1)

    shapes = f"[{tokens}, {hidden}], {chosen_each} of {count} experts"
    chosen = order.contiguous().to(device.device)
    return Case("experts", shapes, lambda: operators.experts(x, weights, chosen, up, down), expected)


def _attention(
    operators: Ops,
    device: Device,
    make: Make,
    dtype: torch.dtype,
    size: int,
    title: str,
    sequences: Sequence[tuple[int, int]],
) -> Case:
    starts, counts = (np.array(values) for values in zip(*sequences, strict=True))
    contexts = (starts + counts).tolist()
    query, query_ = make(int(counts.sum()), HEADS, size)
    whole = [make(context, 2 * KV_HEADS, size) for context in contexts]

    def compute() -> Tensor:
        kv = _empty_cache(operators, device, dtype, size)
        block_tokens = kv.shape[3]
        caches = operators.layer_caches(kv)
        width = -(-max(contexts) // block_tokens)
        # Blocks in falling order, so that one read at its own number would be the wrong one.
        tables = np.arange(len(contexts) * width - 1, -1, -1, dtype=np.int32).reshape(len(contexts), width)
        num_chunks = sum(1 for start, count in sequences if count > 1 or not start)
        cached = np.flatnonzero(starts)

        def step(begin: Any, lengths: Any, chunks: int, rows: Any) -> StepContext:
            last = np.cumsum(lengths) - 1
            return StepContext(
                operators, caches, begin, lengths, chunks, rows, block_tokens, last.astype(np.int64), device.device
            )

        if len(cached):
            before = step(np.zeros_like(cached), starts[cached], len(cached), tables[cached])
            parts = [whole[index][0][: starts[index]] for index in cached.tolist()]
            operators.store_kv(torch.cat(parts), caches[0], before)
        now = step(starts, counts, num_chunks, tables)
        new = torch.cat([pair[0][start:] for pair, start in zip(whole, starts.tolist(), strict=True)])
        operators.store_kv(new, caches[0], now)
        return operators.attention(query, new, caches[0], now)

    def expected() -> Tensor:
        parts, row = [], 0
        for (_, kv), count in zip(whole, counts.tolist(), strict=True):
            parts.append(_attend(query_[row : row + count], kv))
            row += count
        return torch.cat(parts).flatten(1)

    return Case(
        "attention", f"head size {size}, {title}: {', '.join(f'{s}+{c}' for s, c in sequences)}", compute, expected
    )


def _empty_cache(operators: Ops, device: Device, dtype: torch.dtype, size: int) -> Tensor:
    """One layer of KV cache with blocks as small as the device takes them, at least 16 tokens."""
    block_tokens = max(16, operators.KV_BLOCK_TOKENS)
    blocks = max(BLOCKS, 4 * -(-320 // block_tokens))
    return torch.zeros((1, 2, blocks, block_tokens, KV_HEADS, size), dtype=dtype, device=device.device)


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def _swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def _attend(query: Tensor, kv: Tensor) -> Tensor:
    """query [S, H, D] at the end of kv [C, 2K, D]; returns [S, H, D]."""
    count, heads, size = query.shape
    key, value = (part.repeat_interleave(heads // KV_HEADS, 1) for part in kv.split_with_sizes((KV_HEADS, KV_HEADS), 1))
    scores = torch.einsum("shd,chd->hsc", query, key) / math.sqrt(size)
    later = torch.arange(len(kv)) > torch.arange(count)[:, None] + (len(kv) - count)
    return torch.einsum("hsc,chd->shd", scores.masked_fill(later, -math.inf).softmax(-1), value)
