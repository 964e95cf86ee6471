"""Dispatch policies choose as they promise, and whatever the fleet they choose out of it."""

from collections import Counter
from collections.abc import Callable
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster import events as ev
from cluster.fleet import Fleet
from cluster.policy import DispatchPolicy
from cluster.request import Task
from cluster.vocabulary import Role, TaskKind
from policies.dispatch.deepflow import DeepFlow
from policies.dispatch.heat_map import HeatMap
from policies.dispatch.least_outstanding import LeastOutstanding
from policies.dispatch.round_robin import RoundRobin
from policies.prediction.bucket_mean import BucketMean
from tests.builders import announced, chain, make_request, make_task

LETTERS = {"p": Role.PREFILL, "d": Role.DECODE, "c": Role.COLOCATED}


def fleet_of(**loads: int) -> Fleet:
    """Executors by name with their outstanding tasks; the first letter is the role."""
    fleet = Fleet()
    for name, load in loads.items():
        fleet.announced(announced(name, LETTERS[name[0]]))
        fleet.count(name, load, 0)
    return fleet


def decode_task(task_id: int = 0) -> Task:
    return make_task(task_id, kind=TaskKind.DECODE, generated=1, source="p0")


def choices(policy: DispatchPolicy, fleet: Fleet, count: int, task: Task | None = None) -> list[str | None]:
    return [policy.place(task or make_task(number), fleet, 0) for number in range(count)]


def deepflow(gain: float = 1.0, slack: int = 8, ratio: float = 1.5) -> DeepFlow:
    """A heat map of one cell."""
    return DeepFlow(HeatMap([0], [0], [[gain]], "test"), balance_slack=slack, balance_ratio=ratio)


def teach(policy: DeepFlow, executor: str, ids: tuple[int, ...]) -> None:
    """A request with these blocks went to this executor, which answers."""
    kind = TaskKind.PREFILL if executor[0] == "p" else TaskKind.SERVE
    task = make_task(900, prompt=16 * len(ids), ids=ids, kind=kind)
    policy.dispatched(task, executor)
    policy.first_token(
        task.request,
        ev.FirstToken(to="je-0", time=0, occurred=0, request_id=900, task_id=900, executor=executor),
    )


def sharing(*path: int) -> Task:
    return make_task(1, prompt=16 * len(path), ids=chain(*path))


# -- every policy ---------------------------------------------------------------------------------------------------

POLICIES: list[Callable[[], DispatchPolicy]] = [
    RoundRobin,
    LeastOutstanding,
    lambda: DeepFlow(HeatMap([0, 40], [0, 1], [[-1, 1], [1, -1]], "test"), balance_slack=1),
]

executors = st.lists(
    st.tuples(st.sampled_from("pdc"), st.integers(0, 20), st.sampled_from(["m", "other"])), max_size=12
)
tasks = st.builds(
    lambda prompt, limit, path, decode: (
        decode_task() if decode else make_task(0, prompt, limit, ids=None if path is None else chain(*path))
    ),
    st.integers(1, 5000),
    st.integers(1, 5000),
    st.none() | st.lists(st.integers(0, 1), max_size=4),
    st.booleans(),
)


@pytest.mark.parametrize("make", POLICIES, ids=["round_robin", "least_outstanding", "deepflow"])
@given(stages=st.lists(st.tuples(executors, st.lists(tasks, max_size=5)), min_size=1, max_size=4))
def test_every_choice_is_a_candidate(
    make: Callable[[], DispatchPolicy], stages: list[tuple[list[tuple[str, int, str]], list[Task]]]
) -> None:
    """Over fleets that change, a choice is a member of the candidates, and None exactly where there are none."""
    policy = make()
    for members, to_place in stages:
        fleet = Fleet()
        for number, (letter, load, model) in enumerate(members):
            fleet.announced(announced(f"{letter}{number}", LETTERS[letter], model=model))
            fleet.count(f"{letter}{number}", load, 0)
        for task in to_place:
            allowed = [name for group in fleet.candidates(task) for name in group.names]
            chosen = policy.place(task, fleet, 0)
            assert chosen in allowed if allowed else chosen is None
            if chosen is not None:
                role = fleet.role_of(chosen)
                assert (role is Role.DECODE) == (task.kind is TaskKind.DECODE)
                kind = {Role.COLOCATED: TaskKind.SERVE, Role.PREFILL: TaskKind.PREFILL}.get(role, TaskKind.DECODE)
                policy.dispatched(make_task(0, kind=kind), chosen)
        for number, (letter, _, _) in enumerate(members):
            policy.executor_gone(f"{letter}{number}")


