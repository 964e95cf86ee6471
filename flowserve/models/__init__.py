"""Models by the architecture name in a Hugging Face folder's config.json: one file each, imported when asked for."""

import importlib
import json
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from flowserve.models.decoder import DecoderConfig, Empty
from flowserve.models.loader import load_weights
from flowserve.ops import Ops
from flowserve.ops.step import StepContext

ARCHITECTURES = {
    "LlamaForCausalLM": "flowserve.models.llama",
    "Qwen2ForCausalLM": "flowserve.models.qwen2",
    "Qwen3ForCausalLM": "flowserve.models.qwen3",
    "Qwen3MoeForCausalLM": "flowserve.models.qwen3_moe",
}


class Model(Protocol):
    """What a runner needs of a model."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position: int
    eos_token_ids: tuple[int, ...]
    """Tokens that end an output, from generation_config.json where there is one; none, one or several."""
    bos_token_id: int | None
    """The token that begins every text; None where the model has none."""

    def weights(self) -> dict[str, Tensor]:
        """Where each tensor of a checkpoint goes: its name there, and a view of the parameter that holds it."""
        ...

    def pack(self, ops: Ops) -> None:
        """Bring matrices into the form that the device multiplies fastest: after their weights were set or changed."""
        ...

    def set_positions(self, count: int) -> None:
        """Make ready for positions 0 ... count - 1, once the weights are on their device."""
        ...

    def __call__(self, tokens: Tensor, positions: Tensor, step: StepContext) -> Tensor:
        """tokens, positions [T] int64, packed as `StepContext` says; returns logits [S, V] of `step.sample_rows`."""
        ...


class Family(Protocol):
    """What a model's file offers."""

    def read_config(self, config: dict[str, Any]) -> DecoderConfig:
        """From config.json. Raises ValueError, without the file's name, for what the family does not implement."""
        ...

    def build(self, config: DecoderConfig, empty: Empty) -> Model:
        """A model of what its own `read_config` returned, its weights uninitialised."""
        ...


def load_model(folder: Path, dtype: torch.dtype, device: torch.device) -> Model:
    """A model with its weights, from a folder with config.json and safetensors files; `pack`, `set_positions` follow.

    Raises ValueError where the folder, its architecture or its weights are not what they should be.
    """
    family, config = _read(folder)
    model = family.build(config, lambda *shape: torch.empty(shape, dtype=dtype, device=device))
    load_weights(folder, model.weights())
    return model


def read_config(folder: Path) -> DecoderConfig:
    """What config.json and generation_config.json say. Raises ValueError as `load_model` does."""
    return _read(folder)[1]


def family_of(config: dict[str, Any]) -> Family:
    """The file that implements a config.json. Raises ValueError where there is none."""
    name = (config.get("architectures") or [None])[0]
    if name not in ARCHITECTURES:
        raise ValueError(f"architecture {name!r} is not supported: {', '.join(ARCHITECTURES)} are")
    return cast(Family, importlib.import_module(ARCHITECTURES[name]))


def _read(folder: Path) -> tuple[Family, DecoderConfig]:
    path = folder / "config.json"
    if not path.exists():
        raise ValueError(f"{path} does not exist: a model is a Hugging Face folder")
    config = _read_json(path)
    generation = folder / "generation_config.json"
    if generation.exists():
        stops = _read_json(generation)
        config |= {name: stops[name] for name in ("eos_token_id", "bos_token_id") if stops.get(name) is not None}
    try:
        family = family_of(config)
        return family, family.read_config(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__}, not an object")
    return content
