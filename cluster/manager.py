"""CM, the cluster manager: life cycle and number of executors. Sans I/O: `on_event(event) → actions`.

It launches what the scaling policy wants, counting executors that are still on their way, announces them to the job
executors, drains before it retires, and replaces executors that died.
"""

import msgspec

from cluster import events as ev
from cluster.actions import (
    Action,
    AnnounceExecutor,
    DeclareNoCapacity,
    DrainExecutor,
    LaunchExecutor,
    OpenDoors,
    RetireExecutor,
    SetTimer,
    SwitchRole,
)
from cluster.policy import GroupLoad, RoleSwitch, ScalingPolicy
from cluster.vocabulary import WORKERS, ExecutorSpec, ExecutorState, Role, to_ns
from cluster.work import WORK


class GroupPlan(msgspec.Struct, frozen=True):
    """A TE group to run: what its executors are, and between how many of them the scaling policy may choose."""

    spec: ExecutorSpec
    initial: int
    minimum: int
    maximum: int

    def __post_init__(self) -> None:
        if not 0 <= self.minimum <= self.maximum or not self.minimum <= self.initial <= self.maximum:
            raise ValueError(
                f"group {self.spec.model}/{self.spec.role}: initial {self.initial}, minimum {self.minimum}, "
                f"maximum {self.maximum}; needed is 0 <= minimum <= initial <= maximum"
            )
        if self.maximum == 0:
            raise ValueError(f"group {self.spec.model}/{self.spec.role} has zero executors: give it at least one")


class _Executor:
    __slots__ = ("group", "kv_blocks", "max_sequences", "name", "number", "report", "state")

    def __init__(self, number: int, group: "_Group") -> None:
        self.name = f"te-{number}"
        self.number = number
        self.group = group
        self.state: ExecutorState | None = None  # None: launching
        self.report: ev.LoadReport | None = None
        self.kv_blocks = 0
        self.max_sequences = 0


class _Group:
    """A TE group and sums over its executors, kept as they change: no event costs more where there are more of them."""

    __slots__ = (
        "failures",
        "kv_total",
        "kv_used",
        "max_sequences",
        "members",
        "pending",
        "plan",
        "ready",
        "running",
        "waiting",
    )

    def __init__(self, plan: GroupPlan) -> None:
        self.plan = plan
        self.members: dict[str, _Executor] = {}
        self.failures = 0  # launches in a row
        self.ready = self.pending = 0
        self.waiting = self.running = self.kv_used = self.kv_total = self.max_sequences = 0

    @property
    def present(self) -> int:
        return self.ready + self.pending

    def count(self, executor: _Executor, sign: int) -> None:
        """Add an executor to the sums as it is now, or take it out of them before it changes."""
        if executor.state is None:
            self.pending += sign
        elif executor.state is ExecutorState.READY:
            self.ready += sign
            self.kv_total += sign * executor.kv_blocks
            self.max_sequences += sign * executor.max_sequences
            if executor.report is not None:
                self.count_report(executor.report, sign)

    def count_report(self, report: ev.LoadReport, sign: int) -> None:
        self.waiting += sign * report.waiting
        self.running += sign * report.running
        self.kv_used += sign * (report.total_blocks - report.free_blocks)


