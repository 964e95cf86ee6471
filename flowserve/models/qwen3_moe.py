"""Qwen3 mixture of experts (arXiv 2505.09388): Qwen3, where most layers choose a few of many small MLPs per token."""

from typing import Any

import torch
from torch import Tensor

from flowserve.models import qwen3
from flowserve.models.decoder import Decoder, DecoderConfig, Empty, Layer, Mlp, Size, read
from flowserve.ops import Ops
from flowserve.ops.matrix import Matrix


class Qwen3MoeConfig(DecoderConfig, frozen=True, kw_only=True):
    """`norm_topk_prob`: whether the chosen experts' probabilities are scaled to a sum of 1. Dense are the layers named
    in `mlp_only_layers` and all but every `decoder_sparse_step`-th.
    """

    num_experts: Size
    num_experts_per_tok: Size
    moe_intermediate_size: Size
    norm_topk_prob: bool = False
    decoder_sparse_step: Size = 1
    mlp_only_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(f"num_experts_per_tok is {self.num_experts_per_tok}, of num_experts {self.num_experts}")

    def is_sparse(self, layer: int) -> bool:
        return layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0


class SparseMlp:
    """The weighted sum of a token's most probable experts. `gate_up` [E, hidden, 2F], `down` [E, F, hidden]."""

    def __init__(self, config: Qwen3MoeConfig, empty: Empty) -> None:
        self.chosen, self.normalised = config.num_experts_per_tok, config.norm_topk_prob
        self.router = empty(config.hidden_size, config.num_experts)
        self.gate_up = empty(config.num_experts, config.hidden_size, 2 * config.moe_intermediate_size)
        self.down = empty(config.num_experts, config.moe_intermediate_size, config.hidden_size)

    def __call__(self, residual: Tensor, x: Tensor, ops: Ops) -> Tensor:
        """residual + experts of x, both [T, hidden]."""
        chances, experts = torch.mm(x, self.router).softmax(-1, dtype=torch.float32).topk(self.chosen)
        if self.normalised:
            chances = chances / chances.sum(-1, keepdim=True)
        return residual + ops.experts(x, chances.to(x.dtype), experts, self.gate_up, self.down)

    def weights(self) -> dict[str, Tensor]:
        weights = {"gate.weight": self.router.t()}
        for expert, (gate_up, down) in enumerate(zip(self.gate_up, self.down, strict=True)):
            gate, up = gate_up.t().chunk(2)
            parts = {"gate_proj": gate, "up_proj": up, "down_proj": down.t()}
            weights |= {f"experts.{expert}.{name}.weight": tensor for name, tensor in parts.items()}
        return weights

    def matrices(self) -> list[Matrix]:
        return []


def read_config(config: dict[str, Any]) -> Qwen3MoeConfig:
    qwen3.check(config)
    config = {"num_experts": config.get("num_local_experts"), **config}  # transformers 5 writes the other name
    return read(config, Qwen3MoeConfig)


def build(config: Qwen3MoeConfig, empty: Empty) -> Decoder:
    layers = []
    for index in range(config.num_layers):
        mlp = SparseMlp(config, empty) if config.is_sparse(index) else Mlp(config, empty)
        layers.append(Layer(config, empty, qwen3.NormedAttention(config, empty), mlp))
    return Decoder(config, empty, layers)
