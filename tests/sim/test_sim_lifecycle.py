"""The life of simulated executors: cold start stage by stage, scaling up and down, delays, and death."""

from itertools import pairwise

import pytest

from cluster import events as ev
from cluster.actions import Action, DispatchTask
from cluster.manager import GroupPlan
from cluster.policy import GroupLoad, ScalingPolicy
from cluster.request import Trigger
from cluster.vocabulary import NS_PER_S, ExecutorState, FailureReason, Outcome, Role, Stage, to_ns
from flowserve.core.config import EngineConfig
from policies.dispatch.round_robin import RoundRobin
from sim.cluster import SimCluster
from sim.coldstart import ColdStart
from sim.latency import Constant
from sim.node import Delays, Failure
from tests.builders import Run, disaggregated, make_arrival, make_spec, run_sim

STEP_S = 0.01


class Steps(ScalingPolicy):
    """As many executors as a timetable says: (from when in s, how many)."""

    period_s = 0.5

    def __init__(self, *timetable: tuple[float, int]) -> None:
        self._timetable = timetable

    def desired(self, load: GroupLoad, now_ns: int) -> int:
        return [wanted for since, wanted in self._timetable if now_ns >= to_ns(since)][-1]


def scaling_of(run: Run, executor: str) -> list[tuple[str, int, int]]:
    return [(what, time, took) for time, name, what, took in run.recorder.scaling if name == executor]


# -- cold start -----------------------------------------------------------------------------------------------------


def test_stages_are_those_of_the_recipe() -> None:
    """Five stages in order; where weights are moved, TE-Load is what that takes."""
    recipe = ColdStart(0.5, 1.5, 0.25, 0.75, 0.125)
    assert recipe.stages() == [
        (Stage.SCALER_PRE, to_ns(0.5)),
        (Stage.TE_PRE_LOAD, to_ns(1.5)),
        (Stage.TE_LOAD, to_ns(0.25)),
        (Stage.TE_POST_LOAD, to_ns(0.75)),
        (Stage.SCALER_POST, to_ns(0.125)),
    ]
    assert ColdStart(load_setup_s=2.0, load="local").stages()[2] == (Stage.TE_LOAD, 0)
    with pytest.raises(ValueError, match="te_post_load_s is -1"):
        ColdStart(te_post_load_s=-1)


def test_readiness_comes_after_the_last_stage() -> None:
    """Each stage is recorded when it ends and with what it took; no request is served before the last one."""
    stages = ColdStart(0.5, 1.5, 0.25, 0.75, 0.125).stages()
    run = run_sim([make_arrival(0, output=1)], stages=stages, latency=lambda: Constant(STEP_S))
    assert set(run.rows) == {0}
    ends, at = [], 0
    for stage, took in stages:
        at += took
        ends.append((str(stage), at, took))
    assert scaling_of(run, "te-0") == [("launch", 0, 0), *ends, ("ready", at, 0)]
    [ready] = run.of(ev.ExecutorReady)
    assert (ready.time, ready.kv_blocks, ready.max_sequences) == (at, 1000, 256)
    # The client waits for the fleet, so its first request arrives when the executor is ready.
    assert run.rows[0]["arrival_ns"] == at
    assert run.rows[0]["first_token_ns"] == at + to_ns(STEP_S)


def test_an_executor_added_later_takes_requests_when_it_is_ready() -> None:
    """Scaled up in mid-run, the second executor gets its first task not before its start-up is over."""
    run = run_sim(
        [make_arrival(n, at_s=0.1 * n, output=60) for n in range(60)],
        groups=[GroupPlan(make_spec(), 1, 1, 2)],
        scaling=Steps((0, 1), (1.0, 2)),
        stages=[(Stage.TE_LOAD, to_ns(2.0))],
        latency=lambda: Constant(STEP_S),
    )
    assert [what for what, *_ in scaling_of(run, "te-1")] == ["launch", "te_load", "ready"]
    launch, ready = (time for what, time, _ in scaling_of(run, "te-1") if what in ("launch", "ready"))
    assert (launch, ready) == (to_ns(1.0), to_ns(3.0))
    tokens = [event.time for event in run.of(ev.FirstToken) if event.executor == "te-1"]
    assert min(tokens) > ready
    assert set(run.recorder.outcomes) == {Outcome.FINISHED}
    # Both were paid from their launch to the end of the run.
    assert run.recorder.npu_seconds() == pytest.approx((2 * run.recorder.end_ns - launch) / NS_PER_S)