# -- round robin ----------------------------------------------------------------------------------------------------


def test_round_robin_is_fair_over_all_groups() -> None:
    """Entry tasks take turns over colocated and prefill executors alike, whatever their load."""
    fleet = fleet_of(c0=9, c1=0, p0=5, p1=0, p2=0, d0=0)
    assert choices(RoundRobin(), fleet, 10) == ["c0", "c1", "p0", "p1", "p2"] * 2


def test_round_robin_turns_of_decode_tasks_are_their_own() -> None:
    """Entry and decode tasks that alternate, and requests of another model, do not disturb each other's turns."""
    fleet, policy = fleet_of(p0=0, p1=0, d0=0, d1=0), RoundRobin()
    for name in ("o0", "o1"):
        fleet.announced(announced(name, model="other"))
    seen = Counter()
    for number in range(40):
        seen[policy.place(make_task(number), fleet, 0)] += 1
        seen[policy.place(decode_task(number), fleet, 0)] += 1
        other = Task(number, make_request(number, model="other"), TaskKind.SERVE)
        seen[policy.place(other, fleet, 0)] += 1
    assert seen == dict.fromkeys(["p0", "p1", "d0", "d1", "o0", "o1"], 20)


def test_round_robin_goes_on_when_the_fleet_changes() -> None:
    """After each change the next turns visit every executor that is there now equally often."""
    fleet, policy = fleet_of(c0=0, c1=0, c2=0), RoundRobin()
    choices(policy, fleet, 4)
    for change in ("+c3", "-c0", "+p0", "-c2", "-c3"):
        if change[0] == "+":
            fleet.announced(announced(change[1:], LETTERS[change[1]]))
        else:
            fleet.remove(change[1:])
        names = [name for group in fleet.candidates(make_task()) for name in group.names]
        assert Counter(choices(policy, fleet, 3 * len(names))) == dict.fromkeys(names, 3)
    fleet.remove("c1")
    fleet.remove("p0")
    assert policy.place(make_task(), fleet, 0) is None


# -- least outstanding ----------------------------------------------------------------------------------------------


@given(
    loads=st.lists(st.tuples(st.sampled_from("pc"), st.integers(0, 4)), min_size=1, max_size=10),
    count=st.integers(1, 40),
)
def test_least_outstanding_picks_a_minimum(loads: list[tuple[str, int]], count: int) -> None:
    """Each choice has the fewest tasks of all candidates; so a fleet fills up evenly."""
    now = {f"{letter}{number}": load for number, (letter, load) in enumerate(loads)}
    fleet, policy = fleet_of(**now), LeastOutstanding()
    for number in range(count):
        chosen = policy.place(make_task(number), fleet, 0)
        assert chosen is not None
        assert now[chosen] == min(now.values())
        now[chosen] += 1
        fleet.count(chosen, 1, 0)


def test_least_outstanding_rotates_among_ties() -> None:
    """Executors with equal counts take turns, the busier one gets nothing."""
    fleet = fleet_of(c0=0, c1=3, c2=0, c3=0)
    chosen = choices(LeastOutstanding(), fleet, 30)
    assert Counter(chosen) == {"c0": 10, "c2": 10, "c3": 10}
    assert all(earlier != later for earlier, later in pairwise(chosen))


