"""The cluster manager, event by event: how many executors it runs, and how each of them comes and goes."""

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
from cluster.manager import ClusterManager, GroupPlan
from cluster.policy import GroupLoad, RoleSwitch, ScalingPolicy
from cluster.vocabulary import NS_PER_S, ExecutorSpec, ExecutorState, Role
from cluster.work import WORK
from policies.scaling.fixed import Fixed
from policies.scaling.target_utilisation import TargetUtilisation
from tests.builders import MODEL, load_report, make_spec


class Wish(ScalingPolicy):
    """Wants what the test says; notes what it was shown."""

    def __init__(self, wanted: int, period_s: float | None = 1.0) -> None:
        self.wanted = wanted
        self.period_s = period_s
        self.shown: list[GroupLoad] = []

    def desired(self, load: GroupLoad, now_ns: int) -> int:
        self.shown.append(load)
        return self.wanted


class Office:
    """A cluster manager with events fed by hand; whatever it launches can be made ready or let fail."""

    def __init__(
        self,
        policy: ScalingPolicy | None = None,
        groups: tuple[GroupPlan, ...] | None = None,
        job_executors: tuple[str, ...] = ("je-0",),
        initial: int = 2,
        minimum: int = 1,
        maximum: int = 9,
        max_launch_failures: int = 3,
        npus: int | None = None,
    ) -> None:
        groups = groups or (GroupPlan(make_spec(), initial, minimum, maximum),)
        self.cm = ClusterManager(groups, policy or Fixed(), job_executors, max_launch_failures, npus)
        self.now = 0
        self.last: list[Action] = []
        self.specs: dict[str, LaunchExecutor] = {}
        self.hear(ev.RunStarted(to="cm", time=0, occurred=0))

    def hear(self, event: ev.Event) -> list[Action]:
        self.last = self.cm.on_event(event)
        for action in self.last:
            if isinstance(action, LaunchExecutor):
                assert action.executor not in self.specs, "a name was used twice"
                self.specs[action.executor] = action
        return self.last

    def ready(self, *names: str) -> list[Action]:
        for name in names:
            self.hear(
                ev.ExecutorReady(
                    to="cm",
                    time=self.now,
                    occurred=self.now,
                    executor=name,
                    spec=self.specs[name].spec,
                    kv_blocks=100,
                    block_tokens=16,
                    max_sequences=8,
                )
            )
        return self.last

    def failed(self, name: str, reason: str = "broken", permanent: bool = False) -> list[Action]:
        at = {"to": "cm", "time": self.now, "occurred": self.now}
        return self.hear(ev.ExecutorFailed(**at, executor=name, reason=reason, permanent=permanent))

    def drained(self, name: str) -> list[Action]:
        return self.hear(ev.ExecutorDrained(to="cm", time=self.now, occurred=self.now, executor=name))

    def retired(self, name: str) -> list[Action]:
        return self.hear(ev.ExecutorRetired(to="cm", time=self.now, occurred=self.now, executor=name))

    def tick(self, seconds: float = 1.0) -> list[Action]:
        self.now += round(seconds * NS_PER_S)
        return self.hear(ev.TimerFired(to="cm", time=self.now, occurred=self.now, name="scale"))

    def demand(self, parked: int, model: str = MODEL, job_executor: str = "je-0") -> list[Action]:
        at = {"to": "cm", "time": self.now, "occurred": self.now}
        return self.hear(ev.DemandReported(**at, job_executor=job_executor, model=model, parked=parked))

    def launched(self) -> list[str]:
        return [action.executor for action in self.last if isinstance(action, LaunchExecutor)]

    def draining(self) -> list[str]:
        return [action.executor for action in self.last if isinstance(action, DrainExecutor)]


def announcement(
    name: str, state: ExecutorState, to: str = "je-0", role: Role = Role.COLOCATED, blocks: int = 100, places: int = 8
) -> AnnounceExecutor:
    return AnnounceExecutor(to, name, make_spec(role), state, blocks, places)


# -- start ----------------------------------------------------------------------------------------------------------


def test_a_run_starts_with_the_initial_executors() -> None:
    """Each group is launched at its initial size; without a period no timer is set."""
    groups = (GroupPlan(make_spec(Role.PREFILL), 2, 1, 4), GroupPlan(make_spec(Role.DECODE, npus=4), 1, 1, 4))
    office = Office(groups=groups)
    assert office.last == [
        LaunchExecutor("te-0", make_spec(Role.PREFILL)),
        LaunchExecutor("te-1", make_spec(Role.PREFILL)),
        LaunchExecutor("te-2", make_spec(Role.DECODE, npus=4)),
    ]


