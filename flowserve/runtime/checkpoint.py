"""Tiny Llama checkpoints with seeded random weights, made once: models to run where nothing can be downloaded."""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import torch
import xxhash
from safetensors.torch import save_file
from torch import Tensor

FORMAT = 1
"""Part of the folder's name: to be raised when the same shape and seed no longer give the same weights."""


class LlamaShape(msgspec.Struct, frozen=True):
    """Sizes of a Llama model and the seed of its weights. The default has 4 M parameters: 14 MB in float32."""

    hidden_size: int = 256
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    intermediate_size: int = 688
    vocab_size: int = 2048
    max_position: int = 32768
    tie: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            if name not in ("tie", "seed") and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(f"hidden_size {self.hidden_size} is not an even multiple of num_heads {self.num_heads}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")


def make_checkpoint(name: str, shape: LlamaShape | None = None, root: Path | None = None) -> Path:
    """The folder of a checkpoint, `<root>/<name>-<hash>`: config.json as Hugging Face writes it, model.safetensors in
    float32.

    Made where it is not there yet, under another name first, so that a folder of that name is always complete, whoever
    else makes it at the same time. `root`: the user's cache where None.
    """
    shape = shape or LlamaShape()
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


def hf_config(shape: LlamaShape) -> dict[str, Any]:
    """config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.hidden_size // shape.num_heads,
        "intermediate_size": shape.intermediate_size,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.max_position,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": shape.tie,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "float32",
    }


def random_weights(shape: LlamaShape) -> dict[str, Tensor]:
    """Normal weights of variance 1 / fan-in, so that logits have a spread of about 1 and depend on the whole context.

    The matrices that add to the residual stream are smaller by sqrt(2 layers), as in GPT-2. Hugging Face's constant
    0.02 is the same for a hidden size of 2500; at 256 it would leave all logits nearly equal. Norm weights scatter
    around 1, so that a norm that is skipped or swapped shows.
    """
    generator = torch.Generator().manual_seed(shape.seed)
    head_dim = shape.hidden_size // shape.num_heads
    hidden, queries, keys = shape.hidden_size, shape.num_heads * head_dim, shape.num_kv_heads * head_dim

    def normal(out: int, fan_in: int, scale: float = 1.0) -> Tensor:
        return torch.empty(out, fan_in).normal_(std=scale * fan_in**-0.5, generator=generator)

    def norm() -> Tensor:
        return torch.empty(hidden).normal_(mean=1.0, std=0.1, generator=generator)

    residual = (2 * shape.num_layers) ** -0.5
    weights = {"model.embed_tokens.weight": normal(shape.vocab_size, hidden)}
    for layer in range(shape.num_layers):
        weights |= {
            f"model.layers.{layer}.{name}.weight": tensor
            for name, tensor in {
                "input_layernorm": norm(),
                "self_attn.q_proj": normal(queries, hidden),
                "self_attn.k_proj": normal(keys, hidden),
                "self_attn.v_proj": normal(keys, hidden),
                "self_attn.o_proj": normal(hidden, queries, residual),
                "post_attention_layernorm": norm(),
                "mlp.gate_proj": normal(shape.intermediate_size, hidden),
                "mlp.up_proj": normal(shape.intermediate_size, hidden),
                "mlp.down_proj": normal(hidden, shape.intermediate_size, residual),
            }.items()
        }
    weights["model.norm.weight"] = norm()
    if not shape.tie:
        weights["lm_head.weight"] = normal(shape.vocab_size, hidden)
    return weights
