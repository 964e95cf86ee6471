"""Laws that every simulated run of the tests is held to, whatever the test itself looks at (`tests/conftest.py`).

* Little's law, L = lambda x W, in whole nanoseconds: the number of requests in the system, read from the job executors'
  own state and added up over time, is the sum of all requests' times in the system, taken from events. Likewise for
  the tasks at each engine: what its core says is waiting and running, against what comes and goes by messages.
  Requests and tasks that fail, are cancelled, or are there when the run ends, count like all others.
* Conservation: every request that arrives ends exactly once, and is recorded once; every task that is dispatched comes
  back exactly once.
* Work conservation: no engine is without a step in flight while it has something to decode, or the head of its queue
  fits; no worker has a free slot and a task that waits, and no task waits at its job executor for such a slot.

The checks hang on the classes' public methods, so every run passes through them, however the test builds it. They are
made while it runs and when it ends; of a run that a test leaves in the middle, when the test is over. Runs that go on
from a snapshot are not checked: nobody has seen how they began.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import pytest

from cluster import events as ev
from cluster.actions import Action, DispatchTask, DispatchWork, EndCall, EndRequest, EndRun, EndWork
from cluster.control import ControlPlane
from cluster.vocabulary import WORKERS
from flowserve.core.messages import Dispatch
from flowserve.core.task_executor import TaskExecutor
from sim.cluster import SimCluster
from sim.executor import SimExecutor

ARRIVED = (ev.RequestArrived, ev.CallArrived, ev.WorkArrived)
ENDS = (EndRequest, EndCall, EndWork)
BACK = (ev.TaskFinished, ev.TaskFailed, ev.TaskAborted, ev.WorkFinished, ev.WorkFailed, ev.WorkAborted)
LEFT = (ev.TaskFinished, ev.TaskFailed, ev.TaskAborted)


class Ledger:
    """Both sides of Little's law. `present`: since when each that is in the system, by id."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.present: dict[int, int] = {}
        self.area = 0
        self.sojourns = 0
        self.came = 0
        self._number = 0
        self._since = 0

    def passed(self, number: int, now: int) -> None:
        """So many have been in the system since the last time this was called."""
        assert now >= self._since, f"{self.what}: time goes back from {self._since} to {now}"
        self.area += number * (now - self._since)
        self._since = now

    def came_in(self, number: int, now: int) -> None:
        assert number not in self.present, f"{self.what}: {number} arrived twice"
        self.present[number] = now
        self.came += 1

    def went(self, number: int, now: int) -> None:
        assert number in self.present, f"{self.what}: {number} ended, and was not there"
        self.sojourns += now - self.present.pop(number)

    def check(self) -> None:
        """L x T = sum of times in the system, up to the last moment that was looked at."""
        there = sum(self._since - since for since in self.present.values())
        assert self.area == self.sojourns + there, (
            f"Little's law does not hold for {self.what}: {self.area} ns by number, "
            f"{self.sojourns} ns by those that left and {there} ns by {len(self.present)} that are there"
        )


class Plane:
    """The laws of one control plane."""

    def __init__(self) -> None:
        self.ledger = Ledger("requests in the system")
        self.open = 0

    def before(self, event: ev.Event) -> None:
        self.ledger.passed(self.open, event.time)
        if isinstance(event, ARRIVED):
            self.ledger.came_in(event.request.request_id, event.time)

    def after(self, control: ControlPlane[Any], event: ev.Event, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, ENDS):
                self.ledger.went(action.request_id, event.time)
        work = control.work
        self.open = sum(executor.open_jobs for executor in control.job_executors)
        self.open += 0 if work is None else work.open_requests
        if any(isinstance(action, EndRun) for action in actions):
            self.check(control)
        if work is None:
            return
        for role in WORKERS:
            group = work.fleet.group(str(role), role)
            free = (group.max_sequences - group.outstanding).max(initial=0)
            assert not work.parked(role) or free <= 0, f"a task waits for a worker of role {role}, and one has a slot"

    def check(self, control: ControlPlane[Any]) -> None:
        self.ledger.check()
        recorder, open_serving = control.recorder, sum(executor.open_jobs for executor in control.job_executors)
        ids = recorder.requests["request_id"].tolist()
        assert len(ids) == len(set(ids)), "a request was recorded twice"
        assert len(ids) <= self.ledger.came, "a request was recorded that never arrived"
        assert open_serving <= self.ledger.came


class Tasks:
    """Every task dispatched to a cluster comes back once."""

    def __init__(self) -> None:
        self.out: dict[int, Any] = {}
        self.checked_ns = -1

    def submitted(self, action: Action) -> None:
        if isinstance(action, DispatchTask | DispatchWork):
            task_id = action.task.task_id
            assert task_id not in self.out, f"task {task_id} was dispatched twice"
            self.out[task_id] = action

    def heard(self, event: ev.Event) -> None:
        if isinstance(event, BACK):
            assert event.task_id in self.out, f"task {event.task_id} came back twice: {event}"
            del self.out[event.task_id]


