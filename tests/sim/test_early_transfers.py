"""KV cache that is sent while it is computed: what it gains on slow links, what it costs, and that nothing hangs."""

from itertools import accumulate
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import events as ev
from cluster.engine_policy import PolicySpec
from cluster.request import Arrival
from cluster.vocabulary import FailureReason, Outcome, to_ns
from flowserve.core.config import EngineConfig
from flowserve.core.transfer import KvLayout, KvTransfer
from sim.cluster import SimCluster
from sim.contention import Contention
from sim.latency import Constant
from sim.node import Delays, Failure
from sim.topology import Wire
from tests.builders import Run, disaggregated, make_arrival, run_sim

ALL: tuple[KvTransfer, ...] = ("by_request", "by_chunk", "by_layer")
STEP_S = 0.1
LAYERS = 4
LAST = 1000
BYTES_PER_TOKEN = 1000


def serve(
    workload: list[Arrival],
    kv_transfer: KvTransfer,
    link: Wire,
    kv_layout: KvLayout = "layer_major",
    budget: int = 512,
    **more: Any,
) -> Run:
    """One prefill and one decode executor with steps of 100 ms, and messages that take no time."""
    run = run_sim(
        workload,
        groups=disaggregated(),
        engine=EngineConfig(100, 16, budget, 8, kv_layout=kv_layout, kv_transfer=kv_transfer),
        latency=lambda: Constant(STEP_S),
        wire=link,
        kv_bytes_per_token=BYTES_PER_TOKEN,
        kv_segments=2 * LAYERS if kv_layout == "layer_major" else 1,
        layers=LAYERS,
        **more,
    )
    assert {row["outcome"] for row in run.rows.values()} == {Outcome.FINISHED}
    return run


def gap(run: Run) -> int:
    """From the first token to the second."""
    return int(run.recorder.gaps[0])


def test_a_step_is_followed_layer_by_layer() -> None:
    """Four layers of 16 ms: the last is sent behind the step, the others while it lasts; then one step of decode."""
    alone = [make_arrival(0, prompt=64, output=3)]
    link = Wire(1e6)
    waits = {each: gap(serve(alone, each, link)) - to_ns(STEP_S) for each in ALL}
    assert waits == {"by_request": to_ns(0.064), "by_chunk": to_ns(0.064), "by_layer": to_ns(0.016)}


def test_a_step_is_followed_to_its_new_end() -> None:
    """Prompts take twice as long while the other prefill executor computes: the first one's step ends later than was
    thought, the second one's sooner. The last of four layers of 16 ms is sent behind it, and the others before.
    """
    run = run_sim(
        [make_arrival(n, at_s=0.05 * n, prompt=64, output=3) for n in range(2)],
        groups=disaggregated(2, 2),
        engine=EngineConfig(100, kv_transfer="by_layer"),
        latency=lambda: Constant(STEP_S),
        wire=Wire(1e6),
        kv_bytes_per_token=BYTES_PER_TOKEN,
        layers=LAYERS,
        contention=Contention(0, 0, 0, 1.0),
    )
    assert [event.occurred for event in run.of(ev.FirstToken)] == [to_ns(0.15), to_ns(0.2)]
    ends = [span.end_ns for span in run.cluster.transfers]
    assert ends == pytest.approx([to_ns(0.166), to_ns(0.216)], abs=100)


@given(
    arrivals=st.lists(
        st.tuples(st.sampled_from([0.01, 0.05]), st.integers(17, 200), st.integers(2, 5)), min_size=6, max_size=12
    ),
    executors=st.tuples(st.integers(1, 3), st.integers(2, 3)),
    link=st.sampled_from([1e6, 1e8]),
    layers=st.sampled_from([1, 2, 8]),
    contention=st.tuples(*[st.sampled_from([0.3, 1.0])] * 4),
    kv_host_s=st.sampled_from([0.0, 0.0, 0.001]),
)
@settings(max_examples=60)
def test_nothing_is_sent_before_it_is_computed(
    arrivals: list[tuple[float, int, int]],
    executors: tuple[int, int],
    link: float,
    layers: int,
    contention: tuple[float, float, float, float],
    kv_host_s: float,
) -> None:
    """Wherever steps end that others slow down: the last layer arrives behind the first token."""
    times = accumulate(wait for wait, _, _ in arrivals)
    run = run_sim(
        [
            make_arrival(n, at_s, prompt, output)
            for n, (at_s, (_, prompt, output)) in enumerate(zip(times, arrivals, strict=True))
        ],
        groups=disaggregated(*executors),
        engine=EngineConfig(300, kv_transfer="by_layer"),
        latency=lambda: Constant(0.05, 1e-4),
        wire=Wire(link),
        kv_bytes_per_token=BYTES_PER_TOKEN,
        layers=layers,
        contention=Contention(*contention),
        kv_host_s=kv_host_s,
    )
    assert {row["outcome"] for row in run.rows.values()} == {Outcome.FINISHED}
    first = {event.request_id: event.occurred for event in run.of(ev.FirstToken)}
    sent = {span.task_id: span.end_ns for span in run.cluster.transfers}
    for event in run.of(ev.TaskFinished):
        assert sent.get(event.task_id, first[event.request_id]) >= first[event.request_id]


