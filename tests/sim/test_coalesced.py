"""Decode steps taken at once give, to the nanosecond, the run of single steps; and no run breaks the contract."""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import events as ev
from cluster.actions import Action
from cluster.engine_policy import PolicySpec
from cluster.manager import GroupPlan
from cluster.policy import DispatchPolicy, ScalingPolicy
from cluster.request import Answer, Arrival, Trigger
from cluster.vocabulary import NS_PER_S, Outcome, Role, Stage
from flowserve.core.config import EngineConfig
from flowserve.core.tiers import TierConfig
from policies.dispatch.deepflow import DeepFlow
from policies.dispatch.heat_map import HeatMap
from policies.dispatch.least_outstanding import LeastOutstanding
from policies.dispatch.round_robin import RoundRobin
from policies.scaling.fixed import Fixed
from policies.scaling.target_utilisation import TargetUtilisation
from sim.cluster import SimCluster
from sim.coldstart import Load
from sim.contention import Contention
from sim.latency import Constant, Fitted
from sim.model_shape import ModelShape
from sim.node import Delays, Failure
from sim.noise import Noise
from sim.roofline import Roofline
from sim.topology import Hosts, HostShape, Wire
from tests.builders import (
    MODEL,
    NPU,
    AtItsHolder,
    BackAndForth,
    Run,
    chain,
    disaggregated,
    make_arrival,
    make_request,
    make_spec,
    run_sim,
)


def deepflow() -> DispatchPolicy:
    return DeepFlow(HeatMap([0, 40], [0, 1], [[-1, 1], [1, -1]], "test"), balance_slack=1)


def scaling() -> ScalingPolicy:
    return TargetUtilisation(target=0.5, period_s=0.03, down_delay_s=0.06)


ORDERS = (
    None,
    PolicySpec("policies.engine.order.priority.Priority"),
    PolicySpec("policies.engine.order.fair.Fair"),
    PolicySpec("policies.engine.order.shortest_prompt.ShortestPrompt"),
)
CHUNKINGS = (None, None, PolicySpec("policies.engine.chunking.fixed.Fixed", {"tokens": 7}))
PIPELINE = ModelShape("toy", 4, 1024, 8, 2, 128, 4096, 1000, pipeline_stages=2)
LATENCIES = (
    lambda: Roofline(NPU, PIPELINE, 2),
    lambda: Constant(0.01),
    lambda: Constant(0.001, 0.0005),
    lambda: Fitted([1e6, 3e5, 777, 3.3, 1e4, 9e4, 1111, 5.7]),
    lambda: Fitted([1e6, 3e5, 777, 3.3, 1e4, 9e4, 1111, 5.7], reshape_ns=123_456),
)

NOISES = (None, None, Noise((1.0, 0.93, 1.21, 0.98, 3.0), 1), Noise((0.5,), 2))


LOADS = (
    None,
    Load(5_000_000, 5_000_000, 0.001),
    Load(5_000_000, 5_000_000, 0.001, fork=True, chunk_bytes=1e6),
    Load(5_000_000, 5_000_000, fork=True, fanout=2, chunk_bytes=1e7),
)


@st.composite
def hosts(draw: st.DrawFn) -> HostShape:
    """Fast or slow; one or two executors to a host, which share what a host has, or a domain of several hosts."""
    npus = draw(st.sampled_from([1, 1, 2, 4]))
    nic = draw(st.sampled_from([Wire(1e9), Wire(1e7, 0.001, 0.0005)]))
    peer = draw(st.sampled_from([None, Wire(2e7, 0.0001, 0.0001)]))
    return HostShape(
        nic,
        npus,
        npus * draw(st.sampled_from([1, 2])),
        peer,
        draw(st.sampled_from([None, Wire(1.5e7)])),
        draw(st.sampled_from([1, npus])),
        draw(st.sampled_from([None, Wire(5e7)])),
        *draw(st.sampled_from([(Wire(1e9), Wire(1e8)), (Wire(1e7, 0.001), Wire(1e6, 0.001))])),
        memory_bytes=draw(st.sampled_from([None, 4e6, 1e7])),
        memory_bytes_per_s=draw(st.sampled_from([None, 1.2e7])),
        rack_hosts=draw(st.sampled_from([None, 1])),
        oversubscription=draw(st.sampled_from([1.0, 3.0])),
    )


