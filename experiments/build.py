"""From a configuration to the objects of a run: workload, control plane, cluster."""

from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
from omegaconf import DictConfig, OmegaConf

from cluster import cost
from cluster.acceptance import Acceptance
from cluster.client import Client
from cluster.control import ControlPlane
from cluster.engine_policy import ChunkPolicy, EvictionPolicy, PolicySpec, QueueOrder, VictimPolicy
from cluster.job_executor import JobExecutor
from cluster.jobs.executor import WorkJobExecutor
from cluster.latency import LatencyModel
from cluster.manager import ClusterManager, GroupPlan
from cluster.metrics import Slo, Window
from cluster.policy import DispatchPolicy, ScalingPolicy
from cluster.recorder import Recorder
from cluster.seam import Cluster
from cluster.streams import stream
from cluster.vocabulary import WORKERS, ExecutorSpec, Role, Stage
from cluster.work import WORK, AnyArrival, OperationTime
from experiments.config import CONF, build, plain, typed
from experiments.models import by_group, served, shape_of
from experiments.models import model_folder as model_folder
from experiments.models import model_name as model_name
from experiments.models import model_shape as model_shape
from experiments.task_log import TaskLog
from experiments.timeline import Spans
from flowserve.core import record
from flowserve.core.config import EngineConfig
from flowserve.core.transfer import pieces_per_run
from flowserve.runtime.sampling import Sampling
from sim.hardware import Hardware
from sim.model_shape import ModelShape

if TYPE_CHECKING:
    from real.cluster import RealCluster
    from sim.topology import Hosts

ROLES_THAT_SERVE = (
    {Role.COLOCATED},
    {Role.PREFILL, Role.DECODE},
    {Role.COLOCATED, Role.PREFILL, Role.DECODE},
    {Role.COLOCATED, Role.DECODE},
)
ENGINE_POLICIES = {
    "order": QueueOrder,
    "victim": VictimPolicy,
    "eviction": EvictionPolicy,
    "chunking": ChunkPolicy,
}


DRAWING = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logprobs",
)
"""What `sampling` sets of `Sampling`, for all requests of a run."""


class GroupConfig(msgspec.Struct, frozen=True):
    """One entry of `fleet.groups`. `hardware`: an option of conf/hardware or a YAML file, where it is not the run's.
    `npus`: of each executor, by default 1, and none of a CPU worker. `slots`: of each CPU worker, tasks side by side.
    `model`: the same of conf/model, or a Hugging Face folder. `copies` above 0: the entry stands for so many models of
    that shape (fine-tuned ones, say), named NAME-0, NAME-1 and so on, and a group of each. `profile`: the latency
    profile of this model on this hardware, in place of the run's latency model. `pipeline_stages`,
    `attention_groups`: how its executors spread the model, where that is not in its shape (`ModelShape`). Workers
    belong to no model.
    """

    role: Role
    executors: int
    npus: int | None = None
    slots: int = 1
    minimum: int = 0
    maximum: int = 64
    hardware: str = ""
    model: str = ""
    copies: int = 0
    profile: str = ""
    pipeline_stages: int | None = None
    attention_groups: int | None = None

    def spread(self, shape: ModelShape) -> ModelShape:
        """The shape as the executors of this group have it."""
        stages, parts = self.pipeline_stages, self.attention_groups
        return msgspec.structs.replace(
            shape,
            pipeline_stages=shape.pipeline_stages if stages is None else stages,
            attention_groups=shape.attention_groups if parts is None else parts,
        )


class Settings(msgspec.Struct, frozen=True):
    """Single values of the configuration, for their types. Here: its top level."""

    seed: int
    start_when_ready: bool
    job_executors: int
    max_attempts: int
    max_parked: int
    warmup_s: float
    cooldown_s: float
    profile_max_prompt: int
    electricity_per_kwh: float
    profile_launches: int
    decisions: bool
    report: bool
    progress: bool
    watch: bool
    snapshot_at: float | None
    out: str | None


class TraceSettings(msgspec.Struct, frozen=True):
    """The same in `trace`."""

    name: str
    stand_in: str | None
    stand_in_rate: float | None
    start_s: float
    duration_s: float | None
    rate: float
    prompt_scale: float
    output_scale: float
    max_prompt_tokens: int | None
    max_output_tokens: int | None
    limit: int | None
    max_tokens: int
    closed_loop: bool


