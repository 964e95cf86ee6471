"""Every model family against transformers, on the same seeded random weights."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import transformers

from flowserve.models import ARCHITECTURES, Model, load_model
from flowserve.ops import cpu
from flowserve.runtime.checkpoint import FAMILIES, make_checkpoint
from tests.flowserve.driver import TINY, Engine, Reference, make_prompt, packed_logits, serve

SHAPES = {
    "llama": TINY,
    "qwen2": msgspec.structs.replace(TINY, family="qwen2"),
    "qwen3": msgspec.structs.replace(TINY, family="qwen3", head_dim=24, tie=True),
    "qwen3_moe": msgspec.structs.replace(
        TINY,
        family="qwen3_moe",
        head_dim=24,
        num_experts=6,
        experts_per_token=2,
        expert_size=40,
        num_layers=3,
        dense_layers=1,
    ),
}
LENGTHS = [1, 16, 17, 40, 90]
PROMPTS = [make_prompt(length, length) for length in LENGTHS]
LIMIT = 12
SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 256,
    "max_position_embeddings": 128,
}
MOE: dict[str, Any] = {"head_dim": 32, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
WRITTEN: dict[str, Any] = {
    "llama": transformers.LlamaConfig(**SMALL, head_dim=32, eos_token_id=[3, 4], bos_token_id=0),
    "llama, tied": transformers.LlamaConfig(**SMALL, tie_word_embeddings=True),
    "qwen2, tied": transformers.Qwen2Config(**SMALL, tie_word_embeddings=True),
    "qwen3": transformers.Qwen3Config(**SMALL, head_dim=32),
    "qwen3_moe, every other layer dense": transformers.Qwen3MoeConfig(**SMALL, **MOE, decoder_sparse_step=2),
    "qwen3_moe, layer 1 dense": transformers.Qwen3MoeConfig(**SMALL, **MOE, mlp_only_layers=[1], norm_topk_prob=True),
}
"""Configurations for transformers itself to write: sharded, with what its releases call things now."""

torch.set_num_threads(1)


def load_float32(folder: Path) -> Model:
    model = load_model(folder, torch.float32, torch.device("cpu"))
    model.set_positions(model.max_position)
    return model


@pytest.fixture(scope="module", params=SHAPES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(request.param, SHAPES[request.param], tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def reference(folder: Path) -> Reference:
    return Reference(folder)


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[list[int]]:
    """Each prompt's greedy output, served alone and in one chunk."""
    return [serve(folder, [prompt], LIMIT)[0] for prompt in PROMPTS]


def test_all_families_are_here() -> None:
    """Every architecture has a family of random checkpoints, and each of them is compared below."""
    assert set(FAMILIES.values()) == set(ARCHITECTURES)
    assert set(SHAPES) == set(FAMILIES)


def test_logits_are_those_of_transformers(folder: Path, reference: Reference) -> None:
    """Teacher-forced logits agree within 1e-4, whether the prompt is one chunk, several, or token by token."""
    model, tokens = load_float32(folder), make_prompt(1, 100)
    expected = reference.logits(tokens)
    for chunks in ([100], [33, 33, 34], [50], []):
        torch.testing.assert_close(packed_logits(model, tokens, chunks), expected, atol=1e-4, rtol=0)


def test_greedy_tokens_are_those_of_transformers(reference: Reference, alone: list[list[int]]) -> None:
    """Greedy decoding follows the reference implementation, but where two logits are within 1e-4."""
    for prompt, output in zip(PROMPTS, alone, strict=True):
        assert len(output) == LIMIT
        reference.check_greedy(prompt, output)


@pytest.mark.parametrize("limits", [{}, {"token_budget": 23, "max_sequences": 3}], ids=["together", "in chunks"])
def test_batched_and_chunked_is_as_alone(folder: Path, alone: list[list[int]], limits: dict[str, int]) -> None:
    """Mixed steps of chunks and decodes change no token."""
    assert serve(folder, PROMPTS, LIMIT, **limits) == alone


def test_a_cached_prefix_changes_nothing(folder: Path, alone: list[list[int]]) -> None:
    """A prompt whose first blocks are found in the cache gives the tokens that it gives without."""
    engine = Engine(folder)
    outputs = []
    for _ in range(2):
        task = engine.add(PROMPTS[-1], LIMIT)
        plan = engine.step()
        assert plan is not None
        computed = plan.chunks[0].tokens
        engine.run()
        outputs.append(engine.output[task])
    assert computed == LENGTHS[-1] - 80, "80 tokens, five blocks, were in the cache"
    assert outputs == [alone[-1], alone[-1]]
    engine.close()


def test_bfloat16_is_close(folder: Path, reference: Reference) -> None:
    """In bfloat16 the engine runs, all parameters are of that type, and the logits are near those of float32."""
    engine = Engine(folder, "bfloat16")
    task = engine.add(PROMPTS[-1], LIMIT)
    engine.run()
    assert {tensor.dtype for tensor in engine.runner.model.weights().values()} == {torch.bfloat16}
    logits = reference.logits([*PROMPTS[-1], *engine.output[task]])[LENGTHS[-1] - 1 : -1]
    short = logits.amax(-1) - logits.gather(1, torch.tensor(engine.output[task])[:, None])[:, 0]
    assert short.max() < 0.15
    engine.close()


