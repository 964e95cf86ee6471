"""Both clusters behind one signature, and a hand-held driver for tests that speak to the seam directly."""

import os
import signal
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import pytest

from cluster import events as ev
from cluster.acceptance import Acceptance
from cluster.actions import AbortTask, Action, DispatchTask, EndRequest, LaunchExecutor, SetTimer, SubmitRequest
from cluster.request import Answer, KvSource, Request, Task
from cluster.seam import Cluster
from cluster.vocabulary import NS_PER_S, WORKERS, Outcome, Role, Stage, TaskKind, to_ns
from flowserve.core.config import EngineConfig
from flowserve.runtime.wire import NullDevice
from real.cluster import Engine, RealCluster, WorkEngine
from sim.cluster import SimCluster
from sim.latency import Constant
from sim.node import Delays, Node, WorkNode
from sim.topology import HostShape, Wire
from tests.builders import MODEL, make_spec, simple_times

ACTORS = ("client", "je", "cm")
SLOTS = 2
"""Of workers."""
GUARD_S = 60.0
"""A test that waits so long for an event has failed; nothing is asserted about speed."""

E = TypeVar("E", bound=ev.Event)


def sim_cluster(
    actors: Sequence[str] = ACTORS,
    engine: EngineConfig | None = None,
    step_s: float = 0.002,
    report_period_s: float = 0.05,
    acceptance: float = 0.0,
) -> SimCluster:
    """Constant step times, stages of a millisecond each, and messages that take their time."""
    node = Node(
        engine=engine or EngineConfig(kv_blocks=2000),
        latency=lambda: Constant(step_s),
        stages=[(stage, to_ns(0.001)) for stage in Stage],
        kv_bytes_per_token=1000,
        kv_segments=2,
        host=HostShape(Wire(1e9, 1e-4, 1e-5), pcie=Wire(1e9, 1e-4), ssd=Wire(1e8, 1e-4)),
        acceptance=Acceptance(acceptance),
    )
    work = WorkNode(SLOTS, simple_times, node.stages)
    return SimCluster(
        actors,
        lambda spec: work if spec.role in WORKERS else node,
        report_period_s,
        Delays(5e-5, 5e-5, 2e-5, 5e-5),
    )


def real_cluster(
    actors: Sequence[str] = ACTORS,
    engine: EngineConfig | None = None,
    step_s: float = 0.002,
    report_period_s: float = 0.05,
    acceptance: float = 0.0,
    **options: Any,
) -> RealCluster:
    """Processes whose engine sleeps instead of computing."""
    kind = Engine(engine or EngineConfig(kv_blocks=2000), NullDevice(step_s, acceptance=Acceptance(acceptance)))
    work = WorkEngine(SLOTS, simple_times)
    return RealCluster(
        actors,
        lambda spec: work if spec.role in WORKERS else kind,
        lambda model: 1000,
        report_period_s=report_period_s,
        **options,
    )


AHEAD = EngineConfig(kv_blocks=2000, max_in_flight=2)
BACKENDS: dict[str, Callable[..., Cluster]] = {
    "sim": sim_cluster,
    "real": real_cluster,
    "sim, plans in flight": partial(sim_cluster, engine=AHEAD),
    "real, plans in flight": partial(real_cluster, engine=AHEAD),
}


def kill(cluster: Cluster, executor: str) -> None:
    """Let an executor die as by `kill -9`."""
    if isinstance(cluster, SimCluster):
        cluster.kill(executor)
    else:
        assert isinstance(cluster, RealCluster)
        os.kill(cluster.process_ids()[executor], signal.SIGKILL)


def present(cluster: Cluster) -> set[str]:
    """Names of the executors that the cluster has, launching ones included."""
    if isinstance(cluster, SimCluster):
        return {*cluster.executors, *cluster.workers, *cluster._starter._starts}
    assert isinstance(cluster, RealCluster)
    return set(cluster.process_ids())


