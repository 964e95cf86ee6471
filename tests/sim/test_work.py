"""Agents and fine-tuning in simulated runs: slots, contexts, saved states and shared NPUs change what comes out."""

from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import events as ev
from cluster.cost import Rates, costs
from cluster.decision_log import Decision
from cluster.manager import GroupPlan
from cluster.request import Trigger
from cluster.vocabulary import NS_PER_S, ExecutorSpec, FailureReason, Role, Stage, to_ns
from cluster.work import FIRST_CALL, Agent, Call, Truth, WorkArrival, WorkRequest
from flowserve.core.config import EngineConfig
from policies.scaling.target_utilisation import TargetUtilisation
from sim.latency import Constant
from sim.node import Delays, Failure
from tests.builders import (
    MODEL,
    Run,
    disaggregated,
    make_agent,
    make_arrival,
    make_tuning,
    run_sim,
    workers,
)


def run_work(workload: Sequence[Any], cpu: int = 1, training: int = 0, **options: Any) -> Run:
    groups = [*disaggregated(0, 0, options.pop("executors", 1)), *workers(cpu, training)]
    return run_sim(workload, groups=groups, **options)


def rows(run: Run) -> list[Any]:
    assert run.control.work is not None
    return run.control.work.recorder.rows


def jct_s(run: Run) -> list[float]:
    return [(row.ended_ns - row.started_ns) / NS_PER_S for row in rows(run)]


def test_an_agent_takes_its_calls_and_its_tools() -> None:
    """Alone, its time is the sum of what its steps take: 4 and 8 steps of 10 ms, and the longer of two tools."""
    run = run_work([make_agent(0, [(32, 4)], [0.5, 0.3], [(64, 8)])], slots=2)
    assert jct_s(run) == [0.62]
    assert [row.outcome for row in rows(run)] == ["finished"]


def test_tools_queue_for_slots() -> None:
    """Six agents with a second's tool each: on one slot the last waits for five, on six slots nobody for anybody."""
    agents = [make_agent(number, [1.0]) for number in range(6)]
    assert sorted(jct_s(run_work(agents))) == [1, 2, 3, 4, 5, 6]
    assert jct_s(run_work(agents, slots=6)) == [1] * 6
    assert jct_s(run_work(agents, cpu=2, slots=3)) == [1] * 6


def test_later_calls_find_the_context_of_earlier_ones() -> None:
    """Prompt and answer of a call are the beginning of the next prompt: all of its full blocks are cached."""
    ids = tuple(range(1000, 1020))
    first = make_agent(0, [(64, 32)], [0.1], [(128, 16)], ids=ids)
    think = Trigger("ended", request_id=0, delay_ns=to_ns(5.0))
    second = make_agent(1, [(160, 8)], ids=ids, after=think)
    run = run_work([first, second])
    cached = [run.rows[FIRST_CALL + number]["cached_tokens"] for number in range(3)]
    assert cached == [0, 80, 128]  # the last block of a prompt's and answer's 96 and 144 tokens is not full yet
    started = [row.started_ns for row in rows(run)]
    ended = rows(run)[0].ended_ns
    assert started[1] - ended == 5 * NS_PER_S
    apart = run_work([make_agent(0, [(64, 32)], [0.1], [(128, 16)])])
    assert apart.rows[FIRST_CALL + 1]["cached_tokens"] == 0


def test_a_call_that_leaves_out_the_answer_does_not_find_it() -> None:
    """Where the next prompt is shorter than prompt and answer, the answer's blocks are nobody's."""
    calls = (Call(64, 32, 0), Call(80, 4, 0))
    work = Agent(tuple((call,) for call in calls), (tuple(range(10)),))
    run = run_work([WorkArrival(WorkRequest(0, work, MODEL), Truth((32, 4)))])
    assert run.rows[FIRST_CALL + 1]["cached_tokens"] == 64


def test_what_a_failure_costs_depends_on_saved_states() -> None:
    """A worker dies in second 8 of training: saved every 2 steps, 1 step is lost, unsaved all; both end."""
    failure = [Failure(8.0, "te-2")]

    def run(checkpoint: int | None) -> Run:
        tuning = make_tuning(0, steps=10, checkpoint_steps=checkpoint)
        return run_work([tuning], training=2, failures=failure)

    saved, unsaved = run(2), run(None)
    for each in (saved, unsaved):
        preprocess, train = rows(each)
        assert (train.outcome, train.failed_tasks, train.steps) == ("finished", 1, 10)
        assert train.npu_ns > 10 * 8 * NS_PER_S
        assert preprocess.outcome == "finished"
    assert jct_s(saved)[1] < 13 < 17 < jct_s(unsaved)[1]