class SimSettings(msgspec.Struct, frozen=True):
    """The same in `backend=sim`."""

    report_period_s: float
    coalesce: bool
    record: bool
    draft_acceptance: float
    hosts: int | None


class RealSettings(msgspec.Struct, frozen=True):
    """The same in `backend=real`."""

    report_period_s: float
    device: str | None
    draft_model: str | None
    dtype: str
    threads: int
    ssd_folder: str | None
    graph_sizes: list[int]
    memory_share: float | None
    pin: bool
    record: bool
    metrics_port: int | None
    log_level: str
    keep_outputs: bool
    step_s: float
    prefill_token_s: float
    draft_acceptance: float


def check_types(cfg: DictConfig) -> None:
    """ValueError: a value of the wrong type, or a time below 0, before anything is started."""
    for node, kind, where in (
        (cfg, Settings, "config"),
        (cfg.trace, TraceSettings, "trace"),
        (cfg.backend, RealSettings if cfg.backend.name == "real" else SimSettings, "backend"),
    ):
        typed({field: plain(node[field]) for field in kind.__struct_fields__}, kind, where)
    sampling(cfg)
    if cfg.snapshot_at is not None and not (cfg.snapshot_at >= 0 and cfg.backend.name == "sim"):
        raise ValueError(
            f"snapshot_at is {cfg.snapshot_at} on backend {cfg.backend.name}: allowed are seconds from 0 up of a "
            "simulated run"
        )
    if cfg.electricity_per_kwh < 0:
        raise ValueError(f"electricity_per_kwh is {cfg.electricity_per_kwh}: allowed are 0 (in the price) and more")
    for field in ("report_period_s", "step_s", "prefill_token_s"):
        if cfg.backend.get(field, 0.0) < 0:
            raise ValueError(f"backend.{field} is {cfg.backend[field]}: allowed are seconds from 0 up")


class Workload(NamedTuple):
    """Arrivals, and where they come from, for the report."""

    arrivals: Iterable[AnyArrival]
    source: str
    stand_in: bool


def workload(cfg: DictConfig) -> Workload:
    """The configured trace, cut and scaled; its fitted stand-in where no file is found, which `source` then says."""
    from traces.catalog import find
    from traces.merge import Merge
    from traces.synthetic import SyntheticTrace
    from traces.transforms import ClipLengths, LengthScale, Limit, RateScale, TimeWindow

    trace, model = cfg.trace, model_name(cfg)
    sources = job_sources(cfg, model)
    if trace.reader is None and trace.stand_in is None:
        if not sources:
            raise ValueError("the run has no requests: give it a trace or jobs, e.g. trace=azure2023_conv jobs=agents")
        return Workload(Merge(sources), "jobs only", False)
    stand_in = trace.reader is None or (
        trace.stand_in is not None
        and not Path(str(trace.reader.path)).is_file()
        and find(str(trace.reader.path)) is None
    )
    arrivals: Iterable[AnyArrival]
    if stand_in:
        span_s = (trace.start_s + (trace.duration_s or 600.0)) * max(trace.rate, 1e-9)
        arrivals = SyntheticTrace(trace.stand_in, trace.stand_in_rate, span_s, model, cfg.seed, trace.max_tokens)
        source = f"generated like {trace.stand_in} ({trace.stand_in_rate} requests/s, seed {cfg.seed})"
        if trace.reader is not None:
            source += f": a stand-in, because no file {trace.reader.path} was found (set DEEPFLOW_TRACES)"
    else:
        arrivals = build(trace.reader, "trace", model=model, max_tokens=trace.max_tokens)
        source = str(trace.name)
    if not trace.rate > 0:
        raise ValueError(f"trace.rate is {trace.rate}: allowed is a factor above 0 (1 keeps the trace's own rate)")
    if trace.rate != 1:
        arrivals = RateScale(arrivals, factor=trace.rate)
    if trace.start_s or trace.duration_s is not None:
        arrivals = TimeWindow(arrivals, trace.start_s, trace.duration_s)
    if trace.prompt_scale != 1 or trace.output_scale != 1:
        arrivals = LengthScale(arrivals, trace.prompt_scale, trace.output_scale)
    if trace.max_prompt_tokens is not None or trace.max_output_tokens is not None:
        arrivals = ClipLengths(arrivals, trace.max_prompt_tokens, trace.max_output_tokens)
    if trace.limit is not None:
        arrivals = Limit(arrivals, trace.limit)
    if cfg.mix["_target_"] is not None:
        how = {**plain(cfg.mix), "_partial_": True, "_convert_": "all"}
        arrivals = build(how, "mix", models=list(served(cfg)), seed=cfg.seed)(arrivals)
    if sources:
        arrivals = Merge([arrivals, *sources])
    return Workload(arrivals, source, stand_in and trace.reader is not None)


