"""The laws of `tests/invariants.py` see what they are there to see: each is broken once on purpose."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import msgspec
import pytest

from cluster import events as ev
from cluster.job_executor import JobExecutor
from cluster.jobs.executor import WorkJobExecutor
from flowserve.core.master import Master
from flowserve.core.scheduler import EngineCore
from flowserve.core.worker import Slots
from tests.builders import disaggregated, make_agent, make_arrival, run_sim, workers
from tests.invariants import Watch

pytestmark = pytest.mark.pure


def test_every_run_is_watched(laws: Watch) -> None:
    """The fixture that all tests have sees this one's run, its control plane and its engines."""
    run = run_sim([make_arrival(number, 0.1 * number) for number in range(5)], executors=2)
    assert laws.runs == 1
    assert laws.planes[run.control].ledger.came == 5
    assert sorted(ledger.what for ledger in laws.engines.values()) == ["tasks at te-0", "tasks at te-1"]
    assert laws.planes[run.control].ledger.area > 0


@contextmanager
def seen(laws: Watch, what: str) -> Iterator[None]:
    """The run in the block breaks a law, and is stopped for it."""
    with pytest.raises(AssertionError, match=what):
        yield
    laws.forget()


WITH_A_WORKER = [*disaggregated(0, 0, 1), *workers(1)]


def test_an_engine_that_dawdles_is_seen(laws: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheduler that decides on nothing for a while, though a request fits."""
    schedule, asked = EngineCore.schedule, count()
    monkeypatch.setattr(EngineCore, "schedule", lambda core: None if next(asked) < 2 else schedule(core))
    with seen(laws, "is idle, though task"):
        run_sim([make_arrival(0), make_arrival(1, 1.0), make_arrival(2, 2.0)])


def test_a_worker_that_dawdles_is_seen(laws: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots that are not filled while a task waits."""
    monkeypatch.setattr(Slots, "start", lambda slots, now: [])
    with seen(laws, "has a free slot, and a task waits"):
        run_sim([make_agent(0, [1.0]), make_arrival(1, 1.0)], groups=WITH_A_WORKER)


def test_a_job_executor_that_dawdles_is_seen(laws: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks kept back while a worker has a slot."""
    monkeypatch.setattr(WorkJobExecutor, "_place", lambda executor, role, now: [])
    with seen(laws, "waits for a worker of role cpu, and one has a slot"):
        run_sim([make_agent(0, [1.0])], groups=WITH_A_WORKER)


def test_a_task_that_ends_twice_is_seen(laws: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every task comes back once."""
    finished = Master._finished

    def twice(master: Master, sequence: Any, held: Any, now: int) -> None:
        finished(master, sequence, held, now)
        master._outbox.events.append(master._outbox.events[-1])

    monkeypatch.setattr(Master, "_finished", twice)
    with seen(laws, "came back twice|ended, and was not there"):
        run_sim([make_arrival(0), make_arrival(1, 5.0)])


def test_a_request_that_stays_breaks_littles_law(laws: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job executor that answers, and keeps the request among its open ones, has more there than came and went."""
    end = JobExecutor._end

    def kept(executor: JobExecutor, job: Any, *more: Any) -> Any:
        actions = end(executor, job, *more)
        executor._jobs[-1 - job.request.request_id] = job
        return actions

    monkeypatch.setattr(JobExecutor, "_end", kept)
    with seen(laws, "Little's law does not hold for requests in the system"):
        run_sim([make_arrival(0), make_arrival(1, 5.0)])


def test_a_wrongly_dated_end_breaks_littles_law(laws: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ends that an engine dates one nanosecond early are found."""
    emit = Master._emit

    def early(master: Master, event: ev.Event) -> None:
        if isinstance(event, ev.TaskFinished):
            event = msgspec.structs.replace(event, occurred=event.occurred - 1)
        emit(master, event)

    monkeypatch.setattr(Master, "_emit", early)
    with seen(laws, "Little's law does not hold for tasks at te-0"):
        run_sim([make_arrival(0), make_arrival(1, 5.0)])