def test_least_outstanding_rotates_each_group() -> None:
    """Ties are broken in turn in each group, also where entry and decode tasks alternate."""
    fleet, policy = fleet_of(p0=0, p1=0, d0=0, d1=0), LeastOutstanding()
    seen = Counter()
    for number in range(20):
        seen[policy.place(make_task(number), fleet, 0)] += 1
        seen[policy.place(decode_task(number), fleet, 0)] += 1
    assert seen == dict.fromkeys(["p0", "p1", "d0", "d1"], 10)


def test_least_outstanding_decode_tasks_see_decode_executors_only() -> None:
    """A decode task goes to the decode executor with the fewest tasks, even where others are idle."""
    assert LeastOutstanding().place(decode_task(), fleet_of(c0=0, p0=0, d0=4, d1=3), 0) == "d1"


# -- deepflow: PD-aware ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gain", "expected"), [(0.1, "p0"), (-0.1, "c0"), (0.0, "c0")])
def test_the_sign_of_the_heat_map_chooses_the_type(gain: float, expected: str) -> None:
    """Above 0 prefill executors get the request, else colocated ones, however busy they are."""
    busy = {"p0": {"p0": 50, "c0": 0}, "c0": {"p0": 0, "c0": 50}}[expected]
    assert deepflow(gain).place(make_task(), fleet_of(**busy, d0=0), 0) == expected


def test_the_cell_is_that_of_prompt_and_predicted_output() -> None:
    """Prompt tokens choose the row, predicted output per prompt token the column; retries count what they repeat."""
    heat_map = HeatMap([0, 1000], [0, 1], [[-1, 1], [1, -1]], "test")
    fleet = fleet_of(c0=0, p0=0)
    policy = DeepFlow(heat_map, BucketMean(prior_tokens=500))  # predicts 448
    for prompt, limit, generated, expected in (
        (500, 10_000, 0, "c0"),
        (400, 10_000, 0, "p0"),
        (400, 300, 0, "c0"),
        (1000, 10_000, 0, "p0"),
        (990, 10_000, 9, "c0"),
        (990, 10_000, 10, "p0"),
    ):
        task = make_task(0, prompt, limit, generated=generated)
        assert policy.place(task, fleet, 0) == expected, (prompt, limit, generated)


def test_the_predictor_learns_from_finished_requests() -> None:
    """Long answers of similar prompts change the column of the next; a prefill that goes on teaches nothing."""
    fleet, request = fleet_of(c0=0, p0=0), make_request(0, 500, 10_000)
    policy = DeepFlow(HeatMap([0], [0, 1], [[-1, 1]], "test"))
    done = ev.TaskFinished(
        to="je-0",
        time=0,
        occurred=0,
        request_id=0,
        task_id=0,
        executor="c0",
        generated=5000,
        stopped=False,
        tokens=5000,
        last_token_ns=0,
        token_times=b"",
    )
    for stopped, expected in ((False, "c0"), (True, "p0")):
        policy.finished(request, msgspec.structs.replace(done, stopped=stopped))
        assert policy.place(make_task(1, 500, 10_000), fleet, 0) == expected


