"""Policies at work: what whole runs show of them on the simulated cluster."""

from cluster import events as ev
from cluster.actions import Action, LaunchExecutor
from cluster.fleet import Fleet
from cluster.manager import GroupPlan
from cluster.policy import DispatchPolicy
from cluster.request import Arrival, Request, Task, Trigger
from cluster.vocabulary import Outcome, Stage, to_ns
from flowserve.core.config import EngineConfig
from policies.dispatch.deepflow import DeepFlow
from policies.dispatch.heat_map import HeatMap
from policies.dispatch.least_outstanding import LeastOutstanding
from policies.dispatch.round_robin import RoundRobin
from policies.scaling.target_utilisation import TargetUtilisation
from sim.cluster import SimCluster
from sim.latency import Constant
from tests.builders import Run, chain, disaggregated, make_arrival, make_spec, run_sim


class DoNothing(DispatchPolicy):
    """Places nothing, ever."""

    def place(self, task: Task, fleet: Fleet, now_ns: int) -> str | None:
        return None


class Late(LeastOutstanding):
    """Places nothing before there are three executors."""

    def place(self, task: Task, fleet: Fleet, now_ns: int) -> str | None:
        ready = sum(map(len, fleet.candidates(task)))
        return super().place(task, fleet, now_ns) if ready >= 3 else None


def colocate_all() -> DispatchPolicy:
    return DeepFlow(HeatMap([0], [0], [[-1]], "test"))


def disaggregate_all() -> DispatchPolicy:
    return DeepFlow(HeatMap([0], [0], [[1]], "test"))


def sessions(users: int, turns: int) -> list[Arrival]:
    """Users that talk in turns: each prompt is the last one and two blocks more, some time after the last answer."""
    workload = []
    for turn in range(turns):
        for user in range(users):
            number = turn * users + user
            after = Trigger("ended", number - users, delay_ns=50_000_000) if turn else None
            ids = chain(user, *(1,) * (2 * turn + 2))
            workload.append(
                make_arrival(number, at_s=0.013 * user, prompt=16 * len(ids), output=8, ids=ids, after=after)
            )
    return workload


def executors_of(run: Run, users: int, turns: int) -> list[set[str]]:
    """For each user, the executors that computed the prompts."""
    return [{run.rows[turn * users + user]["executor"] for turn in range(turns)} for user in range(users)]


def test_a_policy_that_does_nothing_ends_in_cancellations() -> None:
    """Requests wait for ever until their clients give up; the run ends, and no executor computes anything."""
    run = run_sim([make_arrival(n, at_s=0.1 * n, cancel_after_s=1.0) for n in range(5)], policy=DoNothing)
    assert run.recorder.outcomes == [Outcome.CANCELLED] * 5
    assert run.executors["te-0"].steps == 0
    assert [event.parked for event in run.of(ev.DemandReported)] == [1, 2, 3, 4, 5, 4, 3, 2, 1]  # the run is over


def test_a_policy_may_wait_for_a_change_in_the_fleet() -> None:
    """Parked requests are placed again at every executor that appears, and all at once when the policy agrees."""
    run = run_sim(
        [make_arrival(n, output=4) for n in range(6)],
        groups=[GroupPlan(make_spec(npus=npus), 1, 1, 1) for npus in (1, 2, 4)],
        policy=Late,
    )
    assert set(run.recorder.outcomes) == {Outcome.FINISHED}
    assert {row["executor"] for row in run.rows.values()} == {"te-0", "te-1", "te-2"}


def test_sessions_stay_where_their_cache_is() -> None:
    """Locality-aware, every turn finds the one before in the cache; round robin sends many elsewhere."""
    users, turns = 9, 4
    by_policy = {}
    for policy in (colocate_all, RoundRobin):
        run = run_sim(
            sessions(users, turns),
            executors=4,
            policy=policy,
            engine=EngineConfig(1000),
            latency=lambda: Constant(0.01),
        )
        assert set(run.recorder.outcomes) == {Outcome.FINISHED}
        by_policy[policy] = run
        if policy is colocate_all:
            assert all(len(places) == 1 for places in executors_of(run, users, turns))
            for number, row in run.rows.items():
                assert row["cached_tokens"] == (row["prompt_tokens"] - 32 if number >= users else 0)
    cached = {policy: sum(row["cached_tokens"] for row in run.rows.values()) for policy, run in by_policy.items()}
    assert cached[RoundRobin] < 0.8 * cached[colocate_all]


def test_a_mixed_fleet_obeys_the_heat_map() -> None:
    """With all cells above 0 every request is disaggregated, with all below none is."""
    for policy, tasks in ((disaggregate_all, 2), (colocate_all, 1)):
        run = run_sim(
            [make_arrival(n, at_s=0.02 * n, output=5) for n in range(10)],
            groups=disaggregated(1, 1, 1),
            policy=policy,
        )
        assert len(run.of(ev.TaskFinished)) == 10 * tasks
        assert set(run.recorder.outcomes) == {Outcome.FINISHED}


def test_a_slow_start_is_not_multiplied() -> None:
    """Twice too busy with starts that take longer than many looks: two more executors are launched, not six."""
    sizes: list[int] = []

    def watch(event: ev.Event, actions: list[Action], cluster: SimCluster) -> None:
        sizes.append((sizes[-1] if sizes else 0) + sum(isinstance(action, LaunchExecutor) for action in actions))

    places = 10
    policy = TargetUtilisation(target=0.5, period_s=0.5, down_delay_s=1000.0)
    # Twenty requests at any time, of 2 s each, on two executors of ten places: full, where half full is wanted.
    run = run_sim(
        [make_arrival(n, at_s=0.1 * n, output=195) for n in range(300)],
        groups=[GroupPlan(make_spec(), 2, 1, 50)],
        scaling=policy,
        engine=EngineConfig(10_000, max_sequences=places),
        stages=[(Stage.TE_LOAD, to_ns(10.0))],
        latency=lambda: Constant(0.01),
        report_period_s=0.1,
        watch=watch,
    )
    assert set(run.recorder.outcomes) == {Outcome.FINISHED}
    assert 4 <= sizes[-1] <= 5
    launched = [time for time, _, what, _ in run.recorder.scaling if what == "launch"]
    assert launched[2] < to_ns(10.0 + 5.0)


def test_a_policy_sees_no_answer() -> None:
    """What a policy is given of a request does not contain the true output length."""
    assert "output_tokens" not in Request.__struct_fields__
    assert "answer" not in Request.__struct_fields__
    assert set(Task.__struct_fields__) == {"task_id", "request", "kind", "generated", "kv", "deadline_ns"}
