"""`backend=sim`: what executors run on, how long their steps and starts take, and where they sit."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import msgspec
from omegaconf import DictConfig

from cluster.acceptance import Acceptance
from cluster.latency import LatencyModel
from cluster.seam import Cluster
from cluster.vocabulary import WORKERS, ExecutorSpec, Role, Stage
from experiments.config import build, typed
from experiments.parts.engine import engine_config
from experiments.parts.fleet import GroupEntry, group_entries, hardware_of, work_times
from flowserve.core.transfer import pieces_per_run
from sim.hardware import Hardware
from sim.model_shape import ModelShape

if TYPE_CHECKING:
    from sim.topology import Hosts


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
