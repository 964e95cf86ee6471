"""The job executor for agents and fine-tuning, event by event, without a cluster."""

import pickle
from typing import Any

import pytest

from cluster import events as ev
from cluster.actions import AbortTask, Action, CancelRequest, DispatchWork, EndWork, ReportDemand, SubmitCall
from cluster.jobs.executor import WorkJobExecutor
from cluster.vocabulary import ExecutorSpec, ExecutorState, FailureReason, Outcome, Role
from cluster.work import FIRST_CALL, WORK, Preprocess, RunTool, Train, WorkArrival
from tests.builders import make_agent, make_tuning


class Bench:
    """Events in, actions out; `time` goes on by itself."""

    def __init__(self, **options: Any) -> None:
        self.executor = WorkJobExecutor(("je-0", "je-1"), **options)
        self.time = 0
        self.said: list[Action] = []

    def hear(self, kind: type, **fields: Any) -> list[Action]:
        self.time += 10
        self.said = self.executor.on_event(kind(to=WORK, time=self.time, occurred=self.time, **fields))
        return self.said

    def worker(self, name: str, role: Role = Role.CPU, slots: int = 1, npus: int = 0) -> list[Action]:
        spec = ExecutorSpec(str(role), role, npus)
        state = ExecutorState.READY
        return self.hear(ev.ExecutorAnnounced, executor=name, spec=spec, state=state, kv_blocks=0, max_sequences=slots)

    def gone(self, name: str, role: Role = Role.CPU) -> list[Action]:
        spec, state = ExecutorSpec(str(role), role, 0), ExecutorState.GONE
        return self.hear(ev.ExecutorAnnounced, executor=name, spec=spec, state=state, kv_blocks=0, max_sequences=1)

    def arrive(self, arrival: WorkArrival) -> list[Action]:
        return self.hear(ev.WorkArrived, request=arrival.request)

    def done(self, action: Action) -> list[Action]:
        assert isinstance(action, DispatchWork)
        return self.hear(ev.WorkFinished, **_names(action), started=self.time)

    def failed(self, action: Action, reason: FailureReason = FailureReason.EXECUTOR_LOST) -> list[Action]:
        assert isinstance(action, DispatchWork)
        return self.hear(ev.WorkFailed, **_names(action), reason=reason)

    def answered(self, action: Action, outcome: Outcome = Outcome.FINISHED) -> list[Action]:
        assert isinstance(action, SubmitCall)
        return self.hear(ev.CallEnded, request_id=action.request.request_id, outcome=outcome, generated=5)


def _names(action: DispatchWork) -> dict[str, Any]:
    task = action.task
    return {"request_id": task.request_id, "task_id": task.task_id, "executor": action.executor}


def work(actions: list[Action]) -> list[DispatchWork]:
    return [action for action in actions if isinstance(action, DispatchWork)]


def test_an_agent_goes_round_by_round() -> None:
    """Steps of a round are side by side, the next round begins when all are done, and the last ends the request."""
    bench = Bench()
    bench.worker("te-0", slots=2)
    (call,) = bench.arrive(make_agent(1, [(20, 4)], [0.5, 0.2], [(40, 5)]))
    assert isinstance(call, SubmitCall)
    assert (call.job_executor, call.caller, call.work, call.step) == ("je-1", WORK, 1, 0)
    first, second = work(bench.answered(call))
    assert [action.task.operation for action in (first, second)] == [RunTool("tool", 1), RunTool("tool", 2)]
    assert bench.done(second) == []
    (again,) = bench.done(first)
    assert isinstance(again, SubmitCall) and again.step == 3 and again.job_executor == "je-1"
    assert again.request.request_id == FIRST_CALL + 1
    assert bench.answered(again) == [EndWork(1, Outcome.FINISHED, "")]
    (row,) = bench.executor.recorder.rows
    assert (row.kind, row.outcome, row.calls, row.tasks, row.generated_tokens) == ("agent", "finished", 2, 2, 10)


def test_fine_tuning_is_three_jobs_in_a_row() -> None:
    """Shards are preprocessed side by side, training goes from one saved state to the next, calls evaluate it."""
    bench = Bench()
    bench.worker("te-0", slots=2)
    bench.worker("te-1", Role.TRAINING, npus=8)
    shards = work(bench.arrive(make_tuning(0, steps=5, checkpoint_steps=2, shards=2, evaluation=[(9, 2)])))
    assert [each.task.operation for each in shards] == [Preprocess(2500), Preprocess(2500)]
    bench.done(shards[0])
    steps: list[tuple[int, bool]] = []
    actions = bench.done(shards[1])
    while training := work(actions):
        operation = training[0].task.operation
        assert isinstance(operation, Train)
        steps.append((operation.steps, operation.restore))
        actions = bench.done(training[0])
    assert steps == [(2, True), (2, False), (1, False)]
    assert bench.answered(actions[0]) == [EndWork(0, Outcome.FINISHED, "")]
    rows = bench.executor.recorder.rows
    assert [(row.kind, row.tasks, row.steps, row.tokens) for row in rows] == [
        ("preprocess", 2, 0, 5000),
        ("train", 3, 5, 5000),
        ("evaluate", 0, 0, 0),
    ]


