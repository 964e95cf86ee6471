"""The control plane on engine processes that only sleep: nothing is lost, whatever dies."""

import pytest

from cluster import events as ev
from cluster.manager import GroupPlan
from cluster.metrics import Slo, summarise
from cluster.request import Arrival, Trigger
from cluster.vocabulary import ExecutorState, FailureReason, Outcome
from flowserve.core.config import EngineConfig
from flowserve.runtime.wire import NullDevice
from policies.scaling.fixed import Fixed
from tests.builders import disaggregated, make_arrival, make_spec
from tests.real.engines import COLOCATED, RealRun, Watch, alive, kill_on, run_real

PAIR = disaggregated(1, 1)
# Small steps, so that prompts take several and a queue forms.
ENGINE = EngineConfig(kv_blocks=400, token_budget=64, max_sequences=16)
SLOW = NullDevice(0.003)
"""Leaves time to strike before all is done; the tokens are the same."""


def workload() -> list[Arrival]:
    """Requests of many lengths, all at once: executors are busy from the start."""
    return [make_arrival(n, prompt=20 + 37 * n % 160, output=20 + 31 * n % 90) for n in range(24)]


@pytest.fixture(scope="module")
def undisturbed() -> RealRun:
    """The workload on two colocated executors, and nothing happens to them."""
    return run_real(workload(), engine=ENGINE)


def expected() -> dict[int, tuple[str, int]]:
    return {a.request.request_id: ("finished", a.answer.output_tokens) for a in workload()}


def test_an_undisturbed_run(undisturbed: RealRun) -> None:
    """Every request finishes with the tokens it should have, on both executors, and no process is left."""
    assert undisturbed.ends == expected()
    assert {number: len(tokens) for number, tokens in undisturbed.outputs.items()} == {
        number: tokens for number, (_, tokens) in expected().items()
    }
    assert {event.executor for event in undisturbed.of(ev.TaskFinished)} == {"te-0", "te-1"}
    assert not any(alive(pid) for pid in undisturbed.pids.values())


def test_disaggregated_outputs_are_the_same(undisturbed: RealRun) -> None:
    """A prefill and a decode executor together yield, token by token, what colocated ones do."""
    run = run_real(workload(), engine=ENGINE, groups=PAIR)
    assert run.ends == expected()
    assert run.outputs == undisturbed.outputs
    assert {event.executor for event in run.of(ev.TaskFinished) if event.stopped} == {"te-1"}
    assert {event.executor for event in run.of(ev.FirstToken)} == {"te-0"}


@pytest.mark.parametrize(
    ("groups", "victim", "watch"),
    [
        pytest.param(COLOCATED, "te-1", kill_on("te-1", ev.FirstToken, 3), id="colocated"),
        pytest.param(PAIR, "te-0", kill_on("te-0", ev.FirstToken, 2), id="prefill"),
        pytest.param(PAIR, "te-1", kill_on("te-1", ev.TaskFinished, 2, stopped=True), id="decode"),
    ],
)
def test_a_killed_executor_costs_no_token(
    undisturbed: RealRun, groups: list[GroupPlan], victim: str, watch: Watch
) -> None:
    """After kill -9 of one executor every request still finishes, with the very tokens of an undisturbed run."""
    run = run_real(workload(), engine=ENGINE, device=SLOW, groups=groups, watch=watch)
    lost = [event for event in run.of(ev.TaskFailed) if event.reason is FailureReason.EXECUTOR_LOST]
    assert lost, "the executor had nothing to lose"
    assert {event.executor for event in lost} == {victim}
    (failed,) = run.of(ev.ExecutorFailed)
    assert (failed.executor, failed.reason) == (victim, "killed by signal 9")
    assert run.events.index(lost[0]) < run.events.index(failed)  # later ones were sent before the word went round
    assert run.ends == expected()
    assert run.outputs == undisturbed.outputs
    firsts = [event.request_id for event in run.of(ev.FirstToken)]
    assert sorted(firsts) == sorted(set(firsts))
    # The cluster manager starts another of the same kind.
    (spec,) = {launch.spec for launch in run.launches if launch.executor == victim}
    assert [launch.spec for launch in run.launches[2:]] == [spec]
    if groups is PAIR:
        replacement = run.launches[2].executor
        assert replacement in {event.executor for event in run.of(ev.ExecutorReady)}
        assert replacement in {event.executor for event in run.of(ev.TaskFinished)}
    assert not any(alive(pid) for pid in run.pids.values())


