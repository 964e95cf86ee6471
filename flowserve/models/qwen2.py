"""Qwen2 and Qwen2.5 (arXiv 2407.10671, 2412.15115): queries, keys and values have a bias."""

from typing import Any

from torch import Tensor

from flowserve.models.decoder import Attention, Decoder, DecoderConfig, Empty, Layer, Mlp, read
from flowserve.ops import Ops


class BiasedAttention(Attention):
    """`bias` [(H + 2K) * D]."""

    def __init__(self, config: DecoderConfig, empty: Empty) -> None:
        super().__init__(config, empty)
        self.bias = empty(self.qkv.weight.shape[1])

    def project(self, x: Tensor, ops: Ops) -> Tensor:
        return ops.linear(x, self.qkv, self.bias).view(len(x), -1, self.head_dim)

    def weights(self) -> dict[str, Tensor]:
        query, key, value = self.split(self.bias)
        return super().weights() | {"q_proj.bias": query, "k_proj.bias": key, "v_proj.bias": value}


def read_config(config: dict[str, Any]) -> DecoderConfig:
    return read(config, DecoderConfig)


def build(config: DecoderConfig, empty: Empty) -> Decoder:
    layers = [
        Layer(config, empty, BiasedAttention(config, empty), Mlp(config, empty)) for _ in range(config.num_layers)
    ]
    return Decoder(config, empty, layers)