class Driver:
    """Actions in, events out, by hand. Every event passes the checks that hold for all events of all runs."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.events: list[ev.Event] = []
        self._left: list[ev.Event] = []
        self._numbers = iter(range(1_000_000))
        self.submit(SetTimer("cm", "guard", to_ns(GUARD_S)))

    @property
    def now(self) -> int:
        return self.events[-1].time if self.events else 0

    def submit(self, *actions: Action) -> None:
        for action in actions:
            self.cluster.submit(action)

    def read(self) -> ev.Event:
        """The next event."""
        event = self.cluster.next_event()
        assert event is not None, "the run ended"
        assert event.time >= self.now, "events go back in time"
        assert 0 <= event.occurred <= event.time, f"{event} was heard of before it happened"
        if isinstance(event, ev.TimerFired) and event.name == "guard":
            pytest.fail(f"waited in vain; the last events were {self.events[-5:]}")
        self.events.append(event)
        return event

    def wait(self, kind: type[E], **fields: Any) -> E:
        """The first event of a kind, with these fields, that was not waited for before; it may be here already."""
        number = 0
        while True:
            while number >= len(self._left):
                self._left.append(self.read())
            event = self._left[number]
            if isinstance(event, kind) and all(getattr(event, name) == value for name, value in fields.items()):
                del self._left[number]
                return event
            number += 1

    def pause(self, seconds: float) -> list[ev.Event]:
        """What is heard in the next seconds."""
        name, before = f"pause {next(self._numbers)}", len(self.events)
        self.submit(SetTimer("cm", name, self.now + round(seconds * NS_PER_S)))
        self.wait(ev.TimerFired, name=name)
        return self.events[before:-1]

    def of(self, *kinds: type, **fields: Any) -> list[Any]:
        """All events of some kinds so far, with these fields."""
        return [
            event
            for event in self.events
            if isinstance(event, kinds) and all(getattr(event, name) == value for name, value in fields.items())
        ]

    # -- what most tests begin with -------------------------------------------------------------------------------

    def launch(self, executor: str, role: Role = Role.COLOCATED) -> ev.ExecutorReady:
        """Launch an executor and wait until it is ready."""
        self.submit(LaunchExecutor(executor, make_spec(role)))
        return self.wait(ev.ExecutorReady, executor=executor)

    def open(self, request_id: int, prompt: int = 40, output: int = 10, limit: int | None = None) -> Request:
        """A request arrives at the job executor `je`."""
        request = Request(request_id, prompt, output if limit is None else limit, MODEL)
        self.submit(SubmitRequest("je", request, Answer(output)))
        self.wait(ev.RequestArrived, to="je", request=request)
        return request

    def dispatch(
        self,
        executor: str,
        request: Request,
        task_id: int,
        kind: TaskKind = TaskKind.SERVE,
        generated: int = 0,
        kv: KvSource | None = None,
    ) -> Task:
        task = Task(task_id, request, kind, generated, kv)
        self.submit(DispatchTask("je", executor, task))
        return task

    def serve(self, executor: str, request_id: int, task_id: int, **lengths: int) -> ev.TaskFinished:
        """A request from its arrival to its end, on one executor."""
        self.dispatch(executor, self.open(request_id, **lengths), task_id)
        finished = self.wait(ev.TaskFinished, task_id=task_id)
        self.end(request_id, finished.generated)
        return finished

    def prefill(self, executor: str, request: Request, task_id: int) -> KvSource:
        """Prefill on one executor, which then holds the KV cache."""
        self.dispatch(executor, request, task_id, TaskKind.PREFILL)
        finished = self.wait(ev.TaskFinished, task_id=task_id)
        assert not finished.stopped
        assert (finished.generated, finished.tokens) == (1, 1)
        return KvSource(executor, task_id)

    def abort(self, executor: str, task_id: int) -> None:
        self.submit(AbortTask(executor, task_id))

    def end(self, request_id: int, generated: int = 0, outcome: Outcome = Outcome.FINISHED) -> ev.RequestEnded:
        """The job executor's last word on a request."""
        self.submit(EndRequest(request_id, outcome, generated))
        return self.wait(ev.RequestEnded, request_id=request_id)
