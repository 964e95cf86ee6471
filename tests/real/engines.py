"""Whole runs of the control plane on engine processes, with a hand on the process table."""

import os
import signal
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cluster import events as ev
from cluster.actions import Action, LaunchExecutor
from cluster.client import Client
from cluster.control import ControlPlane
from cluster.job_executor import JobExecutor
from cluster.manager import ClusterManager, GroupPlan
from cluster.policy import DispatchPolicy, ScalingPolicy
from cluster.recorder import Recorder
from cluster.request import Arrival
from flowserve.core.config import EngineConfig
from flowserve.runtime.wire import NullDevice, TorchDevice
from policies.dispatch.least_outstanding import LeastOutstanding
from policies.scaling.fixed import Fixed
from real.cluster import Engine, RealCluster
from tests.builders import make_spec

Watch = Callable[[ev.Event, list[Action], RealCluster], None]

COLOCATED = [GroupPlan(make_spec(), 2, 2, 2)]


class RealRun(NamedTuple):
    """What a run left behind. `pids`: every process that was an executor."""

    recorder: Recorder
    events: list[ev.Event]
    actions: list[Action]
    outputs: dict[int, list[int]]
    pids: dict[str, int]

    def of(self, *kinds: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kinds)]

    @property
    def launches(self) -> list[LaunchExecutor]:
        return [action for action in self.actions if isinstance(action, LaunchExecutor)]

    @property
    def ends(self) -> dict[int, tuple[str, int]]:
        """(outcome, tokens) by request."""
        numbers, tokens = (self.recorder.requests[name] for name in ("request_id", "output_tokens"))
        return {n: (outcome, t) for n, outcome, t in zip(numbers, self.recorder.outcomes, tokens, strict=True)}


def run_real(
    workload: Iterable[Arrival],
    *,
    groups: Sequence[GroupPlan] = COLOCATED,
    engine: EngineConfig | None = None,
    device: NullDevice | TorchDevice | None = None,
    policy: Callable[[], DispatchPolicy] = LeastOutstanding,
    scaling: ScalingPolicy | None = None,
    max_attempts: int = 4,
    report_period_s: float = 0.05,
    vocab: int = 1000,
    watch: Watch | None = None,
    **options: Any,
) -> RealRun:
    """One run to its end: the control plane on real processes. `watch` sees every event and may strike."""
    kind = Engine(engine or EngineConfig(kv_blocks=2000), device or NullDevice(0.001))
    client = Client(workload, ("je-0",), np.random.default_rng(0), closed_loop=True)
    job_executor = JobExecutor("je-0", 0, policy(), max_attempts)
    manager = ClusterManager(tuple(groups), scaling or Fixed(), ("je-0",))
    control = ControlPlane(client, [job_executor], manager, Recorder())
    events: list[ev.Event] = []
    actions: list[Action] = []
    pids: dict[str, int] = {}
    with RealCluster(
        ("client", "je-0", "cm"),
        lambda spec: kind,
        lambda model: vocab,
        report_period_s=report_period_s,
        keep_outputs=True,
        **options,
    ) as cluster:
        while (event := cluster.next_event()) is not None:
            events.append(event)
            decided = control.on_event(event)
            actions += decided
            for action in decided:
                cluster.submit(action)
            pids.update(cluster.process_ids())
            if watch is not None:
                watch(event, decided, cluster)
        outputs = cluster.outputs()
    control.recorder.censor()
    return RealRun(control.recorder, events, actions, outputs, pids)


def kill_on(executor: str, kind: type, count: int, **fields: Any) -> Watch:
    """Kill an executor's process at its `count`-th event of a kind."""
    seen = 0

    def watch(event: ev.Event, actions: list[Action], cluster: RealCluster) -> None:
        nonlocal seen
        wanted = {"executor": executor, **fields}
        if isinstance(event, kind) and all(getattr(event, name) == value for name, value in wanted.items()):
            seen += 1
            if seen == count:
                os.kill(cluster.process_ids()[executor], signal.SIGKILL)

    return watch


def alive(pid: int) -> bool:
    """Whether a process runs (one that has ended and was not waited for does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def engine_processes(driver: int) -> list[int]:
    """Process ids of the engines that process `driver` started."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                command = (folder / "cmdline").read_bytes()
            except OSError:  # it has just ended
                continue
            if parent == driver and b"flowserve.runtime.engine_process" in command:
                found.append(int(folder.name))
    return found


def shared_memory() -> set[str]:
    """Names of ours in /dev/shm."""
    return {path.name for path in Path("/dev/shm").iterdir() if "deepflow" in path.name}
