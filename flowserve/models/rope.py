"""Rotary position embedding (arXiv 2104.09864) and how its frequencies are stretched to longer contexts."""

import math
from typing import Any

import msgspec
import torch
from torch import Tensor

REQUIRED = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor",),
}
"""Rope types and what each must be given."""


class Rope(msgspec.Struct, frozen=True):
    """Rope parameters under Hugging Face's names; what a type does not use is left as it is."""

    rope_type: str
    rope_theta: float
    original_max_position_embeddings: int
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None


def read_rope(config: dict[str, Any]) -> Rope:
    """From `rope_theta` with `rope_scaling` (old style) or `rope_parameters`. ValueError: not implemented."""
    given = {"rope_theta": config.get("rope_theta", 10000.0)}
    given |= config.get("rope_scaling") or config.get("rope_parameters") or {}
    given = {key: value for key, value in given.items() if value is not None}
    kind = given["rope_type"] = given.pop("rope_type", None) or given.get("type", "default")
    given.pop("type", None)
    if kind not in REQUIRED:
        raise ValueError(f"rope type {kind!r} is not supported: {', '.join(REQUIRED)} are")
    for name in REQUIRED[kind]:
        if name not in given:
            raise ValueError(f"rope type {kind} needs {name}, which is missing")
    for name, value in given.items():
        if name not in Rope.__struct_fields__:
            raise ValueError(f"rope parameter {name} ({value!r}) is not supported")
    given.setdefault("original_max_position_embeddings", config.get("max_position_embeddings", 1))
    try:
        return msgspec.convert(given, Rope, strict=False)
    except msgspec.ValidationError as error:
        raise ValueError(f"rope parameters: {error}") from None


def cos_sin(rope: Rope, head_dim: int, count: int) -> Tensor:
    """[count, 2, D] float32: cosine and sine of the angles of positions 0, 1 ..., the sine's first half negated."""
    angles = torch.outer(torch.arange(count, dtype=torch.float32), inverse_frequencies(rope, head_dim))
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)), 1) * attention_factor(rope)


def inverse_frequencies(rope: Rope, head_dim: int) -> Tensor:
    """[D / 2] float32: theta^(-2i/D), stretched as the rope type says.

    linear: all divided by `factor`. llama3: wavelengths beyond original context / low_freq_factor are divided by
    `factor`, those below original context / high_freq_factor stay, between them it is interpolated (arXiv 2407.21783,
    and the released configuration). yarn: the same between the dimensions that turn beta_fast and beta_slow times in
    the original context, rounded outwards and interpolated over the dimension's index (arXiv 2309.00071, section 3.2).
    """
    halves = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = torch.pow(rope.rope_theta, -halves)
    if rope.rope_type == "linear":
        return frequencies / rope.factor
    if rope.rope_type == "llama3":
        turns = rope.original_max_position_embeddings * frequencies / (2 * math.pi)
        keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    elif rope.rope_type == "yarn":
        first = max(math.floor(_dimension(rope, head_dim, rope.beta_fast)), 0)
        last = min(math.ceil(_dimension(rope, head_dim, rope.beta_slow)), head_dim - 1)
        keep = 1 - (torch.arange(head_dim // 2, dtype=torch.float32) - first) / max(last - first, 1e-3)
    else:
        return frequencies
    keep = keep.clamp(0, 1)
    return frequencies * (keep + (1 - keep) / rope.factor)


def attention_factor(rope: Rope) -> float:
    """What cosine and sine are multiplied by: 0.1 ln(factor) + 1 for yarn (section 3.4), 1 for the others."""
    if rope.rope_type != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    return 0.1 * math.log(max(rope.factor, 1.0)) + 1.0


def _dimension(rope: Rope, head_dim: int, turns: float) -> float:
    """The index i whose frequency turns so many times in the original context."""
    length = rope.original_max_position_embeddings / (turns * 2 * math.pi)
    return head_dim * math.log(length) / (2 * math.log(rope.rope_theta))