def job_sources(cfg: DictConfig, model: str) -> list[Iterable[AnyArrival]]:
    """The workloads of `jobs`: work other than serving, beside the trace."""
    return [
        build(source, f"jobs.sources[{number}]", model=model, seed=cfg.seed)
        for number, source in enumerate(cfg.jobs.sources)
    ]


def rate_from(arrivals: Iterable[AnyArrival], since_ns: int, rate: float, before: float) -> Iterable[AnyArrival]:
    """What comes from then on at another `trace.rate`."""
    from traces.transforms import RateFrom

    if not rate > 0:
        raise ValueError(f"trace.rate is {rate}: allowed is a factor above 0 (1 keeps the trace's own rate)")
    return RateFrom(arrivals, since_ns, rate / before)


def job_executor_names(cfg: DictConfig) -> tuple[str, ...]:
    if cfg.job_executors < 1:
        raise ValueError(f"job_executors is {cfg.job_executors}: at least one must take requests")
    return tuple(f"je-{number}" for number in range(cfg.job_executors))


class GroupEntry(NamedTuple):
    """What an entry of `fleet.groups` says of one TE group. `shape`: for workers it means nothing."""

    plan: GroupPlan
    shape: ModelShape
    profile: str
    slots: int


def groups(cfg: DictConfig) -> tuple[GroupPlan, ...]:
    """The TE groups of `fleet`."""
    return tuple(entry.plan for entry in group_entries(cfg).values())


def group_entries(cfg: DictConfig) -> dict[ExecutorSpec, GroupEntry]:
    """The same with what stands behind each."""
    entries: dict[ExecutorSpec, GroupEntry] = {}
    roles: dict[str, set[Role]] = {}
    for number, (node, (model, called)) in enumerate(zip(cfg.fleet.groups, by_group(cfg), strict=True)):
        where = f"fleet.groups[{number}]"
        group = typed(node, GroupConfig, where)
        npus = _npus(group, where)
        if group.executors == 0 and group.maximum > 0 and plain(cfg.scaling).get("period_s") is None:
            raise ValueError(f"{where} has zero executors and scaling never adds one: set executors to 1 or more")
        shape = shape_of(cfg, model)
        if group.role not in WORKERS:
            shape = group.spread(shape)
            if cfg.backend.name == "sim":
                shape.check_split(npus)
            elif shape.pipeline_stages > 1 or shape.groups(npus) > 1:
                raise ValueError(
                    f"{where}: real engines have neither pipeline stages nor attention groups; leave them out"
                )
        for name in called or [str(group.role)]:
            spec = ExecutorSpec(name, group.role, npus, group.hardware)
            if spec in entries:
                raise ValueError(f"{where} is another group of {group.role} executors of {name}: make them one")
            plan = GroupPlan(spec, group.executors, group.minimum, group.maximum)
            entries[spec] = GroupEntry(plan, shape, group.profile, group.slots)
            if group.role not in WORKERS:
                roles.setdefault(name, set()).add(group.role)
    if entries and not roles:
        raise ValueError("fleet.groups has only workers: a run needs executors that serve, too")
    for name, found in roles.items():
        if found not in ROLES_THAT_SERVE:
            raise ValueError(
                f"fleet.groups has only {' and '.join(sorted(found))} executors of {name}, which cannot finish a "
                "request: needed are colocated ones, or prefill and decode together"
            )
    return entries


def _npus(group: GroupConfig, where: str) -> int:
    """Of each executor. ValueError: more or less than its role takes, or what workers of its role do not have."""
    npus = group.npus if group.npus is not None else int(group.role is not Role.CPU)
    if group.role is Role.CPU and npus:
        raise ValueError(f"{where}.npus is {npus}: workers of role cpu take none, leave it out")
    if group.role is not Role.CPU and npus < 1:
        raise ValueError(f"{where}.npus is {npus}: an executor takes at least one")
    if group.slots < 1 or (group.slots > 1 and group.role is not Role.CPU):
        raise ValueError(f"{where}.slots is {group.slots}: allowed are 1 and more for role cpu, and 1 for others")
    if group.copies < 0:
        raise ValueError(f"{where}.copies is {group.copies}: allowed are 0 (the model itself) and more")
    for name in ("model", "copies", "profile", "pipeline_stages", "attention_groups"):
        if group.role in WORKERS and getattr(group, name):
            raise ValueError(f"{where}.{name} is {getattr(group, name)}: workers belong to no model, leave it out")
    return npus