def test_a_policy_with_a_period_is_asked_again_and_again() -> None:
    """Every timer sets the next, one period on."""
    office = Office(Wish(2, period_s=2.5))
    assert office.last[-1] == SetTimer("cm", "scale", 2_500_000_000)
    assert office.tick(2.5) == [SetTimer("cm", "scale", 5_000_000_000)]


def test_a_ready_executor_is_announced_to_every_job_executor() -> None:
    """With what it can hold; and when all are ready the doors open, once."""
    office = Office(job_executors=("je-0", "je-1"))
    announced = [announcement("te-1", ExecutorState.READY, to) for to in ("je-0", "je-1")]
    assert office.ready("te-1") == announced
    assert office.ready("te-0")[-1] == OpenDoors()
    office.failed("te-0")
    assert office.ready("te-2") == [announcement("te-2", ExecutorState.READY, to) for to in ("je-0", "je-1")]


def test_doors_open_though_not_everything_started() -> None:
    """When launches are given up, or not repeated, clients are let in with what there is."""
    office = Office(max_launch_failures=1)
    office.ready("te-0")
    assert office.failed("te-1") == [OpenDoors()]
    office = Office(TargetUtilisation(), minimum=0, initial=1)
    assert office.failed("te-0") == [OpenDoors()]
    office = Office(groups=(GroupPlan(make_spec(), 0, 0, 4),))
    assert office.last == [OpenDoors()]
    groups = (GroupPlan(make_spec(Role.PREFILL), 1, 1, 1), GroupPlan(make_spec(Role.DECODE), 1, 1, 1))
    office = Office(groups=groups, max_launch_failures=1)
    office.ready("te-0")
    assert office.failed("te-1")[-1] == OpenDoors()


# -- size -----------------------------------------------------------------------------------------------------------


def test_executors_on_their_way_count() -> None:
    """What is launching is not launched again: each tick asks for the difference only."""
    wish = Wish(2)
    office = Office(wish)
    office.ready("te-0", "te-1")
    wish.wanted = 5
    office.tick()
    assert office.launched() == ["te-2", "te-3", "te-4"]
    office.tick()
    assert office.launched() == []
    assert (wish.shown[-1].ready, wish.shown[-1].pending) == (2, 3)
    wish.wanted = 6
    office.tick()
    assert office.launched() == ["te-5"]


def test_limits_bind_the_policy() -> None:
    """Wishes below the minimum or above the maximum are cut."""
    wish = Wish(100)
    office = Office(wish, initial=2, minimum=2, maximum=4)
    office.ready("te-0", "te-1")
    office.tick()
    assert office.launched() == ["te-2", "te-3"]
    office.ready("te-2", "te-3")
    wish.wanted = -5
    office.tick()
    assert office.draining() == ["te-2", "te-3"]


def test_on_the_way_down_the_newest_are_drained_first() -> None:
    """Announced as draining, drained, retired, forgotten: in this order, and each once."""
    wish = Wish(3)
    office = Office(wish, initial=3)
    office.ready("te-0", "te-1", "te-2")
    wish.wanted = 1
    office.tick()
    assert office.last[:-1] == [
        announcement("te-1", ExecutorState.DRAINING),
        DrainExecutor("te-1"),
        announcement("te-2", ExecutorState.DRAINING),
        DrainExecutor("te-2"),
    ]
    office.tick()
    assert office.draining() == []
    assert wish.shown[-1].draining == 2
    assert office.drained("te-2") == [RetireExecutor("te-2")]
    assert office.retired("te-2") == []
    office.tick()
    assert wish.shown[-1].draining == 1
    assert office.drained("te-2") == []


def test_executors_on_their_way_do_not_push_out_those_that_serve() -> None:
    """Fewer wanted while some still start: those that serve stay, the late ones are drained when they are ready."""
    wish = Wish(2)
    office = Office(wish)
    office.ready("te-0", "te-1")
    wish.wanted = 4
    office.tick()
    wish.wanted = 2
    office.tick()
    assert office.draining() == []
    office.ready("te-2", "te-3")
    office.tick()
    assert office.draining() == ["te-2", "te-3"]