def test_training_takes_npus_only_while_it_lasts() -> None:
    """Scaled from none: the worker is launched for the job and retired after it, and serving goes on beside it."""
    spec = ExecutorSpec("training", Role.TRAINING, 8)
    groups = [*disaggregated(0, 0, 1), *workers(1), GroupPlan(spec, 0, 0, 2)]
    workload = [make_tuning(0, steps=10), *(make_arrival(number, 3.0 * number) for number in range(1, 31))]
    scaling = TargetUtilisation(target=1.0, period_s=1.0, down_delay_s=3.0)
    run = run_sim(workload, groups=groups, scaling=scaling, stages=[(Stage.TE_LOAD, to_ns(2.0))])
    assert [row.outcome for row in rows(run)] == ["finished"] * 2
    held = run.recorder.npu_seconds(role=Role.TRAINING) / 8
    assert 2 + 10.5 < held < 25 < run.recorder.end_ns / NS_PER_S
    assert run.recorder.npu_seconds() == pytest.approx(
        run.recorder.npu_seconds(role=Role.TRAINING) + run.recorder.npu_seconds(role=Role.COLOCATED)
    )


def test_training_npus_are_busy_while_they_train() -> None:
    """Costs know what of a training executor's time was used; workers on CPUs cost nothing, whatever their rates."""
    run = run_work([make_tuning(0, steps=10, checkpoint_steps=5), make_arrival(1, 20.0)], training=1)
    (train,) = (row for row in rows(run) if row.kind == "train")
    held = {each.spec.role: each for each in run.recorder.held()}
    assert train.ran_ns == held[Role.TRAINING].busy_ns < held[Role.TRAINING].held_ns
    assert held[Role.CPU].busy_ns > 0
    rates = {Role.COLOCATED: Rates(0.0, 0.0, 0.0), Role.TRAINING: Rates(1.0, 1000.0, 0.0), Role.CPU: Rates()}
    found = costs(run.recorder, lambda spec: rates[spec.role])
    assert found["energy_kwh"] == pytest.approx(8 * train.ran_ns / NS_PER_S / 3600)
    assert found["cost_usd"] == pytest.approx(run.recorder.npu_seconds(role=Role.TRAINING) / 3600)
    assert run.recorder.npu_seconds(MODEL) == run.recorder.npu_seconds(role=Role.COLOCATED)


def test_a_call_is_a_request_that_is_never_late() -> None:
    """Calls are recorded like what users ask for, with a lag of 0; they wait for a tokenizer, and may be cancelled."""
    delays = Delays(tokenizers=1, token_s=0.001)
    agents = [make_agent(number, [(100, 4)], cancel_after_s=0.15 if number == 2 else None) for number in range(3)]
    run = run_work([*agents, make_arrival(3, 1.0)], delays=delays)
    calls = [row for number, row in run.rows.items() if number >= FIRST_CALL]
    assert [row["lag_ns"] for row in calls] == [0] * 3
    assert sorted(jct_s(run)[:2]) == [pytest.approx(0.1 + 0.04), pytest.approx(0.2 + 0.04)]
    assert [row.outcome for row in rows(run)] == ["finished", "finished", "cancelled"]


def test_a_more_important_job_takes_over_at_a_saved_state() -> None:
    """It waits for the task at hand, not for the job; the other goes on behind it and restores its state."""
    long = make_tuning(0, steps=8, checkpoint_steps=2)
    urgent = make_tuning(1, steps=2, at_s=3.0, priority=1)
    run = run_work([long, urgent], training=1)
    trains = {row.request_id: row for row in rows(run) if row.kind == "train"}
    assert trains[1].ended_ns < trains[0].ended_ns
    assert trains[0].ran_ns == (8 + 2 * 0.5) * NS_PER_S  # restored at the start, and again after the other one


def test_agents_and_chat_share_the_engine() -> None:
    """Calls of agents and requests of users are in one batch: with one place in it, each waits for the other."""
    workload = [make_agent(0, [(32, 50)], [0.1], [(64, 50)]), make_arrival(1, 0.1, output=50)]
    together = run_work(workload, engine=EngineConfig(1000, max_sequences=1))
    alone = run_work(workload[:1], engine=EngineConfig(1000, max_sequences=1))
    assert jct_s(together)[0] > jct_s(alone)[0]
    assert together.rows[1]["first_token_ns"] > to_ns(0.5)


def test_a_model_too_large_for_the_worker_fails_its_request() -> None:
    """The reason is the request's; nothing else is harmed."""

    def too_large(spec: ExecutorSpec, operation: object) -> int:
        raise ValueError("does not fit")

    run = run_work([make_tuning(0), make_arrival(1)], work_time=too_large)
    (row,) = rows(run)
    assert (row.outcome, row.reason) == ("failed", "does not fit")
    assert run.rows[1]["outcome"] == "finished"


