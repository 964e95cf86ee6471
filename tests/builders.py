"""Small builders that tests share: requests, tasks, events, and whole runs of the simulated cluster."""

import io
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from cluster import events as ev
from cluster.acceptance import Acceptance
from cluster.actions import Action
from cluster.client import Client
from cluster.control import ControlPlane
from cluster.fleet import Fleet
from cluster.job_executor import JobExecutor
from cluster.jobs.executor import WorkJobExecutor
from cluster.latency import LatencyModel
from cluster.manager import ClusterManager, GroupPlan
from cluster.policy import DispatchPolicy, GroupLoad, RoleSwitch, ScalingPolicy
from cluster.recorder import Recorder
from cluster.request import Answer, Arrival, KvSource, Request, Task, Trigger
from cluster.vocabulary import NS_PER_S, WORKERS, ExecutorSpec, ExecutorState, Role, Stage, TaskKind, to_ns
from cluster.work import (
    WORK,
    Agent,
    Call,
    FineTuning,
    Operation,
    OperationTime,
    Preprocess,
    Step,
    Tool,
    Train,
    Truth,
    WorkArrival,
    WorkRequest,
)
from flowserve.core.config import EngineConfig
from policies.dispatch.least_outstanding import LeastOutstanding
from policies.scaling.fixed import Fixed
from sim.clock import Clock
from sim.cluster import SimCluster
from sim.coldstart import Load
from sim.contention import Contention
from sim.executor import SimExecutor
from sim.hardware import Hardware
from sim.latency import Constant
from sim.node import Delays, Failure, Node, WorkNode
from sim.noise import Noise
from sim.topology import Hosts, HostShape, Wire

MODEL = "m"
NPU = Hardware(
    name="npu",
    flops=1e14,
    hbm_bytes=64e9,
    hbm_bytes_per_s=1e12,
    efficiency_gemm=0.5,
    efficiency_attention=0.25,
    efficiency_bandwidth=0.8,
    step_overhead_s=0.001,
    kv_link_bytes_per_s=1e10,
    kv_link_latency_s=5e-5,
    kv_call_overhead_s=1e-5,
    pcie_bytes_per_s=2e10,
    pcie_latency_s=1e-5,
    ssd_bytes_per_s=5e9,
    ssd_latency_s=1e-4,
    node_npus=8,
    topology="mesh",
    peer_bytes_per_s=140e9,
    peer_latency_s=1e-5,
    efficiency_link=0.5,
)
"""Round figures, with which times can be computed by hand."""


# -- plain data ---------------------------------------------------------------------------------------------------


def make_request(
    request_id: int = 0,
    prompt: int = 32,
    limit: int = 64,
    ids: tuple[int, ...] | None = None,
    model: str = MODEL,
    tenant: str = "",
    priority: int = 0,
    deadline_s: float | None = None,
) -> Request:
    deadline_ns = None if deadline_s is None else to_ns(deadline_s)
    return Request(request_id, prompt, limit, model, ids, tenant, priority, deadline_ns)


def make_arrival(
    request_id: int,
    at_s: float = 0.0,
    prompt: int = 32,
    output: int = 8,
    limit: int | None = None,
    ids: tuple[int, ...] | None = None,
    after: Trigger | None = None,
    cancel_after_s: float | None = None,
    model: str = MODEL,
    tenant: str = "",
    priority: int = 0,
    deadline_s: float | None = None,
) -> Arrival:
    return Arrival(
        make_request(request_id, prompt, output if limit is None else limit, ids, model, tenant, priority, deadline_s),
        Answer(output),
        to_ns(at_s),
        after,
        None if cancel_after_s is None else to_ns(cancel_after_s),
    )


def make_task(
    task_id: int = 0,
    prompt: int = 32,
    limit: int = 64,
    kind: TaskKind = TaskKind.SERVE,
    generated: int = 0,
    ids: tuple[int, ...] | None = None,
    source: str | None = None,
) -> Task:
    """A task of a request of the same number; a decode task fetches from `source` the KV cache of task 1000 + id."""
    kv = None if source is None else KvSource(source, 1000 + task_id)
    return Task(task_id, make_request(task_id, prompt, limit, ids), kind, generated, kv)


def make_spec(role: Role = Role.COLOCATED, model: str = MODEL, npus: int = 1) -> ExecutorSpec:
    return ExecutorSpec(model, role, npus)


def make_agent(
    request_id: int,
    *rounds: Sequence[tuple[int, int] | float],
    at_s: float = 0.0,
    ids: tuple[int, ...] | None = None,
    after: Trigger | None = None,
    cancel_after_s: float | None = None,
    priority: int = 0,
) -> WorkArrival:
    """An agent's turn of rounds: (prompt, output) tokens of a call, or seconds of a tool; `ids`: of its context."""
    steps: list[tuple[Step, ...]] = []
    lengths: list[int] = []
    for each in rounds:
        steps.append(
            tuple(
                Call(step[0], step[1], None if ids is None else 0) if isinstance(step, tuple) else Tool()
                for step in each
            )
        )
        lengths += [step[1] if isinstance(step, tuple) else to_ns(step) for step in each]
    work = Agent(tuple(steps), () if ids is None else (ids,))
    request = WorkRequest(request_id, work, MODEL, priority=priority)
    cancel = None if cancel_after_s is None else to_ns(cancel_after_s)
    return WorkArrival(request, Truth(tuple(lengths)), to_ns(at_s), after, cancel)