def work_is_conserved(cluster: SimCluster) -> None:
    """Nobody is idle who could work. At a moment when all that happens at this time has happened."""
    for name, executor in cluster.executors.items():
        core = executor.shell.core
        if core.in_flight:
            continue
        assert not any(True for _ in core.decoding()), f"{name} decodes nothing, though it could"
        head: Any = core.order.head(core.clock.issued) if core.waiting.count else None
        if head is None or head.status.name != "WAITING" or core.num_running >= core.config.max_sequences:
            continue
        need = -(-head.target // core.config.block_tokens) + int(core.config.watermark * core.config.kv_blocks)
        assert need > core.rtc.available, f"{name} is idle, though task {head.task_id} waits and fits"
    for name, worker in cluster.workers.items():
        slots = worker.worker.slots
        assert not slots.waiting or len(slots.running) >= slots.number, f"{name} has a free slot, and a task waits"


class Watch:
    """All that is being watched, until the test is over."""

    def __init__(self) -> None:
        self.planes: WeakKeyDictionary[ControlPlane[Any], Plane] = WeakKeyDictionary()
        self.clusters: WeakKeyDictionary[SimCluster, Tasks] = WeakKeyDictionary()
        self.engines: WeakKeyDictionary[TaskExecutor, Ledger] = WeakKeyDictionary()
        self.runs = 0
        """Runs that were watched to their end."""

    def check(self) -> None:
        """The laws hold for whatever there still is."""
        for control, plane in self.planes.items():
            plane.check(control)
        for ledger in self.engines.values():
            ledger.check()

    def forget(self) -> None:
        """Let go of runs that broke a law on purpose."""
        self.planes.clear()
        self.engines.clear()

    @contextmanager
    def patched(self) -> Iterator[None]:
        """Hang the checks on the classes."""
        with pytest.MonkeyPatch.context() as patch:
            self._watch_planes(patch)
            self._watch_clusters(patch)
            self._watch_engines(patch)
            yield

    def _watch_planes(self, patch: pytest.MonkeyPatch) -> None:
        planes, make, on_event = self.planes, ControlPlane.__init__, ControlPlane.on_event

        def watched_make(control: ControlPlane[Any], *more: Any, **options: Any) -> None:
            make(control, *more, **options)
            planes[control] = Plane()

        def watched(control: ControlPlane[Any], event: ev.Event) -> list[Action]:
            plane = planes.get(control)
            if plane is None:
                return on_event(control, event)
            plane.before(event)
            actions = on_event(control, event)
            plane.after(control, event, actions)
            return actions

        patch.setattr(ControlPlane, "__init__", watched_make)
        patch.setattr(ControlPlane, "on_event", watched)

    def _watch_clusters(self, patch: pytest.MonkeyPatch) -> None:
        clusters, make = self.clusters, SimCluster.__init__
        submit, next_event = SimCluster.submit, SimCluster.next_event

        def watched_make(cluster: SimCluster, *more: Any, **options: Any) -> None:
            make(cluster, *more, **options)
            clusters[cluster] = Tasks()

        def watched_submit(cluster: SimCluster, action: Action) -> None:
            if cluster in clusters:
                clusters[cluster].submitted(action)
            submit(cluster, action)

        def watched_next(cluster: SimCluster) -> ev.Event | None:
            event, tasks = next_event(cluster), clusters.get(cluster)
            if tasks is None:
                return event
            if event is None:
                self.runs += 1
                return None
            tasks.heard(event)
            if event.time > tasks.checked_ns:
                tasks.checked_ns = event.time
                work_is_conserved(cluster)
            return event

        patch.setattr(SimCluster, "__init__", watched_make)
        patch.setattr(SimCluster, "submit", watched_submit)
        patch.setattr(SimCluster, "next_event", watched_next)

    def _watch_engines(self, patch: pytest.MonkeyPatch) -> None:
        """An engine's number of tasks changes when it receives, completes or fails something, or right afterwards."""
        engines, make = self.engines, SimExecutor.__init__
        receive, complete, outbox = TaskExecutor.receive, TaskExecutor.complete, TaskExecutor.outbox

        def watched_make(executor: SimExecutor, env: Any, shell: TaskExecutor, *more: Any, **options: Any) -> None:
            make(executor, env, shell, *more, **options)
            engines[shell] = Ledger(f"tasks at {shell.shell.name}")

        def passed(shell: TaskExecutor, now: int) -> Ledger | None:
            ledger = engines.get(shell)
            if ledger is not None:
                # Finished prefills are held for others, they are no task any more.
                ledger.passed(len(shell.core.task_ids()) - len(shell.core.held), now)
            return ledger

        def watched_receive(shell: TaskExecutor, message: Any, now: int, *ids: Any) -> None:
            ledger = passed(shell, now)
            if ledger is not None and isinstance(message, Dispatch):
                ledger.came_in(message.task.task_id, now)
            receive(shell, message, now, *ids)

        def watched_complete(shell: TaskExecutor, plan: Any, stopped: Any, now: int, *more: Any) -> None:
            passed(shell, now)
            complete(shell, plan, stopped, now, *more)

        def watched_outbox(shell: TaskExecutor) -> Any:
            said = outbox(shell)
            ledger = engines.get(shell)
            if ledger is not None:
                left = [event for event in said.events if isinstance(event, LEFT) and event.task_id in ledger.present]
                for event in left:
                    ledger.went(event.task_id, event.occurred)
                if left:
                    ledger.check()
            return said

        patch.setattr(SimExecutor, "__init__", watched_make)
        patch.setattr(TaskExecutor, "receive", watched_receive)
        patch.setattr(TaskExecutor, "complete", watched_complete)
        patch.setattr(TaskExecutor, "outbox", watched_outbox)