# -- down again -----------------------------------------------------------------------------------------------------


def test_scaling_down_drains_first() -> None:
    """The executor that goes finishes its tasks, gets no more, and frees its NPUs only then."""
    dispatched: list[tuple[int, str]] = []

    def watch(event: ev.Event, actions: list[Action], cluster: SimCluster) -> None:
        dispatched.extend((event.time, a.executor) for a in actions if isinstance(a, DispatchTask))

    run = run_sim(
        [make_arrival(n, at_s=0.1 * n, output=100) for n in range(50)],
        groups=[GroupPlan(make_spec(), 2, 1, 2)],
        scaling=Steps((0, 2), (2.0, 1)),
        latency=lambda: Constant(STEP_S),
        watch=watch,
    )
    [draining] = [event for event in run.of(ev.ExecutorAnnounced) if event.state is ExecutorState.DRAINING]
    assert (draining.executor, draining.time) == ("te-1", to_ns(2.0))
    last_task = max(event.time for event in run.of(ev.TaskFinished) if event.executor == "te-1")
    [drained], [retired] = run.of(ev.ExecutorDrained), run.of(ev.ExecutorRetired)
    assert draining.time < last_task == drained.time == retired.time
    assert max(time for time, executor in dispatched if executor == "te-1") <= draining.time
    assert set(run.recorder.outcomes) == {Outcome.FINISHED}
    assert not run.of(ev.TaskFailed)
    held = run.recorder.end_ns + retired.time
    assert run.recorder.npu_seconds() == pytest.approx(held / NS_PER_S)


def test_a_task_on_its_way_to_a_draining_executor_is_placed_again() -> None:
    """A refusal on the way out costs the request nothing: it is served elsewhere, and counts no attempt."""
    run = run_sim(
        [make_arrival(n, at_s=1.98, output=20) for n in range(60)],
        groups=[GroupPlan(make_spec(), 2, 1, 2)],
        scaling=Steps((0, 2), (2.0, 1)),
        latency=lambda: Constant(STEP_S),
        policy=RoundRobin,  # blind: one of its choices falls between the decision to drain and the word of it
        delays=Delays(decision_s=0.0005),
        max_attempts=1,
    )
    refused = run.of(ev.TaskFailed)
    assert {event.reason for event in refused} == {FailureReason.NOT_SERVING}
    assert set(run.recorder.outcomes) == {Outcome.FINISHED}
    assert len(run.of(ev.ExecutorRetired)) == 1


# -- delays ---------------------------------------------------------------------------------------------------------


def test_deciding_takes_time() -> None:
    """Each decision delays its actions: the request reaches the executor one decision after it arrived."""
    decision, step = to_ns(0.004), to_ns(STEP_S)
    run = run_sim(
        [make_arrival(0, at_s=1.0, output=3)], latency=lambda: Constant(STEP_S), delays=Delays(decision_s=0.004)
    )
    row = run.rows[0]
    assert row["lag_ns"] == decision  # the client's own, to send it
    assert row["first_token_ns"] - row["arrival_ns"] == decision + step
    assert row["last_token_ns"] - row["first_token_ns"] == 2 * step


def test_messages_take_time_both_ways() -> None:
    """A task is under way to its executor, and what it says is under way back: heard later than it happened."""
    there, back, step = to_ns(0.003), to_ns(0.007), to_ns(STEP_S)
    run = run_sim(
        [make_arrival(0, at_s=1.0, output=3)],
        latency=lambda: Constant(STEP_S),
        delays=Delays(dispatch_s=0.003, event_s=0.007),
    )
    row = run.rows[0]
    assert row["first_token_ns"] - row["arrival_ns"] == there + step
    assert row["last_token_ns"] - row["arrival_ns"] == there + 3 * step
    [first], [ended] = run.of(ev.FirstToken), run.of(ev.RequestEnded)
    assert first.time - first.occurred == back
    assert ended.time == row["last_token_ns"] + back
    with pytest.raises(ValueError, match="event_s is -1"):
        Delays(event_s=-1)


def test_reports_are_as_old_as_their_way() -> None:
    """A load report arrives with the age of the way it came, and never two of one executor within a period."""
    run = run_sim(
        [make_arrival(n, at_s=0.03 * n, output=50) for n in range(40)],
        executors=2,
        latency=lambda: Constant(STEP_S),
        report_period_s=0.25,
        delays=Delays(event_s=0.02),
    )
    assert {load.time - load.occurred for load in run.recorder.loads} == {to_ns(0.02)}
    for name in ("te-0", "te-1"):
        times = [load.occurred for load in run.recorder.loads if load.executor == name]
        assert len(times) > 3
        assert min(later - earlier for earlier, later in pairwise(times)) >= to_ns(0.25)