def test_tools_wait_for_a_slot_in_order_of_priority() -> None:
    """One slot: the more important request's tool is next, then the one that came first; demand is reported."""
    bench = Bench()
    assert bench.arrive(make_agent(0, [0.1])) == [ReportDemand(WORK, "cpu", 1)]
    bench.arrive(make_agent(1, [0.1]))
    bench.arrive(make_agent(2, [0.1], priority=5))
    assert bench.executor.parked(Role.CPU) == 3
    (running,) = work(bench.worker("te-0"))
    order = [running.task.request_id]
    while running_next := work(bench.done(running)):
        (running,) = running_next
        order.append(running.task.request_id)
    assert order == [2, 0, 1]
    assert bench.executor.parked(Role.CPU) == 0


def test_training_stays_where_its_state_is() -> None:
    """The next steps go to the worker that has the state; one that lacks it, after a loss, restores it first."""
    bench = Bench()
    for number in range(3):
        bench.worker(f"te-{number}", Role.TRAINING, npus=8)
    bench.worker("te-3")
    (shard,) = work(bench.arrive(make_tuning(0, steps=6, checkpoint_steps=2)))
    (other,) = work(bench.arrive(make_tuning(1, steps=6, checkpoint_steps=2)) or []) or (None,)
    assert other is None  # one CPU slot
    (train, shard) = work(bench.done(shard))
    (second,) = work(bench.done(train))
    assert (train.executor, second.executor) == ("te-0", "te-0")
    assert isinstance(second.task.operation, Train) and not second.task.operation.restore
    (retry,) = work(bench.failed(second))
    assert retry.executor == "te-1" and retry.task.operation == train.task.operation
    assert retry.task.task_id != second.task.task_id


def test_a_task_is_given_up_after_its_attempts() -> None:
    """So many workers lost under one task, and the request fails, saying so; a refusal costs no attempt."""
    bench = Bench(max_attempts=2)
    for number in range(4):
        bench.worker(f"te-{number}")
    (task,) = work(bench.arrive(make_agent(0, [0.1])))
    for reason in (FailureReason.NOT_SERVING, FailureReason.EXECUTOR_LOST):
        (task,) = work(bench.failed(task, reason))
    (end,) = bench.failed(task)
    assert isinstance(end, EndWork) and end.outcome is Outcome.FAILED and "gave up after 2 attempts" in end.reason


def test_a_failed_call_fails_the_request_and_stops_the_rest() -> None:
    """What is still outstanding is told to stop, once; the request ends when all of it is back."""
    bench = Bench()
    bench.worker("te-0")
    call, lost, tool = bench.arrive(make_agent(0, [(9, 2), (9, 2), 5.0]))
    assert isinstance(call, SubmitCall) and isinstance(tool, DispatchWork)
    assert bench.answered(lost, Outcome.FAILED) == [
        CancelRequest("je-0", call.request.request_id),
        AbortTask("te-0", tool.task.task_id),
    ]
    assert bench.answered(call, Outcome.CANCELLED) == []
    (end,) = bench.hear(ev.WorkAborted, **_names(tool))
    assert end == EndWork(0, Outcome.FAILED, "a call failed")


def test_a_cancelled_request_lets_go_of_everything() -> None:
    """Waiting tasks are dropped at once, running ones aborted; the slot is free for others."""
    bench = Bench()
    bench.worker("te-0")
    (running, _) = bench.arrive(make_agent(0, [5.0, 5.0]))
    bench.arrive(make_agent(1, [1.0]))
    assert isinstance(running, DispatchWork)
    assert bench.hear(ev.CancelRequested, request_id=0)[0] == AbortTask("te-0", running.task.task_id)
    assert bench.hear(ev.CancelRequested, request_id=0) == []
    actions = bench.hear(ev.WorkAborted, **_names(running))
    assert actions[0] == EndWork(0, Outcome.CANCELLED, "")
    assert [each.task.request_id for each in work(actions)] == [1]
    assert bench.executor.open_requests == 1


def test_work_that_nothing_can_run_is_refused() -> None:
    """A fleet without workers of the role refuses; one whose workers cannot be launched fails what waits for them."""
    bench = Bench(roles=(Role.CPU,))
    bench.worker("te-0")
    (shard,) = work(bench.arrive(make_tuning(0)))
    (end,) = bench.done(shard)
    assert isinstance(end, EndWork) and end.outcome is Outcome.REFUSED and "no workers of role training" in end.reason
    bench = Bench()
    bench.arrive(make_agent(0, [1.0]))
    assert bench.hear(ev.NoCapacity, model="cpu", reason="no host")[0] == EndWork(0, Outcome.FAILED, "no host")
    assert bench.arrive(make_agent(1, [1.0])) == [EndWork(1, Outcome.FAILED, "no host")]


@pytest.mark.pure
def test_its_state_can_be_stored_at_any_moment() -> None:
    """A copy through pickle goes on exactly as the original does."""
    bench = Bench()
    bench.worker("te-0")
    call, tool = bench.arrive(make_agent(0, [(9, 2), 5.0], [1.0]))
    bench.arrive(make_tuning(1, evaluation=[(9, 2)]))
    copy = Bench()
    copy.executor, copy.time = pickle.loads(pickle.dumps(bench.executor)), bench.time
    for each in (bench, copy):
        each.answered(call)
    assert bench.done(tool) == copy.done(tool)
    assert bench.said


def test_no_attempt_is_refused() -> None:
    """A number of attempts below one has no meaning."""
    with pytest.raises(ValueError, match="max_attempts is 0: allowed are 1"):
        WorkJobExecutor(("je-0",), max_attempts=0)
