"""What a run has: the TE groups of `fleet`, what each runs on, and what it costs."""

from pathlib import Path
from typing import NamedTuple

import msgspec
from omegaconf import DictConfig, OmegaConf

from cluster import cost
from cluster.manager import GroupPlan
from cluster.recorder import Recorder
from cluster.vocabulary import WORKERS, ExecutorSpec, Role
from cluster.work import OperationTime
from experiments.config import CONF, plain, typed
from experiments.models import by_group, shape_of
from sim.hardware import Hardware
from sim.model_shape import ModelShape

ROLES_THAT_SERVE = (
    {Role.COLOCATED},
    {Role.PREFILL, Role.DECODE},
    {Role.COLOCATED, Role.PREFILL, Role.DECODE},
    {Role.COLOCATED, Role.DECODE},
)


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


def hardware_of(cfg: DictConfig, spec: ExecutorSpec) -> Hardware:
    """What an executor runs on: its group's hardware, or the run's. ValueError: there is no such option or file."""
    if not spec.hardware:
        return typed(cfg.hardware, Hardware, "hardware")
    file = Path(spec.hardware) if spec.hardware.endswith(".yaml") else CONF / "hardware" / f"{spec.hardware}.yaml"
    if not file.is_file():
        options = ", ".join(sorted(option.stem for option in (CONF / "hardware").glob("*.yaml")))
        raise ValueError(f"fleet.groups: hardware {spec.hardware!r} is not one of {options}, nor a YAML file")
    return typed(OmegaConf.load(file), Hardware, str(file))


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


def costs(cfg: DictConfig, recorder: Recorder) -> dict[str, float]:
    """What a run cost, each executor at the rates of its own hardware, see `cluster.cost`."""
    rates = {spec: hardware_of(cfg, spec).rates for spec in {each.spec for each in recorder.held()}}
    return cost.costs(recorder, rates.__getitem__, float(cfg.electricity_per_kwh))
