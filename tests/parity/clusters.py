"""The same run on a simulated and on a real cluster of engines without a model."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from cluster.acceptance import Acceptance
from cluster.actions import DispatchTask, DrainExecutor, LaunchExecutor, RetireExecutor
from cluster.client import Client
from cluster.control import ControlPlane
from cluster.events import Event
from cluster.job_executor import JobExecutor
from cluster.manager import ClusterManager, GroupPlan
from cluster.policy import DispatchPolicy, ScalingPolicy
from cluster.recorder import Recorder
from cluster.request import Arrival
from cluster.seam import Cluster
from cluster.streams import stream
from cluster.vocabulary import ExecutorSpec, Role, Stage
from flowserve.core.config import EngineConfig
from flowserve.runtime.wire import NullDevice
from policies.scaling.fixed import Fixed
from real.cluster import Engine, RealCluster
from sim.cluster import SimCluster
from sim.latency import Constant
from sim.node import Node
from sim.topology import HostShape, Wire

STEP_S = 0.003
VOCAB = 1000
REPORT_S = 0.05
MODEL = "m"


class Run(NamedTuple):
    """What the control plane decided, in order, and what was recorded."""

    decisions: list[tuple[str, ...]]
    recorder: Recorder
    outputs: dict[int, list[int]]


ACCEPTANCE = Acceptance(0.6, seed=3)
"""Of guesses, on both sides, where engines speculate."""


def simulated(engine: EngineConfig) -> Callable[[list[str], Path], Cluster]:
    """Makes a simulated cluster whose steps take as long as the real engines sleep."""
    node = Node(
        engine=engine,
        latency=lambda: Constant(STEP_S),
        stages=[(Stage.TE_LOAD, 50_000_000)],
        kv_bytes_per_token=1024,
        kv_segments=1,
        host=HostShape(Wire(1e9, 1e-5, 1e-6), pcie=Wire(1e9, 1e-4), ssd=Wire(1e8, 1e-4)),
        acceptance=ACCEPTANCE,
    )
    return lambda actors, _: SimCluster(actors, lambda _: node, REPORT_S)


def real(engine: EngineConfig, record: bool = False) -> Callable[[list[str], Path], Cluster]:
    """Makes a real cluster of processes that sleep instead of computing."""
    behind = Engine(engine, NullDevice(STEP_S, 0.0, VOCAB, ACCEPTANCE))
    return lambda actors, folder: RealCluster(
        actors,
        lambda _: behind,
        lambda _: VOCAB,
        report_period_s=REPORT_S,
        log_dir=folder,
        record=record,
        keep_outputs=True,
    )


def group(role: Role, initial: int, minimum: int | None = None, maximum: int | None = None) -> GroupPlan:
    """A TE group of the model that all tests here use."""
    low = initial if minimum is None else minimum
    return GroupPlan(ExecutorSpec(MODEL, role), initial, low, max(initial, maximum or initial))


def run(
    make: Callable[[list[str], Path], Cluster],
    folder: Path,
    arrivals: Sequence[Arrival],
    groups: Sequence[GroupPlan],
    dispatch: DispatchPolicy,
    scaling: ScalingPolicy | None = None,
    on_event: Callable[[Event, Cluster], None] | None = None,
) -> Run:
    """Drive a cluster to the end of a workload."""
    names = ("je-0",)
    recorder = Recorder()
    control = ControlPlane(
        Client(arrivals, names, stream(0, "client"), closed_loop=True),
        [JobExecutor("je-0", 0, dispatch)],
        ClusterManager(tuple(groups), scaling or Fixed(), names),
        recorder,
    )
    decisions: list[tuple[str, ...]] = []
    with make(["client", *names, "cm"], folder) as cluster:
        while (event := cluster.next_event()) is not None:
            if on_event is not None:
                on_event(event, cluster)
            for action in control.on_event(event):
                match action:
                    case DispatchTask():
                        task = action.task
                        decisions.append((str(task.request.request_id), str(task.kind), action.executor))
                    case LaunchExecutor() | DrainExecutor() | RetireExecutor():
                        decisions.append((type(action).__name__, action.executor))
                cluster.submit(action)
        outputs = cluster.outputs() if isinstance(cluster, RealCluster) else {}
    return Run(decisions, recorder, outputs)
