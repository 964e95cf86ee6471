"""From a configuration to the objects of a run: its parts, see `experiments.parts`, and the cluster as a whole."""

from itertools import chain
from pathlib import Path

from omegaconf import DictConfig

from cluster.seam import Cluster
from cluster.work import WORK
from experiments.models import model_folder, model_name, model_shape
from experiments.parts.arrivals import Workload, rate_from, workload
from experiments.parts.control import control_plane, dispatch_policy, job_executor_names, objectives, scaling_policy
from experiments.parts.engine import ENGINE_POLICIES, engine_config
from experiments.parts.fleet import costs, group_entries, groups, hardware_of, runs_work
from experiments.parts.processes import device_name, real_cluster
from experiments.parts.settings import check_types, sampling
from experiments.parts.simulated import sim_cluster, sim_node
from experiments.task_log import TaskLog
from experiments.timeline import Spans
from flowserve.core import record

__all__ = [
    "ENGINE_POLICIES",
    "Workload",
    "check_types",
    "cluster",
    "control_plane",
    "costs",
    "device_name",
    "dispatch_policy",
    "engine_config",
    "group_entries",
    "groups",
    "hardware_of",
    "model_folder",
    "model_name",
    "model_shape",
    "notes",
    "objectives",
    "rate_from",
    "real_cluster",
    "sampling",
    "scaling_policy",
    "sim_cluster",
    "sim_node",
    "spans",
    "workload",
]


def cluster(cfg: DictConfig, folder: Path | None) -> Cluster:
    """The configured backend. `folder`: where real engines write their logs."""
    actors = ["client", *job_executor_names(cfg), "cm", *([WORK] if runs_work(cfg) else [])]
    if cfg.backend.name == "sim":
        return sim_cluster(cfg, actors)
    return real_cluster(cfg, actors, folder)


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