def worker_roles(cfg: DictConfig) -> tuple[Role, ...]:
    """Roles of the workers that `fleet` has."""
    present = {plan.spec.role for plan in groups(cfg)}
    return tuple(role for role in WORKERS if role in present)


def runs_work(cfg: DictConfig) -> bool:
    """Whether the run has a job executor for work other than serving."""
    return bool(worker_roles(cfg) or cfg.jobs.sources)


def dispatch_policy(cfg: DictConfig, job_executor: str) -> DispatchPolicy:
    """That of one job executor."""
    policy = build(cfg.dispatch, "dispatch", rng=stream(cfg.seed, f"dispatch {job_executor}"))
    if not isinstance(policy, DispatchPolicy):
        raise ValueError(f"dispatch: {cfg.dispatch['_target_']} is not a cluster.policy.DispatchPolicy")
    return policy


def scaling_policy(cfg: DictConfig) -> ScalingPolicy:
    policy = build(cfg.scaling, "scaling", rng=stream(cfg.seed, "scaling"))
    if not isinstance(policy, ScalingPolicy):
        raise ValueError(f"scaling: {cfg.scaling['_target_']} is not a cluster.policy.ScalingPolicy")
    return policy


def control_plane(cfg: DictConfig, arrivals: Iterable[AnyArrival], recorder: Recorder) -> ControlPlane[Client]:
    """Client, job executors (each with a policy object of its own) and cluster manager."""
    names = job_executor_names(cfg)
    job_executors = [
        JobExecutor(name, number, dispatch_policy(cfg, name), cfg.max_attempts, cfg.max_parked)
        for number, name in enumerate(names)
    ]
    scaling = scaling_policy(cfg)
    work = WorkJobExecutor(names, worker_roles(cfg), cfg.max_attempts) if runs_work(cfg) else None
    closed_loop, rng = cfg.trace.closed_loop or bool(cfg.jobs.sources), stream(cfg.seed, "client")
    client = Client(arrivals, names, rng, closed_loop, cfg.start_when_ready, work is not None)
    limit: int | None = typed(cfg.fleet.get("npus"), int | None, "fleet.npus")  # type: ignore[arg-type]
    manager = ClusterManager(groups(cfg), scaling, names, npus=limit)
    return ControlPlane(client, job_executors, manager, recorder, work)


def objectives(cfg: DictConfig) -> tuple[Slo, Window]:
    return typed(cfg.slo, Slo, "slo"), Window(cfg.warmup_s, cfg.cooldown_s)


def hardware_of(cfg: DictConfig, spec: ExecutorSpec) -> Hardware:
    """What an executor runs on: its group's hardware, or the run's. ValueError: there is no such option or file."""
    if not spec.hardware:
        return typed(cfg.hardware, Hardware, "hardware")
    file = Path(spec.hardware) if spec.hardware.endswith(".yaml") else CONF / "hardware" / f"{spec.hardware}.yaml"
    if not file.is_file():
        options = ", ".join(sorted(option.stem for option in (CONF / "hardware").glob("*.yaml")))
        raise ValueError(f"fleet.groups: hardware {spec.hardware!r} is not one of {options}, nor a YAML file")
    return typed(OmegaConf.load(file), Hardware, str(file))


def costs(cfg: DictConfig, recorder: Recorder) -> dict[str, float]:
    """What a run cost, each executor at the rates of its own hardware, see `cluster.cost`."""
    rates = {spec: hardware_of(cfg, spec).rates for spec in {each.spec for each in recorder.held()}}
    return cost.costs(recorder, rates.__getitem__, float(cfg.electricity_per_kwh))