@pytest.mark.parametrize("gain", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("only", ["c0", "p0"])
def test_a_single_type_gets_everything(gain: float, only: str) -> None:
    """Where only one type of executor is there, the heat map has no say."""
    assert deepflow(gain).place(make_task(), fleet_of(**{only: 7}, d0=0), 0) == only


# -- deepflow: locality and load ------------------------------------------------------------------------------------


def test_balanced_goes_to_the_longest_prefix() -> None:
    """With loads within the slack, the executor with the longest cached prefix gets the request, although busier."""
    policy = deepflow(slack=8)
    teach(policy, "p0", chain(1))
    teach(policy, "p1", chain(1, 2, 3))
    fleet = fleet_of(p0=0, p1=8, p2=0)
    assert policy.place(sharing(1, 2, 9), fleet, 0) == "p1"
    assert policy.place(sharing(1, 9, 9), fleet, 0) == "p0"  # both have it, p0 has less to do


def test_unbalanced_goes_to_the_least_loaded() -> None:
    """One task beyond the slack, and the prefix counts for nothing."""
    policy = deepflow(slack=8)
    teach(policy, "p1", chain(1, 2, 3))
    assert policy.place(sharing(1, 2, 3), fleet_of(p0=0, p1=9, p2=1), 0) == "p0"


@pytest.mark.parametrize(("loads", "balanced"), [((20, 30), True), ((20, 31), False), ((0, 2), True), ((0, 3), False)])
def test_balance_is_slack_or_ratio(loads: tuple[int, int], balanced: bool) -> None:
    """Balanced: a difference within the slack, or the most within the ratio of the least; both edges included."""
    policy = deepflow(slack=2, ratio=1.5)
    teach(policy, "p1", chain(1))
    assert policy.place(sharing(1), fleet_of(p0=loads[0], p1=loads[1]), 0) == ("p1" if balanced else "p0")


@pytest.mark.parametrize("task", [sharing(7, 7), make_task(1, 64), make_task(1, 8, ids=())])
def test_without_a_hit_the_least_loaded(task: Task) -> None:
    """Prompts nobody has cached, that nobody shares, or that fill no block go by load, the first of equals."""
    policy = deepflow()
    teach(policy, "p0", chain(1, 2))
    assert policy.place(task, fleet_of(p0=3, p1=2, p2=1, p3=1), 0) == "p2"


def test_what_an_executor_cached_is_gone_with_it() -> None:
    """A prefix of an executor that went counts no more, also when one of the same name returns."""
    policy, fleet = deepflow(), fleet_of(p0=0, p1=5)
    teach(policy, "p1", chain(1, 2))
    assert policy.place(sharing(1, 2), fleet, 0) == "p1"
    policy.executor_gone("p1")
    assert policy.place(sharing(1, 2), fleet, 0) == "p0"
    teach(policy, "p1", chain(1))
    assert policy.place(sharing(1, 2), fleet, 0) == "p1"


def test_an_executor_that_went_teaches_nothing() -> None:
    """A late first token of an executor that takes no more tasks does not bring its prefix back."""
    policy = deepflow()
    teach(policy, "p1", chain(1))
    policy.executor_gone("p1")
    late = ev.FirstToken(to="je-0", time=0, occurred=0, request_id=1, task_id=1, executor="p1")
    policy.first_token(sharing(1, 2).request, late)
    assert policy.place(sharing(1, 2), fleet_of(p0=0, p1=1), 0) == "p0"


def test_trees_of_types_are_apart() -> None:
    """A prefix in a colocated executor is no reason to choose among prefill executors."""
    policy = deepflow(gain=1)
    teach(policy, "c1", chain(1))
    teach(policy, "p1", chain(2))
    fleet = fleet_of(c0=0, c1=1, p0=0, p1=1)
    assert policy.place(sharing(1), fleet, 0) == "p0"
    assert policy.place(sharing(2), fleet, 0) == "p1"


def test_decode_tasks_go_to_the_least_loaded() -> None:
    """Balanced or not, with a prefix known or not, a decode task goes by load."""
    policy = deepflow()
    for loads in ((3, 2, 4), (30, 0, 99)):
        fleet = fleet_of(c0=0, p0=0, d0=loads[0], d1=loads[1], d2=loads[2])
        assert policy.place(decode_task(), fleet, 0) == "d1"


# -- bad parameters -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"balance_slack": -1}, "balance_slack is -1"),
        ({"balance_ratio": 0.5}, r"balance_ratio is 0\.5"),
        ({"max_tree_blocks": 0}, "max_tree_blocks is 0"),
    ],
)
def test_bad_parameters_are_named(parameters: dict[str, float], said: str) -> None:
    """A parameter out of range is refused when the policy is made, with its name and value."""
    with pytest.raises(ValueError, match=said):
        DeepFlow(HeatMap([0], [0], [[1]], "test"), **parameters)  # type: ignore[arg-type]
