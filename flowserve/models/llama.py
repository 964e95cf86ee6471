"""Llama 2 and 3 (arXiv 2302.13971, 2407.21783): the shared decoder as it is."""

from typing import Any

from flowserve.models.decoder import Attention, Decoder, DecoderConfig, Empty, Layer, Mlp, read


def read_config(config: dict[str, Any]) -> DecoderConfig:
    return read(config, DecoderConfig)


def build(config: DecoderConfig, empty: Empty) -> Decoder:
    layers = [Layer(config, empty, Attention(config, empty), Mlp(config, empty)) for _ in range(config.num_layers)]
    return Decoder(config, empty, layers)
