"""Shapes of published models: parameters, KV cache and FLOPs that follow from their config.json are those published."""

import math

import msgspec
import pytest

from cluster.latency import StepShape
from cluster.vocabulary import ExecutorSpec, Role
from experiments import build, compose
from sim.hardware import Hardware, activation_bytes, kv_blocks
from sim.model_shape import ModelShape
from sim.roofline import Roofline

PUBLISHED = {
    "llama3_8b": (8.03, 8.03, 131_072),
    "llama3_70b": (70.6, 70.6, 327_680),
    "codellama_34b": (33.7, 33.7, 196_608),
    "qwen2_72b": (72.7, 72.7, 327_680),
    "qwen2_5_0_5b": (0.494, 0.494, 12_288),
    "qwen2_5_1_5b": (1.54, 1.54, 28_672),
    "qwen2_5_3b": (3.09, 3.09, 36_864),
    "qwen2_5_7b": (7.61, 7.61, 57_344),
    "qwen2_5_14b": (14.7, 14.7, 196_608),
    "qwen2_5_32b": (32.8, 32.8, 262_144),
    "qwen2_5_72b": (72.7, 72.7, 327_680),
    "qwen3_0_6b": (0.596, 0.596, 114_688),
    "qwen3_1_7b": (1.72, 1.72, 114_688),
    "qwen3_4b": (4.02, 4.02, 147_456),
    "qwen3_8b": (8.2, 8.2, 147_456),
    "qwen3_14b": (14.8, 14.8, 163_840),
    "qwen3_32b": (32.8, 32.8, 262_144),
    "qwen3_30b_a3b": (30.5, 3.3, 98_304),
    "qwen3_235b_a22b": (235, 22, 192_512),
    "deepseek_v3": (671, 37, 70_272),
}
"""Published: billions of parameters in all, active ones; bytes of KV cache per token in 16 bit."""


def shape_of(option: str) -> ModelShape:
    return build.model_shape(compose([f"model={option}"]))


@pytest.mark.parametrize("option", PUBLISHED)
def test_published_sizes(option: str) -> None:
    """Parameters within the precision of the published figures (active ones: embeddings are counted or not)."""
    shape, (total, active, kv_bytes) = shape_of(option), PUBLISHED[option]
    assert shape.parameters / 1e9 == pytest.approx(total, rel=0.005)
    assert shape.active_parameters / 1e9 == pytest.approx(active, rel=0.03)
    assert shape.kv_bytes_per_token == kv_bytes


def test_a_latent_is_cached_instead_of_heads() -> None:
    """DeepSeek-V3 caches 576 values per token and layer where full heads would take 57 times as much."""
    shape = shape_of("deepseek_v3")
    assert shape.kv_bytes_per_token == 61 * (512 + 64) * 2
    full = msgspec.structs.replace(shape, kv_rank=0)
    assert full.kv_bytes_per_token / shape.kv_bytes_per_token == pytest.approx(2 * 128 * 128 / 576)
    assert shape.attention_parameters == pytest.approx(187.1e6, rel=1e-3)


def test_latent_decodes_are_bound_by_compute_sooner() -> None:
    """A key in latent attention is worked on by all heads: 242 FLOPs per byte, where eight shared heads have 8."""
    latent, grouped = shape_of("deepseek_v3"), shape_of("llama3_70b")
    assert latent.flops_per_key / latent.kv_bytes_per_token == pytest.approx(241.8, rel=1e-3)
    assert grouped.flops_per_key / grouped.kv_bytes_per_token == 8
    assert latent.flops_per_pair == 61 * 128 * 2 * (192 + 128)


def test_guesses_cost_what_latent_attention_computes(npu: Hardware) -> None:
    """A verified guess doubles the work on a latent, which compute bounds; eight shared heads read once for both."""
    for option, share in (("deepseek_v3", 2.0), ("llama3_70b", 1.0)):
        model, context = Roofline(npu, shape_of(option), 64), 64 * 10_000
        more = [
            model.step_ns(StepShape(0, 0, 0, 64, context, drafts)) - model.step_ns(StepShape(0, 0, 0, 64, 0, drafts))
            for drafts in (0, 64)
        ]
        assert more[1] / more[0] == pytest.approx(share, rel=0.01)


@pytest.fixture
def npu() -> Hardware:
    return build.hardware_of(compose(), ExecutorSpec("m", Role.COLOCATED, hardware="cloudmatrix384"))


def test_split_matrices_copy_what_cannot_be_split(npu: Hardware) -> None:
    """Four KV heads on eight NPUs are kept twice, a latent by each NPU; spread sequences are kept once, weights not."""
    few_heads, latent = shape_of("qwen3_30b_a3b"), shape_of("deepseek_v3")
    assert [few_heads.kv_copies(npus) for npus in (1, 4, 8)] == [1, 1, 2]
    together = msgspec.structs.replace(latent, expert_parallel=False)
    assert (latent.kv_copies(16), together.kv_copies(16)) == (1, 16)
    assert together.weight_bytes_on(16) == latent.weight_bytes
    copied = (latent.dense_parameters + latent.embeddings) * 15
    assert latent.weight_bytes_on(16) == latent.weight_bytes + copied
    left = 32 * npu.hbm_bytes * npu.usable_hbm - latent.weight_bytes_on(32)
    left -= 32 * activation_bytes(latent, 32, 8192, 96)
    assert kv_blocks(npu, latent, 32, 128, 8192, 96) == int(left // (128 * latent.kv_bytes_per_token))


def test_spread_experts_pay_for_sending(npu: Hardware) -> None:
    """Dispatch in 8 bit and combine in 16 at the measured rates of the degree, once per sparse layer, as the NPU does
    whose experts are chosen most: of 8,000 choices each on average, 1 + sqrt(2 ln 32 / 8,000) as many.
    """
    shape = shape_of("deepseek_v3")
    free = msgspec.structs.replace(npu, peer_latency_s=0.0, all_to_all=())
    endless = msgspec.structs.replace(free, peer_bytes_per_s=1e30, efficiency_link=1.0)
    step = StepShape(32 * 1000, 0, 1, 0, 0)
    measured = msgspec.structs.replace(free, all_to_all=npu.all_to_all)
    sent = Roofline(measured, shape, 32).step_ns(step) - Roofline(endless, shape, 32).step_ns(step)
    even = 58 * 1000 * 8 * 7168 * (1 / 102e9 + 2 / 95e9) * 1e9
    assert sent == pytest.approx(even * (1 + math.sqrt(2 * math.log(32) / 8000)), rel=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q_rank": 0}, "latent attention needs q_rank"),
        ({"sparse_layers": 0}, "no experts to spread"),
    ],
)
def test_impossible_shapes_are_refused(change: dict[str, int], message: str) -> None:
    """A latent without its parts, experts to spread where there are none."""
    with pytest.raises(ValueError, match=message):
        msgspec.structs.replace(shape_of("deepseek_v3"), **change)
