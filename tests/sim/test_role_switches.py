"""Executors that change sides at work: what is held where it is decoded, and that nobody waits for ever."""

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import events as ev
from cluster.actions import SwitchRole
from cluster.engine_policy import PolicySpec
from cluster.manager import GroupPlan
from cluster.policy import DispatchPolicy, GroupLoad, RoleSwitch, ScalingPolicy
from cluster.request import Trigger
from cluster.vocabulary import FailureReason, Outcome, Role, TaskKind, to_ns
from flowserve.core.config import EngineConfig
from flowserve.core.tiers import TierConfig
from flowserve.core.transfer import KvTransfer
from policies.dispatch.least_outstanding import LeastOutstanding
from policies.dispatch.round_robin import RoundRobin
from sim.cluster import SimCluster
from sim.node import Delays
from sim.topology import Wire
from tests.builders import MODEL, AtItsHolder, make_arrival, make_spec, run_sim
from tests.contract.backends import Driver, sim_cluster
from tests.sim.test_early_transfers import ALL, ORDERS

STEP_S = 0.002


@pytest.mark.parametrize("kv_transfer", ["by_request", "by_chunk"])
def test_a_handover_in_place_costs_a_step_and_no_byte(kv_transfer: KvTransfer) -> None:
    """A prompt of 800 kB: on another executor its copy takes a step's time and more, where it is held nothing."""
    waits, moved = {}, {}
    for executor in ("te-0", "te-1"):
        with sim_cluster(engine=EngineConfig(100, 16, 1024, 8, kv_transfer=kv_transfer), step_s=STEP_S) as cluster:
            driver = Driver(cluster)
            driver.launch("te-0", Role.PREFILL)
            driver.launch("te-1", Role.DECODE)
            request = driver.open(0, prompt=800, output=5)
            held = driver.prefill("te-0", request, 0)
            driver.submit(SwitchRole("te-0", Role.DECODE))
            driver.wait(ev.RoleSwitched)
            asked = driver.now
            driver.dispatch(executor, request, 1, TaskKind.DECODE, generated=1, kv=held)
            finished = driver.wait(ev.TaskFinished, task_id=1)
            waits[executor] = finished.last_token_ns - sum(finished.token_gaps_ns) - asked
            moved[executor] = sum(span.num_bytes for span in cluster.transfers)
    assert moved == {"te-0": 0, "te-1": 800_000}
    messages = to_ns(0.0001) + (to_ns(0.00005) if kv_transfer == "by_chunk" else 0)
    assert to_ns(STEP_S) < waits["te-0"] <= to_ns(STEP_S) + messages
    assert waits["te-1"] > 1.4 * waits["te-0"]


def crosswise(driver: Driver, prompt: int) -> None:
    """Two executors that hold a prompt each and have changed sides; each is to decode what the other one holds, behind
    a prompt of three blocks that it took before.
    """
    sides = ("te-0", "te-1")
    for executor in sides:
        driver.launch(executor, Role.PREFILL)
    requests = [driver.open(number, prompt=prompt, output=5) for number in range(2)]
    held = [driver.prefill(sides[number], requests[number], number) for number in range(2)]
    for number in range(2):
        driver.dispatch(sides[number], driver.open(10 + number, output=5), 10 + number, TaskKind.PREFILL)
        driver.submit(SwitchRole(sides[number], Role.DECODE))
        driver.wait(ev.RoleSwitched)
    for number in range(2):
        driver.dispatch(sides[1 - number], requests[number], 20 + number, TaskKind.DECODE, 1, held[number])


def test_decode_tasks_go_ahead_of_prompts_that_wait_for_each_others_blocks() -> None:
    """Each executor has room for the other's request, whose end makes room for its own prompt."""
    with sim_cluster(engine=EngineConfig(4, 16, 64, 4, watermark=0.0)) as cluster:
        driver = Driver(cluster)
        crosswise(driver, prompt=20)
        for task_id in (20, 21, 10, 11):
            assert driver.wait(ev.TaskFinished, task_id=task_id).executor == f"te-{(task_id + (task_id >= 20)) % 2}"


def test_what_is_held_crosswise_gives_way_to_the_older_request() -> None:
    """Neither executor has room for the other's request: only what is held for the younger one is dropped."""
    with sim_cluster(engine=EngineConfig(3, 16, 64, 4, watermark=0.0)) as cluster:
        driver = Driver(cluster)
        crosswise(driver, prompt=40)
        assert driver.wait(ev.TaskFinished, task_id=20).executor == "te-1"
        failed = driver.wait(ev.TaskFailed)
        assert (failed.task_id, failed.executor, failed.reason) == (21, "te-0", FailureReason.KV_LOST)
        assert [driver.wait(ev.TaskFinished, task_id=10 + number).executor for number in range(2)] == ["te-0", "te-1"]


