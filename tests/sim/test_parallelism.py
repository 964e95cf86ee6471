"""How an executor of several NPUs spreads a model: pipeline stages, attention groups, spread experts; by hand."""

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.latency import StepShape
from cluster.request import Answer, Arrival
from experiments import build, compose
from flowserve.core.config import EngineConfig
from sim.model_shape import ModelShape
from sim.roofline import Roofline
from tests.builders import NPU, make_request, run_sim

MODEL = ModelShape("toy", 8, 4096, 32, 8, 128, 14336, 1000)
STAGED = msgspec.structs.replace(MODEL, pipeline_stages=4)
GROUPED = msgspec.structs.replace(MODEL, attention_groups=4)
SPARSE = ModelShape(
    "sparse", 8, 2048, 32, 4, 128, 6144, 1000, sparse_layers=8, experts=64, experts_per_token=4, expert_intermediate=768
)
HOP = 1e-5
RATE = 140e9 * 0.5 / 7  # one link of the mesh
STILL = msgspec.structs.replace(NPU, step_overhead_s=0.0, peer_bytes_per_s=1e30, peer_latency_s=0.0)
"""No host, no time on the links."""


def seconds(latency: Roofline, shape: StepShape) -> float:
    return latency.step_ns(shape) / 1e9


def test_a_round_of_micro_batches_takes_a_micro_batch_through_all_stages() -> None:
    """64 sequences on 4 stages: on end, rounds take 16 through one NPU each, and 4 hops; the first 3/4 more."""
    staged, alone = Roofline(NPU, STAGED, 4), Roofline(NPU, MODEL, 1)
    step = StepShape(0, 0, 0, 64, 64 * 500)
    micro = seconds(alone, StepShape(0, 0, 0, 16, 16 * 500)) - 0.001
    sent = 4 * HOP + 3 * 16 * 4096 * 2 / RATE
    assert seconds(staged, step) == pytest.approx(0.001 + micro + sent, abs=2e-9)
    assert staged.fill_ns(step) == pytest.approx(0.75 * (micro + sent) * 1e9, abs=2)
    assert alone.fill_ns(step) == 0


def test_one_sequence_gains_nothing_from_stages() -> None:
    """It goes through all layers one after the other, wherever they are, and no other micro-batch is waited for."""
    staged, alone = Roofline(STILL, STAGED, 4), Roofline(STILL, MODEL, 1)
    step = StepShape(0, 0, 0, 1, 500)
    assert staged.step_ns(step) == alone.step_ns(step)
    assert staged.fill_ns(step) == 0


def test_consecutive_chunks_in_consecutive_micro_batches() -> None:
    """A prompt of 8,192 tokens is 4 micro-batches of 2,048: 7/16 of its time on one NPU until it is through, and a
    quarter for each of many on end. Kept in one micro-batch it takes as long as on one NPU.
    """
    prompt = StepShape(8192, 0, 1, 0, 0)
    one = seconds(Roofline(STILL, MODEL, 1), prompt)
    spread, whole = (Roofline(STILL, STAGED, 4, spread_chunks=spread) for spread in (True, False))
    assert seconds(spread, prompt) == pytest.approx(one / 4, rel=0.01)
    assert seconds(spread, prompt) + spread.fill_ns(prompt) / 1e9 == pytest.approx(7 / 16 * one, rel=0.01)
    assert seconds(whole, prompt) == pytest.approx(one, rel=1e-6)


def ttft(spread: bool, in_flight: int = 4) -> float:
    """Of a long prompt alone on 4 stages, in chunks of 2,048 tokens."""
    run = run_sim(
        [Arrival(make_request(0, 16_384, 4), Answer(4))],
        engine=EngineConfig(kv_blocks=2000, token_budget=2048, max_in_flight=in_flight),
        latency=lambda: Roofline(NPU, STAGED, 4, spread_chunks=spread),
    )
    return run.rows[0]["first_token_ns"] / 1e9


def test_pipelined_chunks_shorten_the_first_token() -> None:
    """DeepServe section 4.3 has at least 20 % from chunks in consecutive micro-batches; and plans in flight keep the
    pipeline full from chunk to chunk, where one plan at a time empties it every time.
    """
    assert ttft(spread=True) < 0.8 * ttft(spread=False)
    assert ttft(spread=True, in_flight=1) > 1.4 * ttft(spread=True)


def test_stages_raise_throughput_and_not_the_speed_of_one() -> None:
    """Four stages serve four times the sequences of one NPU in nearly the time of one; tensor parallelism is faster."""
    one, staged, split = Roofline(STILL, MODEL, 1), Roofline(STILL, STAGED, 4), Roofline(STILL, MODEL, 4)
    few, many = StepShape(0, 0, 0, 16, 16_000), StepShape(0, 0, 0, 64, 64_000)
    assert seconds(staged, many) == pytest.approx(seconds(one, few), rel=1e-6)
    assert seconds(split, many) < 0.5 * seconds(staged, many)


