"""Llama in its variants and the CPU's operators, and checkpoints that are not what they should be."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from flowserve.models import Model, load_model
from flowserve.ops import Ops, cpu, load
from flowserve.ops.matrix import Matrix
from flowserve.runtime.checkpoint import CheckpointShape, make_checkpoint
from tests.flowserve.driver import TINY, Reference, make_prompt, packed_logits

CPU = torch.device("cpu")
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

torch.set_num_threads(1)


def load_float32(folder: Path) -> Model:
    model = load_model(folder, torch.float32, CPU)
    model.set_positions(model.max_position)
    return model


def edit_config(folder: Path, **changes: Any) -> None:
    """Change values of config.json; None removes a key."""
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("tiny", TINY, tmp_path_factory.mktemp("models"))


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(folder, tmp_path / "model"))


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")


@pytest.mark.parametrize("rows", [1, 2, 9])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_packed_matrices_multiply_as_plain_ones(
    monkeypatch: pytest.MonkeyPatch, rows: int, dtype: torch.dtype, error: float
) -> None:
    """With nothing, a bias or a residual added, and for a transposed weight as a tied embedding's."""
    monkeypatch.setattr(cpu, "PACKED_SIZE", 1)
    generator = torch.Generator().manual_seed(rows)
    x, residual = torch.randn(rows, 96, generator=generator), torch.randn(rows, 80, generator=generator)
    bias, plain = torch.randn(80, generator=generator), torch.randn(80, 96, generator=generator)
    for weight in (plain.t(), plain.t().contiguous()):
        matrix = Matrix(weight.to(dtype))
        matrix.packed = cpu.pack(matrix.weight)
        assert matrix.packed is not None
        for add in (None, bias, residual):
            with torch.inference_mode():
                out = cpu.linear(x.to(dtype), matrix, None if add is None else add.to(dtype))
            assert out.dtype == dtype
            expected = x @ weight + (0 if add is None else add)
            torch.testing.assert_close(out.float(), expected, atol=error * 10, rtol=error)


def test_small_matrices_stay_plain() -> None:
    """In float32 only those are packed whose multiplication takes longer than the call; float16 never is."""
    assert cpu.pack(torch.zeros(256, 512)) is None
    assert cpu.pack(torch.zeros(1024, 1024)) is not None
    assert cpu.pack(torch.zeros(1024, 1024, dtype=torch.float16)) is None


@pytest.mark.parametrize("tie", [False, True])
def test_logits_with_packed_matrices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tie: bool) -> None:
    """They agree with the reference within 1e-4 too, and weights that change are packed anew."""
    monkeypatch.setattr(cpu, "PACKED_SIZE", 1)
    folder, tokens = make_checkpoint("packed", msgspec.structs.replace(TINY, tie=tie), tmp_path), make_prompt(3, 40)
    model = load_float32(folder)
    model.pack(load("cpu"))
    expected = Reference(folder).logits(tokens)
    torch.testing.assert_close(packed_logits(model, tokens, [30]), expected, atol=1e-4, rtol=0)
    with torch.no_grad():
        model.weights()["model.layers.0.mlp.down_proj.weight"].zero_()
    model.pack(load("cpu"))
    assert not torch.allclose(packed_logits(model, tokens, [30]), expected, atol=1e-2)


