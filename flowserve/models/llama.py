"""Llama-family decoder: RMSNorm, rotary embedding, grouped-query attention, SwiGLU (arXiv 2302.13971, 2407.21783)."""

import math
from collections.abc import Callable
from typing import Any

import msgspec
import torch
from torch import Tensor

from flowserve.ops.step import StepContext


class LlamaConfig(msgspec.Struct, frozen=True):
    """What config.json says, in our words. `rope`: its rope parameters, theta and type included."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position: int
    norm_eps: float
    tied: bool
    rope: dict[str, Any]


def read_config(config: dict[str, Any]) -> LlamaConfig:
    """From a Hugging Face config.json, old or new style. Raises ValueError for what this file does not implement."""
    for key, only in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False)):
        if config.get(key, only) != only:
            raise ValueError(f"config.json: {key} is {config[key]!r}, supported is {only!r}")
    rope = {"rope_theta": config.get("rope_theta", 10000.0)}
    rope |= config.get("rope_scaling") or config.get("rope_parameters") or {}
    rope.setdefault("rope_type", rope.get("type", "default"))
    if rope["rope_type"] not in ("default", "linear", "llama3"):
        raise ValueError(f"config.json: rope type {rope['rope_type']!r} is not supported: default, linear, llama3 are")
    try:
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        return LlamaConfig(
            hidden_size=hidden,
            num_layers=config["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            intermediate_size=config["intermediate_size"],
            vocab_size=config["vocab_size"],
            max_position=config["max_position_embeddings"],
            norm_eps=config["rms_norm_eps"],
            tied=config.get("tie_word_embeddings", False),
            rope=rope,
        )
    except KeyError as error:
        raise ValueError(f"config.json: {error.args[0]} is missing") from None


class Layer:
    """Attention and MLP. Matrices are (in, out), which a batch of one multiplies fastest on a CPU; q, k, v and gate, up
    are one matrix each, so that a layer is four multiplications.
    """

    def __init__(self, config: LlamaConfig, empty: Callable[..., Tensor]) -> None:
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.eps = config.norm_eps
        hidden = config.hidden_size
        self.input_norm = empty(hidden)
        self.qkv = empty(hidden, (self.heads + 2 * self.kv_heads) * self.head_dim)
        self.o = empty(self.heads * self.head_dim, hidden)
        self.post_norm = empty(hidden)
        self.gate_up = empty(hidden, 2 * config.intermediate_size)
        self.down = empty(config.intermediate_size, hidden)

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Any, step: StepContext) -> Tensor:
        """x [T, hidden], cos and sin [T, 1, D]; returns [T, hidden]."""
        ops, heads, kv_heads = step.ops, self.heads, self.kv_heads
        qkv = torch.mm(ops.rms_norm(x, self.input_norm, self.eps), self.qkv).view(len(x), -1, self.head_dim)
        ops.rotate(qkv.narrow(1, 0, heads + kv_heads), cos, sin)
        query, kv = qkv.split_with_sizes((heads, 2 * kv_heads), 1)
        ops.store_kv(kv, cache, step)
        x = torch.addmm(x, ops.attention(query, kv, cache, step), self.o)
        gate_up = torch.mm(ops.rms_norm(x, self.post_norm, self.eps), self.gate_up)
        return torch.addmm(x, ops.swiglu(gate_up), self.down)

    def weights(self) -> dict[str, Tensor]:
        sizes = [self.heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim]
        query, key, value = self.qkv.t().split_with_sizes(sizes)
        gate, up = self.gate_up.t().chunk(2)
        return {
            "input_layernorm.weight": self.input_norm,
            "self_attn.q_proj.weight": query,
            "self_attn.k_proj.weight": key,
            "self_attn.v_proj.weight": value,
            "self_attn.o_proj.weight": self.o.t(),
            "post_attention_layernorm.weight": self.post_norm,
            "mlp.gate_proj.weight": gate,
            "mlp.up_proj.weight": up,
            "mlp.down_proj.weight": self.down.t(),
        }


class Llama:
    """The `Model` of this file; see there for what its methods promise.

    Plain objects, no nn.Module: nothing here is trained, and a module's attribute look-ups and hooks would take a tenth
    of a small model's decode step.
    """

    def __init__(self, config: LlamaConfig, empty: Callable[..., Tensor]) -> None:
        self.config = config
        self.num_layers, self.num_kv_heads, self.head_dim = config.num_layers, config.num_kv_heads, config.head_dim
        self.vocab_size, self.max_position = config.vocab_size, config.max_position
        self.embedding = empty(config.vocab_size, config.hidden_size)
        self.layers = [Layer(config, empty) for _ in range(config.num_layers)]
        self.norm = empty(config.hidden_size)
        self.head = self.embedding.t() if config.tied else empty(config.hidden_size, config.vocab_size)
        self.rotary = empty(0)

    def __call__(self, tokens: Tensor, positions: Tensor, step: StepContext) -> Tensor:
        x = self.embedding.index_select(0, tokens)
        cos, sin = self.rotary.index_select(0, positions).unsqueeze(2).unbind(1)
        for layer, cache in zip(self.layers, step.caches, strict=True):
            x = layer(x, cos, sin, cache, step)
        x = step.ops.rms_norm(x.index_select(0, step.sample_rows), self.norm, self.config.norm_eps)
        return torch.mm(x, self.head)

    def weights(self) -> dict[str, Tensor]:
        weights: dict[str, Tensor] = {"model.embed_tokens.weight": self.embedding, "model.norm.weight": self.norm}
        if not self.config.tied:
            weights["lm_head.weight"] = self.head.t()
        for index, layer in enumerate(self.layers):
            weights |= {f"model.layers.{index}.{name}": tensor for name, tensor in layer.weights().items()}
        return weights

    def set_positions(self, count: int) -> None:
        """`rotary` [count, 2, D]: cosine and sine of each position's angles, the sine's first half negated."""
        angles = torch.outer(torch.arange(count, dtype=torch.float32), inverse_frequencies(self.config))
        cos, sin = angles.cos(), angles.sin()
        table = torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)), 1)
        self.rotary = table.to(self.embedding.device, self.embedding.dtype)


def inverse_frequencies(config: LlamaConfig) -> Tensor:
    """[D / 2] float32: theta^(-2i/D), stretched as the rope type says.

    llama3: wavelengths beyond original context / low_freq_factor are divided by `factor`, those below original context
    / high_freq_factor stay, between them it is interpolated (arXiv 2407.21783, and the released configuration).
    """
    rope = config.rope
    halves = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies = torch.pow(rope["rope_theta"], -halves)
    if rope["rope_type"] == "linear":
        frequencies /= rope["factor"]
    elif rope["rope_type"] == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies *= keep + (1 - keep) / rope["factor"]
    return frequencies


def build(config: dict[str, Any], dtype: torch.dtype, device: torch.device) -> Llama:
    """A model with uninitialised weights, for a loader to fill."""
    return Llama(read_config(config), lambda *shape: torch.empty(shape, dtype=dtype, device=device))