def test_draining_executors_do_not_count() -> None:
    """While one drains, a new wish for more launches another: what drains is not taken back."""
    wish = Wish(2)
    office = Office(wish)
    office.ready("te-0", "te-1")
    wish.wanted = 1
    office.tick()
    wish.wanted = 2
    office.tick()
    assert office.launched() == ["te-2"]


def test_the_policy_sees_the_latest_reports() -> None:
    """Sums over the ready executors that reported; capacity over all ready ones; strangers are ignored."""
    wish = Wish(3)
    office = Office(wish, initial=3)
    office.ready("te-0", "te-1")
    office.hear(load_report("te-0", 1, waiting=9, running=9, free=1))
    office.hear(load_report("te-0", 2, waiting=2, running=3, free=60))
    office.hear(load_report("te-1", 2, waiting=1, running=1, free=90))
    office.hear(load_report("te-2", 2, waiting=50, running=50, free=0))
    office.hear(load_report("te-77", 2, waiting=50, running=50, free=0))
    office.demand(4)
    assert wish.shown[-1] == GroupLoad(
        model=MODEL,
        role=Role.COLOCATED,
        initial=3,
        ready=2,
        pending=1,
        draining=0,
        waiting=3,
        running=4,
        kv_used=50,
        kv_total=200,
        max_sequences=16,
        parked=4,
    )


def test_demand_adds_up_over_job_executors() -> None:
    """What one job executor says replaces what it said before, and nobody else's word."""
    wish = Wish(1)
    office = Office(wish, initial=1)
    office.demand(4, job_executor="je-0")
    office.demand(3, job_executor="je-1")
    assert wish.shown[-1].parked == 7
    office.demand(1, job_executor="je-0")
    assert wish.shown[-1].parked == 4


def test_demand_is_acted_on_at_once() -> None:
    """Requests that wait for any executor do not wait for the next tick; demand that is over asks nothing."""
    office = Office(TargetUtilisation(period_s=60.0), groups=(GroupPlan(make_spec(), 0, 0, 2),))
    office.demand(1)
    assert office.launched() == ["te-0"]
    assert office.demand(2) == []
    assert office.demand(0) == []


# -- deaths ---------------------------------------------------------------------------------------------------------


def test_a_dead_executor_is_announced_and_replaced() -> None:
    """Ready or draining, job executors hear that it is gone; the policy decides about another."""
    office = Office(job_executors=("je-0", "je-1"))
    office.ready("te-0", "te-1")
    assert office.failed("te-1") == [
        announcement("te-1", ExecutorState.GONE, "je-0"),
        announcement("te-1", ExecutorState.GONE, "je-1"),
        LaunchExecutor("te-2", make_spec()),
    ]
    assert office.failed("te-1") == []


def test_a_failed_launch_is_repeated() -> None:
    """Nobody was told of it, so nobody is told that it is gone."""
    office = Office()
    assert office.failed("te-1") == [LaunchExecutor("te-2", make_spec())]


def test_launches_are_given_up_after_so_many_failures_in_a_row() -> None:
    """Then waiting requests are let know, with the last reason, and no more are launched."""
    office = Office(initial=1, job_executors=("je-0", "je-1"))
    assert office.failed("te-0", "a") == [LaunchExecutor("te-1", make_spec())]
    office.failed("te-1", "b")
    said = "no executor for m could be launched: c"
    assert office.failed("te-2", "c") == [
        DeclareNoCapacity("je-0", MODEL, said),
        DeclareNoCapacity("je-1", MODEL, said),
        OpenDoors(),
    ]
    assert office.demand(3) == [DeclareNoCapacity("je-0", MODEL, said), DeclareNoCapacity("je-1", MODEL, said)]


def test_a_launch_that_would_fail_again_is_not_repeated() -> None:
    """One failure of that kind is enough to give up."""
    office = Office(initial=1, job_executors=("je-0",))
    said = "no executor for m could be launched: no such model"
    assert office.failed("te-0", "no such model", permanent=True) == [
        DeclareNoCapacity("je-0", MODEL, said),
        OpenDoors(),
    ]


