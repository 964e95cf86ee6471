"""The master alone: messages and plans in, events out, with no shell in front of it."""

from typing import Any

from cluster import events as ev
from cluster import identity
from cluster.request import KvSource, Task
from cluster.vocabulary import FailureReason, TaskKind
from flowserve.core.config import EngineConfig
from flowserve.core.master import Master
from flowserve.core.messages import Dispatch, KvFetched, KvOffered, KvReleased, KvRequested
from flowserve.core.outbox import Load, Outbox
from tests.builders import make_request, make_task


def run(master: Master, steps: int, now: int = 0) -> int:
    """Steps of 10 ns, with no stop but the client's limit."""
    for _ in range(steps):
        plan = master.next_plan()
        if plan is None:
            break
        now += 10
        master.complete(plan, (), now)
    return now


def dispatch(master: Master, task: Task, now: int = 0) -> None:
    request = task.request
    ids = identity.of_context(request.request_id, request.max_tokens, request.block_ids)
    master.receive(Dispatch("je", task), now, ids)


def of(outbox: Outbox, kind: type) -> list[Any]:
    return [event for event in outbox.take().events if isinstance(event, kind)]


def test_serves_without_a_shell() -> None:
    """A task from its dispatch to its end; nothing reports load, and counts can be asked for."""
    outbox = Outbox()
    master = Master("te", EngineConfig(50), outbox)
    dispatch(master, make_task(0, prompt=20, limit=3))
    assert master.load() == Load(1, 0, 20, 50, 0, 50, 0, 0, 0)
    run(master, 2)
    assert master.progress() == {"je": [(0, 2)]}
    run(master, 9, 20)
    assert [type(event) for event in outbox.take().events] == [ev.FirstToken, ev.TaskFinished]
    assert master.idle
    assert master.load().generated_tokens == 3


def test_runs_tasks_of_every_kind_side_by_side() -> None:
    """Role is not the engine's business: it prefills for others, decodes for others and serves, all in one batch."""
    outbox = Outbox()
    master = Master("te", EngineConfig(50), outbox)
    dispatch(master, make_task(0, prompt=20, limit=9))
    dispatch(master, make_task(1, prompt=20, limit=9, kind=TaskKind.PREFILL))
    dispatch(master, make_task(2, prompt=20, limit=9, kind=TaskKind.DECODE, generated=1, source="other"))
    master.next_plan()
    assert outbox.take().peers == [("other", KvRequested(1002, 2, "te"))]
    master.receive(KvOffered(1002, 2, "other", [4, 5]), 0)
    [transfer] = outbox.take().transfers
    assert (transfer.task_id, transfer.source_blocks) == (2, [4, 5])
    master.receive(KvFetched(2, True), 0)
    assert outbox.take().peers == [("other", KvReleased(1002, "te"))]
    master.complete(master.core.in_flight[0], (), 10)
    run(master, 20, 10)
    ended = of(outbox, ev.TaskFinished)
    assert sorted((event.task_id, event.generated, event.stopped) for event in ended) == [
        (0, 9, True),
        (1, 1, False),
        (2, 9, True),
    ]


def test_a_decode_task_must_say_where_its_cache_is() -> None:
    """Without a source there is nothing to decode from, and with one a prompt must not be computed."""
    outbox = Outbox()
    master = Master("te", EngineConfig(50), outbox)
    dispatch(master, make_task(0, kind=TaskKind.DECODE, generated=1))
    dispatch(master, Task(1, make_request(1), TaskKind.SERVE, 0, KvSource("other", 7)))
    assert [event.reason for event in of(outbox, ev.TaskFailed)] == [FailureReason.INVALID] * 2
