"""The TE-shell alone: without an engine, and in front of one that only counts."""

from typing import Any

import pytest

from cluster import events as ev
from cluster.identity import BlockIds
from cluster.vocabulary import FailureReason, Role, TaskKind
from flowserve.core.messages import Abort, Dispatch, Drain, KvOffered, KvReleased, KvRequested, Message, SwitchRole
from flowserve.core.outbox import NOTHING, Load, Outbox
from flowserve.core.shell import TeShell
from tests.builders import make_spec, make_task


class Counter:
    """An engine that does nothing but take messages."""

    def __init__(self) -> None:
        self.taken: list[Message] = []
        self.idle = True

    def receive(self, message: Message, now: int, ids: BlockIds = ()) -> None:
        self.taken.append(message)

    def serve(self, role: Role) -> None:
        self.role = role

    def load(self) -> Load:
        return NOTHING._replace(waiting=len(self.taken), total_blocks=7)

    def progress(self) -> dict[str, list[tuple[int, int]]]:
        return {"je": [(3, 4)]} if self.taken else {}


def make_shell(role: Role = Role.COLOCATED, period: int = 100) -> tuple[TeShell, Outbox]:
    outbox = Outbox()
    return TeShell("te", make_spec(role), outbox, ("je", "cm"), period), outbox


def refusals(outbox: Outbox) -> list[tuple[FailureReason, str]]:
    return [(event.reason, event.detail) for event in outbox.take().events if isinstance(event, ev.TaskFailed)]


def test_lives_before_its_engine_and_after_it() -> None:
    """It reports that there is nothing, and refuses tasks for another to take, saying why."""
    shell, outbox = make_shell()
    shell.receive(Dispatch("je", make_task(0)), 5)
    reports = [event for event in outbox.events if isinstance(event, ev.LoadReport)]
    assert [(report.to, report.total_blocks) for report in reports] == [("je", 0), ("cm", 0)]
    assert refusals(outbox) == [(FailureReason.NOT_SERVING, "te takes no tasks: its engine is not up yet")]
    engine = Counter()
    shell.attach(engine)
    shell.receive(Dispatch("je", make_task(1)), 105)
    assert engine.taken == [Dispatch("je", make_task(1))]
    assert [event.total_blocks for event in outbox.take().events if isinstance(event, ev.LoadReport)] == [7, 7]
    shell.detach("its engine ran out of memory")
    shell.receive(Dispatch("je", make_task(2)), 106)
    assert refusals(outbox) == [(FailureReason.NOT_SERVING, "te takes no tasks: its engine ran out of memory")]
    assert FailureReason.NOT_SERVING.retriable


def test_nobody_waits_for_an_engine_that_is_not_there() -> None:
    """Who asks for KV cache is told that there is none; what needs no answer is let go."""
    shell, outbox = make_shell()
    shell.receive(KvRequested(1, 2, "reader"), 0)
    shell.receive(Abort(1), 0)
    shell.receive(KvReleased(1, "reader"), 0)
    assert outbox.take().peers == [("reader", KvOffered(1, 2, "te", None))]


@pytest.mark.parametrize("attached", [True, False])
def test_is_drained_when_its_engine_is_empty(attached: bool) -> None:
    """Once, with an engine as soon as that has nothing left, without one at once; a drain is no business of engines."""
    shell, outbox = make_shell()
    engine = Counter()
    engine.idle = False
    if attached:
        shell.attach(engine)
    shell.receive(Drain(), 1)
    assert engine.taken == []

    def drained() -> int:
        return sum(isinstance(event, ev.ExecutorDrained) for event in outbox.take().events)

    assert drained() == (not attached)
    engine.idle = True
    shell.observe(2)
    shell.observe(3)
    assert drained() == attached
    shell.receive(Dispatch("je", make_task(0)), 4)
    assert refusals(outbox) == [(FailureReason.NOT_SERVING, "")]


def test_takes_what_its_role_serves() -> None:
    """The wrong kind of task never reaches the engine."""
    shell, outbox = make_shell(Role.PREFILL)
    engine = Counter()
    shell.attach(engine)
    shell.receive(Dispatch("je", make_task(0)), 0)
    assert refusals(outbox) == [(FailureReason.INVALID, "")]
    task: Any = make_task(1, kind=TaskKind.PREFILL)
    shell.receive(Dispatch("je", task), 0)
    assert len(engine.taken) == 1


def test_a_switch_of_role_changes_what_is_taken() -> None:
    """From the message on, tasks of the new kind are taken and the old kind goes back, for another to take."""
    shell, outbox = make_shell(Role.PREFILL)
    engine = Counter()
    shell.attach(engine)
    shell.receive(SwitchRole(Role.DECODE), 3)
    [switched] = [event for event in outbox.take().events if isinstance(event, ev.RoleSwitched)]
    assert (switched.to, switched.time, switched.spec) == ("cm", 3, make_spec(Role.DECODE))
    assert engine.role is Role.DECODE
    shell.receive(Dispatch("je", make_task(0, kind=TaskKind.PREFILL)), 4)
    assert refusals(outbox) == [(FailureReason.ROLE_SWITCHED, "")]
    assert FailureReason.ROLE_SWITCHED.retriable
    shell.receive(Dispatch("je", make_task(1, kind=TaskKind.DECODE, generated=1, source="p")), 4)
    assert len(engine.taken) == 1


def test_progress_comes_with_reports() -> None:
    """The job executors hear of their tasks when a report is due, and not before."""
    shell, outbox = make_shell()
    engine = Counter()
    shell.attach(engine)
    shell.report(0)
    engine.taken.append(Abort(1))
    shell.changed()
    assert shell.report_due == 100
    shell.report(99)
    assert not any(isinstance(event, ev.TaskProgress) for event in outbox.take().events)
    shell.report(100)
    assert [e.generated for e in outbox.take().events if isinstance(e, ev.TaskProgress)] == [((3, 4),)]