def test_the_fullest_attention_group_is_waited_for() -> None:
    """5 sequences on 4 groups take as long as 2 on an NPU of their own, 8 as long; weights are there four times."""
    grouped, alone = Roofline(STILL, GROUPED, 4), Roofline(STILL, MODEL, 1)
    two = alone.step_ns(StepShape(0, 0, 0, 2, 2 * 300))
    assert [grouped.step_ns(StepShape(0, 0, 0, n, n * 300)) for n in (5, 8)] == [two, two]
    assert GROUPED.weight_bytes_on(4) == 4 * MODEL.weight_bytes
    assert STAGED.weight_bytes_on(4) == MODEL.weight_bytes
    assert (GROUPED.kv_copies(16), MODEL.kv_copies(16), STAGED.kv_copies(16)) == (1, 2, 1)


def test_a_prompt_is_in_one_attention_group() -> None:
    """One prompt takes as long on 4 groups as on one NPU, four prompts no longer."""
    grouped, alone = Roofline(STILL, GROUPED, 4), Roofline(STILL, MODEL, 1)
    one = alone.step_ns(StepShape(1000, 500_500, 1, 0, 0))
    assert grouped.step_ns(StepShape(1000, 500_500, 1, 0, 0)) == one
    assert grouped.step_ns(StepShape(4000, 4 * 500_500, 4, 0, 0)) == pytest.approx(one, rel=1e-3)


def test_groups_of_split_attention_with_spread_experts() -> None:
    """On 8 NPUs, 2 attention groups of 4: dense weights twice, experts once; tokens are sent to the experts besides the
    all-reduces of each group.
    """
    shape = msgspec.structs.replace(SPARSE, expert_parallel=True, attention_groups=2)
    dense = 2 * (SPARSE.dense_parameters + SPARSE.embeddings)
    assert shape.split(8) == 4
    assert shape.weight_bytes_on(8) == SPARSE.weight_bytes + dense
    step = StepShape(0, 0, 0, 80, 0)
    sent = seconds(Roofline(msgspec.structs.replace(NPU, step_overhead_s=0.0), shape, 8), step)
    sent -= seconds(Roofline(STILL, shape, 8), step)
    group, all_of_them = 140e9 * 0.5 * 3 / 7, 140e9 * 0.5
    reduced = 8 * (4 * HOP + 4 * 3 / 4 * 40 * 2048 * 2 / group)
    uneven = 1 + math.sqrt(2 * math.log(8) / (80 * 4 / 8))
    routed = 8 * (2 * HOP + 80 * 4 / 8 * 2048 * (2 + 2) / all_of_them * uneven)
    assert sent == pytest.approx(reduced + routed, rel=1e-5)


@given(
    sequences=st.integers(1, 300),
    context=st.integers(1, 10**6),
    which=st.sampled_from([STAGED, GROUPED, msgspec.structs.replace(STAGED, attention_groups=2)]),
    sizes=st.sampled_from([(), (1, 8, 64)]),
)
def test_steps_on_end_are_steps_one_by_one(
    sequences: int, context: int, which: ModelShape, sizes: tuple[int, ...]
) -> None:
    """However a model is spread, `decode_ns` is a faster way to ask `step_ns`."""
    latency = Roofline(NPU, which, 8, graph_sizes=sizes)
    steps = latency.decode_ns(sequences, context, 5)
    assert steps == [latency.step_ns(StepShape(0, 0, 0, sequences, context + sequences * k)) for k in range(5)]


@pytest.mark.parametrize(
    ("change", "npus", "message"),
    [
        ({"pipeline_stages": 3}, 4, "3 pipeline stages of 1 attention groups need a multiple of 3 NPUs"),
        ({"attention_groups": 4}, 2, "1 pipeline stages of 4 attention groups need a multiple of 4 NPUs"),
        ({}, 3, r"its 32 heads \(8 of the KV cache\) cannot be split over 3 NPUs"),
        ({}, 64, r"cannot be split over 64 NPUs; take a number that divides them, or pipeline stages"),
    ],
)
def test_what_cannot_be_spread(change: dict[str, int], npus: int, message: str) -> None:
    """Stages and groups that do not divide the NPUs, NPUs that do not divide the heads."""
    with pytest.raises(ValueError, match=message):
        Roofline(NPU, msgspec.structs.replace(MODEL, **change), npus)


@pytest.mark.parametrize("change", [{"pipeline_stages": 0}, {"pipeline_stages": 9}, {"attention_groups": 0}])
def test_impossible_numbers_of_parts(change: dict[str, int]) -> None:
    """No stage, more stages than layers, no group."""
    with pytest.raises(ValueError, match=r"is (0|9): allowed are 1"):
        msgspec.structs.replace(MODEL, **change)


def test_groups_of_the_fleet_spread_their_model_each_in_their_own_way() -> None:
    """Prefill by pipeline and decode by tensor parallelism: each group of executors says how."""
    groups = (
        "[{role: prefill, executors: 1, npus: 4, pipeline_stages: 4}, {role: decode, executors: 1, npus: 8, "
        "attention_groups: 2}]"
    )
    cfg = compose([f"fleet.groups={groups}", "engine.max_in_flight=4"])
    node_for = build.sim_node(cfg)
    prefill, decode = (node_for(plan.spec).latency() for plan in build.groups(cfg))
    assert (prefill.stages, decode.stages) == (4, 1)
    together = compose(["fleet.groups=[{role: colocated, executors: 1, npus: 8}]"])
    (plan,) = build.groups(together)
    assert node_for(build.groups(cfg)[1].spec).engine.kv_blocks < build.sim_node(together)(plan.spec).engine.kv_blocks
