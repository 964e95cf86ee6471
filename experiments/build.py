"""From a configuration to the objects of a run: workload, control plane, cluster."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
from omegaconf import DictConfig, OmegaConf

from cluster.acceptance import Acceptance
from cluster.client import Client
from cluster.control import ControlPlane
from cluster.engine_policy import ChunkPolicy, EvictionPolicy, PolicySpec, QueueOrder, VictimPolicy
from cluster.job_executor import JobExecutor
from cluster.jobs.executor import WorkJobExecutor
from cluster.manager import ClusterManager, GroupPlan
from cluster.metrics import Recorder, Slo, Window
from cluster.policy import DispatchPolicy, ScalingPolicy
from cluster.seam import Cluster
from cluster.streams import stream
from cluster.vocabulary import WORKERS, ExecutorSpec, Role, Stage
from cluster.work import WORK, AnyArrival, OperationTime
from experiments.config import CONF, build, plain, typed
from flowserve.core.record import StepSpan, read_turns, spans
from flowserve.core.scheduler import EngineConfig
from flowserve.core.transfer import pieces_per_run
from flowserve.runtime.sampling import Sampling
from sim.hardware import Hardware
from sim.model_shape import ModelShape

if TYPE_CHECKING:
    from real.cluster import RealCluster

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
LARGEST_RANDOM_MODEL = 500_000_000
"""Parameters. Random weights serve to try things out; nobody means to write those of a large model to the disk."""


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
    """

    role: Role
    executors: int
    npus: int | None = None
    slots: int = 1
    minimum: int = 0
    maximum: int = 64
    hardware: str = ""


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
    decisions: bool
    report: bool
    progress: bool
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
    for field in ("report_period_s", "step_s", "prefill_token_s"):
        if cfg.backend.get(field, 0.0) < 0:
            raise ValueError(f"backend.{field} is {cfg.backend[field]}: allowed are seconds from 0 up")


class Workload(NamedTuple):
    """Arrivals, and where they come from, for the report."""

    arrivals: Iterable[AnyArrival]
    source: str
    stand_in: bool


def model_shape(cfg: DictConfig) -> ModelShape:
    """The model's sizes: from config.json where a folder is named, else as configured.

    A real engine keeps weights and KV cache in its own dtype, a simulated one in that of the files.
    """
    if cfg.model.folder is None:
        return typed(cfg.model.shape, ModelShape, "model.shape")
    folder = Path(cfg.model.folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"model.folder is {folder}: there is no config.json of a Hugging Face model")
    from flowserve.models import read_config

    config = read_config(folder)
    dtype = cfg.backend.get("dtype", config.dtype)
    return ModelShape(
        name=folder.resolve().name,
        family=config.model_type,
        layers=config.num_layers,
        hidden=config.hidden_size,
        heads=config.num_heads,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        intermediate=config.intermediate_size,
        vocab=config.vocab_size,
        bytes_per_value=4 if dtype == "float32" else 2,
        tied_embeddings=config.tied,
        sparse_layers=sum(config.is_sparse(layer) for layer in range(config.num_layers)),
        experts=config.num_experts,
        experts_per_token=config.num_experts_per_tok,
        expert_intermediate=config.moe_intermediate_size,
    )


def model_name(cfg: DictConfig) -> str:
    return model_shape(cfg).name


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
    if sources:
        arrivals = Merge([arrivals, *sources])
    return Workload(arrivals, source, stand_in and trace.reader is not None)


def job_sources(cfg: DictConfig, model: str) -> list[Iterable[AnyArrival]]:
    """The workloads of `jobs`: work other than serving, beside the trace."""
    return [
        build(source, f"jobs.sources[{number}]", model=model, seed=cfg.seed)
        for number, source in enumerate(cfg.jobs.sources)
    ]


def job_executor_names(cfg: DictConfig) -> tuple[str, ...]:
    if cfg.job_executors < 1:
        raise ValueError(f"job_executors is {cfg.job_executors}: at least one must take requests")
    return tuple(f"je-{number}" for number in range(cfg.job_executors))


def groups(cfg: DictConfig) -> tuple[GroupPlan, ...]:
    """The TE groups of `fleet`."""
    plans: list[GroupPlan] = []
    for number, node in enumerate(cfg.fleet.groups):
        group = typed(node, GroupConfig, f"fleet.groups[{number}]")
        npus = group.npus if group.npus is not None else int(group.role is not Role.CPU)
        if group.role is Role.CPU and npus:
            raise ValueError(f"fleet.groups[{number}].npus is {npus}: workers of role cpu take none, leave it out")
        if group.role is not Role.CPU and npus < 1:
            raise ValueError(f"fleet.groups[{number}].npus is {npus}: an executor takes at least one")
        if group.slots < 1 or (group.slots > 1 and group.role is not Role.CPU):
            raise ValueError(
                f"fleet.groups[{number}].slots is {group.slots}: allowed are 1 and more for role cpu, and 1 for others"
            )
        if group.executors == 0 and group.maximum > 0 and plain(cfg.scaling).get("period_s") is None:
            raise ValueError(
                f"fleet.groups[{number}] has zero executors and scaling never adds one: set executors to 1 or more"
            )
        serves = str(group.role) if group.role in WORKERS else model_name(cfg)
        spec = ExecutorSpec(serves, group.role, npus, group.hardware)
        if any(spec == plan.spec for plan in plans):
            raise ValueError(f"fleet.groups[{number}] is another group of {group.role} executors: make them one")
        plans.append(GroupPlan(spec, group.executors, group.minimum, group.maximum))
    roles = {plan.spec.role for plan in plans} - {*WORKERS}
    if plans and roles not in ROLES_THAT_SERVE:
        raise ValueError(
            f"fleet.groups has only {' and '.join(sorted(roles)) or 'other'} executors, which cannot finish a "
            "request: needed are colocated ones, or prefill and decode together"
        )
    return tuple(plans)