def test_draining_and_killed_workers_give_their_tasks_back() -> None:
    """Every worker dies once in mid-task: tools run again on those launched in their place."""
    agents = [make_agent(number, [1.0], [1.0]) for number in range(8)]
    failures = [Failure(0.5, "te-1"), Failure(1.7, "te-2")]
    run = run_work(agents, cpu=2, slots=2, failures=failures)
    assert {row.outcome for row in rows(run)} == {"finished"}
    assert sum(row.failed_tasks for row in rows(run)) == 4
    assert len(run.of(ev.WorkFailed)) == 4
    assert {event.reason for event in run.of(ev.WorkFailed)} == {FailureReason.EXECUTOR_LOST}


@st.composite
def mixtures(draw: st.DrawFn) -> list[Any]:
    """Up to ten requests of all kinds, some in closed loop, some cancelled."""
    workload: list[Any] = []
    at_s = 0.0
    ids = tuple(range(500, 600))
    for number in range(draw(st.integers(1, 10))):
        at_s += draw(st.sampled_from([0.0, 0.013, 0.4]))
        cancel_s = draw(st.sampled_from([None, None, None, 0.0, 0.31, 2.0]))
        match draw(st.integers(0, 2)):
            case 0:
                workload.append(make_arrival(number, at_s, draw(st.integers(1, 80)), draw(st.integers(1, 40))))
            case 1:
                prompts = sorted(draw(st.lists(st.integers(1, 400), min_size=1, max_size=4)))
                rounds: list[Any] = []
                for prompt in prompts:
                    rounds += [[(prompt, draw(st.integers(1, 30)))], [draw(st.sampled_from([0.0, 0.1, 0.7]))]]
                after = Trigger("ended", request_id=number - 1, delay_ns=3) if number and draw(st.booleans()) else None
                workload.append(make_agent(number, *rounds, at_s=at_s, ids=ids, after=after, cancel_after_s=cancel_s))
            case _:
                steps, saved = draw(st.integers(1, 5)), draw(st.sampled_from([None, 1, 2]))
                priority = draw(st.integers(0, 1))
                workload.append(
                    make_tuning(number, steps, at_s, saved, 2, [(20, 5)] * 2, priority, cancel_after_s=cancel_s)
                )
    return workload


@given(
    workload=mixtures(),
    failures=st.lists(
        st.builds(Failure, st.sampled_from([0.0, 0.3, 0.9, 3.1]), st.sampled_from(["te-0", "te-1", "te-2"])), max_size=3
    ),
    delays=st.sampled_from([None, Delays(0.0004, 0.0003, 0.0001, 0.0002)]),
    slots=st.integers(1, 3),
)
@settings(max_examples=40)
def test_runs_with_jobs_are_the_same_coalesced_and_stepped(
    workload: list[Any], failures: list[Failure], delays: Delays | None, slots: int
) -> None:
    """Same records and same jobs, to the nanosecond; and fed back, the events give the same actions."""
    options: dict[str, Any] = {
        "training": 1,
        "slots": slots,
        "failures": failures,
        "delays": delays,
        "engine": EngineConfig(60, max_sequences=4),
        "latency": lambda: Constant(0.01, 0.0001),
        "stages": [(Stage.TE_LOAD, 50_000_000)],
    }
    runs = [run_work(workload, coalesce=coalesce, **options) for coalesce in (True, False)]
    coalesced, stepped = runs
    assert coalesced.rows == stepped.rows
    assert coalesced.log == stepped.log
    for one, other in zip(rows(coalesced), rows(stepped), strict=True):
        assert all(getattr(one, name) == getattr(other, name) for name in one.__slots__)
    assert {row.outcome for row in rows(coalesced)} <= {"finished", "failed", "cancelled"}


def test_decisions_read_back() -> None:
    """Every line of the log of a run with jobs is what it was before it was written."""
    run = run_work([make_agent(0, [(32, 4)], [0.5]), make_tuning(1, evaluation=[(9, 2)])], training=1)
    lines = run.log.splitlines()[1:]
    decisions = [msgspec.json.decode(line, type=Decision) for line in lines]
    assert [decision.event for decision in decisions] == run.events


def test_arrivals_are_checked() -> None:
    """A row whose lengths are not those of its steps, or whose contexts are missing, says so."""
    with pytest.raises(ValueError, match="has 1 steps and the lengths"):
        WorkArrival(WorkRequest(0, Agent(((Call(3, 3),),)), MODEL), Truth())
    with pytest.raises(ValueError, match="lies in a context that is not among the 0"):
        Agent(((Call(3, 3, 0),),))
    with pytest.raises(ValueError, match="a round without steps"):
        Agent(((),))
