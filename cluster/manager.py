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
    __slots__ = ("kv_blocks", "max_sequences", "name", "report", "spec", "state")

    def __init__(self, name: str, spec: ExecutorSpec) -> None:
        self.name = name
        self.spec = spec
        self.state: ExecutorState | None = None  # None: launching
        self.report: ev.LoadReport | None = None
        self.kv_blocks = 0
        self.max_sequences = 0


class ClusterManager:
    """Drives every TE group to the size its scaling policy asks for.

    `max_launch_failures`: launches of a group that may fail in a row before it gives up and says so; a
    failure that another launch would meet again is enough by itself. Workers are announced to the job executor for work
    other than serving, all others to `job_executors`.
    """

    name = "cm"

    def __init__(
        self,
        groups: tuple[GroupPlan, ...],
        policy: ScalingPolicy,
        job_executors: tuple[str, ...],
        max_launch_failures: int = 3,
    ) -> None:
        if not groups:
            raise ValueError("the fleet has no executors: name at least one group")
        if policy.period_s is not None and policy.period_s <= 0:
            raise ValueError(f"the scaling period is {policy.period_s} s: it must be more than 0")
        self._groups = groups
        self._policy = policy
        self._job_executors = job_executors
        self._max_launch_failures = max_launch_failures
        self._executors: dict[str, _Executor] = {}
        self._launched = 0
        self._opened = False
        self._failures = [0] * len(groups)
        self._parked: dict[str, dict[str, int]] = {}  # model, job executor
        self._reasons: dict[str, str] = {}

    def on_event(self, event: ev.Event) -> list[Action]:
        """The actions this event calls for."""
        match event:
            case ev.RunStarted():
                actions: list[Action] = []
                for group in self._groups:
                    actions += [self._launch(group.spec) for _ in range(group.initial)]
                return [*actions, *self._open_doors(), *self._set_timer(event.time)]
            case ev.TimerFired():
                return [*self._scale(event.time), *self._set_timer(event.time)]
            case ev.ExecutorReady():
                return self._ready(event)
            case ev.LoadReport():
                if event.executor in self._executors:
                    self._executors[event.executor].report = event
                return []
            case ev.DemandReported():
                self._parked.setdefault(event.model, {})[event.job_executor] = event.parked
                return [*self._scale(event.time), *self._give_up(event.model)] if event.parked else []
            case ev.ExecutorDrained():
                return [RetireExecutor(event.executor)] if event.executor in self._executors else []
            case ev.RoleSwitched():
                executor = self._executors.get(event.executor)
                ready = executor is not None and executor.state is ExecutorState.READY
                return self._announce(executor, ExecutorState.READY) if executor is not None and ready else []
            case ev.ExecutorRetired():
                executor = self._executors.pop(event.executor, None)
                return [] if executor is None else self._give_up(executor.spec.model)
            case ev.ExecutorFailed():
                return self._failed(event)
            case _:
                return []

    # -- life cycle -----------------------------------------------------------------------------------------------

    def _launch(self, spec: ExecutorSpec) -> Action:
        name = f"te-{self._launched}"
        self._launched += 1
        self._executors[name] = _Executor(name, spec)
        return LaunchExecutor(name, spec)

    def _ready(self, event: ev.ExecutorReady) -> list[Action]:
        executor = self._executors[event.executor]
        executor.kv_blocks, executor.max_sequences = event.kv_blocks, event.max_sequences
        self._failures[self._group_number(executor.spec)] = 0
        return [*self._announce(executor, ExecutorState.READY), *self._open_doors()]

    def _open_doors(self) -> list[Action]:
        """Once, when as many executors are ready as the run starts with, or none is on its way any more."""
        if self._opened:
            return []
        launching = any(executor.state is None for executor in self._executors.values())
        ready = sum(executor.state is ExecutorState.READY for executor in self._executors.values())
        self._opened = not launching or ready >= sum(group.initial for group in self._groups)
        return [OpenDoors()] if self._opened else []

    def _drain(self, executor: _Executor) -> list[Action]:
        return [*self._announce(executor, ExecutorState.DRAINING), DrainExecutor(executor.name)]

    def _failed(self, event: ev.ExecutorFailed) -> list[Action]:
        executor = self._executors.pop(event.executor, None)
        if executor is None:
            return []
        model = executor.spec.model
        if executor.state is None:
            group = self._group_number(executor.spec)
            self._failures[group] = self._max_launch_failures if event.permanent else self._failures[group] + 1
            self._reasons[model] = event.reason
        actions = [] if executor.state is None else self._announce(executor, ExecutorState.GONE)
        return [*actions, *self._scale(event.time), *self._give_up(model), *self._open_doors()]

    def _give_up(self, model: str) -> list[Action]:
        """Too many launches failed: where nothing serves the model or will, let waiting requests know."""
        specs = [executor.spec for executor in self._executors.values()]
        roles = {
            group.spec.role
            for number, group in enumerate(self._groups)
            if group.spec.model == model and (group.spec in specs or self._failures[number] < self._max_launch_failures)
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
        executor.state = state
        return [
            AnnounceExecutor(name, executor.name, executor.spec, state, executor.kv_blocks, executor.max_sequences)
            for name in self._told_of(executor.spec.role in WORKERS)
        ]

    # -- size -----------------------------------------------------------------------------------------------------

    def _scale(self, now: int) -> list[Action]:
        actions: list[Action] = []
        for switch in self._policy.switches([self._load(group, self._members(group)) for group in self._groups], now):
            actions += self._switch(switch)
        for number, group in enumerate(self._groups):
            if self._failures[number] >= self._max_launch_failures:
                continue
            members = self._members(group)
            load = self._load(group, members)
            wanted = min(max(self._policy.desired(load, now), group.minimum), group.maximum)
            present = load.ready + load.pending
            actions += [self._launch(group.spec) for _ in range(wanted - present)]
            # The newest go first, and only ready ones: a launch under way is finished, then drained if still unwanted.
            ready = [executor for executor in members if executor.state is ExecutorState.READY]
            for executor in ready[wanted:]:
                actions += self._drain(executor)
        return actions

    def _switch(self, switch: RoleSwitch) -> list[Action]:
        """Move the least loaded executor, the newest of equals; it is announced when it has switched."""
        plans = {(group.spec.model, group.spec.role): group for group in self._groups}
        source, target = plans.get((switch.model, switch.source)), plans.get((switch.model, switch.target))
        if source is None or target is None or source is target or source.spec.npus != target.spec.npus:
            return []
        leaving, joining = self._members(source), self._members(target)
        ready = [executor for executor in leaving if executor.state is ExecutorState.READY]
        if not ready or self._present(leaving) <= source.minimum or self._present(joining) >= target.maximum:
            return []
        executor = min(reversed(ready), key=_busy)
        executor.spec = target.spec
        return [SwitchRole(executor.name, target.spec.role)]

    def _members(self, group: GroupPlan) -> list[_Executor]:
        return [executor for executor in self._executors.values() if executor.spec == group.spec]

    def _present(self, members: list[_Executor]) -> int:
        return sum(executor.state in (None, ExecutorState.READY) for executor in members)

    def _load(self, group: GroupPlan, members: list[_Executor]) -> GroupLoad:
        ready = [executor for executor in members if executor.state is ExecutorState.READY]
        reports = [executor.report for executor in ready if executor.report is not None]
        pending = sum(executor.state is None for executor in members)
        return GroupLoad(
            model=group.spec.model,
            role=group.spec.role,
            initial=group.initial,
            ready=len(ready),
            pending=pending,
            draining=len(members) - len(ready) - pending,
            waiting=sum(report.waiting for report in reports),
            running=sum(report.running for report in reports),
            kv_used=sum(report.total_blocks - report.free_blocks for report in reports),
            kv_total=sum(executor.kv_blocks for executor in ready),
            max_sequences=sum(executor.max_sequences for executor in ready),
            parked=sum(self._parked.get(group.spec.model, {}).values()),
        )

    def _group_number(self, spec: ExecutorSpec) -> int:
        return next(number for number, group in enumerate(self._groups) if group.spec == spec)

    def _set_timer(self, now: int) -> list[Action]:
        period = self._policy.period_s
        return [] if period is None else [SetTimer(self.name, "scale", now + to_ns(period))]


def _busy(executor: _Executor) -> int:
    report = executor.report
    return 0 if report is None else report.waiting + report.running
