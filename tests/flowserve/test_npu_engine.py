"""The engine on the Ascend operators, under a torch_npu that asserts their contracts: same tokens as the reference."""

import inspect
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from flowserve import ops
from flowserve.core.tiers import TierConfig
from flowserve.ops import Ops
from flowserve.runtime.checkpoint import CheckpointShape, make_checkpoint
from flowserve.runtime.sampling import Sampling
from tests.flowserve.driver import GREEDY, TINY, Engine, Reference, make_prompt
from tests.flowserve.npu import plugged, recorded

PROMPTS = [make_prompt(length, length) for length in (1, 5, 100, 128, 129, 300)]
LIMIT = 10
HALF = 0.02
"""What float16 may take from a logit, of a spread of 1: two tokens as close as that may change places, and on which
processors they do depends on the order in which it adds.
"""
COMMON = {"npu_rms_norm", "npu_rotary_mul", "npu_swiglu"}
FUSED = {*COMMON, "npu_fused_infer_attention_score", "npu_scatter_pa_kv_cache"}
ATB = {*COMMON, "_npu_reshape_and_cache", "_npu_paged_attention", "_npu_paged_attention_splitfuse", "npu_format_cast"}
EXPERTS = {"npu_moe_init_routing_v2", "npu_grouped_matmul", "npu_moe_finalize_routing"}


def shape_of(head_dim: int, **more: Any) -> CheckpointShape:
    return msgspec.structs.replace(TINY, num_heads=4, num_kv_heads=2, head_dim=head_dim, **more)


MODELS = {
    "llama 16": shape_of(16),
    "llama 64": shape_of(64),
    "llama 128": shape_of(128),
    "llama 192": shape_of(192),
    "llama 256": shape_of(256),
    "qwen2 128": shape_of(128, family="qwen2"),
    "qwen3 128": shape_of(128, family="qwen3"),
    "qwen3_moe 128": shape_of(128, family="qwen3_moe", num_experts=8, experts_per_token=2, expert_size=48),
}


class Models:
    """Folders of the models, and what each says on the CPU in float32 to every prompt alone."""

    def __init__(self, root: Path) -> None:
        self.folders = {name: make_checkpoint("tiny", shape, root) for name, shape in MODELS.items()}
        self._expected: dict[str, list[list[int]]] = {}

    def expected(self, name: str) -> list[list[int]]:
        if name not in self._expected:
            self._expected[name] = [self.serve(name, [prompt], "cpu", "float32")[0] for prompt in PROMPTS]
        return self._expected[name]

    def engine(self, name: str, device: str = "npu", dtype: str = "float16", **limits: Any) -> Engine:
        return Engine(self.folders[name], dtype, device, **{"block_tokens": 128, "kv_blocks": 32, **limits})

    def serve(
        self,
        name: str,
        prompts: Sequence[list[int]] = PROMPTS,
        device: str = "npu",
        dtype: str = "float16",
        **limits: Any,
    ) -> list[list[int]]:
        engine = self.engine(name, device, dtype, **limits)
        tasks = [engine.add(prompt, LIMIT) for prompt in prompts]
        engine.run()
        engine.close()
        return [engine.output[task] for task in tasks]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


# -- the same tokens -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "name"),
    [
        *[("A2", name) for name in MODELS],
        *[("A3", name) for name in ("llama 64", "qwen3_moe 128")],
        *[("310P", name) for name in ("llama 16", "llama 128", "llama 192", "qwen3_moe 128")],
    ],
)
def test_tokens_are_those_of_the_reference(models: Models, family: str, name: str) -> None:
    """Whatever the chip and the head size, mixed steps give the tokens of the float32 reference, by these operators."""
    with plugged(family), recorded() as calls:
        served = models.serve(name)
    reference = Reference(models.folders[name])
    for prompt, tokens in zip(PROMPTS, served, strict=True):
        reference.check_greedy(prompt, tokens, HALF)
    operators = ATB if family == "310P" else FUSED | (EXPERTS if "moe" in name else set())
    if "moe" in name:  # experts of 48 are too narrow for it on every chip, and these models have no other MLP
        operators = operators - {"npu_swiglu"} if family == "310P" else operators
    assert {call.name for call in calls} == operators


@pytest.mark.parametrize("family", ["A2", "310P"])
@pytest.mark.parametrize("name", ["llama 64", "llama 128"])
@pytest.mark.parametrize(
    "limits",
    [
        {"token_budget": 48, "max_sequences": 16},
        {"token_budget": 150, "max_sequences": 3},
        {"block_tokens": 256},
        {"kv_blocks": 8},
    ],
    ids=["small chunks", "few at a time", "blocks of 256", "few blocks"],
)
def test_any_schedule_gives_these_tokens(models: Models, name: str, family: str, limits: dict[str, int]) -> None:
    """Chunked prefill beside decodes, and batches of any size, change no token."""
    with plugged(family):
        assert models.serve(name, **limits) == models.expected(name)


@pytest.mark.parametrize(("family", "name"), [("A2", "llama 64"), ("A2", "llama 128"), ("310P", "llama 128")])
def test_a_cached_prefix_changes_nothing(models: Models, family: str, name: str) -> None:
    """A chunk that starts in the middle of a sequence attends to the cached blocks before it."""
    with plugged(family):
        engine = models.engine(name)
        first = engine.add(PROMPTS[-1], LIMIT)
        engine.run()
        again = engine.add(PROMPTS[-1], LIMIT)
        plan = engine.step()
        assert plan is not None
        assert [chunk.start for chunk in plan.chunks] == [256]
        engine.run()
        engine.close()
    assert engine.output[first] == engine.output[again] == models.expected(name)[-1]


