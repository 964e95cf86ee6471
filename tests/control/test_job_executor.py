"""The job executor, event by event: what it asks for, and how each request comes to its one end."""

from collections.abc import Callable
from typing import Any

import pytest
from msgspec.structs import replace

from cluster import events as ev
from cluster.actions import AbortTask, Action, DispatchTask, EndRequest, ReleaseKvContext, ReportDemand
from cluster.fleet import Fleet
from cluster.job_executor import JobExecutor
from cluster.policy import DispatchPolicy
from cluster.request import KvSource, Request, Task
from cluster.vocabulary import ExecutorState, FailureReason, Outcome, Role, TaskKind
from tests.builders import MODEL, announced, load_report, make_request

READY = ExecutorState.READY


class Picky(DispatchPolicy):
    """Takes the first executor of the role it was told to prefer; notes what it is told."""

    def __init__(self, prefer: Role = Role.COLOCATED) -> None:
        self.prefer = prefer
        self.told: list[tuple[str, object]] = []

    def place(self, task: Task, fleet: Fleet, now_ns: int) -> str | None:
        groups = sorted(fleet.candidates(task), key=lambda group: group.role is not self.prefer)
        return groups[0].names[0] if groups else None

    def dispatched(self, task: Task, executor: str) -> None:
        self.told.append(("dispatched", (task.task_id, executor)))

    def first_token(self, request: Request, event: ev.FirstToken) -> None:
        self.told.append(("first_token", event.executor))

    def finished(self, request: Request, event: ev.TaskFinished) -> None:
        self.told.append(("finished", event.executor))

    def executor_gone(self, executor: str) -> None:
        self.told.append(("gone", executor))


class Desk:
    """A job executor with events fed by hand. `last`: the actions of the last event."""

    def __init__(self, *executors: tuple[str, Role], max_attempts: int = 3, max_parked: int = 10) -> None:
        self.policy = Picky()
        self.je = JobExecutor("je-0", 0, self.policy, max_attempts, max_parked)
        self.now = 0
        self.last: list[Action] = []
        self.ends: list[EndRequest] = []
        for name, role in executors:
            self.announce(name, role)

    def hear(self, event: ev.Event) -> list[Action]:
        self.last = self.je.on_event(event)
        self.ends += [action for action in self.last if isinstance(action, EndRequest)]
        return self.last

    def announce(
        self, name: str, role: Role = Role.COLOCATED, state: ExecutorState = ExecutorState.READY
    ) -> list[Action]:
        return self.hear(announced(name, role, state))

    def request(self, request_id: int = 0, model: str = MODEL) -> list[Action]:
        request = make_request(request_id, prompt=100, limit=20, model=model)
        return self.hear(ev.RequestArrived(to="je-0", time=self.now, occurred=self.now, request=request))

    def cancel(self, request_id: int = 0) -> list[Action]:
        return self.hear(ev.CancelRequested(to="je-0", time=self.now, occurred=self.now, request_id=request_id))

    @property
    def dispatched(self) -> DispatchTask:
        """The one dispatch among the last actions."""
        [dispatch] = [action for action in self.last if isinstance(action, DispatchTask)]
        return dispatch

    def about(self, dispatch: DispatchTask) -> dict[str, Any]:
        """What every event says that is about a task."""
        task = dispatch.task
        times = {"time": self.now, "occurred": self.now}
        numbers = {"request_id": task.request.request_id, "task_id": task.task_id}
        return {"to": "je-0", "executor": dispatch.executor} | times | numbers

    def first_token(self, dispatch: DispatchTask) -> list[Action]:
        return self.hear(
            ev.FirstToken(
                **self.about(dispatch),
            )
        )

    def started(self, dispatch: DispatchTask) -> list[Action]:
        return self.hear(
            ev.PrefillStarted(
                **self.about(dispatch),
                kv_runs=(7,),
            )
        )

    def finished(self, dispatch: DispatchTask, generated: int, stopped: bool = True) -> list[Action]:
        return self.hear(
            ev.TaskFinished(
                **self.about(dispatch),
                generated=generated,
                stopped=stopped,
                tokens=generated - dispatch.task.generated,
                last_token_ns=self.now,
                token_times=ev.pack_times([self.now]),
            )
        )

    def failed(
        self, dispatch: DispatchTask, reason: FailureReason, generated: int = 0, detail: str = ""
    ) -> list[Action]:
        return self.hear(
            ev.TaskFailed(
                **self.about(dispatch),
                reason=reason,
                generated=generated,
                detail=detail,
            )
        )

    def aborted(self, dispatch: DispatchTask, generated: int = 0) -> list[Action]:
        return self.hear(
            ev.TaskAborted(
                **self.about(dispatch),
                generated=generated,
            )
        )

    def outstanding(self, role: Role = Role.COLOCATED) -> list[int]:
        return self.je.fleet.group(MODEL, role).outstanding.tolist()  # type: ignore[no-any-return]