def test_a_success_forgives_failures() -> None:
    """Failures count in a row: an executor that gets ready ends the row."""
    office = Office(initial=1)
    office.failed("te-0")
    office.failed("te-1")
    office.ready("te-2")
    office.failed("te-2")
    assert office.launched() == ["te-3"]
    office.failed("te-3")
    assert office.launched() == ["te-4"]


def test_while_others_serve_nobody_is_sent_away() -> None:
    """Launches given up, but one executor serves: requests may wait for it; when it dies, or is retired, they fail."""
    wish = Wish(2)
    for last_word in (lambda office: office.failed("te-0"), lambda office: office.retired("te-0")):
        wish.wanted = 2
        office = Office(wish, minimum=0)
        office.ready("te-0")
        for number in (1, 2, 3):
            office.failed(f"te-{number}")
            assert not any(isinstance(action, DeclareNoCapacity) for action in office.last)
        assert office.demand(2) == []
        last_word(office)
        assert [action for action in office.last if isinstance(action, DeclareNoCapacity)] == [
            DeclareNoCapacity("je-0", MODEL, "no executor for m could be launched: broken")
        ]


def test_prefill_without_decode_serves_nobody() -> None:
    """A disaggregated model needs both roles, unless there is a colocated group too."""
    pair = (GroupPlan(make_spec(Role.PREFILL), 1, 1, 1), GroupPlan(make_spec(Role.DECODE), 1, 1, 1))
    office = Office(groups=pair, max_launch_failures=1)
    office.ready("te-0")
    office.failed("te-1")
    assert any(isinstance(action, DeclareNoCapacity) for action in office.last)
    office = Office(groups=(*pair, GroupPlan(make_spec(), 1, 1, 1)), max_launch_failures=1)
    office.failed("te-1")
    assert office.last == []


def test_a_model_without_a_group_has_no_capacity() -> None:
    """Demand for a model that no group serves is answered at once."""
    office = Office()
    said = "no executor for other could be launched: no group of executors serves it"
    assert office.demand(1, "other") == [DeclareNoCapacity("je-0", "other", said)]


def test_an_unused_executor_that_dies_while_draining_is_not_replaced() -> None:
    """Fewer were wanted; its death only speeds that up."""
    wish = Wish(2)
    office = Office(wish)
    office.ready("te-0", "te-1")
    wish.wanted = 1
    office.tick()
    assert office.failed("te-1") == [announcement("te-1", ExecutorState.GONE)]
    assert office.drained("te-1") == []


# -- role switches -------------------------------------------------------------------------------------------------


class Mover(Wish):
    """Asks once for a switch, and wants every group as large as it is then."""

    def __init__(self, *moves: RoleSwitch) -> None:
        super().__init__(1)
        self.moves: tuple[RoleSwitch, ...] = moves
        self.armed = False

    def switches(self, loads: Sequence[GroupLoad], now_ns: int) -> Sequence[RoleSwitch]:
        moves, self.armed = (self.moves if self.armed else ()), False
        return moves

    def desired(self, load: GroupLoad, now_ns: int) -> int:
        super().desired(load, now_ns)
        return load.ready + load.pending


def pair_of_groups(policy: ScalingPolicy, prefill: GroupPlan, decode: GroupPlan) -> Office:
    office = Office(policy, (prefill, decode))
    office.ready(*office.specs)
    return office


P_TO_D = RoleSwitch(MODEL, Role.PREFILL, Role.DECODE)


def test_the_least_loaded_executor_switches_and_is_announced_when_it_has() -> None:
    """The action goes to the one with the least to do; job executors hear of its new role after it took it."""
    policy = Mover(P_TO_D)
    office = pair_of_groups(
        policy, GroupPlan(make_spec(Role.PREFILL), 3, 1, 3), GroupPlan(make_spec(Role.DECODE), 1, 1, 3)
    )
    for name, waiting in (("te-0", 4), ("te-1", 0), ("te-2", 2)):
        office.hear(load_report(name, waiting=waiting))
    policy.armed = True
    assert office.tick()[:-1] == [SwitchRole("te-1", Role.DECODE)]
    assert [(load.role, load.ready) for load in policy.shown[-2:]] == [(Role.PREFILL, 2), (Role.DECODE, 2)]
    switched = ev.RoleSwitched(
        to="cm", time=office.now, occurred=office.now, executor="te-1", spec=make_spec(Role.DECODE)
    )
    assert office.hear(switched) == [announcement("te-1", ExecutorState.READY, role=Role.DECODE)]
    assert office.failed("te-1")[0] == announcement("te-1", ExecutorState.GONE, role=Role.DECODE)
    assert office.hear(switched) == []


