"""Latency models and hardware: by hand where that is possible, and refused where they make no sense."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.latency import LatencyModel, StepShape
from sim.hardware import Hardware, activation_bytes, kv_blocks
from sim.latency import Constant, Fitted
from sim.model_shape import ModelShape
from sim.roofline import Roofline

NPU = Hardware(
    name="npu",
    flops=1e14,
    hbm_bytes=64e9,
    hbm_bytes_per_s=1e12,
    efficiency_gemm=0.5,
    efficiency_attention=0.25,
    efficiency_bandwidth=0.8,
    step_overhead_s=0.001,
    kv_link_bytes_per_s=1e10,
    kv_link_latency_s=1e-5,
    kv_call_overhead_s=1e-5,
    pcie_bytes_per_s=2e10,
    pcie_latency_s=1e-5,
    ssd_bytes_per_s=5e9,
    ssd_latency_s=1e-4,
)
MODEL = ModelShape("toy", layers=2, hidden=64, heads=4, kv_heads=2, head_dim=16, intermediate=128, vocab=1000)
SPARSE = ModelShape(
    "qwen3-30b-a3b", 48, 2048, 32, 4, 128, 6144, 151936, 2, False, "qwen3_moe", 48, 128, 8, expert_intermediate=768
)

shapes = st.builds(
    StepShape,
    st.integers(0, 5000),
    st.integers(0, 10**7),
    st.integers(0, 20),
    st.integers(0, 300),
    st.integers(0, 10**6),
    st.integers(0, 300),
)


MODELS = (
    Roofline(NPU, MODEL, 1),
    Roofline(NPU, SPARSE, 1, graph=False),
    Constant(0.01),
    Constant(1e-10, 0.002),
    Fitted([1e6, 3e5, 777, 3.3, 1e4, 9e4, 1111.1, 5.7]),
    Fitted([0, 0, 0, 0, 0, 0, 0.3, 1e-4]),
    Fitted([1e6, 3e5, 777, 3.3, 1e4, 9e4, 1111.1, 5.7, 99.9, 1.3], [8, 100]),
)


@given(model=st.sampled_from(MODELS), sequences=st.integers(1, 300), context=st.integers(1, 10**6))
def test_consecutive_decode_steps_take_as_long_as_each_alone(model: LatencyModel, sequences: int, context: int) -> None:
    """`decode_ns` is a faster way to ask, not another answer."""
    steps = model.decode_ns(sequences, context, 70)
    assert steps == [model.step_ns(StepShape(0, 0, 0, sequences, context + sequences * k)) for k in range(70)]


def test_model_sizes() -> None:
    """Parameters of a Llama layer: q, k, v, o, and three matrices of the feed-forward part; embeddings beside them."""
    attention = 64 * 16 * (4 + 2 + 2 + 4)
    assert MODEL.dense_parameters == 2 * (attention + 3 * 64 * 128)
    assert MODEL.parameters == MODEL.dense_parameters + 2 * 1000 * 64
    assert MODEL.weight_bytes == 2 * MODEL.parameters
    assert MODEL.kv_bytes_per_token == 2 * 2 * 2 * 16 * 2


def test_a_known_model_has_its_known_size() -> None:
    """Llama 3.1 8B has 8.03 billion parameters and 128 KiB of KV cache per token."""
    llama = ModelShape("llama", 32, 4096, 32, 8, 128, 14336, 128256)
    assert llama.parameters == pytest.approx(8.03e9, rel=1e-3)
    assert llama.kv_bytes_per_token == 128 * 1024


def test_a_known_mixture_of_experts_has_its_known_sizes() -> None:
    """Qwen3-30B-A3B has 30.5 billion parameters in all, 29.9 without embeddings, and 3.3 billion active ones."""
    assert SPARSE.parameters == pytest.approx(30.5e9, rel=2e-3)
    embeddings = 2 * SPARSE.vocab * SPARSE.hidden
    assert SPARSE.parameters - embeddings == pytest.approx(29.9e9, rel=2e-3)
    assert SPARSE.dense_parameters + 8 * SPARSE.expert_parameters + embeddings == pytest.approx(3.3e9, rel=2e-2)


def test_a_decode_reads_the_experts_that_its_tokens_chose() -> None:
    """One token reads its eight experts of each layer, many tokens all of them; each computes with its eight."""
    head, rate = SPARSE.vocab * SPARSE.hidden, 1e12 * 0.8
    for tokens, experts in ((1, 8), (2, 128 * (1 - (15 / 16) ** 2)), (60, 128 * (1 - (15 / 16) ** 60))):
        moved = 2 * (SPARSE.dense_parameters + experts * SPARSE.expert_parameters + head)
        moved += tokens * sum(SPARSE.activation_bytes_per_token)
        found = Roofline(NPU, SPARSE, 1).step_ns(StepShape(0, 0, 0, tokens, 0))
        assert found == pytest.approx((0.001 + moved / rate) * 1e9, rel=1e-6)
    active = SPARSE.dense_parameters + 8 * SPARSE.expert_parameters
    found = Roofline(NPU, SPARSE, 1).step_ns(StepShape(100_000, 0, 0, 0, 0))
    moved = 2 * head + 100_000 * sum(SPARSE.activation_bytes_per_token)
    assert found == pytest.approx((0.001 + 2 * 100_000 * active / (1e14 * 0.5) + moved / rate) * 1e9, rel=1e-6)


def test_small_kernels_move_activations() -> None:
    """Per token and layer 8 hidden by the norms, 2 x (heads + KV heads) x 16 by rope, 4 x KV heads x 16 by the cache,
    3 x 128 by the activation, in 16 bit; each of the five kernels has a fixed part, in graphs too.
    """
    per_token = 2 * 2 * (8 * 64 + 2 * (4 + 2) * 16 + 2 * (2 * 2 * 16) + 3 * 128)
    assert sum(MODEL.activation_bytes_per_token) == per_token
    slow = msgspec.structs.replace(NPU, kernel_fixed_s=1e-5)
    step = StepShape(0, 0, 0, 7, 100)
    more = Roofline(slow, MODEL, 1).step_ns(step) - Roofline(NPU, MODEL, 1).step_ns(step)
    assert more == pytest.approx(2 * 5 * 10_000, abs=1)


def test_decodes_are_padded_to_the_graphs_that_were_captured() -> None:
    """Five sequences take the time of eight; nine, beyond the largest graph, are launched kernel by kernel."""
    launched = msgspec.structs.replace(NPU, kernel_launch_s=1e-4)
    captured = Roofline(launched, MODEL, 1, graph_sizes=[4, 8])
    any_size = Roofline(launched, MODEL, 1)
    assert [captured.decode_ns(n, 0, 1) for n in (3, 5, 8)] == [any_size.decode_ns(n, 0, 1) for n in (4, 8, 8)]
    assert captured.decode_ns(9, 0, 1) == [round((0.001 + 2 * 10 * 1e-4) * 1e9)]
    with pytest.raises(ValueError, match=r"latency.graph_sizes are \[0\]: allowed are numbers of sequences from 1"):
        Roofline(NPU, MODEL, 1, graph_sizes=[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experts_per_token": 129}, "experts_per_token is 129: allowed are 1 to 128"),
        ({"sparse_layers": 49}, "sparse_layers is 49, of 48 layers"),
    ],
)
def test_impossible_mixtures_are_refused(change: dict[str, int], message: str) -> None:
    """Experts that are not there, in layers that are not there."""
    with pytest.raises(ValueError, match=message):
        msgspec.structs.replace(SPARSE, **change)


def test_kv_blocks_fill_what_the_weights_leave() -> None:
    """Usable HBM minus weights and activations over bytes per block; what does not fit is refused with its size."""
    left = 64e9 * 0.9 * 2 - MODEL.weight_bytes - 2 * activation_bytes(MODEL, 2, 512, 64)
    assert kv_blocks(NPU, MODEL, 2, 16, 512, 64) == int(left // (16 * MODEL.kv_bytes_per_token))
    huge = ModelShape("huge", 80, 8192, 64, 8, 128, 28672, 128256)
    with pytest.raises(
        ValueError, match=r"model huge does not fit 2 x npu: its weights take 141\.\d GB and the act.* of 115\.2 GB"
    ):
        kv_blocks(NPU, huge, 2, 16, 512, 64)


def test_a_small_decode_reads_all_weights() -> None:
    """Few tokens are bound by memory: weights without the input embedding once, and the KV cache of every context."""
    weights = 2 * (MODEL.dense_parameters + 1000 * 64)
    moved = weights + sum(MODEL.activation_bytes_per_token) + 500 * MODEL.kv_bytes_per_token
    expected = 0.001 + moved / (1e12 * 0.8)
    assert Roofline(NPU, MODEL, 1).step_ns(StepShape(0, 0, 0, 1, 500)) == pytest.approx(expected * 1e9, abs=1)


def test_a_large_prefill_is_bound_by_compute() -> None:
    """Many tokens cost 2 FLOPs per layer parameter each, attention 4 per pair and channel; the head is read for one."""
    tokens, pairs = 100_000, 100_000 * 100_001 // 2
    linear = tokens * 2 * MODEL.dense_parameters / (1e14 * 0.5)
    attention = pairs * 4 * 2 * 4 * 16 / (1e14 * 0.25)
    moved = 2 * 1000 * 64 + tokens * sum(MODEL.activation_bytes_per_token)
    expected = 0.001 + linear + attention + moved / (1e12 * 0.8)
    found = Roofline(NPU, MODEL, 1).step_ns(StepShape(tokens, pairs, 1, 0, 0))
    assert found == pytest.approx(expected * 1e9, rel=1e-6)


@given(shape=shapes, npus=st.sampled_from([1, 2]))
def test_more_work_takes_no_less_time(shape: StepShape, npus: int) -> None:
    """Every model is monotone in every part of a step, and more NPUs are never slower where sending costs nothing."""
    joined = msgspec.structs.replace(NPU, node_npus=16, peer_bytes_per_s=1e30)
    rooflines = [Roofline(NPU, MODEL, npus), Roofline(NPU, SPARSE, npus)]
    for model in [*rooflines, Fitted([5, 4, 3, 2, 1, 0, 7, 8]), Constant(0.01, 0.001)]:
        base = model.step_ns(shape)
        assert base >= 1
        for place in range(6):
            if place == 3 and shape.draft_tokens:
                continue  # the same context in more sequences: each guess attends to less of it
            more = list(shape)
            more[place] += 100
            assert model.step_ns(StepShape(*more)) >= base
    assert Roofline(joined, MODEL, 2 * npus).step_ns(shape) <= Roofline(joined, MODEL, npus).step_ns(shape)


def test_fitted_is_linear_in_its_features() -> None:
    """Each coefficient counts its own feature, and a step takes at least a nanosecond."""
    assert (
        Fitted([1, 10, 2, 3, 4, 100, 5, 6]).step_ns(StepShape(7, 8, 9, 10, 11)) == 1 + 10 + 14 + 24 + 36 + 100 + 50 + 66
    )
    assert Fitted([1, 10, 2, 3, 4, 100, 5, 6]).step_ns(StepShape(0, 0, 0, 1, 3)) == 1 + 100 + 5 + 18
    assert Fitted([0] * 8).step_ns(StepShape(1, 1, 1, 1, 1)) == 1
    with pytest.raises(ValueError, match=r"needs 8 coefficients .* not 3"):
        Fitted([1, 2, 3])


def test_constant_needs_a_time() -> None:
    """A step that takes no time at all is refused."""
    assert Constant(0.5, 0.25).step_ns(StepShape(3, 0, 1, 9, 9)) == 1_250_000_000
    for arguments in ((0.0, 0.0), (-1.0, 2.0), (1.0, -0.5)):
        with pytest.raises(ValueError, match="give positive times"):
            Constant(*arguments)