def disaggregated() -> Desk:
    desk = Desk(("p0", Role.PREFILL), ("d0", Role.DECODE))
    desk.policy.prefer = Role.PREFILL
    return desk


def ended(outcome: Outcome, generated: int, reason: str = "", request_id: int = 0) -> EndRequest:
    return EndRequest(request_id, outcome, generated, reason)


# -- jobs and tasks -------------------------------------------------------------------------------------------------


def test_chat_on_a_colocated_executor_is_one_task() -> None:
    """Dispatch, first token, end: one task, counted on its executor while it is there."""
    desk = Desk(("te-0", Role.COLOCATED))
    desk.request()
    serve = desk.dispatched
    assert (serve.job_executor, serve.executor) == ("je-0", "te-0")
    assert serve.task == Task(0, make_request(0, 100, 20), TaskKind.SERVE)
    group = desk.je.fleet.group(MODEL, Role.COLOCATED)
    assert (group.outstanding.tolist(), group.queued_tokens.tolist()) == ([1], [100])
    assert desk.first_token(serve) == []
    assert (group.outstanding.tolist(), group.queued_tokens.tolist()) == ([1], [0])
    assert desk.finished(serve, 20) == [ended(Outcome.FINISHED, 20)]
    assert (group.outstanding.tolist(), desk.je.open_jobs) == ([0], 0)
    assert desk.policy.told == [("dispatched", (0, "te-0")), ("first_token", "te-0"), ("finished", "te-0")]


def test_chat_on_a_prefill_executor_is_two_tasks() -> None:
    """The decode task is placed when the prefill is done, and names where the KV cache lies."""
    desk = disaggregated()
    desk.request()
    prefill = desk.dispatched
    assert (prefill.executor, prefill.task.kind, prefill.task.kv) == ("p0", TaskKind.PREFILL, None)
    desk.first_token(prefill)
    desk.finished(prefill, 1, stopped=False)
    decode = desk.dispatched
    assert decode.executor == "d0"
    assert decode.task == Task(1, make_request(0, 100, 20), TaskKind.DECODE, 1, KvSource("p0", 0))
    assert (desk.outstanding(Role.PREFILL), desk.outstanding(Role.DECODE)) == ([0], [1])
    assert desk.je.fleet.group(MODEL, Role.DECODE).queued_tokens.tolist() == [0]
    assert desk.finished(decode, 20) == [ended(Outcome.FINISHED, 20)]


def test_a_prefill_that_is_the_whole_answer_needs_no_decode() -> None:
    """A request complete with its first token ends there."""
    desk = disaggregated()
    desk.request()
    assert desk.finished(desk.dispatched, 1) == [ended(Outcome.FINISHED, 1)]


def test_task_ids_of_job_executors_do_not_meet() -> None:
    """Task ids are unique across job executors."""
    ids = set()
    for number in range(3):
        je = JobExecutor(f"je-{number}", number, Picky())
        je.on_event(announced("te-0"))
        for request_id in range(5):
            request = make_request(request_id)
            [action] = je.on_event(ev.RequestArrived(to=je.name, time=0, occurred=0, request=request))
            assert isinstance(action, DispatchTask)
            ids.add(action.task.task_id)
    assert len(ids) == 15


# -- failures -------------------------------------------------------------------------------------------------------