@st.composite
def workloads(draw: st.DrawFn) -> list[Arrival]:
    """Up to 12 requests: open or closed loop, with shared prompts, cancellations and limits below the answer."""
    arrivals: list[Arrival] = []
    at = 0
    for request_id in range(draw(st.integers(1, 12))):
        prompt, output = draw(st.integers(1, 80)), draw(st.integers(1, 60))
        path = draw(st.none() | st.lists(st.integers(0, 1), min_size=10, max_size=10))
        ids = None if path is None else chain(*path)
        limit = draw(st.sampled_from([output, output + 20, max(1, output - 5)]))
        cancel_s = draw(st.sampled_from([None] * 12 + [0.0, 0.02, 0.113, 0.4]))
        after = None
        if request_id and draw(st.integers(0, 3)) == 0:
            target = draw(st.integers(0, request_id - 1))
            by_id = draw(st.booleans())
            after = Trigger(
                draw(st.sampled_from(["first_token", "ended"])),
                target if by_id else None,
                None if by_id else target + 1,
                draw(st.sampled_from([0, 30_000_000])),
            )
        at += draw(st.sampled_from([0, 0, 0, 10_000_000, 7_123_457, 300_000_000]))
        request = make_request(
            request_id,
            prompt,
            limit,
            None if ids is None else ids[: prompt // 16],
            model=draw(st.sampled_from([MODEL, MODEL, MODEL, "n"])),
            tenant=draw(st.sampled_from(["", "", "other"])),
            priority=draw(st.integers(0, 1)),
        )
        answer = Answer(output, None if ids is None else ids[: (prompt + output) // 16])
        cancel = None if cancel_s is None else round(cancel_s * NS_PER_S)
        arrivals.append(Arrival(request, answer, at, after, cancel))
    return arrivals


@st.composite
def clusters(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of a run: sizes, roles, latencies, delays, failures."""
    prefill, decode, colocated = draw(st.sampled_from([(0, 0, 1), (0, 0, 2), (1, 1, 0), (2, 2, 0), (1, 1, 1)]))
    sequences = draw(st.sampled_from([1, 2, 4, 6]))
    dram, ssd = draw(st.sampled_from([(0, 0), (0, 0), (12, 0), (6, 9), (0, 9)]))
    failures = draw(
        st.lists(
            st.builds(
                Failure,
                at_s=st.sampled_from([0.01, 0.05, 0.0731, 0.2, 0.34]),
                executor=st.sampled_from([f"te-{number}" for number in range(5)]),
            ),
            max_size=3,
        )
    )
    delayed = st.sampled_from([0.0, 0.0, 0.0004, 0.01])
    spare = draw(st.sampled_from([0, 0, 2]))
    guesses = draw(st.sampled_from([0, 0, 0, 2]))
    groups = [
        GroupPlan(group.spec, group.initial, 1, group.maximum + spare)
        for group in disaggregated(prefill, decode, colocated)
    ]
    scales = draw(st.sampled_from([scaling, BackAndForth])) if spare else Fixed
    if draw(st.booleans()):  # else nobody serves the other model
        least = 0 if scales is scaling else 1  # the other policies replace what dies only up to the minimum
        groups.append(GroupPlan(make_spec(model="n"), least, least, 2))
    return {
        "groups": groups,
        "scaling": scales,
        "stages": [(Stage.TE_LOAD, draw(st.sampled_from([0, 10_000_000, 123_456_789])))],
        "engine": EngineConfig(
            kv_blocks=draw(st.integers(3, 16)),
            block_tokens=draw(st.sampled_from([16, 16, 32])),
            token_budget=sequences * (1 + guesses) + draw(st.integers(0, 60)),
            max_sequences=sequences,
            speculative_tokens=guesses,
            order=draw(st.sampled_from(ORDERS)),
            chunking=draw(st.sampled_from(CHUNKINGS)),
            max_in_flight=draw(st.integers(1, 3)),
            kv_transfer=draw(st.sampled_from(["by_request", "by_request", "by_chunk", "by_layer"])),
            tiers=TierConfig(
                dram, ssd, 0.3, 0.6, draw(st.sampled_from([1, 64])), draw(st.sampled_from(["cost", "always"]))
            ),
            preemption="swap" if dram and draw(st.booleans()) else "recompute",
        ),
        "layers": draw(st.sampled_from([1, 3])),
        "host": draw(hosts()),
        "hosts": draw(st.sampled_from([None, None, Hosts(5)])),  # at least what the run starts with
        "load": draw(st.sampled_from(LOADS)),
        "acceptance": 0.6,
        "kv_host_s": draw(st.sampled_from([0.0, 0.0013])),
        "noise": draw(st.sampled_from(NOISES)),
        "contention": draw(st.sampled_from([Contention(), Contention(), Contention(0.3, 0.1, 0.0, 0.2)])),
        "latency": draw(st.sampled_from(LATENCIES)),
        "host_step_s": draw(st.sampled_from([0.0, 0.0, 0.0007, 0.02])),
        "policy": draw(st.sampled_from([LeastOutstanding, RoundRobin, AtItsHolder, deepflow])),
        "report_period_s": draw(st.sampled_from([0.02, 0.1, 1.0])),
        "delays": draw(st.builds(Delays, delayed, delayed, st.sampled_from([0.0, 0.0001, 0.01]), delayed)),
        "num_job_executors": draw(st.integers(1, 2)),
        "failures": failures,
    }


def run(workload: list[Arrival], arguments: dict[str, Any], coalesce: bool = True) -> Run:
    """A run with a scaling policy of its own, which has a memory; it must end."""

    def watch(event: ev.Event, actions: list[Action], cluster: SimCluster) -> None:
        assert event.time < 100 * NS_PER_S, "the run does not end"

    return run_sim(workload, **{**arguments, "scaling": arguments["scaling"](), "coalesce": coalesce}, watch=watch)


def outcome_of(run: Run) -> Any:
    """All that a run is compared by: every event, every record, and how many steps each engine took."""
    return {
        "events": run.events,
        "requests": {name: list(column) for name, column in run.recorder.requests.items()},
        "outcomes": run.recorder.outcomes,
        "reasons": run.recorder.reasons,
        "gaps": list(run.recorder.gaps),
        "scaling": run.recorder.scaling,
        "steps": {name: executor.steps for name, executor in run.executors.items()},
        "log": run.log,
    }


def check_contract(run: Run, workload: list[Arrival]) -> None:
    """What holds for every run: order of events, conservation of requests and tasks, counts that agree."""
    times = [event.time for event in run.events]
    assert times == sorted(times)
    assert all(0 <= event.occurred <= event.time for event in run.events)
    sent = [event.request.request_id for event in run.of(ev.RequestArrived)]
    ended = [event.request_id for event in run.of(ev.RequestEnded)]
    assert len(set(sent)) == len(sent)
    assert sorted(sent) == sorted(ended) == sorted(run.recorder.requests["request_id"])
    assert len(sent) + run.control.client.never_sent == len(workload)
    assert all(job_executor.open_jobs == 0 for job_executor in run.control.job_executors)
    tasks = [event.task_id for event in run.of(ev.TaskFinished, ev.TaskFailed, ev.TaskAborted)]
    assert len(set(tasks)) == len(tasks), "a task ended twice"
    first_tokens = [event.request_id for event in run.of(ev.FirstToken)]
    assert len(set(first_tokens)) == len(first_tokens), "a first token was repeated"
    arrivals = {arrival.request.request_id: arrival for arrival in workload}
    for event in run.of(ev.RequestEnded):
        arrival = arrivals[event.request_id]
        whole = min(arrival.answer.output_tokens, arrival.request.max_tokens)
        assert event.generated == whole if event.outcome is Outcome.FINISHED else event.generated <= whole
    speculates = any(executor.shell.core.config.speculative_tokens for executor in run.executors.values())
    for event in run.of(ev.TaskFinished):
        assert event.tokens == len(event.token_gaps_ns) + 1
        assert all(gap > 0 or (gap == 0 and speculates) for gap in event.token_gaps_ns)
    for executor in run.executors.values():
        executor.shell.core.check_integrity()


@given(workload=workloads(), arguments=clusters())
@settings(max_examples=120)
def test_coalesced_runs_equal_stepped_runs(workload: list[Arrival], arguments: dict[str, Any]) -> None:
    """Same events, records, decisions and steps, whatever the workload, the fleet, the delays and the failures."""
    coalesced = run(workload, arguments)
    check_contract(coalesced, workload)
    stepped = run(workload, arguments, coalesce=False)
    assert outcome_of(coalesced) == outcome_of(stepped)


def test_a_first_step_of_new_rows_is_hidden_by_the_host_as_much() -> None:
    """Two plans in flight and a slow host: what a new number of rows costs is the device's, in a segment, too."""
    workload = [make_arrival(0), Arrival(make_request(1, 2, 23), Answer(3)), make_arrival(2)]
    arguments: dict[str, Any] = {
        "engine": EngineConfig(kv_blocks=1000, token_budget=2, max_sequences=1, max_in_flight=2),
        "latency": LATENCIES[-1],
        "host_step_s": 0.02,
    }
    coalesced, stepped = (run_sim(workload, coalesce=coalesce, **arguments) for coalesce in (True, False))
    assert outcome_of(coalesced) == outcome_of(stepped)


def test_steps_that_end_together_do_so_in_the_order_of_executors() -> None:
    """Two answers end in the same nanosecond: first that of the first executor, whenever which segment was begun."""
    # The second executor begins first, and begins another segment after its load report at 1 s; the first does not.
    workload = [make_arrival(0, output=130), make_arrival(1, at_s=0.5, output=80)]
    for coalesce in (True, False):
        run = run_sim(workload, executors=2, coalesce=coalesce, report_period_s=1.0)
        ends = [(event.occurred, event.executor) for event in run.of(ev.TaskFinished)]
        assert ends == [(1_300_000_000, "te-0"), (1_300_000_000, "te-1")]


def test_chunks_of_a_long_prompt_are_coalesced_too() -> None:
    """A prompt of 1000 chunks, beside a request that decodes, takes no event of its own per chunk."""
    workload = [Arrival(make_request(0, 10, 1500), Answer(1500)), make_arrival(1, 0.1, 9001, 3)]
    engine = EngineConfig(kv_blocks=1000, token_budget=10, max_sequences=2)
    events = []
    for coalesce in (True, False):
        run = run_sim(workload, engine=engine, coalesce=coalesce, report_period_s=100.0)
        assert run.executors["te-0"].steps == 1500
        events.append(next(run.cluster.clock.env._eid))
    assert events[0] * 20 < events[1]


def test_steps_are_in_fact_coalesced() -> None:
    """A long answer alone is one simulator event or two, not one per token."""
    workload = [Arrival(make_request(0, 10, 900), Answer(900))]
    events = []
    for coalesce in (True, False):
        run = run_sim(workload, coalesce=coalesce, report_period_s=100.0)
        assert run.executors["te-0"].steps == 900
        events.append(next(run.cluster.clock.env._eid))
    assert events[0] * 20 < events[1]


@given(workload=workloads(), arguments=clusters())
@settings(max_examples=20)
def test_a_run_can_be_repeated(workload: list[Arrival], arguments: dict[str, Any]) -> None:
    """The same seed gives the same run twice, decision log included."""
    assert outcome_of(run(workload, arguments)) == outcome_of(run(workload, arguments))


def test_roles_have_their_executors() -> None:
    """The fleets above are what they are meant to be: each role is there, and disaggregated requests have two tasks."""
    run = run_sim([Arrival(make_request(0, 20, 5), Answer(5))], groups=disaggregated(1, 1))
    assert [event.spec.role for event in run.of(ev.ExecutorReady)] == [Role.PREFILL, Role.DECODE]
    assert [event.executor for event in run.of(ev.TaskFinished)] == ["te-0", "te-1"]
