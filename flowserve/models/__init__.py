"""Models by the architecture name in a Hugging Face folder's config.json: one file each, imported when asked for."""

import importlib
import json
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from flowserve.models.loader import load_weights
from flowserve.ops.step import StepContext

ARCHITECTURES = {"LlamaForCausalLM": "flowserve.models.llama"}


class Model(Protocol):
    """What a runner needs of a model. A model's file has `build(config, dtype, device) -> Model`, its weights empty."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position: int

    def weights(self) -> dict[str, Tensor]:
        """Where each tensor of a checkpoint goes: its name there, and a view of the parameter that holds it."""
        ...

    def set_positions(self, count: int) -> None:
        """Make ready for positions 0 ... count - 1, once the weights are on their device."""
        ...

    def __call__(self, tokens: Tensor, positions: Tensor, step: StepContext) -> Tensor:
        """tokens, positions [T] int64, packed as `StepContext` says; returns logits [S, V] of `step.sample_rows`."""
        ...


def load_model(folder: Path, dtype: torch.dtype, device: torch.device) -> Model:
    """A model with its weights, from a folder with config.json and safetensors files; `set_positions` is still to come.

    Raises ValueError where the folder, its architecture or its weights are not what they should be.
    """
    config = _read_config(folder)
    names = config.get("architectures") or [None]
    if names[0] not in ARCHITECTURES:
        raise ValueError(f"{folder}: architecture {names[0]!r} is not supported: {', '.join(ARCHITECTURES)} are")
    module = importlib.import_module(ARCHITECTURES[names[0]])
    model: Model = module.build(config, dtype, device)
    load_weights(folder, model.weights())
    return model


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: a model is a Hugging Face folder") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds {type(config).__name__}, not an object")
    return config