# -- death ----------------------------------------------------------------------------------------------------------


def check_retries(run: Run, outputs: dict[int, int]) -> None:
    """Every request ends once and whole; each attempt goes on where the one before ended, elsewhere."""
    assert sorted(event.request_id for event in run.of(ev.RequestEnded)) == sorted(outputs)
    assert {e.request_id: e.generated for e in run.of(ev.RequestEnded)} == outputs
    assert set(run.recorder.outcomes) == {Outcome.FINISHED}
    firsts = [event.request_id for event in run.of(ev.FirstToken)]
    assert len(firsts) == len(set(firsts)) == len(outputs)
    tokens = dict.fromkeys(outputs, 0)
    for event in run.of(ev.TaskFinished, ev.TaskFailed):
        if isinstance(event, ev.TaskFinished):
            assert event.generated == tokens[event.request_id] + event.tokens, "a token was repeated or skipped"
        else:
            assert event.generated >= tokens[event.request_id]
        tokens[event.request_id] = event.generated
    assert tokens == outputs


def test_tasks_of_a_dead_executor_go_on_elsewhere() -> None:
    """Killed in mid-run: its tasks come back before its own end, with their tokens, and finish on the others."""
    run = run_sim(
        [make_arrival(n, at_s=0.02 * n, output=40 + n) for n in range(30)],
        executors=2,
        latency=lambda: Constant(STEP_S),
        failures=[Failure(0.305, "te-0")],
    )
    lost = run.of(ev.TaskFailed)
    assert lost
    assert {(event.executor, event.reason) for event in lost} == {("te-0", FailureReason.EXECUTOR_LOST)}
    assert any(event.generated > 1 for event in lost)
    [died] = run.of(ev.ExecutorFailed)
    order = run.events.index
    assert max(order(event) for event in lost) < order(died)
    assert died.time == to_ns(0.305)
    check_retries(run, {n: 40 + n for n in range(30)})
    places = {event.task_id: event.executor for event in run.of(ev.TaskFinished)}
    assert set(places.values()) == {"te-1", "te-2"}  # te-2 took the place of the dead one
    assert sum(row["failed_tasks"] for row in run.rows.values()) == len(lost)


@pytest.mark.parametrize("victim", ["te-0", "te-1", "te-2", "te-3"])
@pytest.mark.parametrize("at_s", [0.105, 0.1234, 0.25])
def test_a_death_in_a_disaggregated_fleet_loses_nothing(victim: str, at_s: float) -> None:
    """Whether it prefills, holds, fetches or decodes: what an executor took with it is computed again elsewhere."""
    run = run_sim(
        [make_arrival(n, at_s=0.01 * n, prompt=100, output=12) for n in range(30)],
        groups=disaggregated(2, 2),
        engine=EngineConfig(60, 16, 128, 8),
        latency=lambda: Constant(0.005, 0.0001),
        kv_bytes_per_token=100_000,
        failures=[Failure(at_s, victim)],
        delays=Delays(dispatch_s=0.0003, event_s=0.0002, peer_s=0.0004),
    )
    assert len(run.of(ev.ExecutorFailed)) == 1
    check_retries(run, dict.fromkeys(range(30), 12))
    for executor in run.executors.values():
        executor.shell.core.check_integrity()
        assert executor.shell.core.idle, "KV cache is held for nobody"


def test_a_source_that_dies_in_mid_transfer_loses_the_cache() -> None:
    """A copy from an executor that dies has failed at once: the prompt is prefilled again."""
    run = run_sim(
        [make_arrival(0, prompt=64, output=5)],
        groups=disaggregated(1, 1),
        latency=lambda: Constant(STEP_S),
        kv_bytes_per_token=10**7,  # 0.64 s on the way
        failures=[Failure(0.3, "te-0")],
    )
    failed, *_ = run.of(ev.TaskFailed)  # tried again before the job executor has heard who died
    assert (failed.executor, failed.reason, failed.generated) == ("te-1", FailureReason.KV_LOST, 1)
    assert failed.time == to_ns(0.3)
    check_retries(run, {0: 5})