def test_without_retries_lost_requests_are_reported(undisturbed: RealRun) -> None:
    """Where a request may be tried once only, those on the dead executor fail with a reason, the others finish."""
    watch = kill_on("te-0", ev.FirstToken, 3)
    run = run_real(workload(), engine=ENGINE, device=SLOW, max_attempts=1, watch=watch)
    lost = {event.request_id for event in run.of(ev.TaskFailed)}
    assert lost
    assert {number for number, (outcome, _) in run.ends.items() if outcome == "failed"} == lost
    assert set(run.ends) == set(expected())
    pairs = set(zip(run.recorder.outcomes, run.recorder.reasons, strict=True))
    assert pairs == {("finished", ""), ("failed", "gave up after 1 attempts, the last: executor lost")}
    for number, (outcome, tokens) in run.ends.items():
        assert run.outputs[number] == undisturbed.outputs[number][:tokens]
        assert outcome == "failed" or tokens == len(undisturbed.outputs[number])


def test_every_executor_killed_again_and_again(undisturbed: RealRun) -> None:
    """Executors that die one after the other are replaced each time, and no token is lost."""
    strikes = [kill_on(f"te-{number}", ev.FirstToken, 2) for number in range(4)]

    def watch(*arguments: object) -> None:
        for strike in strikes:
            strike(*arguments)  # type: ignore[arg-type]

    run = run_real(workload(), engine=ENGINE, device=SLOW, max_attempts=10, watch=watch)
    assert run.ends == expected()
    assert run.outputs == undisturbed.outputs
    assert len(run.of(ev.ExecutorFailed)) >= 2
    assert not any(alive(pid) for pid in run.pids.values())


def test_many_small_requests(undisturbed: RealRun) -> None:
    """Two thousand tiny requests pass, none is lost, and the lateness of the load generator is on record."""
    arrivals = [make_arrival(n, at_s=0.0002 * n, prompt=5 + n % 11, output=1 + n % 3) for n in range(2000)]
    run = run_real(arrivals, engine=EngineConfig(kv_blocks=2000), device=NullDevice(0.0))
    assert run.ends == {n: ("finished", 1 + n % 3) for n in range(2000)}
    assert {number: len(tokens) for number, tokens in run.outputs.items()} == {n: 1 + n % 3 for n in range(2000)}
    assert len(run.of(ev.FirstToken)) == 2000
    lags = run.recorder.requests["lag_ns"]
    assert len(lags) == 2000
    assert min(lags) >= 0
    summary = summarise(run.recorder, Slo())
    assert summary["lag_max_s"] == max(lags) / 1e9
    assert 0 <= summary["lag_p99_s"] <= summary["lag_max_s"]


def test_closed_loop_and_cancellation() -> None:
    """Requests wait for others and are given up in mid-flight on real engines too."""
    arrivals = [
        make_arrival(0, output=5),
        make_arrival(1, output=5, after=Trigger("ended", request_id=0, delay_ns=1_000_000)),
        make_arrival(2, output=5, after=Trigger("first_token", request_id=1)),
        make_arrival(3, output=10_000, cancel_after_s=0.05),
    ]
    run = run_real(arrivals)
    assert {number: run.ends[number] for number in range(3)} == dict.fromkeys(range(3), ("finished", 5))
    outcome, tokens = run.ends[3]
    assert outcome == Outcome.CANCELLED
    assert tokens < 10_000
    ended = {event.request_id: event.time for event in run.of(ev.RequestEnded)}
    arrived = {event.request.request_id: event.time for event in run.of(ev.RequestArrived)}
    assert arrived[1] >= ended[0] + 1_000_000


class _ShrinkOnce(Fixed):
    """Two executors until the third request has ended, then one."""

    def desired(self, load: object, now_ns: int) -> int:
        return 1 if self.shrink else 2

    shrink = False
    period_s = 0.02


def test_scaling_down_drains_a_process() -> None:
    """An executor that is no longer wanted finishes its tasks, is retired, and its process ends during the run."""
    policy = _ShrinkOnce()

    def watch(event: ev.Event, *_: object) -> None:
        policy.shrink = policy.shrink or isinstance(event, ev.RequestEnded)

    arrivals = [make_arrival(n, output=40) for n in range(8)]
    arrivals += [make_arrival(8, output=5, after=Trigger("ended", count=8, delay_ns=300_000_000))]
    run = run_real(arrivals, groups=[GroupPlan(make_spec(), 2, 1, 2)], scaling=policy, watch=watch)
    assert set(run.ends.values()) == {("finished", 40), ("finished", 5)}
    assert [event.executor for event in run.of(ev.ExecutorDrained)] == ["te-1"]
    assert [event.executor for event in run.of(ev.ExecutorRetired)] == ["te-1"]
    states = [event.state for event in run.of(ev.ExecutorAnnounced) if event.executor == "te-1"]
    assert states == [ExecutorState.READY, ExecutorState.DRAINING]
    assert run.of(ev.TaskFailed, ev.ExecutorFailed) == []