@pytest.mark.parametrize("name", WRITTEN)
def test_a_folder_that_transformers_wrote(tmp_path: Path, name: str) -> None:
    """Sharded weights behind an index load, tied embeddings or not, sparse layers and dense ones, every tensor used."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(WRITTEN[name])
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.1)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    tokens = make_prompt(2, 50)
    logits = packed_logits(load_float32(tmp_path), tokens, [50])
    torch.testing.assert_close(logits, Reference(tmp_path).logits(tokens), atol=1e-4, rtol=0)


# -- ends of text --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({"eos_token_id": 7, "bos_token_id": 5}, None, ((7,), 5)),
        ({"eos_token_id": [7, 8]}, {"max_length": 20}, ((7, 8), None)),
        ({"eos_token_id": 7, "bos_token_id": 5}, {"eos_token_id": [7, 8, 9], "bos_token_id": 6}, ((7, 8, 9), 6)),
        ({"eos_token_id": None}, {"eos_token_id": 4}, ((4,), None)),
        ({}, None, ((), None)),
    ],
    ids=["config.json", "a list", "generation_config.json first", "only there", "none"],
)
def test_tokens_that_end_and_begin_a_text(
    tmp_path: Path, config: dict[str, Any], generation: dict[str, Any] | None, expected: tuple[Any, Any]
) -> None:
    """Ends and beginnings of text come from generation_config.json, else from config.json, else there are none."""
    folder = make_checkpoint("small", msgspec.structs.replace(TINY, num_layers=1), tmp_path)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    model = load_float32(folder)
    assert (model.eos_token_ids, model.bos_token_id) == expected


# -- experts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "chosen"), [(1, 1), (1, 3), (7, 2), (40, 8)])
def test_experts_are_the_sum_over_the_chosen(tokens: int, chosen: int) -> None:
    """The operator gives what its definition says, token by token, also where experts are left out."""
    generator = torch.Generator().manual_seed(tokens)
    x, gate_up, down = (torch.randn(shape, generator=generator) for shape in ((tokens, 16), (8, 16, 20), (8, 10, 16)))
    weights = torch.rand((tokens, chosen), generator=generator)
    experts = torch.rand((tokens, 8), generator=generator).argsort(-1)[:, :chosen]
    expected = torch.zeros_like(x)
    for token in range(tokens):
        for weight, expert in zip(weights[token], experts[token], strict=True):
            gate, up = (x[token] @ gate_up[expert]).chunk(2)
            expected[token] += weight * ((torch.nn.functional.silu(gate) * up) @ down[expert])
    torch.testing.assert_close(cpu.experts(x, weights, experts, gate_up, down), expected, atol=1e-4, rtol=1e-5)


def test_heads_are_normalised_in_place() -> None:
    """Each head by its own mean square; the rest of the wider tensor stays."""
    wide = torch.randn((3, 5, 8), generator=torch.Generator().manual_seed(0))
    before, weight = wide.clone(), torch.linspace(0.5, 2, 8)
    cpu.norm_heads(wide.narrow(1, 1, 3), weight, 1e-6)
    torch.testing.assert_close(wide[:, 1:4], torch.nn.functional.rms_norm(before[:, 1:4], (8,), weight, 1e-6))
    assert torch.equal(wide[:, [0, 4]], before[:, [0, 4]])


# -- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("qwen2", {"use_sliding_window": True}, r"config.json: use_sliding_window is True, supported is False"),
        ("qwen2", {"layer_types": ["sliding_attention"]}, "layer_types has 'sliding_attention'"),
        ("qwen2", {"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}, supported is None"),
        ("qwen3", {"attention_bias": True}, "attention_bias is True, supported is False"),
        ("qwen3", {"head_dim": None}, "head_dim is missing"),
        ("qwen3", {"head_dim": 7}, "head_dim is 7: rotary embedding takes an even one"),
        ("qwen3", {"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ("qwen3", {"num_hidden_layers": "four"}, r"Expected `int`, got `str` - at `\$.num_hidden_layers`"),
        ("qwen3", {"rope_scaling": {"rope_type": "llama3", "factor": 2}}, "llama3 needs low_freq_factor, which is mis"),
        ("qwen3", {"rope_scaling": {"rope_type": "yarn", "factor": 2, "mscale": 1}}, r"parameter mscale \(1\) is not"),
        ("qwen3", {"rope_scaling": {"rope_type": "linear", "factor": "two"}}, "rope parameters: Expected `float`"),
        ("qwen3_moe", {"num_experts": None}, "missing required field `num_experts`"),
        ("qwen3_moe", {"num_experts_per_tok": 7}, "num_experts_per_tok is 7, of num_experts 6"),
        ("qwen3_moe", {"num_experts": 7}, "tensor model.layers.1.mlp.experts.6.gate_proj.weight is missing"),
        ("qwen3_moe", {"num_experts": 5}, "tensor model.layers.1.mlp.experts.5.down_proj.weight is unexpected"),
        ("qwen3_moe", {"moe_intermediate_size": 41}, r"down_proj.weight is F32 \[64, 40\], .* \[64, 41\]"),
    ],
)
def test_configurations_that_are_not_supported(
    tmp_path: Path, family: str, change: dict[str, Any], message: str
) -> None:
    """What this code does not compute, or what does not fit the weights, is refused by name."""
    folder = make_checkpoint(family, SHAPES[family], tmp_path)
    path = folder / "config.json"
    config = json.loads(path.read_text()) | change
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    with pytest.raises(ValueError, match=message):
        load_float32(folder)