# -- nothing hangs ------------------------------------------------------------------------------------------------

LAST = 1000
TRIES = st.tuples(
    st.sampled_from([0.0, 0.0, 0.0, 0.01, 0.05, 0.2]),  # when it comes
    st.sampled_from([1, 20, 33, 33, 40]),  # prompt: up to three blocks
    st.integers(1, 8),  # output
    st.integers(0, 2),  # priority
    st.sampled_from([None] * 9 + [0.05, 0.4]),  # cancelled after
)
SIDES = (Role.PREFILL, Role.DECODE)


class Wander(ScalingPolicy):
    """Once per period an executor changes sides, or none: by turns of the list. 0: to prefill, 1: to decode."""

    def __init__(self, turns: list[int | None], period_s: float) -> None:
        self.period_s = period_s
        self._turns = itertools.cycle(turns)

    def desired(self, load: GroupLoad, now_ns: int) -> int:
        return load.ready + load.pending

    def switches(self, loads: Sequence[GroupLoad], now_ns: int) -> Sequence[RoleSwitch]:
        to = next(self._turns)
        return () if to is None else (RoleSwitch(MODEL, SIDES[1 - to], SIDES[to]),)


@given(
    requests=st.lists(TRIES, min_size=4, max_size=24),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    turns=st.lists(st.sampled_from([0, 1, None]), min_size=1, max_size=8),
    period_s=st.sampled_from([0.01, 0.02, 0.05, 0.1, 0.3]),
    blocks=st.sampled_from([3, 3, 3, 5]),
    sequences=st.sampled_from([1, 1, 2]),
    kv_transfer=st.sampled_from(ALL),
    prefix_cache=st.booleans(),
    order=st.sampled_from(ORDERS),
    policy=st.sampled_from([LeastOutstanding, RoundRobin, AtItsHolder]),
    delays=st.tuples(*[st.sampled_from([0.0, 0.0007, 0.02])] * 4),
    in_flight=st.integers(1, 3),
    guesses=st.sampled_from([0, 0, 2]),
    dram_blocks=st.sampled_from([0, 0, 6]),
    job_executors=st.integers(1, 2),
)
@settings(max_examples=200)
def test_nobody_waits_for_ever(
    requests: list[tuple[float, int, int, int, float | None]],
    sizes: tuple[int, int],
    turns: list[int | None],
    period_s: float,
    blocks: int,
    sequences: int,
    kv_transfer: KvTransfer,
    prefix_cache: bool,
    order: PolicySpec | None,
    policy: type[DispatchPolicy],
    delays: tuple[float, float, float, float],
    in_flight: int,
    guesses: int,
    dram_blocks: int,
    job_executors: int,
) -> None:
    """KV caches that hold one request or two, and executors that change sides all the time: every request ends, none is
    lost more often than it may be tried, and nothing is kept for it.
    """
    workload = [
        make_arrival(n, at, prompt, output, priority=priority, cancel_after_s=cancel)
        for n, (at, prompt, output, priority, cancel) in enumerate(sorted(requests, key=lambda each: each[0]))
    ]
    workload.append(make_arrival(LAST, prompt=1, output=1, after=Trigger("ended", None, len(workload), to_ns(1.0))))

    def watch(event: ev.Event, actions: object, cluster: SimCluster) -> None:
        assert event.time < to_ns(60), "the run does not end"
        if isinstance(event, ev.RequestArrived) and event.request.request_id == LAST:
            for name, executor in cluster.executors.items():
                core = executor.shell.core
                assert core.idle, f"{name} keeps {core.task_ids()}"
                assert core.rtc.available == blocks
                assert not core.leased
                core.check_integrity()

    total = sum(sizes)
    run = run_sim(
        workload,
        groups=[GroupPlan(make_spec(role), size, 1, total) for role, size in zip(SIDES, sizes, strict=True)],
        scaling=Wander(turns, period_s),
        engine=EngineConfig(
            blocks,
            16,
            32,
            sequences,
            in_flight,
            prefix_cache=prefix_cache,
            order=order,
            kv_transfer=kv_transfer,
            speculative_tokens=guesses,
            tiers=TierConfig(dram_blocks),
        ),
        policy=policy,
        wire=Wire(1e6, 0.001),
        layers=4,
        delays=Delays(*delays),
        num_job_executors=job_executors,
        watch=watch,
    )
    for row in run.rows.values():
        assert row["outcome"] in (Outcome.FINISHED, Outcome.CANCELLED) or "gave up after 4 attempts" in row["reason"]