def test_a_retry_goes_on_behind_the_known_tokens() -> None:
    """A lost task is tried elsewhere, from the tokens its frontend holds, under a new number."""
    desk = Desk(("te-0", Role.COLOCATED), ("te-1", Role.COLOCATED))
    desk.request()
    lost = desk.dispatched
    desk.first_token(lost)
    desk.failed(lost, FailureReason.EXECUTOR_LOST, generated=7)
    again = desk.dispatched
    assert again.executor == "te-1"
    assert again.task == Task(1, make_request(0, 100, 20), TaskKind.SERVE, 7)
    assert again.task.context_tokens == 107
    assert desk.outstanding() == [1]
    assert desk.finished(again, 20) == [ended(Outcome.FINISHED, 20)]


def test_a_lost_executor_is_out_of_the_list_at_once() -> None:
    """Its loss is learned from the task; the cluster manager's word comes later and changes nothing more."""
    desk = Desk(("te-0", Role.COLOCATED), ("te-1", Role.COLOCATED))
    desk.request()
    desk.failed(desk.dispatched, FailureReason.EXECUTOR_LOST)
    assert desk.je.fleet.role_of("te-0") is None
    desk.announce("te-0", state=ExecutorState.GONE)
    assert [what for what, _ in desk.policy.told].count("gone") == 1


@pytest.mark.parametrize("reason", [reason for reason in FailureReason if not reason.retriable])
def test_what_would_fail_everywhere_fails_at_once(reason: FailureReason) -> None:
    """No retry for a task that no executor can run: the request fails, with the reason or what was said."""
    for detail in ("", "out of memory in layer 3"):
        desk = Desk(("te-0", Role.COLOCATED), ("te-1", Role.COLOCATED))
        desk.request()
        assert desk.failed(desk.dispatched, reason, 3, detail) == [ended(Outcome.FAILED, 3, detail or str(reason))]
        assert desk.je.fleet.role_of("te-0") is Role.COLOCATED
        assert desk.je.open_jobs == 0


def test_attempts_are_limited() -> None:
    """After so many lost tasks the request is given up, with the last reason."""
    desk = Desk(*((f"te-{n}", Role.COLOCATED) for n in range(4)), max_attempts=3)
    desk.request()
    for generated in (2, 5):
        desk.failed(desk.dispatched, FailureReason.EXECUTOR_LOST, generated)
        assert desk.dispatched.task.generated == generated
    desk.failed(desk.dispatched, FailureReason.EXECUTOR_LOST, 9)
    assert desk.last == [ended(Outcome.FAILED, 9, "gave up after 3 attempts, the last: executor lost")]


def test_a_refusal_on_the_way_out_is_no_attempt() -> None:
    """However often a draining executor refuses, the request goes on with all its attempts."""
    desk = Desk(*((f"te-{n}", Role.COLOCATED) for n in range(9)), max_attempts=1)
    desk.request()
    for _ in range(8):
        desk.failed(desk.dispatched, FailureReason.NOT_SERVING)
    assert desk.dispatched.executor == "te-8"
    assert desk.je.fleet.group(MODEL, Role.COLOCATED).names == ["te-8"]


def test_a_refused_decode_keeps_its_prefill() -> None:
    """The KV cache outlives a refusal: the decode task goes elsewhere with the same source."""
    desk = disaggregated()
    desk.announce("d1", Role.DECODE)
    desk.request()
    desk.finished(desk.dispatched, 1, stopped=False)
    desk.failed(desk.dispatched, FailureReason.NOT_SERVING, 1)
    assert len(desk.last) == 1
    assert desk.dispatched.executor == "d1"
    assert desk.dispatched.task.kv == KvSource("p0", 0)


@pytest.mark.parametrize("reason", [FailureReason.KV_LOST, FailureReason.EXECUTOR_LOST])
def test_a_lost_decode_is_prefilled_again(reason: FailureReason) -> None:
    """After any other loss the old KV cache is let go, and the context with its tokens is prefilled again."""
    desk = disaggregated()
    desk.announce("d1", Role.DECODE)
    desk.request()
    desk.finished(desk.dispatched, 1, stopped=False)
    desk.failed(desk.dispatched, reason, 4)
    assert desk.last[0] == AbortTask("p0", 0)
    assert desk.dispatched.task == Task(2, make_request(0, 100, 20), TaskKind.PREFILL, 4)
    assert (desk.je.fleet.role_of("d0") is None) == (reason is FailureReason.EXECUTOR_LOST)