def worker_roles(cfg: DictConfig) -> tuple[Role, ...]:
    """Roles of the workers that `fleet` has."""
    present = {plan.spec.role for plan in groups(cfg)}
    return tuple(role for role in WORKERS if role in present)


def runs_work(cfg: DictConfig) -> bool:
    """Whether the run has a job executor for work other than serving."""
    return bool(worker_roles(cfg) or cfg.jobs.sources)


def worker_slots(cfg: DictConfig, spec: ExecutorSpec) -> int:
    """Tasks that a worker runs side by side."""
    configured = zip(groups(cfg), cfg.fleet.groups, strict=True)
    return next(int(node.get("slots", 1)) for plan, node in configured if plan.spec == spec)


def control_plane(cfg: DictConfig, arrivals: Iterable[AnyArrival], recorder: Recorder) -> ControlPlane[Client]:
    """Client, job executors (each with a policy object of its own) and cluster manager."""
    names = job_executor_names(cfg)
    job_executors = []
    for number, name in enumerate(names):
        policy = build(cfg.dispatch, "dispatch", rng=stream(cfg.seed, f"dispatch {name}"))
        if not isinstance(policy, DispatchPolicy):
            raise ValueError(f"dispatch: {cfg.dispatch['_target_']} is not a cluster.policy.DispatchPolicy")
        job_executors.append(JobExecutor(name, number, policy, cfg.max_attempts, cfg.max_parked))
    scaling = build(cfg.scaling, "scaling", rng=stream(cfg.seed, "scaling"))
    if not isinstance(scaling, ScalingPolicy):
        raise ValueError(f"scaling: {cfg.scaling['_target_']} is not a cluster.policy.ScalingPolicy")
    work = WorkJobExecutor(names, worker_roles(cfg), cfg.max_attempts) if runs_work(cfg) else None
    closed_loop = cfg.trace.closed_loop or bool(cfg.jobs.sources)
    rng = stream(cfg.seed, "client")
    client = Client(arrivals, names, rng, closed_loop, cfg.start_when_ready, work is not None)
    return ControlPlane(client, job_executors, ClusterManager(groups(cfg), scaling, names), recorder, work)


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


def engine_config(cfg: DictConfig, spec: ExecutorSpec) -> EngineConfig:
    """Engine limits; KV cache blocks by what fits where the configuration leaves them open."""
    from sim.hardware import kv_blocks

    values = plain(cfg.engine)
    if values["kv_blocks"] is None:
        values["kv_blocks"] = kv_blocks(hardware_of(cfg, spec), model_shape(cfg), spec.npus, values["block_tokens"])
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
    from sim.cluster import Node, WorkNode
    from sim.coldstart import ColdStart
    from sim.link import Link, TierLinks

    shape = model_shape(cfg)
    stages = typed(cfg.coldstart, ColdStart, "coldstart").stages(shape.weight_bytes)
    nodes: dict[ExecutorSpec, Node | WorkNode] = {}

    def node_for(spec: ExecutorSpec) -> Node | WorkNode:
        if spec not in nodes and spec.role in WORKERS:
            nodes[spec] = WorkNode(worker_slots(cfg, spec), work_times(cfg, spec), worker_stages(cfg, spec))
        elif spec not in nodes:
            hardware = hardware_of(cfg, spec)
            model = build(cfg.latency, "latency", hardware=hardware, shape=shape, npus=spec.npus)
            engine = engine_config(cfg, spec)
            nodes[spec] = Node(
                engine=engine,
                latency=lambda: model,
                stages=stages,
                kv_bytes_per_token=shape.kv_bytes_per_token,
                kv_segments=pieces_per_run(engine.kv_layout, shape.layers),
                contention=hardware.contention,
                host_step_s=hardware.host_step_s,
                acceptance=Acceptance(cfg.backend.draft_acceptance, cfg.seed),
                link=lambda: Link(
                    hardware.kv_link_bytes_per_s, hardware.kv_link_latency_s, hardware.kv_call_overhead_s
                ),
                tiers=lambda: TierLinks(
                    lambda: Link(hardware.pcie_bytes_per_s, hardware.pcie_latency_s, hardware.kv_call_overhead_s),
                    lambda: Link(hardware.ssd_bytes_per_s, hardware.ssd_latency_s, hardware.kv_call_overhead_s),
                ),
            )
        return nodes[spec]

    for group in groups(cfg):
        node_for(group.spec)  # a model that does not fit is an error now, not in the middle of the run
    return node_for