def make_tuning(
    request_id: int,
    steps: int = 4,
    at_s: float = 0.0,
    checkpoint_steps: int | None = None,
    shards: int = 1,
    evaluation: Sequence[tuple[int, int]] = (),
    priority: int = 0,
    cancel_after_s: float | None = None,
) -> WorkArrival:
    """A fine-tuning request of `steps` steps of 1000 tokens; `evaluation`: (prompt, output) tokens of calls."""
    calls = tuple(Call(prompt, output) for prompt, output in evaluation)
    work = FineTuning(steps * 1000, 1.0, steps, 100, 10, 1.0, checkpoint_steps, shards, calls)
    request = WorkRequest(request_id, work, MODEL, priority=priority)
    cancel = None if cancel_after_s is None else to_ns(cancel_after_s)
    return WorkArrival(request, Truth(tuple(output for _, output in evaluation)), to_ns(at_s), cancel_after_ns=cancel)


def simple_times(spec: ExecutorSpec, operation: Operation) -> int:
    """A millisecond per thousand tokens preprocessed; a second per training step, half a second to restore a state."""
    match operation:
        case Preprocess():
            return operation.tokens * NS_PER_S // 1_000_000
        case Train():
            return operation.steps * NS_PER_S + operation.restore * NS_PER_S // 2
    raise AssertionError(operation)


def workers(cpu: int = 1, training: int = 0, npus: int = 8) -> list[GroupPlan]:
    """Groups of workers, of fixed size."""
    sizes = ((Role.CPU, cpu, 0), (Role.TRAINING, training, npus))
    return [GroupPlan(ExecutorSpec(str(role), role, each), size, size, size) for role, size, each in sizes if size]


def chain(*choices: int) -> tuple[int, ...]:
    """Chained block ids: the n-th id names the first n choices, so equal prefixes have equal ids and others never."""
    ids, link = [], 1
    for choice in choices:
        assert 0 <= choice < 10
        link = link * 10 + choice
        ids.append(link)
    return tuple(ids)


# -- events -------------------------------------------------------------------------------------------------------


def announced(
    executor: str,
    role: Role = Role.COLOCATED,
    state: ExecutorState = ExecutorState.READY,
    time: int = 0,
    to: str = "je-0",
    model: str = MODEL,
) -> ev.ExecutorAnnounced:
    return ev.ExecutorAnnounced(
        to=to,
        time=time,
        occurred=time,
        executor=executor,
        spec=make_spec(role, model),
        state=state,
        kv_blocks=100,
        max_sequences=8,
    )


def load_report(
    executor: str, time: int = 0, to: str = "cm", waiting: int = 0, running: int = 0, free: int = 100, total: int = 100
) -> ev.LoadReport:
    return ev.LoadReport(
        to=to,
        time=time,
        occurred=time,
        executor=executor,
        waiting=waiting,
        running=running,
        waiting_tokens=0,
        free_blocks=free,
        cached_blocks=0,
        total_blocks=total,
        generated_tokens=0,
        preemptions=0,
    )


# -- runs of the simulated cluster --------------------------------------------------------------------------------


class Run(NamedTuple):
    """What a simulated run left behind."""

    recorder: Recorder
    cluster: SimCluster
    control: ControlPlane
    events: list[ev.Event]
    log: bytes
    executors: dict[str, SimExecutor]
    """Those that were still there at the end."""

    @property
    def rows(self) -> dict[int, dict[str, Any]]:
        """Records of requests by id, each with its columns, outcome and reason."""
        columns = self.recorder.requests
        return {
            request_id: {
                **{name: column[place] for name, column in columns.items()},
                "outcome": self.recorder.outcomes[place],
                "reason": self.recorder.reasons[place],
                "executor": self.recorder.executors[place],
            }
            for place, request_id in enumerate(columns["request_id"])
        }

    def of(self, *kinds: type) -> list[Any]:
        """Events of some kinds, in order."""
        return [event for event in self.events if isinstance(event, kinds)]


def tier_wires(pcie_bytes_per_s: float, ssd_bytes_per_s: float, latency_s: float = 0.0) -> tuple[Wire, Wire]:
    """PCIe and disk of a host."""
    return Wire(pcie_bytes_per_s, latency_s), Wire(ssd_bytes_per_s, latency_s)


WIRE, TIERS = Wire(1e9), tier_wires(1e9, 1e8)


def no_stages() -> list[tuple[Stage, int]]:
    return [(stage, 0) for stage in Stage]