def test_an_executor_that_switched_its_role_is_not_lost() -> None:
    """A refusal because of a new role costs no attempt, and the executor with its load moves to its new group."""
    desk = Desk(("p0", Role.PREFILL), ("d0", Role.DECODE), max_attempts=1)
    desk.request()
    desk.failed(desk.dispatched, FailureReason.ROLE_SWITCHED)
    late = desk.dispatched
    assert late.executor == "p0"  # nobody has said yet what it is now
    desk.announce("p0", Role.COLOCATED)
    assert desk.je.fleet.role_of("p0") is Role.COLOCATED
    assert len(desk.je.fleet.group(MODEL, Role.PREFILL)) == 0
    assert desk.je.fleet.group(MODEL, Role.COLOCATED).outstanding.tolist() == [1]
    desk.failed(late, FailureReason.ROLE_SWITCHED)
    assert desk.dispatched.task.kind is TaskKind.SERVE


def test_stale_events_are_ignored() -> None:
    """What comes late from an earlier attempt changes nothing about the present one."""
    desk = Desk(("te-0", Role.COLOCATED), ("te-1", Role.COLOCATED))
    desk.request()
    lost = desk.dispatched
    desk.failed(lost, FailureReason.EXECUTOR_LOST, 7)
    again = desk.dispatched
    for late in (
        desk.first_token(lost),
        desk.finished(lost, 20),
        desk.failed(lost, FailureReason.ENGINE_ERROR, 9),
        desk.aborted(lost, 9),
    ):
        assert late == []
    progress = ev.TaskProgress(to="je-0", time=0, occurred=0, executor="te-0", generated=((lost.task.task_id, 15),))
    assert desk.hear(progress) == []
    assert (desk.je.open_jobs, desk.outstanding()) == (1, [1])
    desk.failed(again, FailureReason.KV_LOST, 8)
    assert desk.dispatched.task.generated == 8
    desk.finished(desk.dispatched, 20)
    assert len(desk.ends) == 1
    assert desk.first_token(again) == desk.aborted(again) == []


# -- decode tasks that are placed while the prefill is under way ----------------------------------------------------


def under_way(*more: tuple[str, Role]) -> tuple[Desk, DispatchTask, DispatchTask]:
    """A prefill that has begun, on p0, and its decode task, on d0."""
    desk = disaggregated()
    for name, role in more:
        desk.announce(name, role)
    desk.request()
    prefill = desk.dispatched
    desk.started(prefill)
    return desk, prefill, desk.dispatched


def test_a_decode_task_is_placed_when_its_prefill_has_begun() -> None:
    """It goes on behind the token that the prefill will yield, and is the job's own as soon as that is done."""
    desk, prefill, decode = under_way()
    assert decode.executor == "d0"
    assert decode.task == Task(1, make_request(0, 100, 20), TaskKind.DECODE, 1, KvSource("p0", 0, (7,)))
    assert (desk.outstanding(Role.PREFILL), desk.outstanding(Role.DECODE)) == ([1], [1])
    assert desk.first_token(prefill) == []
    assert desk.finished(prefill, 1, stopped=False) == []
    assert (desk.outstanding(Role.PREFILL), desk.outstanding(Role.DECODE)) == ([0], [1])
    assert desk.finished(decode, 20) == [ended(Outcome.FINISHED, 20)]
    assert desk.outstanding(Role.DECODE) == [0]


def test_a_prefill_that_begins_twice_has_one_decode_task() -> None:
    """Preempted and begun again: nothing is placed while a task is there."""
    desk, prefill, _ = under_way()
    assert desk.started(prefill) == []


def test_without_a_decode_executor_nothing_is_placed_ahead() -> None:
    """Nor parked: the request waits when its prefill is done, as ever."""
    desk = Desk(("p0", Role.PREFILL))
    desk.request()
    prefill = desk.dispatched
    assert desk.started(prefill) == []
    assert desk.finished(prefill, 1, stopped=False) == [ReportDemand("je-0", MODEL, 1)]


