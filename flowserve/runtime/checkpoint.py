"""Tiny checkpoints with seeded random weights, made once: models to run where nothing can be downloaded."""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch
import xxhash
from safetensors.torch import save_file
from torch import Tensor

from flowserve.models import family_of

FORMAT = 2
"""Part of the folder's name: to be raised when the same shape and seed no longer give the same weights."""
FAMILIES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
"""Hugging Face's model types and their architectures."""


class CheckpointShape(msgspec.Struct, frozen=True):
    """Sizes of a model and the seed of its weights. The default is a Llama of 4 M parameters: 14 MB in float32.

    `head_dim` 0: hidden_size / num_heads. `num_experts` and what follows it: of a mixture of experts, whose first
    `dense_layers` have none; 0 for the other families.
    """

    hidden_size: int = 256
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    intermediate_size: int = 688
    vocab_size: int = 2048
    max_position: int = 32768
    family: str = "llama"
    head_dim: int = 0
    num_experts: int = 0
    experts_per_token: int = 0
    expert_size: int = 0
    dense_layers: int = 0
    tie: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"family is {self.family!r}: allowed are {', '.join(FAMILIES)}")
        derived = not self.head_dim
        if derived:
            msgspec.structs.force_setattr(self, "head_dim", self.hidden_size // max(self.num_heads, 1))
        experts = ("num_experts", "experts_per_token", "expert_size", "dense_layers")
        for name, value in msgspec.structs.asdict(self).items():
            if name in experts and self.family != "qwen3_moe":
                if value:
                    raise ValueError(f"{name} is {value}: a {self.family} model has no experts")
            elif name not in ("seed", "dense_layers") and type(value) is int and value < 1:
                raise ValueError(f"{name} is {value}: it must be at least 1")
        if derived and self.hidden_size % (2 * self.num_heads):
            raise ValueError(f"hidden_size {self.hidden_size} is not an even multiple of num_heads {self.num_heads}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")


def make_checkpoint(name: str, shape: CheckpointShape | None = None, root: Path | None = None) -> Path:
    """The folder of a checkpoint, `<root>/<name>-<hash>`: config.json as Hugging Face writes it, model.safetensors.

    Made where it is not there yet, under another name first, so that a folder of that name is always complete, whoever
    else makes it at the same time. `root`: the user's cache where None.
    """
    shape = shape or CheckpointShape()
    root = root or Path.home() / ".cache" / "deepflow" / "models"
    key = xxhash.xxh3_64_hexdigest(repr((FORMAT, msgspec.structs.astuple(shape))).encode())
    folder = root / f"{name}-{key}"
    if folder.is_dir():
        return folder
    root.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=root))
    try:
        (draft / "config.json").write_text(json.dumps(hf_config(shape), indent=2) + "\n")
        save_file(random_weights(shape), draft / "model.safetensors", metadata={"format": "pt"})
        for path, mode in ((draft, 0o755), (draft / "model.safetensors", 0o644)):
            path.chmod(mode)
        os.rename(draft, folder)
    except OSError:
        if not folder.is_dir():  # else another maker was faster
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def hf_config(shape: CheckpointShape) -> dict[str, Any]:
    """config.json."""
    config = {
        "architectures": [FAMILIES[shape.family]],
        "model_type": shape.family,
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.intermediate_size,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.max_position,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": shape.tie,
        "torch_dtype": shape.dtype,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if shape.num_experts:
        config |= {
            "num_experts": shape.num_experts,
            "num_experts_per_tok": shape.experts_per_token,
            "moe_intermediate_size": shape.expert_size,
            "norm_topk_prob": True,
            "mlp_only_layers": list(range(shape.dense_layers)),
        }
    return config


def random_weights(shape: CheckpointShape) -> dict[str, Tensor]:
    """Normal weights of variance 1 / fan-in, so that logits have a spread of about 1 and depend on the whole context.

    The matrices that add to the residual stream are smaller by sqrt(2 layers), as in GPT-2. Hugging Face's constant
    0.02 is the same for a hidden size of 2500; at 256 it would leave all logits nearly equal. Norm weights scatter
    around 1 and biases around 0, so that one that is skipped or swapped shows.
    """
    generator = torch.Generator().manual_seed(shape.seed)
    config = hf_config(shape)
    family = family_of(config)
    places = family.build(family.read_config(config), lambda *sizes: torch.empty(sizes, device="meta")).weights()
    weights = {}
    for name, place in places.items():
        tensor = weights[name] = torch.empty(place.shape)
        if name.endswith("norm.weight"):
            tensor.normal_(mean=1.0, std=0.1, generator=generator)
        elif name.endswith(".bias"):
            tensor.normal_(std=0.5, generator=generator)
        else:
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            scale = (2 * shape.num_layers) ** -0.5 if residual else 1.0
            tensor.normal_(std=scale * place.shape[1] ** -0.5, generator=generator)
    return {name: tensor.to(getattr(torch, shape.dtype)) for name, tensor in weights.items()}
