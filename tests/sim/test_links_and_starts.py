"""What a simulated run promises as a whole: costs of a hand-over, order of start-ups, order of time, repetition."""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import events as ev
from cluster.manager import GroupPlan
from cluster.vocabulary import Outcome, Stage, to_ns
from flowserve.core.config import EngineConfig
from policies.scaling.target_utilisation import TargetUtilisation
from sim.coldstart import ColdStart
from sim.latency import Constant
from sim.node import Delays, Failure
from sim.topology import Wire
from tests.builders import Run, disaggregated, make_arrival, make_spec, run_sim

CALL_S = 0.0005


def second_gap(pieces: int = 1, call_s: float = CALL_S, bytes_per_s: float = 1e6) -> int:
    """ns between first and second token of a lone request on one prefill and one decode executor."""
    run = run_sim(
        [make_arrival(0, prompt=64, output=4)],
        groups=disaggregated(),
        wire=Wire(bytes_per_s, 0.0, call_s),
        kv_segments=pieces,
        kv_bytes_per_token=1000,
    )
    assert len(run.recorder.gaps) == 3
    return run.recorder.gaps[0]


def test_the_gap_behind_the_first_token_moves_by_what_changed() -> None:
    """More pieces, a dearer call, half the bandwidth: the second token is later by exactly that."""
    base = second_gap()
    assert second_gap(pieces=65) - base == 64 * to_ns(CALL_S)
    assert second_gap(pieces=4, call_s=2 * CALL_S) - base == 7 * to_ns(CALL_S)
    assert second_gap(bytes_per_s=5e5) - base == to_ns(64_000 / 1e6)


# -- start-ups ------------------------------------------------------------------------------------------------------


def test_every_start_goes_through_its_stages() -> None:
    """Executors launched in mid-run and after a failure: every stage in order, each as late as it takes, then ready."""
    stages = ColdStart(0.1, 0.2, 0.05, 0.3, 0.4).stages()
    run = run_sim(
        [make_arrival(number, at_s=0.05 * number, output=40) for number in range(80)],
        groups=[GroupPlan(make_spec(), 1, 1, 4)],
        engine=EngineConfig(kv_blocks=200, max_sequences=4),
        stages=stages,
        scaling=TargetUtilisation(period_s=0.5, down_delay_s=1.0),
        failures=[Failure(3.0, "te-0")],
        delays=Delays(decision_s=0.001),
    )
    launched = [name for _, name, what, _ in run.recorder.scaling if what == "launch"]
    assert len(launched) > 2
    for name in launched:
        story = [(what, at, took) for at, executor, what, took in run.recorder.scaling if executor == name]
        begin = story[0][1] + to_ns(0.001)  # the launch is under way when the decision is made
        expected, at = [("launch", story[0][1], 0)], begin
        for stage, took in stages:
            at += took
            expected.append((str(stage), at, took))
        expected.append(("ready", at, 0))
        assert story[: len(expected)] == expected[: len(story)]
        first = [event.time for event in run.of(ev.FirstToken) if event.executor == name]
        assert not first or min(first) > at


def test_start_stages_of_a_recipe_are_all_five() -> None:
    """A recipe without times still has every stage, so that tables of start-ups have no holes."""
    assert ColdStart().stages() == [(stage, 0) for stage in Stage]


# -- whole runs -----------------------------------------------------------------------------------------------------


def eventful(failures: list[Failure], delays: Delays, seed: int = 0) -> Run:
    """A disaggregated run with two job executors, in which executors die."""
    return run_sim(
        [make_arrival(number, at_s=0.013 * number, prompt=20 + number, output=1 + number % 9) for number in range(40)],
        groups=disaggregated(2, 2, 1),
        engine=EngineConfig(kv_blocks=40, token_budget=64, max_sequences=4),
        latency=lambda: Constant(0.004, 0.0001),
        wire=Wire(1e7, 0.001, CALL_S),
        stages=[(Stage.TE_LOAD, to_ns(0.1))],
        num_job_executors=2,
        report_period_s=0.05,
        delays=delays,
        failures=failures,
        seed=seed,
    )


def records(run: Run) -> dict[str, Any]:
    columns = {name: list(column) for name, column in run.recorder.requests.items()}
    return {**columns, "outcomes": run.recorder.outcomes, "gaps": list(run.recorder.gaps), "log": run.log}


@given(
    failures=st.lists(
        st.builds(
            Failure,
            at_s=st.floats(0.0, 1.0).map(lambda at: round(at, 4)),
            executor=st.sampled_from([f"te-{number}" for number in range(9)]),
        ),
        max_size=6,
    ),
    delays=st.builds(Delays, *[st.sampled_from([0.0, 0.0007])] * 4),
    seed=st.integers(0, 3),
)
@settings(max_examples=40)
def test_whoever_dies_every_request_ends_once(failures: list[Failure], delays: Delays, seed: int) -> None:
    """Time never goes back, nothing is heard before it occurred, every request ends once and whole; and again so."""
    run = eventful(failures, delays, seed)
    times = [event.time for event in run.events]
    assert times == sorted(times)
    assert all(0 <= event.occurred <= event.time for event in run.events)
    ends = {event.request_id: event for event in run.of(ev.RequestEnded)}
    assert len(run.of(ev.RequestEnded)) == len(ends) == len(run.rows) == 40
    for request_id, event in ends.items():
        if event.outcome is Outcome.FINISHED:
            assert event.generated == 1 + request_id % 9
        else:
            assert event.outcome is Outcome.FAILED and event.reason
    assert len({event.request_id for event in run.of(ev.FirstToken)}) == len(run.of(ev.FirstToken))
    assert records(eventful(failures, delays, seed)) == records(run)


def test_the_seed_matters() -> None:
    """Another seed spreads the requests over the job executors in another way."""
    runs = [eventful([], Delays(), seed) for seed in (0, 1)]
    first, second = ([(event.to, event.request.request_id) for event in run.of(ev.RequestArrived)] for run in runs)
    assert len(first) == len(second) == 40 and first != second
