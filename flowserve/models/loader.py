"""Weights from safetensors files into a model's parameters, every tensor accounted for."""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
RECOMPUTED = "rotary_emb.inv_freq"
"""Old checkpoints carry this buffer, which follows from the configuration."""
TIED = ("lm_head.weight", "model.embed_tokens.weight")
"""The output matrix, and the embedding that some models take for it: they may be stored both, if they are equal."""


def load_weights(folder: Path, weights: dict[str, Tensor]) -> None:
    """Fill every tensor of `weights` (name in the checkpoint: where it goes), converted to its dtype.

    Reads `model.safetensors`, or the files its index names. Raises ValueError, before anything is written, where a
    tensor is missing, unexpected, of another shape or not of floats.
    """
    with ExitStack() as stack, torch.no_grad():
        files = {name: stack.enter_context(_open(folder / name)) for name in _files(folder)}
        where = {name: file for file, content in files.items() for name in content.keys()}  # noqa: SIM118 - not a dict
        listed = ", ".join(files)
        for name in [name for name in weights if name not in where]:
            raise ValueError(f"{folder}: tensor {name} is missing, it is in none of {listed}")
        for name in [name for name in where if name not in weights]:
            if name == TIED[0]:
                head, embedding = (files[where[each]].get_tensor(each) for each in TIED)
                if not torch.equal(head, embedding):
                    raise ValueError(f"{folder / where[name]}: config.json ties {name} to {TIED[1]}, but they differ")
            elif not name.endswith(RECOMPUTED):
                raise ValueError(f"{folder / where[name]}: tensor {name} is unexpected, the model has no place for it")
            del where[name]
        for name, file in where.items():
            stored = files[file].get_slice(name)
            if tuple(stored.get_shape()) != weights[name].shape or stored.get_dtype() not in ("F32", "F16", "BF16"):
                raise ValueError(
                    f"{folder / file}: tensor {name} is {stored.get_dtype()} {stored.get_shape()}, the model takes "
                    f"F32, F16 or BF16 {list(weights[name].shape)}"
                )
        for name, file in where.items():
            weights[name].copy_(files[file].get_tensor(name))


def _files(folder: Path) -> list[str]:
    if (folder / SINGLE).exists():
        return [SINGLE]
    try:
        index = json.loads((folder / INDEX).read_text())
        return sorted({str(Path(name)) for name in index["weight_map"].values()})
    except FileNotFoundError:
        raise ValueError(f"{folder} has neither {SINGLE} nor {INDEX}") from None
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{folder / INDEX} is no index of safetensors files") from None


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist, though the index names it") from None
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from None
