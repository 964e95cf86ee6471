"""What a run costs: worked out by hand, and told by runs whose executors were watched."""

import math

import pytest

from cluster.cost import Rates, costs
from cluster.manager import GroupPlan
from cluster.vocabulary import NS_PER_S, ExecutorSpec, Role, Stage
from flowserve.core.config import EngineConfig
from policies.scaling.target_utilisation import TargetUtilisation
from tests.builders import MODEL, disaggregated, make_arrival, make_spec, run_sim

RATES = Rates(price_per_hour=3.6, busy_w=500.0, idle_w=100.0)


def test_costs_by_hand() -> None:
    """One request of 101 steps of 10 ms on an executor of 2 NPUs that took 1 s to start: all is paid, half is busy."""
    stages = [(Stage.TE_LOAD, NS_PER_S)]
    run = run_sim(
        [make_arrival(0, output=101)],
        groups=[GroupPlan(make_spec(npus=2), 1, 1, 1)],
        stages=stages,
        report_period_s=0.3,
    )
    found = costs(run.recorder, lambda spec: RATES, electricity_per_kwh=0.5)
    assert found["npu_hours"] == pytest.approx(2 * 2.01 / 3600)
    assert found["busy_share"] == pytest.approx(1.01 / 2.01)
    energy = 2 * (1.01 * 500 + 1.0 * 100) / 3.6e6
    assert found["energy_kwh"] == pytest.approx(energy)
    assert found["cost_usd"] == pytest.approx(2 * 2.01 / 3600 * 3.6 + 0.5 * energy)
    for name in ("npu_hours", "energy_kwh", "cost_usd"):
        assert found[f"{name}_per_million_tokens"] == pytest.approx(found[name] / 101e-6)


def test_mixed_fleets_are_priced_by_their_own_hardware() -> None:
    """A prefill executor on dear hardware and a decode executor on cheap one: the sum of both."""
    groups = [
        GroupPlan(ExecutorSpec(MODEL, Role.PREFILL, 1, "dear"), 1, 1, 1),
        GroupPlan(ExecutorSpec(MODEL, Role.DECODE, 1, "cheap"), 1, 1, 1),
    ]
    run = run_sim([make_arrival(0, output=100)], groups=groups)
    rates = {"dear": Rates(10.0, 1000.0, 1000.0), "cheap": Rates(1.0, 0.0, 0.0)}
    found = costs(run.recorder, lambda spec: rates[spec.hardware])
    each = found["npu_hours"] / 2
    assert found["cost_usd"] == pytest.approx(each * 11)
    assert found["energy_kwh"] == pytest.approx(each)


def test_what_is_not_known_is_not_made_up() -> None:
    """Without a price there is no cost, without watts no energy, without tokens nothing per token."""
    run = run_sim([make_arrival(0, output=10)])
    without_price = costs(run.recorder, lambda spec: Rates(busy_w=1.0, idle_w=1.0))
    assert math.isnan(without_price["cost_usd"])
    assert without_price["energy_kwh"] > 0
    without_watts = costs(run.recorder, lambda spec: Rates(price_per_hour=1.0))
    assert math.isnan(without_watts["energy_kwh"])
    assert without_watts["cost_usd"] > 0
    assert math.isnan(costs(run.recorder, lambda spec: Rates(price_per_hour=1.0), 0.1)["cost_usd"])
    nothing = run_sim([make_arrival(0, prompt=99_999)])
    assert math.isnan(costs(nothing.recorder, lambda spec: RATES)["cost_usd_per_million_tokens"])


@pytest.mark.parametrize("coalesce", [True, False])
@pytest.mark.parametrize("in_flight", [1, 2])
def test_busy_time_is_that_of_the_steps(coalesce: bool, in_flight: int) -> None:
    """What executors report as busy is the sum of their steps, prefill and decode, with idle time between."""
    workload = [make_arrival(number, at_s=0.37 * number, prompt=500, output=10 + 5 * number) for number in range(12)]
    engine = EngineConfig(kv_blocks=400, token_budget=64, max_sequences=16, max_in_flight=in_flight)
    run = run_sim(
        workload, groups=disaggregated(1, 2), engine=engine, coalesce=coalesce, report_period_s=0.11, record=True
    )
    steps = dict.fromkeys(run.executors, 0)
    for step in run.cluster.steps:
        steps[step.executor] += step.end_ns - step.start_ns
    assert {each.executor: each.busy_ns for each in run.recorder.held()} == steps
    assert 0 < sum(steps.values()) < sum(each.held_ns for each in run.recorder.held())


def test_scaling_down_costs_less() -> None:
    """The same requests, served by a fleet that shrinks while they are few, cost less money and energy."""
    workload = [make_arrival(number, at_s=0.5 * number, output=20) for number in range(40)]
    groups = [GroupPlan(make_spec(), 4, 1, 4)]
    found = []
    for scaling in (None, TargetUtilisation(target=0.5, period_s=0.5, down_delay_s=1.0)):
        run = run_sim(workload, groups=groups, scaling=scaling, engine=EngineConfig(kv_blocks=1000, max_sequences=8))
        assert run.recorder.outcomes == ["finished"] * 40
        found.append(costs(run.recorder, lambda spec: RATES))
    fixed, scaled = found
    assert scaled["cost_usd"] < 0.5 * fixed["cost_usd"]
    assert scaled["energy_kwh"] < 0.8 * fixed["energy_kwh"]
    assert scaled["busy_share"] > fixed["busy_share"]
