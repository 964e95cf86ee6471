"""The decoder that the families share: RMSNorm, rotary grouped-query attention, RMSNorm, a gated MLP, per layer.

Plain objects, no nn.Module: nothing here is trained, and a module's attribute look-ups and hooks would take a tenth of
a small model's decode step. Matrices are (in, out), which a batch of one multiplies fastest on a CPU; q, k, v and gate,
up are one matrix each, so that a dense layer is four multiplications. T: packed tokens of a step, H and K: query and KV
heads, D: head size.
"""

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Protocol, TypeVar

import msgspec
from torch import Tensor

from flowserve.models.rope import Rope, cos_sin, read_rope
from flowserve.ops import Ops
from flowserve.ops.matrix import Matrix
from flowserve.ops.step import StepContext

Empty = Callable[..., Tensor]
"""Allocates a weight of the shape given, on the model's device and of its dtype."""

ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "use_sliding_window": (False, None),
    "partial_rotary_factor": (1.0, None),
    "quantization_config": (None,),
}
"""Keys of config.json that change what is computed, and the values that are implemented."""


Size = Annotated[int, msgspec.Meta(ge=1)]
TokenId = Annotated[int, msgspec.Meta(ge=0)]


class DecoderConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What config.json says, in our words; a family with more to say extends it. Raises ValueError for sizes that
    do not fit each other.

    `dtype`: of the weights as they are stored. Experts are those of a layer that `is_sparse`, 0 where there is none.
    """

    model_type: str = ""
    hidden_size: Size
    num_layers: Size = msgspec.field(name="num_hidden_layers")
    num_heads: Size = msgspec.field(name="num_attention_heads")
    num_kv_heads: Size = msgspec.field(name="num_key_value_heads", default=0)
    head_dim: Size = 0
    intermediate_size: Size
    vocab_size: Size
    max_position: Size = msgspec.field(name="max_position_embeddings")
    norm_eps: float = msgspec.field(name="rms_norm_eps")
    tied: bool = msgspec.field(name="tie_word_embeddings", default=False)
    rope: Rope
    eos_token_id: TokenId | list[TokenId] = []
    bos_token_id: TokenId | None = None
    dtype: str = "float32"
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0

    def __post_init__(self) -> None:
        if not self.num_kv_heads:
            msgspec.structs.force_setattr(self, "num_kv_heads", self.num_heads)
        if not self.head_dim:
            msgspec.structs.force_setattr(self, "head_dim", self.hidden_size // self.num_heads)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_attention_heads {self.num_heads} is not a multiple of num_key_value_heads {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}: rotary embedding takes an even one")

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer, counted from 0, has experts in place of an MLP."""
        return False

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an output, none or several."""
        return tuple(self.eos_token_id) if isinstance(self.eos_token_id, list) else (self.eos_token_id,)


Config = TypeVar("Config", bound=DecoderConfig)


def read(config: dict[str, Any], kind: type[Config]) -> Config:
    """From a Hugging Face config.json, old or new style. Raises ValueError for what is missing or not implemented."""
    for name, allowed in ONLY.items():
        if config.get(name, allowed[0]) not in allowed:
            raise ValueError(f"{name} is {config[name]!r}, supported is {allowed[0]!r}")
    for attention in config.get("layer_types") or ():
        if attention != "full_attention":
            raise ValueError(f"layer_types has {attention!r}, supported is 'full_attention'")
    values = {name: value for name, value in config.items() if value is not None}
    values.setdefault("dtype", values.get("torch_dtype", "float32"))
    try:
        return msgspec.convert(values | {"rope": read_rope(config)}, kind)
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from None


class Attention:
    """Rotary grouped-query attention; a family with more to it overrides `project`."""

    def __init__(self, config: DecoderConfig, empty: Empty) -> None:
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.qkv = Matrix(empty(config.hidden_size, (self.heads + 2 * self.kv_heads) * self.head_dim))
        self.o = Matrix(empty(self.heads * self.head_dim, config.hidden_size))

    def __call__(self, residual: Tensor, x: Tensor, cos: Tensor, sin: Tensor, cache: Any, step: StepContext) -> Tensor:
        """residual + attention of x, both [T, hidden]; cos and sin from `Ops.rotary`."""
        ops, heads, kv_heads = step.ops, self.heads, self.kv_heads
        qkv = self.project(x, ops)
        ops.rotate(qkv.narrow(1, 0, heads + kv_heads), cos, sin)
        query, kv = qkv.split_with_sizes((heads, 2 * kv_heads), 1)
        ops.store_kv(kv, cache, step)
        return ops.linear(ops.attention(query, kv, cache, step), self.o, residual)

    def project(self, x: Tensor, ops: Ops) -> Tensor:
        """Queries, keys and values of x, [T, H + 2K, D], before their rotation."""
        return ops.linear(x, self.qkv).view(len(x), -1, self.head_dim)

    def weights(self) -> dict[str, Tensor]:
        query, key, value = self.split(self.qkv.weight.t())
        return {
            "q_proj.weight": query,
            "k_proj.weight": key,
            "v_proj.weight": value,
            "o_proj.weight": self.o.weight.t(),
        }

    def matrices(self) -> list[Matrix]:
        return [self.qkv, self.o]

    def split(self, joint: Tensor) -> Sequence[Tensor]:
        """The parts of queries, keys and values along the first dimension."""
        keys = self.kv_heads * self.head_dim
        return joint.split_with_sizes([self.heads * self.head_dim, keys, keys])


class Mlp:
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: DecoderConfig, empty: Empty) -> None:
        self.gate_up = Matrix(empty(config.hidden_size, 2 * config.intermediate_size))
        self.down = Matrix(empty(config.intermediate_size, config.hidden_size))

    def __call__(self, residual: Tensor, x: Tensor, ops: Ops) -> Tensor:
        """residual + MLP of x, both [T, hidden]."""
        return ops.linear(ops.swiglu(ops.linear(x, self.gate_up)), self.down, residual)

    def weights(self) -> dict[str, Tensor]:
        gate, up = self.gate_up.weight.t().chunk(2)
        return {"gate_proj.weight": gate, "up_proj.weight": up, "down_proj.weight": self.down.weight.t()}

    def matrices(self) -> list[Matrix]:
        return [self.gate_up, self.down]


class FeedForward(Protocol):
    """`Mlp`, or what a family has in its place."""

    def __call__(self, residual: Tensor, x: Tensor, ops: Ops) -> Tensor: ...

    def weights(self) -> dict[str, Tensor]: ...

    def matrices(self) -> list[Matrix]:
        """Those that `Ops.linear` multiplies by."""
        ...


class Layer:
    """Attention and MLP, each behind a norm and beside a residual stream."""

    def __init__(self, config: DecoderConfig, empty: Empty, attention: Attention, mlp: FeedForward) -> None:
        self.eps = config.norm_eps
        self.input_norm = empty(config.hidden_size)
        self.attention = attention
        self.post_norm = empty(config.hidden_size)
        self.mlp = mlp

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Any, step: StepContext) -> Tensor:
        """x [T, hidden], cos and sin from `Ops.rotary`; returns [T, hidden]."""
        ops = step.ops
        x = self.attention(x, ops.rms_norm(x, self.input_norm, self.eps), cos, sin, cache, step)
        return self.mlp(x, ops.rms_norm(x, self.post_norm, self.eps), ops)

    def weights(self) -> dict[str, Tensor]:
        return {
            "input_layernorm.weight": self.input_norm,
            **{f"self_attn.{name}": tensor for name, tensor in self.attention.weights().items()},
            "post_attention_layernorm.weight": self.post_norm,
            **{f"mlp.{name}": tensor for name, tensor in self.mlp.weights().items()},
        }


class Decoder:
    """The `Model` that all families are so far; see there for what its methods promise."""

    def __init__(self, config: DecoderConfig, empty: Empty, layers: Sequence[Layer]) -> None:
        self.config = config
        self.num_layers, self.num_kv_heads, self.head_dim = config.num_layers, config.num_kv_heads, config.head_dim
        self.vocab_size, self.max_position = config.vocab_size, config.max_position
        self.eos_token_ids, self.bos_token_id = config.eos_token_ids, config.bos_token_id
        self.embedding = empty(config.vocab_size, config.hidden_size)
        self.layers = layers
        self.norm = empty(config.hidden_size)
        self.head = Matrix(self.embedding.t() if config.tied else empty(config.hidden_size, config.vocab_size))
        self.rotary = empty(0)

    def __call__(self, tokens: Tensor, positions: Tensor, step: StepContext) -> Tensor:
        x = self.embedding.index_select(0, tokens)
        cos, sin = step.ops.rotary(self.rotary.index_select(0, positions))
        for layer, cache in zip(self.layers, step.caches, strict=True):
            x = layer(x, cos, sin, cache, step)
        x = step.ops.rms_norm(x.index_select(0, step.sample_rows), self.norm, self.config.norm_eps)
        return step.ops.linear(x, self.head)

    def weights(self) -> dict[str, Tensor]:
        weights: dict[str, Tensor] = {"model.embed_tokens.weight": self.embedding}
        for index, layer in enumerate(self.layers):
            weights |= {f"model.layers.{index}.{name}": tensor for name, tensor in layer.weights().items()}
        weights["model.norm.weight"] = self.norm
        if not self.config.tied:
            weights["lm_head.weight"] = self.head.weight.t()
        return weights

    def pack(self, ops: Ops) -> None:
        parts = [part for layer in self.layers for part in (layer.attention, layer.mlp)]
        for matrix in [matrix for part in parts for matrix in part.matrices()] + [self.head]:
            matrix.packed = ops.pack(matrix.weight)

    def set_positions(self, count: int) -> None:
        """`rotary` [count, 2, D]: cosine and sine of each position's angles, the sine's first half negated."""
        table = cos_sin(self.config.rope, self.head_dim, count)
        self.rotary = table.to(self.embedding.device, self.embedding.dtype)