def engine_config(cfg: DictConfig, spec: ExecutorSpec, shape: ModelShape | None = None) -> EngineConfig:
    """Engine limits; KV cache blocks by what fits where the configuration leaves them open. `shape`: of the model that
    the executor serves, where it is known.
    """
    from sim.hardware import kv_blocks

    values = plain(cfg.engine)
    if values["kv_blocks"] is None:
        shape = shape or model_shape(cfg, spec.model)
        budgets = (values.get(name) or 0 for name in ("token_budget", "prefill_token_budget", "decode_token_budget"))
        sizes = (values["block_tokens"], max(budgets), values["max_sequences"])
        values["kv_blocks"] = kv_blocks(hardware_of(cfg, spec), shape, spec.npus, *sizes)
    for name, kind in ENGINE_POLICIES.items():
        if name in values:  # an option of one's own may leave it to the engine's default
            values[name] = engine_policy(values[name], kind, f"engine.{name}")
    return typed(values, EngineConfig, "engine")


def engine_policy(node: dict[str, Any], kind: type, where: str) -> PolicySpec:
    """A policy inside the engines: each makes its own from this. ValueError: it cannot be made."""
    spec = PolicySpec(node["_target_"], {name: value for name, value in node.items() if name != "_target_"})
    try:
        spec.build(kind)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return spec


def cluster(cfg: DictConfig, folder: Path | None) -> Cluster:
    """The configured backend. `folder`: where real engines write their logs."""
    actors = ["client", *job_executor_names(cfg), "cm", *([WORK] if runs_work(cfg) else [])]
    if cfg.backend.name == "sim":
        return sim_cluster(cfg, actors)
    return real_cluster(cfg, actors, folder)


def sim_node(cfg: DictConfig) -> Callable[[ExecutorSpec], Any]:
    """What an executor spec runs on in simulation."""
    from sim.coldstart import ColdStart
    from sim.contention import Contention
    from sim.latency import Fitted
    from sim.node import Node, WorkNode

    cold = typed(cfg.coldstart, ColdStart, "coldstart")
    entries = group_entries(cfg)
    profiled(cfg, entries)
    made: dict[tuple[Any, ...], Node] = {}
    workers: dict[ExecutorSpec, WorkNode] = {}

    def node_for(spec: ExecutorSpec) -> Node | WorkNode:
        entry = entries[spec]
        if spec.role in WORKERS:
            if spec not in workers:
                host = hardware_of(cfg, spec).host() if spec.npus else None
                workers[spec] = WorkNode(entry.slots, work_times(cfg, spec), worker_stages(cfg, spec), host)
            return workers[spec]
        shape = entry.shape
        kind = (shape, spec.npus, spec.hardware, entry.profile)  # copies of a model are alike
        if kind not in made:
            hardware = hardware_of(cfg, spec)
            model = latency_model(cfg, hardware, shape, spec.npus, entry.profile)
            engine = engine_config(cfg, spec, shape)
            made[kind] = Node(
                engine=engine,
                latency=lambda: model,
                stages=cold.stages(),
                kv_bytes_per_token=shape.kv_bytes_per_token,
                kv_segments=pieces_per_run(engine.kv_layout, shape.layers),
                host=hardware.host(),
                contention=Contention.of(hardware.contention),
                kv_host_s=hardware.kv_host_s,
                noise=model.noise if isinstance(model, Fitted) else None,
                host_step_s=hardware.host_step_s,
                acceptance=Acceptance(cfg.backend.draft_acceptance, cfg.seed),
                layers=shape.layers,
                load=cold.loading(shape.weight_bytes, shape.weight_bytes_on(spec.npus), shape.pipeline_stages),
            )
        return made[kind]

    for spec in entries:
        node_for(spec)  # a model that does not fit is an error now, not in the middle of the run
    return node_for


def work_times(cfg: DictConfig, spec: ExecutorSpec) -> OperationTime:
    """How long tasks other than tools take on a worker. Jobs train models that the fleet serves."""
    from sim.training import WorkTimes

    shapes = {spec.model: entry.shape for spec, entry in group_entries(cfg).items() if spec.role not in WORKERS}

    def shape_named(name: str) -> ModelShape:
        if name not in shapes:
            raise ValueError(
                f"a job trains {name!r}: allowed are the models that fleet.groups serves, as {next(iter(shapes))}"
            )
        return shapes[name]

    return WorkTimes(hardware_of(cfg, spec), shape_named)