@pytest.mark.parametrize(
    ("prefill", "decode", "move"),
    [
        ((1, 1, 3), (1, 1, 3), P_TO_D),
        ((2, 1, 3), (1, 1, 1), P_TO_D),
        ((2, 1, 3), (1, 1, 3), RoleSwitch(MODEL, Role.PREFILL, Role.COLOCATED)),
        ((2, 1, 3), (1, 1, 3), RoleSwitch("other", Role.PREFILL, Role.DECODE)),
        ((2, 1, 3), (1, 1, 3), RoleSwitch(MODEL, Role.PREFILL, Role.PREFILL)),
    ],
)
def test_a_switch_that_no_plan_allows_is_not_made(
    prefill: tuple[int, int, int], decode: tuple[int, int, int], move: RoleSwitch
) -> None:
    """Below the minimum, above the maximum, or to a group that there is not."""
    policy = Mover(move)
    groups = GroupPlan(make_spec(Role.PREFILL), *prefill), GroupPlan(make_spec(Role.DECODE), *decode)
    office = pair_of_groups(policy, *groups)
    policy.armed = True
    assert not any(isinstance(action, SwitchRole) for action in office.tick())


def test_an_executor_that_leaves_while_it_switches_is_not_announced_again() -> None:
    """Drained before its answer came: it stays announced as draining."""
    policy = Mover(RoleSwitch(MODEL, Role.DECODE, Role.PREFILL))
    office = pair_of_groups(
        policy, GroupPlan(make_spec(Role.PREFILL), 1, 1, 3), GroupPlan(make_spec(Role.DECODE), 2, 1, 3)
    )
    policy.armed = True
    [switch, *_] = office.tick()
    assert isinstance(switch, SwitchRole)
    policy.desired = lambda load, now_ns: 1  # type: ignore[method-assign]
    office.tick()
    assert switch.executor in office.draining()
    switched = ev.RoleSwitched(
        to="cm", time=office.now, occurred=office.now, executor=switch.executor, spec=make_spec(Role.PREFILL)
    )
    assert office.hear(switched) == []


# -- user errors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: GroupPlan(make_spec(), 1, 2, 3), "initial 1, minimum 2, maximum 3"),
        (lambda: GroupPlan(make_spec(), 4, 2, 3), "needed is 0 <= minimum <= initial <= maximum"),
        (lambda: GroupPlan(make_spec(), 1, -1, 3), "minimum -1"),
        (lambda: GroupPlan(make_spec(), 0, 0, 0), "zero executors"),
        (lambda: ClusterManager((), Fixed(), ("je-0",)), "no executors: name at least one group"),
        (lambda: Office(Wish(1, period_s=0.0)), "scaling period is 0.0 s"),
        (lambda: Fixed(-1), "scaling.executors is -1"),
    ],
)
def test_bad_sizes_are_named(make: Callable[[], object], named: str) -> None:
    """A plan that cannot be is refused with its values and what is needed."""
    with pytest.raises(ValueError, match=named):
        make()


# -- many models ----------------------------------------------------------------------------------------------------


def test_demand_for_a_model_concerns_its_groups_alone() -> None:
    """A request that waits for one of many models makes the policy look at that one, and launches for it from zero."""
    wish = Wish(1)
    office = Office(wish, tuple(GroupPlan(make_spec(model=f"m{number}"), 0, 0, 4) for number in range(50)))
    office.demand(1, "m7")
    assert [load.model for load in wish.shown] == ["m7"]
    assert office.last == [LaunchExecutor("te-0", make_spec(model="m7"))]


def test_npus_are_limited_for_all_groups_together() -> None:
    """What does not fit is launched when others have been retired, the group that waits longest first."""
    wish = Wish(2)
    groups = tuple(GroupPlan(make_spec(model=model, npus=2), 0, 0, 9) for model in "abc")
    office = Office(wish, groups, npus=6)
    office.tick()
    assert [office.specs[name].spec.model for name in office.launched()] == ["a", "a", "b"]
    office.ready("te-0", "te-1", "te-2")
    office.failed("te-0")
    assert [office.specs[name].spec.model for name in office.launched()] == ["a"], "its own group comes first"
    office.ready("te-3")
    wish.wanted = 1
    office.tick()
    assert office.draining() == ["te-3"]
    office.drained("te-3")
    assert office.launched() == []
    office.retired("te-3")
    assert [office.specs[name].spec.model for name in office.launched()] == ["c"]