class ClusterManager:
    """Drives every TE group to the size its scaling policy asks for.

    `max_launch_failures`: launches of a group that may fail in a row before it gives up and says so; a
    failure that another launch would meet again is enough by itself. `npus`: those of all groups together, None for no
    limit; a launch for which none are left is made when others have been given back. Workers are announced to the job
    executor for work other than serving, all others to `job_executors`.
    """

    name = "cm"

    def __init__(
        self,
        groups: tuple[GroupPlan, ...],
        policy: ScalingPolicy,
        job_executors: tuple[str, ...],
        max_launch_failures: int = 3,
        npus: int | None = None,
    ) -> None:
        if not groups:
            raise ValueError("the fleet has no executors: name at least one group")
        if policy.period_s is not None and policy.period_s <= 0:
            raise ValueError(f"the scaling period is {policy.period_s} s: it must be more than 0")
        needed = sum(group.initial * group.spec.npus for group in groups)
        if npus is not None and needed > npus:
            raise ValueError(f"fleet.npus is {npus}, but the executors a run starts with take {needed}: raise it")
        self._policy = policy
        self._job_executors = job_executors
        self._max_launch_failures = max_launch_failures
        self._free_npus = npus
        self._short: dict[_Group, None] = {}  # groups with launches that NPUs were missing for, longest waiting first
        self._groups = [_Group(plan) for plan in groups]
        self._groups_of: dict[str, list[_Group]] = {}
        for group in self._groups:
            self._groups_of.setdefault(group.plan.spec.model, []).append(group)
        self._initial = sum(plan.initial for plan in groups)
        self._ready = self._pending = 0
        self._executors: dict[str, _Executor] = {}
        self._launched = 0
        self._opened = False
        self._parked: dict[str, dict[str, int]] = {}  # model, job executor
        self._reasons: dict[str, str] = {}

    def on_event(self, event: ev.Event) -> list[Action]:
        """The actions this event calls for."""
        match event:
            case ev.LoadReport():
                self._reported(event)
                return []
            case ev.RunStarted():
                actions: list[Action] = []
                for group in self._groups:
                    actions += [self._launch(group) for _ in range(group.plan.initial)]
                return [*actions, *self._open_doors(), *self._set_timer(event.time)]
            case ev.TimerFired():
                return [*self._scale(self._groups, event.time), *self._set_timer(event.time)]
            case ev.ExecutorReady():
                return self._became_ready(event)
            case ev.DemandReported():
                self._parked.setdefault(event.model, {})[event.job_executor] = event.parked
                groups = self._groups_of.get(event.model, [])
                return [*self._scale(groups, event.time), *self._give_up(event.model)] if event.parked else []
            case ev.ExecutorDrained():
                return [RetireExecutor(event.executor)] if event.executor in self._executors else []
            case ev.RoleSwitched():
                executor = self._executors.get(event.executor)
                ready = executor is not None and executor.state is ExecutorState.READY
                return self._announce(executor, ExecutorState.READY) if executor is not None and ready else []
            case ev.ExecutorRetired():
                executor = self._leave(event.executor)
                if executor is None:
                    return []
                return [*self._scale(list(self._short), event.time), *self._give_up(executor.group.plan.spec.model)]
            case ev.ExecutorFailed():
                return self._failed(event)
            case _:
                return []

    def follow(self, policy: ScalingPolicy, now: int) -> list[Action]:
        """Scale by another policy from here on."""
        waits, self._policy = self._policy.period_s is not None, policy
        return [] if waits else self._set_timer(now)

    def loads(self) -> dict[ExecutorSpec, GroupLoad]:
        """Every TE group as it is known here."""
        return {group.plan.spec: self._load(group) for group in self._groups}

    # -- life cycle -----------------------------------------------------------------------------------------------

    def _launch(self, group: _Group) -> Action:
        executor = _Executor(self._launched, group)
        self._launched += 1
        if self._free_npus is not None:
            self._free_npus -= group.plan.spec.npus
        self._executors[executor.name] = group.members[executor.name] = executor
        self._count(executor, +1)
        return LaunchExecutor(executor.name, group.plan.spec)

    def _became_ready(self, event: ev.ExecutorReady) -> list[Action]:
        executor = self._executors[event.executor]
        self._count(executor, -1)
        executor.kv_blocks, executor.max_sequences = event.kv_blocks, event.max_sequences
        self._count(executor, +1)
        executor.group.failures = 0
        return [*self._announce(executor, ExecutorState.READY), *self._open_doors()]

    def _reported(self, event: ev.LoadReport) -> None:
        executor = self._executors.get(event.executor)
        if executor is None:
            return
        if executor.state is ExecutorState.READY:
            if executor.report is not None:
                executor.group.count_report(executor.report, -1)
            executor.group.count_report(event, +1)
        executor.report = event

    def _open_doors(self) -> list[Action]:
        """Once, when as many executors are ready as the run starts with, or none is on its way any more."""
        if self._opened:
            return []
        self._opened = not self._pending or self._ready >= self._initial
        return [OpenDoors()] if self._opened else []

    def _drain(self, executor: _Executor) -> list[Action]:
        return [*self._announce(executor, ExecutorState.DRAINING), DrainExecutor(executor.name)]

    def _leave(self, name: str) -> _Executor | None:
        """An executor is no more, and its NPUs are free."""
        executor = self._executors.pop(name, None)
        if executor is not None:
            self._count(executor, -1)
            del executor.group.members[name]
            if self._free_npus is not None:
                self._free_npus += executor.group.plan.spec.npus
        return executor

    def _failed(self, event: ev.ExecutorFailed) -> list[Action]:
        executor = self._leave(event.executor)
        if executor is None:
            return []
        group, model = executor.group, executor.group.plan.spec.model
        if executor.state is None:
            group.failures = self._max_launch_failures if event.permanent else group.failures + 1
            self._reasons[model] = event.reason
        actions = [] if executor.state is None else self._tell(executor, ExecutorState.GONE)
        groups = [*self._groups_of[model], *(short for short in self._short if short.plan.spec.model != model)]
        return [*actions, *self._scale(groups, event.time), *self._give_up(model), *self._open_doors()]

    def _give_up(self, model: str) -> list[Action]:
        """Too many launches failed: where nothing serves the model or will, let waiting requests know."""
        roles = {
            group.plan.spec.role
            for group in self._groups_of.get(model, ())
            if group.members or group.failures < self._max_launch_failures
        }
        if Role.COLOCATED in roles or {Role.PREFILL, Role.DECODE} <= roles or roles & {*WORKERS}:
            return []
        reason = self._reasons.get(model, "no group of executors serves it")
        said = f"no executor for {model} could be launched: {reason}"
        # A group of workers is called like its role.
        return [DeclareNoCapacity(name, model, said) for name in self._told_of(model in WORKERS)]

    def _told_of(self, workers: bool) -> tuple[str, ...]:
        return (WORK,) if workers else self._job_executors

    def _announce(self, executor: _Executor, state: ExecutorState) -> list[Action]:
        self._count(executor, -1)
        executor.state = state
        self._count(executor, +1)
        return self._tell(executor, state)

    def _tell(self, executor: _Executor, state: ExecutorState) -> list[Action]:
        spec = executor.group.plan.spec
        return [
            AnnounceExecutor(name, executor.name, spec, state, executor.kv_blocks, executor.max_sequences)
            for name in self._told_of(spec.role in WORKERS)
        ]

    def _count(self, executor: _Executor, sign: int) -> None:
        executor.group.count(executor, sign)
        self._pending += sign * (executor.state is None)
        self._ready += sign * (executor.state is ExecutorState.READY)

    # -- size -----------------------------------------------------------------------------------------------------

    def _scale(self, groups: list[_Group], now: int) -> list[Action]:
        actions: list[Action] = []
        if not groups:
            return actions
        for switch in self._policy.switches([self._load(group) for group in groups], now):
            actions += self._switch(switch)
        for group in groups:
            if group.failures >= self._max_launch_failures:
                continue
            plan = group.plan
            wanted = min(max(self._policy.desired(self._load(group), now), plan.minimum), plan.maximum)
            missing = wanted - group.present
            if missing > 0:
                actions += self._launch_some(group, missing)
            else:
                self._short.pop(group, None)
            if group.ready > wanted:
                # The newest go first, and only ready ones: a launch under way is finished, then drained if still
                # unwanted.
                ready = [each for each in group.members.values() if each.state is ExecutorState.READY]
                for executor in sorted(ready, key=_number)[wanted:]:
                    actions += self._drain(executor)
        return actions

    def _launch_some(self, group: _Group, missing: int) -> list[Action]:
        """As many of the missing executors as there are NPUs left."""
        launches = missing
        if self._free_npus is not None and group.plan.spec.npus:
            launches = min(missing, self._free_npus // group.plan.spec.npus)
        if launches < missing:
            self._short.setdefault(group)
        else:
            self._short.pop(group, None)
        return [self._launch(group) for _ in range(launches)]

    def _switch(self, switch: RoleSwitch) -> list[Action]:
        """Move the least loaded executor, the newest of equals; it is announced when it has switched."""
        roles = {group.plan.spec.role: group for group in self._groups_of.get(switch.model, ())}
        source, target = roles.get(switch.source), roles.get(switch.target)
        if source is None or target is None or source is target or source.plan.spec.npus != target.plan.spec.npus:
            return []
        ready = [executor for executor in source.members.values() if executor.state is ExecutorState.READY]
        if not ready or source.present <= source.plan.minimum or target.present >= target.plan.maximum:
            return []
        executor = min(ready, key=lambda each: (_busy(each), -each.number))
        self._count(executor, -1)
        target.members[executor.name] = source.members.pop(executor.name)
        executor.group = target
        self._count(executor, +1)
        return [SwitchRole(executor.name, target.plan.spec.role)]

    def _load(self, group: _Group) -> GroupLoad:
        spec = group.plan.spec
        return GroupLoad(
            model=spec.model,
            role=spec.role,
            initial=group.plan.initial,
            ready=group.ready,
            pending=group.pending,
            draining=len(group.members) - group.ready - group.pending,
            waiting=group.waiting,
            running=group.running,
            kv_used=group.kv_used,
            kv_total=group.kv_total,
            max_sequences=group.max_sequences,
            parked=sum(self._parked.get(spec.model, {}).values()),
        )

    def _set_timer(self, now: int) -> list[Action]:
        period = self._policy.period_s
        return [] if period is None else [SetTimer(self.name, "scale", now + to_ns(period))]


def _number(executor: _Executor) -> int:
    return executor.number


def _busy(executor: _Executor) -> int:
    report = executor.report
    return 0 if report is None else report.waiting + report.running