def run_sim(
    workload: Iterable[Arrival | WorkArrival],
    *,
    groups: Sequence[GroupPlan] | None = None,
    executors: int = 1,
    engine: EngineConfig | None = None,
    latency: Callable[[], LatencyModel] = lambda: Constant(0.01),
    host_step_s: float = 0.0,
    wire: Wire = WIRE,
    tiers: tuple[Wire, Wire] = TIERS,
    host: HostShape | None = None,
    hosts: Hosts | None = None,
    load: Load | None = None,
    kv_bytes_per_token: int = 1000,
    kv_segments: int = 1,
    layers: int = 1,
    stages: Sequence[tuple[Stage, int]] | None = None,
    policy: Callable[[], DispatchPolicy] = LeastOutstanding,
    scaling: ScalingPolicy | None = None,
    num_job_executors: int = 1,
    report_period_s: float = 1.0,
    delays: Delays | None = None,
    failures: Sequence[Failure] = (),
    coalesce: bool = True,
    record: bool = False,
    closed_loop: bool = True,
    max_attempts: int = 4,
    seed: int = 0,
    acceptance: float = 0.0,
    noise: Noise | None = None,
    kv_host_s: float = 0.0,
    contention: Contention = Contention(),  # noqa: B008 (frozen)
    slots: int = 1,
    work_time: OperationTime = simple_times,
    watch: Callable[[ev.Event, list[Action], SimCluster], None] | None = None,
    between: Callable[[ControlPlane, SimCluster], None] | None = None,
) -> Run:
    """One run to its end: the real control plane on the simulated cluster. Without `host`, executors have one each,
    with `wire` to the others and `tiers` to its memory and disk. `between`: called after each event.
    """
    groups = groups or [GroupPlan(make_spec(), executors, executors, executors)]
    engine = engine or EngineConfig(kv_blocks=1000)
    names = tuple(f"je-{number}" for number in range(num_job_executors))
    client = Client(workload, names, np.random.default_rng(seed), closed_loop)
    job_executors = [JobExecutor(name, number, policy(), max_attempts) for number, name in enumerate(names)]
    manager = ClusterManager(tuple(groups), scaling or Fixed(), names)
    roles = tuple(role for role in WORKERS if any(group.spec.role is role for group in groups))
    work = WorkJobExecutor(names, roles, max_attempts) if roles else None
    control = ControlPlane(client, job_executors, manager, Recorder(), work)
    log = io.BytesIO()
    control.log_to(log)
    node = Node(
        engine=engine,
        latency=latency,
        stages=no_stages() if stages is None else stages,
        kv_bytes_per_token=kv_bytes_per_token,
        kv_segments=kv_segments,
        host=host or HostShape(wire, pcie=tiers[0], ssd=tiers[1]),
        host_step_s=host_step_s,
        acceptance=Acceptance(acceptance),
        load=load,
        noise=noise,
        kv_host_s=kv_host_s,
        layers=layers,
        contention=contention,
    )
    work_node = WorkNode(slots, work_time, no_stages() if stages is None else stages)
    cluster = SimCluster(
        ("client", *names, "cm", *([WORK] if roles else [])),
        lambda spec: work_node if spec.role in WORKERS else node,
        report_period_s,
        delays,
        failures,
        coalesce=coalesce,
        record=record,
        hosts=hosts,
    )
    events: list[ev.Event] = []
    with cluster:
        while (event := cluster.next_event()) is not None:
            events.append(event)
            actions = control.on_event(event)
            if watch is not None:
                watch(event, actions, cluster)
            for action in actions:
                cluster.submit(action)
            if between is not None:
                between(control, cluster)
        left = dict(cluster.executors)
    control.recorder.censor()
    return Run(control.recorder, cluster, control, events, log.getvalue(), left)


def run_out(clock: Clock) -> None:
    """Until nothing is left to happen."""
    while clock.next_ns is not None:
        clock.step()


class BackAndForth(ScalingPolicy):
    """Moves an executor from prefill to decode, then from decode to prefill, and so on."""

    def __init__(self, period_s: float = 0.04) -> None:
        self.period_s = period_s
        self._turn = 0

    def desired(self, load: GroupLoad, now_ns: int) -> int:
        return load.ready + load.pending

    def switches(self, loads: Sequence[GroupLoad], now_ns: int) -> Sequence[RoleSwitch]:
        self._turn += 1
        sides = (Role.PREFILL, Role.DECODE)
        return [RoleSwitch(MODEL, sides[self._turn % 2 - 1], sides[self._turn % 2])]


class AtItsHolder(LeastOutstanding):
    """Decode tasks go where their KV cache is, if that executor decodes by now."""

    def place(self, task: Task, fleet: Fleet, now_ns: int) -> str | None:
        if task.kv is not None and fleet.role_of(task.kv.executor) is Role.DECODE:
            return task.kv.executor
        return super().place(task, fleet, now_ns)


def disaggregated(prefill: int = 1, decode: int = 1, colocated: int = 0) -> list[GroupPlan]:
    """Groups of a disaggregated fleet of fixed size."""
    sizes = ((Role.PREFILL, prefill), (Role.DECODE, decode), (Role.COLOCATED, colocated))
    return [GroupPlan(make_spec(role), size, size, size) for role, size in sizes if size]
