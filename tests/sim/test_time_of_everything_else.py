"""Time that no device spends: tokenizing, messages, decisions, reports, the host's part of steps; each is felt."""

import pytest

from cluster import events as ev
from cluster.latency import LatencyModel
from cluster.manager import GroupPlan
from cluster.request import Arrival
from cluster.vocabulary import to_ns
from flowserve.core.config import EngineConfig
from policies.scaling.target_utilisation import TargetUtilisation
from sim.latency import Constant
from sim.node import Delays
from sim.tokenizers import Tokenizers
from tests.builders import Run, make_arrival, make_spec, run_sim

STEP_S = 0.01


def constant() -> LatencyModel:
    return Constant(STEP_S)


def ttft_s(run: Run, request_id: int = 0) -> float:
    row = run.rows[request_id]
    return (row["first_token_ns"] - row["arrival_ns"]) / 1e9


def test_prompts_queue_for_tokenizers() -> None:
    """Three prompts of 1,000 tokens at 10 us each come at once: with one worker they are encoded at 10, 20 and 30 ms,
    with two at 10, 10 and 20; the time counts in TTFT.
    """
    for workers, encoded in ((1, (10, 20, 30)), (2, (10, 10, 20)), (9, (10, 10, 10))):
        delays = Delays(token_s=1e-5, tokenizers=workers)
        workload = [make_arrival(number, 0.0, prompt=1000) for number in range(3)]
        engine = EngineConfig(kv_blocks=1000, token_budget=4000)
        run = run_sim(workload, executors=3, engine=engine, latency=constant, delays=delays)
        heard = [event.time - event.occurred for event in run.of(ev.RequestArrived)]
        assert heard == [each * 1_000_000 for each in encoded]
        assert [round(ttft_s(run, number) * 1e3) for number in range(3)] == [each + 10 for each in encoded]


def test_a_request_may_be_cancelled_before_it_is_encoded() -> None:
    """The job executor hears of it first, then that it is not wanted any more, and no executor computes it."""
    workload = [make_arrival(0, prompt=1000, cancel_after_s=0.001), make_arrival(1, 0.5)]
    run = run_sim(workload, delays=Delays(token_s=1e-5))
    heard = [type(event) for event in run.events if getattr(event, "request_id", 0) == 0 and event.to == "je-0"]
    assert heard.index(ev.CancelRequested) > 0
    assert run.rows[0]["outcome"] == "cancelled"
    assert [event.request_id for event in run.of(ev.FirstToken)] == [1]


def test_a_worker_is_free_when_its_prompt_is_done() -> None:
    """Later prompts do not wait for what was encoded long before."""
    tokenizers = Tokenizers(2, 1e-6)
    assert [tokenizers.encode(now, tokens) for now, tokens in ((0, 1000), (0, 10), (20_000, 5), (30_000, 5))] == [
        1_000_000,
        10_000,
        25_000,
        35_000,
    ]


@pytest.mark.parametrize("change", [{"tokenizers": 0}, {"token_s": -1.0}])
def test_senseless_tokenizers(change: dict[str, float]) -> None:
    """No worker, or negative time."""
    with pytest.raises(ValueError, match=r"delays\.(tokenizers is 0: allowed are 1|token_s is -1)"):
        Delays(**change)


def test_messages_and_decisions_count_in_the_first_token() -> None:
    """Decision, message to the executor, step: TTFT is their sum; the way back delays what comes after it."""
    delays = Delays(dispatch_s=0.003, event_s=0.007, decision_s=0.002)
    run = run_sim([make_arrival(0, 1.0, output=2)], latency=constant, delays=delays)
    assert ttft_s(run) == pytest.approx(0.002 + 0.003 + STEP_S)
    ended = run.of(ev.RequestEnded)[0]
    assert ended.time - run.rows[0]["last_token_ns"] == to_ns(0.007 + 0.002)


def first_launch(period_s: float, event_s: float) -> int:
    """When a cluster manager that sees ten requests on one executor launches another one, in ns."""
    scaling = TargetUtilisation(target=0.5, period_s=0.01)
    workload = [make_arrival(number, output=200) for number in range(10)]
    run = run_sim(
        workload,
        groups=[GroupPlan(make_spec(), 1, 1, 3)],
        engine=EngineConfig(kv_blocks=1000, max_sequences=10),
        latency=constant,
        scaling=scaling,
        report_period_s=period_s,
        delays=Delays(event_s=event_s),
    )
    return min(time for time, _, what, _ in run.recorder.scaling if what == "launch" and time > 0)


def test_old_load_reports_scale_later() -> None:
    """Executors report at most every period, and reports take their way: both put the decision to launch off."""
    soon, seldom, slow = first_launch(0.02, 0.0), first_launch(0.5, 0.0), first_launch(0.02, 0.3)
    assert soon < 0.05e9
    assert seldom >= 0.4e9
    assert slow >= 0.3e9


def test_synchronous_engines_wait_for_their_host() -> None:
    """One plan at a time pays the host's 4 ms in each of 50 steps; with two in flight they are hidden by 10 ms."""
    tpot = {}
    for in_flight in (1, 2):
        engine = EngineConfig(kv_blocks=1000, max_in_flight=in_flight)
        workload: list[Arrival] = [make_arrival(0, output=51)]
        row = run_sim(workload, engine=engine, latency=constant, host_step_s=0.004).rows[0]
        tpot[in_flight] = (row["last_token_ns"] - row["first_token_ns"]) / 50e9
    assert tpot == {1: pytest.approx(STEP_S + 0.004), 2: pytest.approx(STEP_S)}
