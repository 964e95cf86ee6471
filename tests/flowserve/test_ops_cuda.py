"""The CUDA operators on host memory: a stand-in for the attention kernel asserts its contract and computes its result.

It shows that shapes, tables, lengths and layouts are right, and nothing about a GPU; `deepflow doctor` does that there.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flowserve import ops
from flowserve.ops import cuda
from flowserve.runtime.checkpoint import make_checkpoint
from tests.flowserve.driver import TINY, Engine, make_prompt, serve

PROMPTS = [make_prompt(length, length) for length in (1, 7, 100, 255, 256, 300)]
LIMIT = 12


def kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_ends: Tensor,
    key_ends: None,
    longest_query: int,
    longest_key: int,
    *,
    window_size: tuple[int, int],
    enable_gqa: bool,
    seqused_k: Tensor,
    block_table: Tensor,
) -> Tensor:
    """What varlen attention computes, one sequence at a time, after asserting what it asks for."""
    tokens, heads, size = query.shape
    blocks, block_tokens, kv_heads, _ = key.shape
    assert key.shape == value.shape and key.dtype == value.dtype == query.dtype
    assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    assert block_tokens % 256 == 0 and size % 8 == 0 and size <= 256
    assert heads % kv_heads == 0 and (enable_gqa or heads == kv_heads)
    assert query_ends.dtype == seqused_k.dtype == block_table.dtype == torch.int32
    assert query_ends.is_contiguous() and seqused_k.is_contiguous() and block_table.stride(-1) == 1
    assert len(query_ends) == len(seqused_k) + 1 == len(block_table) + 1
    assert query_ends[0] == 0 and query_ends[-1] == tokens and key_ends is None and window_size == (-1, 0)
    counts = query_ends.diff()
    assert counts.min() > 0 and counts.max() == longest_query and seqused_k.max() == longest_key
    assert (seqused_k >= counts).all() and block_table.shape[1] * block_tokens >= longest_key
    assert block_table.min() >= 0 and block_table.max() < blocks
    parts = []
    for number, used in enumerate(seqused_k.tolist()):
        mine = query[query_ends[number] : query_ends[number + 1]].transpose(0, 1)
        cached = [each[block_table[number].long()].flatten(0, 1)[:used].transpose(0, 1) for each in (key, value)]
        mask = torch.ones(mine.shape[1], used, dtype=torch.bool).tril(used - mine.shape[1])
        parts.append(F.scaled_dot_product_attention(mine, *cached, attn_mask=mask, enable_gqa=True).transpose(0, 1))
    return torch.cat(parts)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cpu runner takes the CUDA operators; float32 too, so that tokens can be compared."""
    monkeypatch.setattr(ops, "load", lambda device: cuda)
    monkeypatch.setattr(cuda, "varlen_attention", kernel)
    monkeypatch.setattr(cuda, "fused", lambda function: function)
    monkeypatch.setattr(cuda, "DTYPES", (*cuda.DTYPES, torch.float32))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the family that uses every operator."""
    mixture = {"family": "qwen3_moe", "num_experts": 6, "experts_per_token": 2, "expert_size": 40}
    return make_checkpoint("tiny", msgspec.structs.replace(TINY, **mixture), tmp_path_factory.mktemp("models"))


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("limits", [{}, {"token_budget": 37, "max_sequences": 3}, {"prefix_cache": False}])
def test_tokens_are_those_of_the_cpu_operators(
    folder: Path, limits: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batched, chunked, behind a cached prefix: greedy tokens are the same."""
    found = serve(folder, PROMPTS + PROMPTS, LIMIT, block_tokens=256, kv_blocks=64, **limits)
    monkeypatch.undo()
    assert found == serve(folder, PROMPTS, LIMIT) * 2


