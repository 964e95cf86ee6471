"""Tiny random checkpoints."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import transformers
from safetensors.torch import load_file

from flowserve.runtime import checkpoint
from flowserve.runtime.checkpoint import CheckpointShape, make_checkpoint

SMALL = CheckpointShape(hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=1, intermediate_size=48, vocab_size=64)


def test_the_same_shape_is_made_once(tmp_path: Path) -> None:
    """A second call finds the folder of the first; another seed or another name is another folder."""
    first = make_checkpoint("a", SMALL, tmp_path)
    made = (first / "model.safetensors").stat().st_mtime_ns
    assert make_checkpoint("a", SMALL, tmp_path) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == made
    others = {make_checkpoint("a", CheckpointShape(seed=1), tmp_path), make_checkpoint("b", SMALL, tmp_path)}
    assert len({first, *others}) == 3


def test_the_default_place_is_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a root, checkpoints go to ~/.cache/deepflow/models."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert make_checkpoint("a", SMALL).parent == tmp_path / ".cache" / "deepflow" / "models"


def test_weights_follow_from_shape_and_seed(tmp_path: Path) -> None:
    """The same shape gives the same weights anywhere, another seed other ones."""
    one, two = (make_checkpoint("a", SMALL, tmp_path / name) / "model.safetensors" for name in ("x", "y"))
    assert one.read_bytes() == two.read_bytes()
    other = make_checkpoint("a", msgspec.structs.replace(SMALL, seed=1), tmp_path)
    assert one.read_bytes() != (other / "model.safetensors").read_bytes()


def test_concurrent_makers_leave_one_complete_folder(tmp_path: Path) -> None:
    """Eight makers at once all get the same folder, and no draft stays behind."""
    with ThreadPoolExecutor(8) as pool:
        folders = set(pool.map(lambda _: make_checkpoint("a", SMALL, tmp_path), range(8)))
    assert list(tmp_path.iterdir()) == list(folders)
    assert sorted(os.listdir(folders.pop())) == ["config.json", "model.safetensors"]


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the disk is full, the error comes through and the next call starts afresh."""

    def full(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        with pytest.raises(OSError, match="No space"):
            make_checkpoint("a", SMALL, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert (make_checkpoint("a", SMALL, tmp_path) / "model.safetensors").exists()


def test_weights_are_written_in_bfloat16(tmp_path: Path) -> None:
    """The same weights, rounded, and a config.json that says so."""
    folder = make_checkpoint("a", msgspec.structs.replace(SMALL, dtype="bfloat16"), tmp_path)
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "bfloat16"
    exact = load_file(make_checkpoint("a", SMALL, tmp_path) / "model.safetensors")
    rounded = load_file(folder / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in rounded.items()} == dict.fromkeys(exact, torch.bfloat16)
    assert all(torch.equal(exact[name].bfloat16(), rounded[name]) for name in exact)


@pytest.mark.parametrize("tie", [False, True])
def test_transformers_reads_it(tmp_path: Path, tie: bool) -> None:
    """Configuration and weights are complete by the reference implementation's own account."""
    folder = make_checkpoint("a", CheckpointShape(tie=tie, vocab_size=256), tmp_path)
    load: Any = transformers.LlamaForCausalLM.from_pretrained
    model, info = load(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.tie_word_embeddings is tie
    stored = set(load_file(folder / "model.safetensors"))
    assert ("lm_head.weight" in stored) is not tie
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_logits_are_not_degenerate(tmp_path: Path) -> None:
    """Logits spread by about 1, differ with the context, and greedy decoding does not fall into one token."""
    model: Any = transformers.LlamaForCausalLM.from_pretrained(make_checkpoint("a", CheckpointShape(), tmp_path))
    tokens = torch.randint(0, 2048, (4, 64), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits = model(tokens).logits[:, -1]
        assert 0.5 < logits.std() < 2
        tokens[:, 0] += 1 - 2 * (tokens[:, 0] == 2047).long()
        moved = (model(tokens).logits[:, -1] - logits).abs().max()
        assert moved > 0.01
        generated = model.generate(tokens[:1], max_new_tokens=32, do_sample=False, pad_token_id=0)[0, 64:]
    assert len(set(generated.tolist())) > 16


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_layers": 0}, "num_layers is 0"),
        ({"hidden_size": 250}, "even multiple of num_heads"),
        ({"num_heads": 4, "num_kv_heads": 3}, "multiple of num_kv_heads 3"),
        ({"family": "gpt2"}, "family is 'gpt2': allowed are llama, qwen2, qwen3, qwen3_moe"),
        ({"num_experts": 4}, "num_experts is 4: a llama model has no experts"),
        ({"family": "qwen3_moe", "num_experts": 4}, "experts_per_token is 0"),
    ],
)
def test_impossible_shapes_are_refused(sizes: dict[str, Any], message: str) -> None:
    """A shape that no model has is refused when it is written down."""
    with pytest.raises(ValueError, match=message):
        CheckpointShape(**sizes)