@pytest.mark.parametrize("reason", list(FailureReason))
def test_a_decode_task_that_fails_ahead_costs_nothing(reason: FailureReason) -> None:
    """Whatever became of it, the prefill goes on, and another is placed behind it."""
    desk, prefill, decode = under_way(("d1", Role.DECODE))
    assert desk.failed(decode, reason, 1) == []
    gone = reason in (FailureReason.EXECUTOR_LOST, FailureReason.NOT_SERVING)
    assert (desk.je.fleet.role_of("d0") is None) == gone
    desk.finished(prefill, 1, stopped=False)
    again = desk.dispatched
    assert again.executor == ("d1" if gone else "d0")
    assert again.task.kv == KvSource("p0", 0)
    assert desk.finished(again, 20) == [ended(Outcome.FINISHED, 20)]


def test_a_prefill_that_is_lost_takes_its_decode_task_along() -> None:
    """It is asked back; while it is not back, another prefill has its decode task placed when it is done."""
    desk, prefill, decode = under_way(("p1", Role.PREFILL))
    desk.failed(prefill, FailureReason.EXECUTOR_LOST)
    assert desk.last[0] == AbortTask("d0", 1)
    again = desk.dispatched
    assert (again.executor, again.task.kind, again.task.generated) == ("p1", TaskKind.PREFILL, 0)
    assert desk.started(again) == []
    desk.finished(again, 1, stopped=False)
    after = desk.dispatched
    assert after.task.kv == KvSource("p1", 2)
    assert desk.aborted(decode, 1) == []
    assert desk.outstanding(Role.DECODE) == [1]
    assert desk.finished(after, 20) == [ended(Outcome.FINISHED, 20)]


def test_a_request_that_ends_with_its_prefill_waits_for_its_other_task() -> None:
    """The one token was the last: the decode task is asked back, and when it is, the request has ended."""
    desk, prefill, decode = under_way()
    assert desk.finished(prefill, 1) == [AbortTask("d0", 1)]
    assert desk.cancel() == []
    assert desk.je.open_jobs == 1
    assert desk.failed(decode, FailureReason.KV_LOST, 1) == [ended(Outcome.FINISHED, 1)]
    assert desk.je.open_jobs == 0
    assert desk.outstanding(Role.DECODE) == [0]


def test_cancel_asks_both_tasks_back() -> None:
    """The request ends with the last of them, whichever that is."""
    for first in ("prefill", "decode"):
        desk, prefill, decode = under_way()
        assert desk.cancel() == [AbortTask("p0", 0), AbortTask("d0", 1)]
        if first == "prefill":
            assert desk.aborted(prefill) == []
            assert desk.aborted(decode, 1) == [ended(Outcome.CANCELLED, 0)]
        else:
            assert desk.aborted(decode, 1) == []
            assert desk.aborted(prefill) == [ended(Outcome.CANCELLED, 0)]


def test_cancel_meets_the_end_of_a_prefill() -> None:
    """Both tasks got further than the cancellation: what is held is let go, and the tokens count."""
    desk, prefill, decode = under_way()
    desk.cancel()
    assert desk.finished(prefill, 1, stopped=False) == [AbortTask("p0", 0)]
    assert desk.aborted(decode, 3) == [ended(Outcome.CANCELLED, 3)]


def test_a_decode_task_placed_ahead_may_be_lost_behind_its_prefill() -> None:
    """From the end of the prefill on it is like any other."""
    desk, prefill, decode = under_way()
    desk.finished(prefill, 1, stopped=False)
    desk.failed(decode, FailureReason.KV_LOST, 1)
    assert desk.last[0] == AbortTask("p0", 0)
    assert (desk.dispatched.task.kind, desk.dispatched.task.generated) == (TaskKind.PREFILL, 1)
    retry = desk.dispatched
    desk.started(retry)
    assert (desk.dispatched.task.generated, desk.dispatched.task.kv) == (2, KvSource("p0", 2, (7,)))


# -- cancellation ---------------------------------------------------------------------------------------------------


def test_cancel_while_it_runs() -> None:
    """The executor is asked to let go; when it has, the request ends with the tokens it had."""
    desk = Desk(("te-0", Role.COLOCATED))
    desk.request()
    serve = desk.dispatched
    assert desk.cancel() == [AbortTask("te-0", 0)]
    assert desk.cancel() == []
    assert desk.aborted(serve, 6) == [ended(Outcome.CANCELLED, 6)]
    assert desk.outstanding() == [0]
    assert desk.cancel() == []