def test_a_request_fails_when_every_attempt_is_lost() -> None:
    """Attempts are limited: then the request ends, once, with the tokens it had and the reason."""
    run = run_sim(
        [make_arrival(0, output=1000)],
        executors=1,
        latency=lambda: Constant(STEP_S),
        failures=[Failure(0.1 * (n + 1), f"te-{n}") for n in range(4)],
        max_attempts=3,
    )
    [ended] = run.of(ev.RequestEnded)
    assert ended.outcome is Outcome.FAILED
    assert ended.reason == "gave up after 3 attempts, the last: executor lost"
    assert ended.generated == len(run.of(ev.TaskFailed)) * 10  # 0.1 s each, one token per 10 ms
    assert run.rows[0]["failed_tasks"] == 3


def test_nothing_to_launch_ends_the_requests() -> None:
    """When launches fail again and again, waiting requests end as failed instead of waiting for ever."""
    run = run_sim(
        [make_arrival(0, output=3)],
        stages=[(Stage.TE_LOAD, to_ns(1.0))],
        failures=[Failure(0.5, "te-0"), Failure(1.0, "te-1"), Failure(1.2, "te-2")],
    )
    [ended] = run.of(ev.RequestEnded)
    assert (ended.outcome, ended.generated) == (Outcome.FAILED, 0)
    assert ended.reason == "no executor for m could be launched: killed"
    assert [what for _, _, what, _ in run.recorder.scaling] == ["launch", "failed"] * 3


def test_the_last_executor_dies_after_launches_were_given_up() -> None:
    """The one executor that started dies when no more are tried: its requests fail, and the run ends."""
    run = run_sim(
        [make_arrival(0, output=1000), make_arrival(1, output=5, after=Trigger("ended", 0))],
        groups=[GroupPlan(make_spec(), 2, 2, 2)],
        stages=[(Stage.TE_LOAD, to_ns(1.0))],
        latency=lambda: Constant(STEP_S),
        failures=[Failure(1.05 + 0.05 * n, f"te-{n}") for n in (1, 2, 3, 4)] + [Failure(3.0, "te-0")],
    )
    assert [row["outcome"] for row in run.rows.values()] == [Outcome.FAILED, Outcome.FAILED]
    [ready, _] = run.of(ev.ExecutorReady)
    assert ready.executor == "te-0"
    assert run.of(ev.NoCapacity)[0].time == to_ns(3.0)


def test_a_fleet_without_decode_executors_fails_its_requests() -> None:
    """Prefill alone serves nobody: when the decode group cannot be launched, what waits for it ends as failed."""
    run = run_sim(
        [make_arrival(0, output=5)],
        groups=disaggregated(1, 1),
        stages=[(Stage.TE_LOAD, to_ns(1.0))],
        failures=[Failure(0.5, "te-1"), Failure(0.6, "te-2"), Failure(0.7, "te-3")],
    )
    [ended] = run.of(ev.RequestEnded)
    assert ended.outcome is Outcome.FAILED
    assert ended.reason == "no executor for m could be launched: killed"
    assert all(executor.shell.core.idle for executor in run.executors.values())


def test_a_model_that_nobody_serves_fails() -> None:
    """A request for a model without any group of executors ends as failed."""
    run = run_sim([make_arrival(0, output=5, model="other"), make_arrival(1, output=5)])
    assert {number: row["outcome"] for number, row in run.rows.items()} == {0: Outcome.FAILED, 1: Outcome.FINISHED}
    assert run.rows[0]["reason"] == "no executor for other could be launched: no group of executors serves it"


def test_a_run_that_cannot_go_on_says_so() -> None:
    """A client that waits for what can never happen is an error with the time, not an endless loop."""
    cluster = SimCluster(("client", "cm"), lambda spec: pytest.fail("nothing is launched"))
    for _ in range(2):
        assert isinstance(cluster.next_event(), ev.RunStarted)
    with pytest.raises(RuntimeError, match="nothing can happen any more at 0 ns"):
        cluster.next_event()


def test_roles_of_replacements() -> None:
    """An executor that died is replaced by one of the same model and role."""
    run = run_sim(
        [make_arrival(n, at_s=0.1 * n, output=5) for n in range(20)],
        groups=disaggregated(1, 2),
        failures=[Failure(0.5, "te-1")],
    )
    assert {event.executor: event.spec.role for event in run.of(ev.ExecutorReady)} == {
        "te-0": Role.PREFILL,
        "te-1": Role.DECODE,
        "te-2": Role.DECODE,
        "te-3": Role.DECODE,
    }