def worker_stages(cfg: DictConfig, spec: ExecutorSpec) -> list[tuple[Stage, int]]:
    """Start-up stages of a worker: those of a serving executor without weights, on a CPU without an NPU to set up."""
    from sim.coldstart import ColdStart

    cold = typed(cfg.coldstart, ColdStart, "coldstart")
    cold = msgspec.structs.replace(cold, load_setup_s=0.0, te_post_load_s=0.0)
    return (msgspec.structs.replace(cold, te_pre_load_s=0.0) if spec.role is Role.CPU else cold).stages()


def profiled(cfg: DictConfig, entries: Mapping[ExecutorSpec, GroupEntry]) -> None:
    """ValueError: one file of measured steps is to speak for several kinds of executors."""
    if "path" not in cfg.latency:
        return
    kinds = {
        (entry.shape.name, spec.npus, spec.hardware)
        for spec, entry in entries.items()
        if not entry.profile and spec.role not in WORKERS
    }
    if len(kinds) > 1:
        said = ", ".join(f"{model} on {npus} x {name or cfg.hardware.name}" for model, npus, name in sorted(kinds))
        raise ValueError(
            f"latency.path is {cfg.latency.path}, measured on one kind of executor, but the fleet has several: {said}; "
            "name a profile of each in fleet.groups[].profile, or take latency=roofline"
        )


def latency_model(cfg: DictConfig, hardware: Hardware, shape: ModelShape, npus: int, profile: str) -> LatencyModel:
    """How long the steps of a simulated executor take: by its group's own profile, or as `cfg.latency` says."""
    if profile:
        from sim.profile import load_latency

        return load_latency(profile)
    model: LatencyModel = build(cfg.latency, "latency", hardware=hardware, shape=shape, npus=npus, seed=cfg.seed)
    return model


def sim_cluster(cfg: DictConfig, actors: list[str]) -> Cluster:
    from sim.cluster import SimCluster
    from sim.node import Delays, Failure

    backend, node_for = cfg.backend, sim_node(cfg)
    return SimCluster(
        actors,
        node_for,
        backend.report_period_s,
        typed(backend.delays, Delays, "backend.delays"),
        typed(backend.failures, tuple[Failure, ...], "backend.failures"),
        backend.coalesce,
        backend.record,
        sim_hosts(cfg, node_for),
    )


def sim_hosts(cfg: DictConfig, node_for: Callable[[ExecutorSpec], Any]) -> "Hosts":
    """The hosts of a simulated run. ValueError: the executors it starts with do not fit."""
    from sim.topology import Hosts, Topology

    entries = group_entries(cfg)
    weights = {spec.model: entry.shape.weight_bytes for spec, entry in entries.items() if spec.role not in WORKERS}
    preloaded = tuple(reversed(weights.items())) if cfg.coldstart.get("preloaded") else ()  # popular ones leave last
    hosts = Hosts(cfg.backend.hosts, preloaded)
    topology = Topology(hosts)
    for spec, entry in entries.items():
        host = node_for(spec).host
        for executor in range(entry.plan.initial if host is not None else 0):
            if topology.place(f"{spec} {executor}", host, spec.npus) is None:
                raise ValueError(
                    f"backend.hosts is {hosts.count}: {spec.role} executor {executor + 1} of {spec.model}, which takes "
                    f"{spec.npus} NPUs, has no room; give more hosts, or null for as many as needed"
                )
    return hosts


def spans(cluster: Cluster, folder: Path, tasks: TaskLog) -> Spans:
    """What happened when, for the timeline; what engines computed as far as `backend.record` had it recorded."""
    from sim.cluster import SimCluster

    if isinstance(cluster, SimCluster):
        return Spans(tasks, cluster.steps, cluster.transfers)
    turns = {
        path.name.removesuffix(".turns.jsonl"): path for path in sorted((folder / "engines").glob("*.turns.jsonl"))
    }
    return Spans(
        tasks,
        chain.from_iterable(record.spans(name, record.read_turns(path)) for name, path in turns.items()),
        chain.from_iterable(record.transfers(name, record.read_turns(path)) for name, path in turns.items()),
    )


def notes(cluster: Cluster) -> list[str]:
    """What a reader of the results must know: step times asked for beyond what was measured."""
    from sim.cluster import SimCluster
    from sim.latency import Measured

    found = []
    for model in cluster.latencies if isinstance(cluster, SimCluster) else ():
        if isinstance(model, Measured) and model.outside:
            found.append(
                f"{model.outside} of {model.asked} step times ({model.outside / model.asked:.1%}) are extrapolated: "
                "those steps are larger than any that was measured"
            )
    return found


