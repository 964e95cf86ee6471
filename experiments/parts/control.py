"""Who decides in a run: client, job executors and cluster manager with their policies, and what is wished for."""

from collections.abc import Iterable

from omegaconf import DictConfig

from cluster.client import Client
from cluster.control import ControlPlane
from cluster.job_executor import JobExecutor
from cluster.jobs.executor import WorkJobExecutor
from cluster.manager import ClusterManager
from cluster.metrics import Slo, Window
from cluster.policy import DispatchPolicy, ScalingPolicy
from cluster.recorder import Recorder
from cluster.streams import stream
from cluster.work import AnyArrival
from experiments.config import build, typed
from experiments.parts.fleet import groups, runs_work, worker_roles


def job_executor_names(cfg: DictConfig) -> tuple[str, ...]:
    if cfg.job_executors < 1:
        raise ValueError(f"job_executors is {cfg.job_executors}: at least one must take requests")
    return tuple(f"je-{number}" for number in range(cfg.job_executors))


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