@pytest.mark.usefixtures("stand_in")
def test_a_prefix_is_read_from_the_cache(folder: Path) -> None:
    """A second prompt with the same first block computes only the rest, and yields what it would alone."""
    first, second = make_prompt(1, 256) + make_prompt(2, 40), make_prompt(1, 256) + make_prompt(3, 60)
    engine = Engine(folder, block_tokens=256, kv_blocks=16)
    engine.add(first, LIMIT)
    while engine.step():
        pass
    task = engine.add(second, LIMIT)
    plan = engine.step()
    assert plan is not None and plan.chunks[0].start == 256
    while engine.step():
        pass
    assert engine.output[task] == serve(folder, [second], LIMIT, block_tokens=256, kv_blocks=16)[0]


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"block_tokens": 16}, "block_tokens is 16: attention on cuda takes multiples of 256"),
        ({"dtype": "float64"}, "dtype"),
    ],
)
def test_what_the_kernel_does_not_take_is_refused(folder: Path, limits: dict[str, Any], message: str) -> None:
    """At start, with what is allowed."""
    with pytest.raises(ValueError, match=message):
        Engine(folder, **{"block_tokens": 256, **limits})


def test_float32_is_refused() -> None:
    """The kernel computes in 16 bit."""
    with pytest.raises(ValueError, match="dtype is float32: attention on cuda takes bfloat16 or float16"):
        cuda.layer_caches(torch.zeros(1, 2, 4, 256, 2, 64))
    with pytest.raises(ValueError, match="head size is 20: attention on cuda takes multiples of 8 up to 256"):
        cuda.layer_caches(torch.zeros(1, 2, 4, 256, 2, 20, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    "operator",
    [
        lambda o, x: o.rms_norm(x, torch.linspace(0.5, 1.5, x.shape[-1], dtype=x.dtype), 1e-5),
        lambda o, x: (o.norm_heads(y := x.clone().view(9, 8, 8)[:, 2:5], torch.linspace(0.5, 1.5, 8), 1e-5), y)[1],
        lambda o, x: o.swiglu(x),
        lambda o, x: (o.rotate(y := x.view(9, 4, 16).clone(), *rotation()), y)[1],
    ],
    ids=["rms_norm", "norm_heads", "swiglu", "rotate"],
)
def test_element_wise_operators(operator: Callable[[Any, Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers as the reference's."""
    monkeypatch.setattr(cuda, "fused", lambda function: function)
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(operator(cuda, x), operator(ops.load("cpu"), x))


@pytest.mark.parametrize(("tokens", "chosen"), [(1, 1), (1, 3), (7, 2), (40, 8)])
def test_experts(tokens: int, chosen: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Grouped multiplication gives the reference's numbers, also where experts are left out; odd sizes are refused."""
    monkeypatch.setattr(cuda, "fused", lambda function: function)
    generator = torch.Generator().manual_seed(tokens)
    x, gate_up, down = (torch.randn(shape, generator=generator) for shape in ((tokens, 16), (8, 16, 48), (8, 24, 16)))
    weights = torch.rand((tokens, chosen), generator=generator)
    experts = torch.rand((tokens, 8), generator=generator).argsort(-1)[:, :chosen]
    expected = ops.load("cpu").experts(x, weights, experts, gate_up, down)
    torch.testing.assert_close(cuda.experts(x, weights, experts, gate_up, down), expected)
    with pytest.raises(ValueError, match="experts are of 16 x 20: grouped multiplication on cuda takes multiples of 8"):
        cuda.experts(x, weights, experts, gate_up[..., :40], down[:, :20])


def rotation() -> tuple[Tensor, Tensor]:
    angles = torch.outer(torch.arange(9.0), torch.logspace(0, -2, 8))
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1)[:, None], torch.cat((-sin, sin), -1)[:, None]


def test_the_kernel_exists_with_these_arguments() -> None:
    """The installed torch has the function, and takes what we pass (a call on the cpu gets as far as its kernel)."""
    pytest.importorskip("torch.nn.attention.varlen")
    one, zeros = torch.ones(1, dtype=torch.int32), torch.zeros(1, 256, 2, 64, dtype=torch.bfloat16)
    ends = torch.tensor([0, 1], dtype=torch.int32)
    options = {"window_size": (-1, 0), "enable_gqa": True, "seqused_k": one, "block_table": one[None] - 1}
    with pytest.raises((NotImplementedError, RuntimeError), match="CPU"):
        cuda.varlen_attention(zeros[0, :1], zeros, zeros, ends, None, 1, 1, **options)