def test_a_fleet_that_does_not_fit_its_npus() -> None:
    """More executors at the start than NPUs is an error that says how many are needed."""
    with pytest.raises(ValueError, match=r"fleet.npus is 3, but the executors a run starts with take 4"):
        Office(groups=(GroupPlan(make_spec(npus=2), 2, 2, 2),), npus=3)


def test_workers_are_for_the_job_executor_for_work_alone() -> None:
    """Nobody else hears of them; CPU workers are launched where no NPUs are left, training waits for some."""
    wish = Wish(1)
    cpu, training = ExecutorSpec("cpu", Role.CPU, 0), ExecutorSpec("training", Role.TRAINING, 8)
    groups = (*(GroupPlan(spec, 0, 0, 9) for spec in (cpu, training)), GroupPlan(make_spec(), 1, 1, 1))
    office = Office(wish, groups, npus=8)
    office.demand(1, "cpu", WORK)
    assert [office.specs[name].spec for name in office.launched()] == [cpu]
    assert office.ready("te-1")[:1] == [AnnounceExecutor(WORK, "te-1", cpu, ExecutorState.READY, 100, 8)]
    office.demand(1, "training", WORK)
    assert office.launched() == []
    office.failed("te-0")  # its NPU is free, and its own group comes first
    assert [office.specs[name].spec for name in office.launched()] == [make_spec()]


class Shifting(Wish):
    """Wants what the test says, and moves an executor when it is told to."""

    move = False

    def switches(self, loads: Sequence[GroupLoad], now_ns: int) -> Sequence[RoleSwitch]:
        moves, self.move = [RoleSwitch(MODEL, Role.PREFILL, Role.DECODE)] * self.move, False
        return moves


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 9)), max_size=60))
def test_sums_over_a_group_are_those_of_its_executors(steps: list[tuple[int, int, int]]) -> None:
    """Whatever happens to executors, the policy is shown what adding up their latest reports would give."""
    policy = Shifting(2)
    office = Office(policy, (GroupPlan(make_spec(Role.PREFILL), 2, 0, 6), GroupPlan(make_spec(Role.DECODE), 2, 0, 6)))
    role: dict[str, Role] = {}
    state: dict[str, str] = {}
    reports: dict[str, ev.LoadReport] = {}

    def note() -> None:
        for action in office.last:
            match action:
                case LaunchExecutor():
                    role[action.executor], state[action.executor] = action.spec.role, "pending"
                case DrainExecutor():
                    state[action.executor] = "draining"
                case SwitchRole():
                    role[action.executor] = action.role

    note()
    for kind, which, amount in steps:
        name = f"te-{which}"
        if kind == 0 and state.get(name) == "pending":
            office.ready(name)
            state[name] = "ready"
        elif kind == 1 and name in state:
            reports[name] = load_report(name, office.now, waiting=amount, running=which, free=100 - amount)
            office.hear(reports[name])
        elif kind == 2 and name in state:
            office.retired(name) if state.pop(name) == "draining" else office.failed(name)
            note()
        elif kind == 3:
            policy.wanted = amount % 5
        elif kind == 4:
            policy.move = True
        policy.shown.clear()
        before = dict(role), dict(state)
        office.tick()
        if not any(isinstance(action, SwitchRole) for action in office.last):
            for load in policy.shown:
                check_load(load, *before, reports)
        note()


def check_load(
    load: GroupLoad, role: dict[str, Role], state: dict[str, str], reports: dict[str, ev.LoadReport]
) -> None:
    members = [name for name in state if role[name] is load.role]
    ready = [name for name in members if state[name] == "ready"]
    known = [reports[name] for name in ready if name in reports]
    assert (load.ready, load.pending) == (len(ready), sum(state[name] == "pending" for name in members))
    assert load.draining == sum(state[name] == "draining" for name in members)
    assert load.waiting == sum(report.waiting for report in known)
    assert load.running == sum(report.running for report in known)
    assert load.kv_used == sum(report.total_blocks - report.free_blocks for report in known)
    assert (load.kv_total, load.max_sequences) == (100 * len(ready), 8 * len(ready))