def real_cluster(cfg: DictConfig, actors: list[str], folder: Path | None) -> "RealCluster":
    from flowserve.runtime.wire import NullDevice, TorchDevice
    from real.cluster import Engine, RealCluster, WorkEngine
    from real.metrics import ServingMetrics

    backend, found, entries = cfg.backend, served(cfg), group_entries(cfg)
    if cfg.engine.get("kv_transfer") == "by_layer":
        raise ValueError(
            "engine.kv_transfer is by_layer: a real engine computes all layers of a step in one call, and nobody can "
            "fetch one before the others; take by_chunk, or backend=sim"
        )
    null = device_name(cfg) == "null"
    if not null and any(spec.role is Role.TRAINING for spec in entries):
        raise ValueError(
            f"fleet.groups has a training group, but backend.device is {device_name(cfg)}: nothing here trains on "
            "a device; take backend=sim, or backend.device=null, where training sleeps for as long as it would take"
        )
    vocab = {name: shape_of(cfg, node).vocab for name, node in found.items()}
    devices: dict[str, NullDevice | TorchDevice] = {}
    for name in found:
        if null:
            acceptance = Acceptance(backend.draft_acceptance, cfg.seed)
            devices[name] = NullDevice(backend.step_s, backend.prefill_token_s, vocab[name], acceptance)
        else:
            devices[name] = TorchDevice(
                model_folder(cfg, name),
                device_name(cfg),
                backend.dtype,
                backend.threads,
                backend.ssd_folder,
                tuple(backend.graph_sizes),
                draft_model(cfg, name),
                backend.memory_share,
            )
    engines: dict[ExecutorSpec, Engine | WorkEngine] = {}
    for spec, entry in entries.items():
        if spec.role in WORKERS:
            engines[spec] = WorkEngine(entry.slots, work_times(cfg, spec))
        else:
            engines[spec] = Engine(engine_config(cfg, spec), devices[spec.model])
    logs = None
    if folder is not None:
        logs = folder / "engines"
        logs.mkdir(parents=True, exist_ok=True)
    return RealCluster(
        actors,
        engines.__getitem__,
        lambda name: vocab.get(name, min(vocab.values())),  # nobody serves another, so it fails in any case
        sampling(cfg),
        backend.report_period_s,
        logs,
        record=backend.record,
        keep_outputs=backend.keep_outputs,
        pin=backend.pin,
        metrics=ServingMetrics(backend.metrics_port),
        log_level=backend.log_level,
    )


def sampling(cfg: DictConfig) -> Sampling:
    """How real engines draw tokens; each request gets a seed of its own, counted from the run's."""
    values = plain(cfg.sampling)
    unknown = sorted(set(values) - set(DRAWING))
    if unknown:
        raise ValueError(f"sampling.{unknown[0]}: allowed are {', '.join(DRAWING)}; where outputs end is in the trace")
    return typed(values, Sampling, "sampling").for_request(cfg.seed)


def device_name(cfg: DictConfig) -> str:
    """What real engines run on. YAML reads an unquoted null, and what a shell leaves of a quoted one, as nothing."""
    return "null" if cfg.backend.device is None else str(cfg.backend.device)


def draft_model(cfg: DictConfig, name: str | None = None) -> str | None:
    """The folder of the model that guesses. ValueError: it is missing, no model, of another vocabulary, or not used."""
    folder, engine = cfg.backend.draft_model, cfg.engine
    used = engine.speculative_tokens and engine.drafter == "model"
    if folder is None:
        if used:
            raise ValueError(
                "engine.drafter is model, but backend.draft_model names none: set it to a Hugging Face folder, or take "
                "engine.drafter=ngram"
            )
        return None
    if not used:
        raise ValueError(
            f"backend.draft_model is {folder}, but nothing uses it: set engine.drafter=model and "
            "engine.speculative_tokens to the number of guesses, 1 or more"
        )
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"backend.draft_model is {folder}: there is no config.json of a Hugging Face model")
    from flowserve.models import read_config

    found, wanted = read_config(Path(folder)).vocab_size, model_shape(cfg, name).vocab
    if found != wanted:
        raise ValueError(
            f"backend.draft_model {folder} has a vocabulary of {found} tokens, the model {name or model_name(cfg)} of "
            f"{wanted}: take a smaller model of the same family"
        )
    return str(folder)
