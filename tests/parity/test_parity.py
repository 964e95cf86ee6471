"""One policy object, two clusters: the decisions are the same where they depend on outcomes and not on timing."""

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from cluster.fleet import Fleet
from cluster.policy import DispatchPolicy, ScalingPolicy
from cluster.request import Answer, Arrival, Request, Task, Trigger
from cluster.vocabulary import Role, to_ns
from flowserve.core.config import EngineConfig
from policies.dispatch.deepflow import DeepFlow
from policies.dispatch.heat_map import HeatMap
from policies.dispatch.least_outstanding import LeastOutstanding
from policies.dispatch.round_robin import RoundRobin
from policies.scaling.fixed import Fixed
from policies.scaling.target_utilisation import TargetUtilisation
from tests.parity import clusters

ENGINE = EngineConfig(kv_blocks=4096, block_tokens=16, token_budget=64, max_sequences=32)
LONG = 250
LONG_PROMPT = 40


class ByTheClock(DispatchPolicy):
    """Decides from the time of day: what no two runs have in common."""

    def place(self, task: Task, fleet: Fleet, now_ns: int) -> str | None:
        names = [name for group in fleet.candidates(task) for name in group.names]
        return names[now_ns // 1000 % len(names)] if names else None


def heat_map() -> HeatMap:
    return HeatMap([0, LONG_PROMPT], [0.0, 1.0], [[-1.0, -1.0], [1.0, -1.0]], "for tests: long prompts, short outputs")


def triggered_workload() -> list[Arrival]:
    """Each request comes after the k-th first token, so which requests overlap does not hang on how long a step takes.

    One-token requests end at once, long ones outlast all that comes after them until the pause in the middle, which
    waits for their end. Prompts share prefixes in three families.
    """
    arrivals = []
    for number in range(36):
        output = LONG if number % 3 == 0 and number not in (33, 34, 35) else 1
        family = number % 4
        prompt = 16 * (3 + number % 5)
        ids = tuple(1000 * family + block for block in range(2)) + tuple(
            10_000 + 100 * number + block for block in range(prompt // 16 - 2)
        )
        after = None if number == 0 else Trigger("first_token", count=number)
        if number == 18:
            after = Trigger("ended", request_id=15, delay_ns=to_ns(0.2))
        arrivals.append(
            Arrival(Request(number, prompt, 512, clusters.MODEL, ids), Answer(output), at_ns=0, after=after)
        )
    return arrivals


DISPATCH: dict[str, Callable[[], DispatchPolicy]] = {
    "round_robin": RoundRobin,
    "least_outstanding": LeastOutstanding,
    "deepflow": lambda: DeepFlow(heat_map(), balance_slack=2),
}
FLEETS = {
    "colocated": [clusters.group(Role.COLOCATED, 3)],
    "disaggregated": [clusters.group(Role.PREFILL, 2), clusters.group(Role.DECODE, 2)],
    "mixed": [clusters.group(Role.COLOCATED, 2), clusters.group(Role.PREFILL, 1), clusters.group(Role.DECODE, 1)],
}


@pytest.mark.parametrize("fleet", FLEETS)
@pytest.mark.parametrize("policy", DISPATCH)
def test_dispatch_decides_alike(policy: str, fleet: str, tmp_path: Path) -> None:
    """Every dispatch policy places every task on the same executor on both backends."""
    runs = [
        clusters.run(make(ENGINE), tmp_path, triggered_workload(), FLEETS[fleet], DISPATCH[policy]())
        for make in (clusters.simulated, clusters.real)
    ]
    assert set(runs[0].recorder.outcomes) == {"finished"}
    assert _per_executor_start(runs[0].decisions) == _per_executor_start(runs[1].decisions)
    assert len(runs[0].recorder.outcomes) == len(runs[1].recorder.outcomes) == 36


def test_parity_can_fail(tmp_path: Path) -> None:
    """A policy that looks at the time decides differently on the two backends, and the comparison shows it."""
    runs = [
        clusters.run(make(ENGINE), tmp_path, triggered_workload(), FLEETS["colocated"], ByTheClock())
        for make in (clusters.simulated, clusters.real)
    ]
    assert runs[0].decisions != runs[1].decisions


@pytest.mark.parametrize("fleet", ["colocated", "disaggregated"])
def test_speculation_changes_no_token(fleet: str, tmp_path: Path) -> None:
    """Engines that guess yield, token for token, what they yield without, and the simulated ones as many."""
    guessing = msgspec.structs.replace(ENGINE, token_budget=32 * 4, speculative_tokens=3)
    plain, real, simulated = (
        clusters.run(make(engine), tmp_path, triggered_workload(), FLEETS[fleet], RoundRobin())
        for make, engine in (
            (clusters.real, ENGINE),
            (clusters.real, guessing),
            (clusters.simulated, guessing),
        )
    )
    assert real.outputs == plain.outputs
    assert {number: len(tokens) for number, tokens in real.outputs.items()} == dict(
        zip(simulated.recorder.requests["request_id"], simulated.recorder.requests["output_tokens"], strict=True)
    )
    assert _per_executor_start(real.decisions) == _per_executor_start(simulated.decisions)


def burst() -> list[Arrival]:
    """Twelve long requests at once, and after a pause one more: up, and down again."""
    first = [Arrival(Request(n, 20, 512, clusters.MODEL), Answer(200)) for n in range(12)]
    last = Arrival(
        Request(12, 20, 512, clusters.MODEL), Answer(1), after=Trigger("ended", count=12, delay_ns=to_ns(1.5))
    )
    return [*first, last]


@pytest.mark.parametrize(
    "scaling",
    [Fixed, lambda: TargetUtilisation(target=0.5, period_s=0.2, tolerance=0.1, down_delay_s=0.4)],
    ids=["fixed", "target_utilisation"],
)
def test_scaling_decides_alike(scaling: Callable[[], ScalingPolicy], tmp_path: Path) -> None:
    """Executors are launched, drained and retired in the same order on both backends."""
    engine = EngineConfig(kv_blocks=4096, block_tokens=16, token_budget=256, max_sequences=12)
    groups = [clusters.group(Role.COLOCATED, 1, minimum=1, maximum=2)]
    runs = [
        clusters.run(make(engine), tmp_path, burst(), groups, RoundRobin(), scaling())
        for make in (clusters.simulated, clusters.real)
    ]
    scaled = [[decision for decision in run.decisions if len(decision) == 2] for run in runs]
    assert scaled[0] == scaled[1]
    if scaling is not Fixed:
        expected = ["LaunchExecutor", "LaunchExecutor", "DrainExecutor", "RetireExecutor"]
        assert [what for what, _ in scaled[0]] == expected


def _per_executor_start(decisions: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Placements of tasks by request: decode tasks of different requests may be placed in either order."""
    return sorted(decision for decision in decisions if len(decision) == 3)
