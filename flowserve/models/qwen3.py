"""Qwen3, dense (arXiv 2505.09388): queries and keys are normalised per head before their rotation."""

from typing import Any

from torch import Tensor

from flowserve.models.decoder import Attention, Decoder, DecoderConfig, Empty, Layer, Mlp, read
from flowserve.ops import Ops


class NormedAttention(Attention):
    """`query_norm`, `key_norm` [D]: the same for all heads."""

    def __init__(self, config: DecoderConfig, empty: Empty) -> None:
        super().__init__(config, empty)
        self.query_norm, self.key_norm, self.eps = empty(self.head_dim), empty(self.head_dim), config.norm_eps

    def project(self, x: Tensor, ops: Ops) -> Tensor:
        qkv = super().project(x, ops)
        ops.norm_heads(qkv.narrow(1, 0, self.heads), self.query_norm, self.eps)
        ops.norm_heads(qkv.narrow(1, self.heads, self.kv_heads), self.key_norm, self.eps)
        return qkv

    def weights(self) -> dict[str, Tensor]:
        return super().weights() | {"q_norm.weight": self.query_norm, "k_norm.weight": self.key_norm}


def check(config: dict[str, Any]) -> None:
    """Raises ValueError where config.json has no head size, which does not follow from the other sizes."""
    if config.get("head_dim") is None:
        raise ValueError("head_dim is missing: Qwen3 needs it")


def read_config(config: dict[str, Any]) -> DecoderConfig:
    check(config)
    return read(config, DecoderConfig)


def build(config: DecoderConfig, empty: Empty) -> Decoder:
    layers = [
        Layer(config, empty, NormedAttention(config, empty), Mlp(config, empty)) for _ in range(config.num_layers)
    ]
    return Decoder(config, empty, layers)