# -- the same numbers as transformers ------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 64, 100])
def test_logits_of_a_prompt(folder: Path, length: int) -> None:
    """Logits of every position agree within 1e-4, whether the prompt is one chunk, three, or token by token."""
    model, tokens = load_float32(folder), make_prompt(length, length)
    expected = Reference(folder).logits(tokens)
    for chunks in ([length], [length // 3, length // 3, length - 2 * (length // 3)], [length // 2], []):
        torch.testing.assert_close(packed_logits(model, tokens, [c for c in chunks if c]), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "shape",
    [
        {"tie": True},
        {"num_kv_heads": 4},
        {"num_kv_heads": 1},
        {"num_layers": 3, "hidden_size": 48, "num_heads": 2},
    ],
    ids=["tied embeddings", "as many KV heads as heads", "one KV head", "other sizes"],
)
def test_logits_of_other_shapes(tmp_path: Path, shape: dict[str, Any]) -> None:
    """Shapes of the family differ in numbers only."""
    folder = make_checkpoint("other", msgspec.structs.replace(TINY, **shape), tmp_path)
    tokens = make_prompt(0, 40)
    torch.testing.assert_close(
        packed_logits(load_float32(folder), tokens, [30]), Reference(folder).logits(tokens), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize(
    "change",
    [
        {"rope_theta": 500000.0},
        {"rope_scaling": LLAMA3},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.2, "beta_fast": 16}},
        {"rope_theta": None, "rope_parameters": LLAMA3 | {"rope_theta": 1000.0}},
    ],
    ids=["theta", "llama3", "linear", "yarn", "yarn with its options", "new style"],
)
def test_logits_with_other_rotary_embeddings(copy: Path, change: dict[str, Any]) -> None:
    """Rope parameters are understood as config.json of old and new releases writes them."""
    edit_config(copy, **change)
    tokens = make_prompt(1, 150)
    logits = packed_logits(load_float32(copy), tokens, [150])
    torch.testing.assert_close(logits, Reference(copy).logits(tokens), atol=1e-4, rtol=0)


def test_bfloat16_is_close(folder: Path) -> None:
    """In bfloat16 the logits are those of float32 up to its three digits."""
    model = load_model(folder, torch.bfloat16, CPU)
    model.set_positions(64)
    assert {tensor.dtype for tensor in model.weights().values()} == {torch.bfloat16}
    kv = torch.zeros((2, 2, 4, 16, 2, 16), dtype=torch.bfloat16)
    step = cpu_step(kv, count=40)
    tokens = make_prompt(3, 40)
    logits = model(torch.tensor(tokens), torch.from_numpy(step.positions), step)
    assert logits.dtype is torch.bfloat16
    assert (logits.float() - Reference(folder).logits(tokens)).abs().max() < 0.15


def cpu_step(kv: torch.Tensor, count: int) -> Any:
    from flowserve.ops.step import StepContext

    ops = load("cpu")
    zero, table = np.array([0]), np.array([[0, 1, 2, 3]], dtype=np.int32)
    return StepContext(ops, ops.layer_caches(kv), zero, np.array([count]), 1, table, 16, np.arange(count), CPU)


# -- operators -----------------------------------------------------------------------------------------------------


def test_the_cpu_file_offers_every_operator() -> None:
    """The module stands for the interface (for the type checker), and an unknown device is refused."""
    ops: Ops = cpu
    assert load("cpu") is ops
    with pytest.raises(ValueError, match=r"'tpu': there are cpu, cuda, npu"):
        load("tpu")


@given(st.lists(st.integers(1, 700), min_size=1, max_size=60), st.integers(1, 600))
def test_groups_of_decodes_cover_all_and_pad_little(widths: list[int], most_blocks: int) -> None:
    """Groups are consecutive, as wide as their longest, and within the limits on size and padding."""
    widths.sort()
    groups = cpu._groups(widths, most_blocks)
    assert [i for start, end, _ in groups for i in range(start, end)] == list(range(len(widths)))
    for start, end, width in groups:
        assert width == max(widths[start:end])
        assert end - start == 1 or (end - start) * width <= most_blocks
        assert sum(width - w for w in widths[start:end]) <= cpu.MAX_GROUP_PADDING


# -- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "'GPT2LMHeadModel' is not supported: LlamaForCausalLM, Qwen2"),
        ({"architectures": None}, "architecture None is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', supported is 'silu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        (
            {"rope_scaling": {"rope_type": "dynamic"}},
            "rope type 'dynamic' is not supported: default, linear, llama3, yarn",
        ),
        ({"vocab_size": None}, "missing required field `vocab_size`"),
    ],
)
def test_configurations_that_are_not_supported(copy: Path, change: dict[str, Any], message: str) -> None:
    """What this code does not compute is refused by name, with what it does."""
    edit_config(copy, **change)
    with pytest.raises(ValueError, match=message):
        load_float32(copy)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda w: w.pop("model.norm.weight"), "model.norm.weight is missing, it is in none of model.safetensors"),
        (lambda w: w.update(extra=torch.zeros(1)), r"model.safetensors: tensor extra is unexpected"),
        (
            lambda w: w.update({"lm_head.weight": torch.zeros(256, 32)}),
            r"model.safetensors: tensor lm_head.weight is F32 \[256, 32\], .* BF16 \[256, 64\]",
        ),
        (
            lambda w: w.update({"model.norm.weight": torch.zeros(64, dtype=torch.int8)}),
            r"tensor model.norm.weight is I8 \[64\]",
        ),
    ],
    ids=["missing", "unexpected", "wrong shape", "wrong dtype"],
)
def test_weights_that_do_not_fit(copy: Path, edit: Callable[[dict[str, torch.Tensor]], object], message: str) -> None:
    """Every tensor must be there, expected and of its shape; the error names tensor and file."""
    edit_weights(copy, edit)
    with pytest.raises(ValueError, match=message):
        load_float32(copy)


def test_old_checkpoints_with_inverse_frequencies_load(copy: Path) -> None:
    """The rotary buffer that old releases saved beside the weights is not an unexpected tensor."""
    edit_weights(copy, lambda w: w.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}))
    load_float32(copy)


def test_an_output_matrix_beside_tied_embeddings_must_be_equal(copy: Path) -> None:
    """Some checkpoints store the embedding twice though the configuration ties them; two different ones are refused."""
    edit_config(copy, tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"ties lm_head.weight to model.embed_tokens.weight, but they differ"):
        load_float32(copy)
    edit_weights(copy, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    tokens = make_prompt(4, 20)
    logits = packed_logits(load_float32(copy), tokens, [20])
    torch.testing.assert_close(logits, Reference(copy).logits(tokens), atol=1e-4, rtol=0)


def test_files_that_are_not_there_or_not_readable(copy: Path) -> None:
    """A folder without weights, with a shard missing, with a broken file or without config.json says which file."""
    weights = copy / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:1000])
    with pytest.raises(ValueError, match=r"model.safetensors is not a safetensors file"):
        load_float32(copy)
    weights.write_bytes(whole[:-1000])
    with pytest.raises(ValueError, match=r"model.safetensors is not a safetensors file"):
        load_float32(copy)
    weights.unlink()
    with pytest.raises(ValueError, match=r"has neither model.safetensors nor model.safetensors.index.json"):
        load_float32(copy)
    index = copy / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "shard-1.safetensors"}}))
    with pytest.raises(ValueError, match=r"shard-1.safetensors does not exist, though the index names it"):
        load_float32(copy)
    for broken in ("[]", "{", '{"weight_map": {"model.norm.weight": 3}}'):
        index.write_text(broken)
        with pytest.raises(ValueError, match="is no index"):
            load_float32(copy)
    (copy / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not JSON"):
        load_float32(copy)
    (copy / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config.json does not exist"):
        load_float32(copy)


def test_the_default_shape_is_the_measured_one() -> None:
    """Figures in the documentation are for this shape."""
    assert msgspec.structs.astuple(CheckpointShape())[:6] == (256, 4, 4, 2, 688, 2048)