def test_cancel_comes_too_late() -> None:
    """A task that finished before the abort reached it has finished."""
    desk = Desk(("te-0", Role.COLOCATED))
    desk.request()
    serve = desk.dispatched
    desk.cancel()
    assert desk.finished(serve, 20) == [ended(Outcome.FINISHED, 20)]


@pytest.mark.parametrize("reason", list(FailureReason))
def test_cancel_meets_a_failure(reason: FailureReason) -> None:
    """A task that fails after its request was cancelled is not tried again."""
    desk = Desk(("te-0", Role.COLOCATED), ("te-1", Role.COLOCATED))
    desk.request()
    serve = desk.dispatched
    desk.cancel()
    assert desk.failed(serve, reason, 5) == [ended(Outcome.CANCELLED, 5)]


def test_cancel_while_it_waits() -> None:
    """A parked request ends at once, and the demand falls."""
    desk = Desk()
    desk.request()
    assert desk.cancel() == [ended(Outcome.CANCELLED, 0), ReportDemand("je-0", MODEL, 0)]
    assert desk.announce("te-0") == []


def test_cancel_while_it_prefills() -> None:
    """The prefill executor lets go of it, before or after it was done."""
    desk = disaggregated()
    desk.request()
    prefill = desk.dispatched
    assert desk.cancel() == [AbortTask("p0", 0)]
    assert desk.aborted(prefill) == [ended(Outcome.CANCELLED, 0)]
    desk.request(1)
    prefill = desk.dispatched
    desk.cancel(1)
    held = AbortTask("p0", prefill.task.task_id)
    assert desk.finished(prefill, 1, stopped=False) == [held, ended(Outcome.CANCELLED, 1, request_id=1)]


def test_cancel_between_prefill_and_decode() -> None:
    """Parked with its KV cache held at the prefill executor: the cache is let go, the request ends."""
    desk = Desk(("p0", Role.PREFILL))
    desk.request()
    desk.finished(desk.dispatched, 1, stopped=False)
    assert desk.last == [ReportDemand("je-0", MODEL, 1)]
    assert desk.cancel() == [AbortTask("p0", 0), ended(Outcome.CANCELLED, 1), ReportDemand("je-0", MODEL, 0)]


def test_cancel_while_it_decodes() -> None:
    """Both executors are told: the one that decodes, and, once that is over, the one that may still hold."""
    desk = disaggregated()
    desk.request()
    desk.finished(desk.dispatched, 1, stopped=False)
    decode = desk.dispatched
    assert desk.cancel() == [AbortTask("d0", 1)]
    assert desk.aborted(decode, 4) == [AbortTask("p0", 0), ended(Outcome.CANCELLED, 4)]


def test_cancel_of_nothing() -> None:
    """Requests that are unknown or over cannot be cancelled."""
    desk = Desk(("te-0", Role.COLOCATED))
    assert desk.cancel(5) == []
    desk.request()
    desk.finished(desk.dispatched, 20)
    assert desk.cancel() == []
    assert len(desk.ends) == 1


# -- waiting for executors ------------------------------------------------------------------------------------------


def test_parked_requests_go_out_when_an_executor_appears() -> None:
    """In order of arrival, all at once, with one word on what still waits."""
    desk = Desk()
    for number in range(3):
        assert desk.request(number) == [ReportDemand("je-0", MODEL, number + 1)]
    desk.announce("te-0")
    tasks = [action.task.request.request_id for action in desk.last if isinstance(action, DispatchTask)]
    assert tasks == [0, 1, 2]
    assert desk.last[3:] == [ReportDemand("je-0", MODEL, 0)]
    assert desk.announce("te-1") == []


def test_a_decode_task_waits_for_a_decode_executor() -> None:
    """A prefilled request is parked until one appears; a colocated one does not help it."""
    desk = Desk(("p0", Role.PREFILL))
    desk.request()
    desk.finished(desk.dispatched, 1, stopped=False)
    assert desk.announce("te-0") == [ReportDemand("je-0", MODEL, 1)]
    desk.announce("d0", Role.DECODE)
    assert desk.dispatched.task.kv == KvSource("p0", 0)