def work_times(cfg: DictConfig, spec: ExecutorSpec) -> OperationTime:
    """How long tasks other than tools take on a worker. Jobs train the run's model."""
    from sim.training import WorkTimes

    shape = model_shape(cfg)
    return WorkTimes(hardware_of(cfg, spec), {shape.name: shape}.__getitem__)


def worker_stages(cfg: DictConfig, spec: ExecutorSpec) -> list[tuple[Stage, int]]:
    """Start-up stages of a worker: those of a serving executor without weights, on a CPU without an NPU to set up."""
    from sim.coldstart import ColdStart

    cold = typed(cfg.coldstart, ColdStart, "coldstart")
    cold = msgspec.structs.replace(cold, load_setup_s=0.0, te_post_load_s=0.0)
    return (msgspec.structs.replace(cold, te_pre_load_s=0.0) if spec.role is Role.CPU else cold).stages(0)


def sim_cluster(cfg: DictConfig, actors: list[str]) -> Cluster:
    from sim.cluster import Delays, Failure, SimCluster

    backend = cfg.backend
    return SimCluster(
        actors,
        sim_node(cfg),
        backend.report_period_s,
        typed(backend.delays, Delays, "backend.delays"),
        typed(backend.failures, tuple[Failure, ...], "backend.failures"),
        backend.coalesce,
        backend.record,
    )


def steps(cluster: Cluster, folder: Path) -> Iterator[StepSpan]:
    """What the engines of a run computed when, as far as `backend.record` had it recorded."""
    from sim.cluster import SimCluster

    if isinstance(cluster, SimCluster):
        yield from cluster.steps
    for path in sorted((folder / "engines").glob("*.turns.jsonl")):
        yield from spans(path.name.removesuffix(".turns.jsonl"), read_turns(path))


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

    backend, vocab = cfg.backend, model_shape(cfg).vocab
    device: NullDevice | TorchDevice
    if device_name(cfg) == "null":
        acceptance = Acceptance(backend.draft_acceptance, cfg.seed)
        device = NullDevice(backend.step_s, backend.prefill_token_s, vocab, acceptance)
    else:
        device = TorchDevice(
            model_folder(cfg),
            device_name(cfg),
            backend.dtype,
            backend.threads,
            backend.ssd_folder,
            tuple(backend.graph_sizes),
            draft_model(cfg),
            backend.memory_share,
        )
    engines: dict[ExecutorSpec, Engine | WorkEngine] = {}
    for group in groups(cfg):
        spec = group.spec
        if spec.role is Role.TRAINING and not isinstance(device, NullDevice):
            raise ValueError(
                f"fleet.groups has a training group, but backend.device is {device_name(cfg)}: nothing here trains on "
                "a device; take backend=sim, or backend.device=null, where training sleeps for as long as it would take"
            )
        if spec.role in WORKERS:
            engines[spec] = WorkEngine(worker_slots(cfg, spec), work_times(cfg, spec))
        else:
            engines[spec] = Engine(engine_config(cfg, spec), device)
    logs = None
    if folder is not None:
        logs = folder / "engines"
        logs.mkdir(parents=True, exist_ok=True)
    return RealCluster(
        actors,
        engines.__getitem__,
        lambda _: vocab,
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


def draft_model(cfg: DictConfig) -> str | None:
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

    found, wanted = read_config(Path(folder)).vocab_size, model_shape(cfg).vocab
    if found != wanted:
        raise ValueError(
            f"backend.draft_model {folder} has a vocabulary of {found} tokens, the model {model_name(cfg)} of "
            f"{wanted}: take a smaller model of the same family"
        )
    return str(folder)


def model_folder(cfg: DictConfig) -> str:
    """The model's Hugging Face folder; random weights of its shape, made once, where none is named."""
    if cfg.model.folder is not None:
        return str(cfg.model.folder)
    shape = model_shape(cfg)
    if shape.parameters > LARGEST_RANDOM_MODEL:
        raise ValueError(
            f"model {shape.name} has no weights: name a Hugging Face folder with model.folder=DIR, or take "
            "model=tiny_llama, whose weights are drawn at random"
        )
    from flowserve.runtime.checkpoint import CheckpointShape, make_checkpoint

    return str(
        make_checkpoint(
            shape.name,
            CheckpointShape(
                hidden_size=shape.hidden,
                num_layers=shape.layers,
                num_heads=shape.heads,
                num_kv_heads=shape.kv_heads,
                head_dim=shape.head_dim,
                intermediate_size=shape.intermediate,
                vocab_size=shape.vocab,
                family=shape.family,
                num_experts=shape.experts,
                experts_per_token=shape.experts_per_token,
                expert_size=shape.expert_intermediate,
                dense_layers=shape.layers - shape.sparse_layers if shape.experts else 0,
                tie=shape.tied_embeddings,
            ),
        )
    )