def test_a_link_slower_than_the_step_begins_with_the_first_layer() -> None:
    """Of 320 ms on the link, 75 lie in the step: what is left behind it is 245."""
    run = serve([make_arrival(0, prompt=64, output=3)], "by_layer", Wire(2e5))
    assert gap(run) - to_ns(STEP_S) == to_ns(0.245)
    [span] = run.cluster.transfers
    assert (span.num_bytes, span.pieces, span.end_ns) == (64_000, 2 * LAYERS, to_ns(0.345))


def test_chunks_are_sent_when_they_are_computed() -> None:
    """Four chunks of 16 ms each: but the last, all are there when the prompt is; by layer, most of that one, too."""
    run = serve([make_arrival(0, prompt=64, output=3)], "by_chunk", Wire(1e6), budget=16)
    assert gap(run) - to_ns(STEP_S) == to_ns(0.016)
    assert [span.end_ns for span in run.cluster.transfers] == [to_ns(each) for each in (0.116, 0.216, 0.316, 0.416)]
    run = serve([make_arrival(0, prompt=64, output=3)], "by_layer", Wire(1e6), budget=16)
    assert gap(run) - to_ns(STEP_S) == to_ns(0.004)


def test_long_prompts_on_a_slow_link_wait_less() -> None:
    """The more of a transfer lies in the prefill, the sooner the second token comes."""
    workload = [make_arrival(n, at_s=2.0 * n, prompt=1000, output=4) for n in range(8)]
    mean = {each: sum(gap_of(serve(workload, each, Wire(3e6), budget=256), n) for n in range(8)) / 8 for each in ALL}
    assert mean["by_layer"] < mean["by_chunk"] < 0.7 * mean["by_request"]


def gap_of(run: Run, request_id: int) -> int:
    first, second = (event for event in run.of(ev.TaskFinished) if event.request_id == request_id)
    return int(second.last_token_ns - sum(second.token_gaps_ns) - first.last_token_ns)


@pytest.mark.parametrize("kv_layout", ["block_major", "layer_major"])
def test_calls_that_cost_more_than_the_bytes_make_layers_dear(kv_layout: KvLayout) -> None:
    """FlowKV's point: where a run of blocks is one piece, by request takes one call, and by layer one for each layer of
    each block. Where layers lie apart anyway, it takes as many calls as by request.
    """
    workload = [make_arrival(0, prompt=64, output=3)]
    runs = {each: serve(workload, each, Wire(1e9, call_s=0.02), kv_layout) for each in ("by_request", "by_layer")}
    calls = {each: sum(span.pieces for span in run.cluster.transfers) for each, run in runs.items()}
    waits = {each: gap(run) - to_ns(STEP_S) for each, run in runs.items()}
    if kv_layout == "block_major":
        assert calls == {"by_request": 1, "by_layer": LAYERS * 4}
        assert waits["by_layer"] > 10 * waits["by_request"]
    else:
        assert calls == {"by_request": 2 * LAYERS, "by_layer": 2 * LAYERS}
        assert waits["by_layer"] < waits["by_request"]


def test_a_cached_prefix_is_not_sent_in_chunks_either() -> None:
    """The second turn of a session sends the blocks that its decode executor lacks."""
    ids = (11, 22, 33, 44)
    first = make_arrival(0, prompt=64, output=3, ids=ids)
    second = make_arrival(1, at_s=2.0, prompt=80, output=3, ids=(*ids, 55))
    for each in ("by_chunk", "by_layer"):
        run = serve([first, second], each, Wire(1e6), budget=32)  # type: ignore[arg-type]
        blocks = [span.blocks for span in run.cluster.transfers if span.start_ns >= to_ns(2.0)]
        assert blocks == [1]