def test_bfloat16(models: Models) -> None:
    """The dtype of most models: here, too, rounding changes none of these tokens."""
    with plugged():
        assert models.serve("llama 128", dtype="bfloat16") == models.expected("llama 128")


def test_draws_are_those_of_the_cpu(models: Models) -> None:
    """Sampling takes the request's own noise on every device."""
    outputs = []
    with plugged():
        for device, dtype in (("cpu", "float32"), ("npu", "float16")):
            engine = models.engine("llama 128", device, dtype)
            settings = [Sampling(temperature=0.7, seed=seed) for seed in range(len(PROMPTS))]
            tasks = [engine.add(prompt, LIMIT, each) for prompt, each in zip(PROMPTS, settings, strict=True)]
            engine.add(PROMPTS[2], LIMIT, GREEDY)
            engine.run()
            engine.close()
            outputs.append([engine.output[task] for task in tasks])
    assert outputs[0] == outputs[1]
    assert outputs[0] != models.expected("llama 128")


# -- which operators ------------------------------------------------------------------------------------------------


def layouts(calls: Sequence[Any]) -> list[str]:
    fused = [call.arguments for call in calls if call.name == "npu_fused_infer_attention_score"]
    return [arguments["input_layout"] for arguments in fused]


def test_every_operator_is_there_with_the_parameters_of_the_cpus() -> None:
    """What the seam names, the NPU's file has, called in the same way."""
    with plugged():
        npu, cpu = ops.load("npu"), ops.load("cpu")
        for name in [name for name in dir(Ops) if not name.startswith("_")]:
            theirs, ours = getattr(cpu, name), getattr(npu, name)
            if callable(theirs):
                assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs).parameters), name
        assert (npu.KV_BLOCK_TOKENS, npu.KV_ALIGNMENT_BYTES) == (128, 2 << 20)


def test_one_call_a_layer_where_the_head_size_allows_it(models: Models) -> None:
    """TND takes a whole step of chunks and decodes, BSND a chunk at a time, BSH a step of decodes."""
    for name, mixed in (("llama 128", ["TND"]), ("llama 64", ["BSND", "BSND", "BSH"])):
        with plugged():
            engine = models.engine(name)
            engine.add(PROMPTS[1], LIMIT)
            engine.step()
            engine.add(PROMPTS[2], LIMIT)
            engine.add(PROMPTS[3], LIMIT)
            with recorded() as calls:
                engine.step()
            assert layouts(calls) == mixed * MODELS[name].num_layers
            with recorded() as calls:
                engine.step()
            assert layouts(calls) == ["BSH"] * MODELS[name].num_layers
            engine.close()


@pytest.mark.parametrize(
    ("family", "name", "said"),
    [
        ("A2", "llama 128", "attention on A2, head size 128: npu_fused_infer_attention_score, TND"),
        ("A3", "llama 64", "attention on A3, head size 64: npu_fused_infer_attention_score, BSND chunk by chunk (TND"),
        ("310P", "llama 64", "attention on 310P: _npu_paged_attention_splitfuse"),
    ],
)
def test_the_runner_says_which(models: Models, family: str, name: str, said: str) -> None:
    """The choice is in the line that the engine logs."""
    with plugged(family):
        engine = models.engine(name)
        assert engine.runner.about.startswith(said)
        engine.close()


def test_the_cache_is_aligned_and_offered(models: Models) -> None:
    """Each layer's keys and values start at a multiple of 2 MB on the device; peers may read what is staged."""
    with plugged():
        engine = models.engine("llama 128")
        cache = engine.runner.pool.tensor
        assert cache.device.type == "npu"
        assert {part.data_ptr() % (2 << 20) for layer in cache.unbind(0) for part in layer.unbind(0)} == {0}
        assert engine.runner.kv_handle is not None
        engine.close()


def test_a_cache_in_a_format_of_its_own_is_not_offered(models: Models) -> None:
    """On 310P the operators' caches are copies in NZ format: peers are told that there is nothing to read."""
    with plugged("310P"):
        engine = models.engine("llama 128")
        assert engine.runner.kv_handle is None
        with pytest.raises(FileNotFoundError, match="a format of its own"):
            engine.runner.fetch(engine.runner.pool.handle, [0], [1])
        engine.close()


# -- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("A2", {"dtype": "float32"}, "on an Ascend A2 takes float16 or bfloat16, not torch.float32"),
        ("310P", {"dtype": "bfloat16"}, "on an Ascend 310P takes float16, not torch.bfloat16"),
        ("A2", {"block_tokens": 16}, "block_tokens is 16: attention on an NPU takes multiples of 128 up to 512"),
        ("A2", {"block_tokens": 640}, "block_tokens is 640"),
        ("A2", {"kv_layout": "block_major"}, "kv_layout is block_major: attention on an NPU takes each layer's keys"),
        ("310P", {"tiers": TierConfig(8, fetch="always")}, "engine.tiers has 8 blocks, but the KV cache on npu"),
        ("A5", {}, "the NPU Ascend950PR (SoC version 260) is not supported"),
    ],
)
def test_what_no_operator_takes_is_refused(models: Models, family: str, options: dict[str, Any], message: str) -> None:
    """Before the first request, with what is allowed."""
    with plugged(family), pytest.raises(ValueError, match=re.escape(message)):
        models.engine("llama 128", **options)


def test_head_sizes_that_no_operator_takes(tmp_path: Path) -> None:
    """Multiples of 16 are what the hardware reads."""
    folder = make_checkpoint("odd", shape_of(24), tmp_path)
    with plugged(), pytest.raises(ValueError, match="2 KV heads of size 24: attention on an NPU takes sizes that are"):
        Engine(folder, "float16", "npu", block_tokens=128)