def test_models_wait_apart() -> None:
    """An executor of one model does not take what waits for another."""
    desk = Desk()
    desk.request(0, "a")
    desk.request(1, "b")
    desk.hear(announced("te-0", model="b"))
    assert desk.dispatched.task.request.request_id == 1
    assert desk.last[1:] == [ReportDemand("je-0", "b", 0)]


def test_too_many_waiting_are_refused() -> None:
    """Beyond max_parked a request is refused at once, and says why; cancelled ones make room."""
    desk = Desk(max_parked=2)
    desk.request(0)
    desk.request(1)
    reason = "no executor is ready and 2 requests wait already (max_parked)"
    assert desk.request(2) == [ended(Outcome.REFUSED, 0, reason, 2)]
    desk.cancel(0)
    assert desk.request(3) == [ReportDemand("je-0", MODEL, 2)]
    never = Desk(max_parked=0)
    never.request()
    assert [end.outcome for end in never.ends] == [Outcome.REFUSED]


def test_a_refused_decode_lets_go_of_its_cache() -> None:
    """Where a prefilled request may not wait, what is held for it is let go."""
    desk = Desk(("p0", Role.PREFILL), max_parked=0)
    desk.request()
    desk.finished(desk.dispatched, 1, stopped=False)
    assert desk.last[0] == AbortTask("p0", 0)
    assert [(end.outcome, end.generated) for end in desk.ends] == [(Outcome.REFUSED, 1)]


def test_no_capacity_fails_what_waits_and_what_comes() -> None:
    """Waiting requests of that model fail, later ones fail at once, until an executor appears after all."""
    desk = Desk()
    for request_id, model in ((0, MODEL), (1, "other"), (2, MODEL)):
        desk.request(request_id, model)
    desk.hear(ev.NoCapacity(to="je-0", time=0, occurred=0, model=MODEL, reason="no NPUs"))
    assert desk.last == [
        ended(Outcome.FAILED, 0, "no NPUs", 0),
        ended(Outcome.FAILED, 0, "no NPUs", 2),
        ReportDemand("je-0", MODEL, 0),
    ]
    assert desk.request(3) == [ended(Outcome.FAILED, 0, "no NPUs", 3)]
    assert desk.je.open_jobs == 1
    assert desk.hear(ev.NoCapacity(to="je-0", time=0, occurred=0, model=MODEL, reason="no NPUs")) == []
    desk.announce("te-0")
    desk.request(4)
    assert desk.dispatched.executor == "te-0"
    desk.announce("te-0", state=ExecutorState.DRAINING)
    assert desk.request(5) == [ReportDemand("je-0", MODEL, 1)]


def test_no_capacity_lets_go_of_held_cache() -> None:
    """A prefilled request that fails for want of decode executors frees its KV cache."""
    desk = Desk(("p0", Role.PREFILL))
    desk.request()
    desk.finished(desk.dispatched, 1, stopped=False)
    desk.hear(ev.NoCapacity(to="je-0", time=0, occurred=0, model=MODEL, reason="no NPUs"))
    assert desk.last[:2] == [AbortTask("p0", 0), ended(Outcome.FAILED, 1, "no NPUs")]


def test_a_retry_may_have_to_wait() -> None:
    """The last executor is lost: its tasks are parked with their tokens and go on when another appears."""
    desk = Desk(("te-0", Role.COLOCATED))
    desk.request()
    assert desk.failed(desk.dispatched, FailureReason.EXECUTOR_LOST, 5) == [ReportDemand("je-0", MODEL, 1)]
    desk.announce("te-1")
    assert (desk.dispatched.executor, desk.dispatched.task.generated) == ("te-1", 5)


# -- policies that misbehave ----------------------------------------------------------------------------------------


class Stubborn(DispatchPolicy):
    """Always the same answer, right or wrong."""

    def __init__(self, answer: str | None) -> None:
        self.answer = answer

    def place(self, task: Task, fleet: Fleet, now_ns: int) -> str | None:
        return self.answer


def test_a_policy_that_does_nothing_lets_requests_wait() -> None:
    """Placing nothing is allowed: requests stay parked, whatever appears, and can be cancelled."""
    je = JobExecutor("je-0", 0, Stubborn(None))
    request = make_request(0)
    arrived = ev.RequestArrived(to="je-0", time=0, occurred=0, request=request)
    assert je.on_event(arrived) == [ReportDemand("je-0", MODEL, 1)]
    assert je.on_event(announced("te-0")) == [ReportDemand("je-0", MODEL, 1)]
    cancel = ev.CancelRequested(to="je-0", time=0, occurred=0, request_id=0)
    assert je.on_event(cancel) == [EndRequest(0, Outcome.CANCELLED, 0), ReportDemand("je-0", MODEL, 0)]