def test_a_request_that_ends_with_its_first_token() -> None:
    """The limit allows more, so its decode task is placed; it comes back, and the request ends once."""
    for each in ALL:
        run = serve([make_arrival(0, prompt=64, output=1, limit=9)], each, Wire(1e6))
        assert run.rows[0]["output_tokens"] == 1
        assert len(run.of(ev.RequestEnded)) == 1


@pytest.mark.parametrize("kv_transfer", ["by_chunk", "by_layer"])
@pytest.mark.parametrize("killed", ["te-1", "te-3"])
def test_either_side_may_die_in_the_middle(kv_transfer: KvTransfer, killed: str) -> None:
    """The prefill goes on without its decode executor, and a decode task without its prefill comes to nothing."""
    run = run_sim(
        [make_arrival(0, prompt=64, output=5)],
        groups=disaggregated(2, 2),
        engine=EngineConfig(100, 16, 16, 8, kv_transfer=kv_transfer),
        latency=lambda: Constant(STEP_S),
        wire=Wire(1e6),
        layers=LAYERS,
        failures=[Failure(0.35, killed)],
    )
    assert run.rows[0]["outcome"] is Outcome.FINISHED
    lost = [event for event in run.of(ev.TaskFailed) if event.reason is FailureReason.EXECUTOR_LOST]
    assert [event.executor for event in lost] == [killed]
    [first] = run.of(ev.FirstToken)
    # One chunk more is computed; or all four again.
    assert first.occurred == to_ns(0.4 if killed == "te-3" else 0.75)


# -- nothing hangs ------------------------------------------------------------------------------------------------

ORDERS = (
    None,
    PolicySpec("policies.engine.order.shortest_prompt.ShortestPrompt", {}),
    PolicySpec("policies.engine.order.priority.Priority", {}),
)
TRIES = st.tuples(
    st.sampled_from([0.0, 0.0, 0.01, 0.3]),  # when it comes
    st.integers(1, 90),  # prompt
    st.integers(1, 30),  # output
    st.integers(0, 2),  # priority
    st.sampled_from([None, None, None, 0.05, 0.4]),  # cancelled after
)


@given(
    requests=st.lists(TRIES, min_size=4, max_size=24),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    blocks=st.integers(8, 11),
    sequences=st.integers(1, 4),
    kv_transfer=st.sampled_from(ALL),
    order=st.sampled_from(ORDERS),
    delays=st.tuples(*[st.sampled_from([0.0, 0.0007, 0.02])] * 4),
    in_flight=st.integers(1, 3),
    job_executors=st.integers(1, 2),
)
@settings(max_examples=200)
def test_full_decode_executors_never_wait_for_ever(
    requests: list[tuple[float, int, int, int, float | None]],
    sizes: tuple[int, int],
    blocks: int,
    sequences: int,
    kv_transfer: KvTransfer,
    order: PolicySpec | None,
    delays: tuple[float, float, float, float],
    in_flight: int,
    job_executors: int,
) -> None:
    """KV caches that hold one or two requests, queues in any order, messages that are late: every request ends, and
    nothing is kept for it. Decode executors reserve blocks for what prefill executors compute already, so nobody who
    holds blocks waits for somebody who has none.
    """
    workload = [
        make_arrival(n, at, prompt, output, 30, priority=priority, cancel_after_s=cancel)
        for n, (at, prompt, output, priority, cancel) in enumerate(sorted(requests, key=lambda each: each[0]))
    ]
    workload.append(make_arrival(LAST, 50.0, 1, 1))

    def watch(event: ev.Event, actions: object, cluster: SimCluster) -> None:
        if isinstance(event, ev.RequestArrived) and event.request.request_id == LAST:
            for name, executor in cluster.executors.items():
                core = executor.shell.core
                assert core.idle, f"{name} keeps {core.task_ids()}"
                assert core.rtc.available == blocks

    run = run_sim(
        workload,
        groups=disaggregated(*sizes),
        engine=EngineConfig(blocks, 16, 32, sequences, in_flight, order=order, kv_transfer=kv_transfer),
        wire=Wire(1e6, 0.001),
        layers=LAYERS,
        delays=Delays(*delays),
        num_job_executors=job_executors,
        watch=watch,
    )
    assert {row["outcome"] for row in run.rows.values()} <= {Outcome.FINISHED, Outcome.CANCELLED}