@pytest.mark.parametrize("state", [None, ExecutorState.DRAINING, ExecutorState.GONE])
def test_a_policy_that_chooses_what_is_not_ready_is_named(state: ExecutorState | None) -> None:
    """A choice outside the candidates is an error of the policy, and the message says which and what is allowed."""
    je = JobExecutor("je-0", 0, Stubborn("te-9"))
    if state is not None:
        je.on_event(announced("te-9"))
        je.on_event(announced("te-9", state=state))
    with pytest.raises(ValueError, match=r"Stubborn.place chose executor 'te-9', which is not ready.*candidates"):
        je.on_event(ev.RequestArrived(to="je-0", time=0, occurred=0, request=make_request(0)))


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: JobExecutor("je-0", 0, Picky(), max_attempts=0), "max_attempts is 0"),
        (lambda: JobExecutor("je-0", 0, Picky(), max_parked=-1), "max_parked is -1"),
    ],
)
def test_bad_limits_of_a_job_executor_are_named(make: Callable[[], JobExecutor], named: str) -> None:
    """A limit that cannot be is refused with its value."""
    with pytest.raises(ValueError, match=named):
        make()


# -- what it knows of executors -------------------------------------------------------------------------------------


def test_load_reports_fill_the_columns() -> None:
    """KV cache in use and the report's age are kept per executor; reports of others are ignored."""
    desk = Desk(("te-0", Role.COLOCATED), ("te-1", Role.COLOCATED))
    assert desk.hear(load_report("te-1", 55, "je-0", free=30, total=100)) == []
    assert desk.hear(load_report("te-7", 66, "je-0")) == []
    group = desk.je.fleet.group(MODEL, Role.COLOCATED)
    assert group.kv_used.tolist() == [0, 70]
    assert group.reported_ns.tolist() == [0, 55]
    desk.announce("te-0", state=ExecutorState.DRAINING)
    assert (group.names, group.kv_used.tolist(), group.index) == (["te-1"], [70], {"te-1": 0})


def test_executors_stand_in_order_of_launch() -> None:
    """Whoever is ready first, columns are in the order of their numbers, so results do not hang on that race."""
    desk = Desk(*((name, Role.COLOCATED) for name in ("te-10", "te-2", "te-9", "te-1")))
    assert desk.je.fleet.group(MODEL, Role.COLOCATED).names == ["te-1", "te-2", "te-9", "te-10"]
    desk.hear(load_report("te-9", 5, "je-0", free=99, total=100))
    assert desk.je.fleet.group(MODEL, Role.COLOCATED).kv_used.tolist() == [0, 0, 1, 0]


def test_progress_is_kept_for_a_cancelled_request() -> None:
    """Progress reports move the count of a job; late ones do not move it back."""
    desk = Desk(("te-0", Role.COLOCATED))
    desk.request()
    for count in (5, 3):
        desk.hear(ev.TaskProgress(to="je-0", time=0, occurred=0, executor="te-0", generated=((0, count), (99, 1))))
    assert desk.je._jobs[0].generated == 5


# -- explicit contexts ----------------------------------------------------------------------------------------------


def test_the_last_request_of_a_context_releases_it_everywhere() -> None:
    """When it ends, every executor of its model is told, whichever served it; other requests release nothing."""
    desk = Desk(("te-0", Role.COLOCATED), ("te-1", Role.COLOCATED))
    for request_id, release in ((0, False), (1, True)):
        request = replace(make_request(request_id), context_id="doc", tenant="t", release_context=release)
        desk.hear(ev.RequestArrived(to="je-0", time=0, occurred=0, request=request))
        actions = desk.finished(desk.dispatched, 3)
        released = [action for action in actions if isinstance(action, ReleaseKvContext)]
        assert [(each.executor, each.context) for each in released] == (
            [("te-0", "t\x1f\x1fdoc"), ("te-1", "t\x1f\x1fdoc")] if release else []
        )
