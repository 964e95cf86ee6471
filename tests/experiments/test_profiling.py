"""What a profile's load is like, and what is told apart in the steps measured under it."""

import numpy as np
import pytest

from cluster.latency import StepShape
from experiments import profile_load
from experiments.profile_load import LEVELS, PROBE
from experiments.profiling import Measured, fitted, pace
from sim.latency import Fitted
from sim.profile import Profile, Shares, model_of, paces

TRUTH = Fitted([1_000_000, 500_000, 40_000, 0, 0, 0, 200_000, 500])
FETCH_NS = 600_000
RESHAPE_NS = 400_000
CONTENTION = 0.1
SLOW = (1.0, 1.08, 0.95, 1.02, 0.93)
"""How slow the machine is in each window, 1 on average but for rounding."""


def measured(heavy_when_slow: bool) -> list[Measured]:
    """Steps of two engines that share a machine whose pace changes. The second one fetches what it decodes; large
    batches come while the machine is slow, or any time.
    """
    rng = np.random.default_rng(5)
    steps = []
    rows = [0, 0]
    for number in range(6000):
        window, engine = number * len(SLOW) // 6000, number % 2
        heavy = rng.random() < (0.8 if window == 1 else 0.05) if heavy_when_slow else rng.random() < 0.2
        decodes = int(rng.choice([16, 24, 32])) if heavy else int(rng.choice([1, 2, 4, 8]))
        tokens = 0 if engine else int(rng.integers(0, 2)) * int(rng.integers(1, 65))
        shape = StepShape(tokens, tokens * (tokens + 1) // 2, int(tokens > 0), decodes, decodes * 100)
        busy, fetches = float(rng.integers(0, 2)), int(engine and rng.random() < 0.3)
        reshaped, rows[engine] = rows[engine] != shape.rows, shape.rows
        took = (TRUTH.step_ns(shape) + FETCH_NS * fetches + RESHAPE_NS * reshaped) * (1 + CONTENTION * busy)
        took *= SLOW[window] * (1 + 0.02 * rng.standard_normal())
        beside = Shares(busy, 0.0)
        steps.append(Measured(shape, round(took), beside, engine, fetches == 0, False, window, fetches, reshaped))
    return steps


def profile(steps: list[Measured]) -> Profile:
    return fitted(steps, "none", "m", 2, None, None, {})


@pytest.mark.parametrize("heavy_when_slow", [False, True])
def test_pace_contention_and_fetches_are_told_apart(heavy_when_slow: bool) -> None:
    """Each is found again, and a step's own time with them, even where one kind of step came at a slow time only."""
    found = profile(measured(heavy_when_slow))
    assert found.contention.decode_by_decode == pytest.approx(CONTENTION, abs=0.01)
    assert found.contention.prefill_by_decode == pytest.approx(CONTENTION, abs=0.02)
    assert found.handover_s == pytest.approx(FETCH_NS / 1e9, rel=0.1)
    assert found.reshape_s == pytest.approx(RESHAPE_NS / 1e9, rel=0.15)
    shapes = [StepShape(0, 0, 0, decodes, decodes * 100) for decodes in (1, 4, 8, 20, 32)]
    off = [model_of(found).step_ns(shape) / TRUTH.step_ns(shape) for shape in shapes]
    assert max(off) / min(off) < 1.02
    assert np.mean(off) == pytest.approx(1.0, abs=0.04)  # the mean pace, by time: more of it is spent on large batches
    assert found.held_out.median < 0.02


def test_without_windows_a_slow_time_is_taken_for_slow_steps() -> None:
    """What telling the pace apart is for: in one window, large batches seem slower than small ones by half of it."""
    steps = [step._replace(window=0) for step in measured(heavy_when_slow=True)]
    model = model_of(profile(steps))
    off = [
        model.step_ns(shape) / TRUTH.step_ns(shape)
        for shape in (StepShape(0, 0, 0, decodes, decodes * 100) for decodes in (4, 24))
    ]
    assert off[1] - off[0] > 0.03


def test_pace_is_that_of_the_steps_themselves() -> None:
    """Whatever they are, beside which other steps they came, and what was fetched."""
    steps = measured(heavy_when_slow=False)
    found = profile(steps)
    assert pace(steps, found) == pytest.approx(1.0, rel=0.01)
    slower = [step._replace(took_ns=round(step.took_ns * 1.2)) for step in steps]
    assert pace(slower, found) == pytest.approx(1.2, rel=0.01)
    fetching = [step for step in steps if step.window == 1 and step.fetches]
    assert pace(fetching, found) == pytest.approx(SLOW[1], rel=0.03)


def test_noise_has_the_pace_in_it() -> None:
    """Residuals scatter as steps did, pace included: a simulated engine is slow for a while, too."""
    residuals = np.array(profile(measured(heavy_when_slow=False)).residuals)
    by_window = [float(np.median(each)) for each in np.array_split(residuals, len(SLOW))]
    assert by_window == pytest.approx(SLOW, abs=0.015)


def test_paces_are_one_on_average() -> None:
    """By time, so that a profile says what the machine took and not what it takes at its best."""
    steps = [(step.shape, step.took_ns) for step in measured(heavy_when_slow=True)]
    windows = [number * len(SLOW) // len(steps) for number in range(len(steps))]
    pace = np.array(paces(steps, windows))
    took = np.array([took for _, took in steps])
    assert took.sum() / (took / pace).sum() == pytest.approx(1.0, abs=0.002)


def test_each_launch_has_an_order_of_its_own() -> None:
    """All phases are there in every launch, and the probe's are told from the others by their request numbers."""
    loads = [profile_load.load("m", 2, 32, 256, 0, launch) for launch in range(3)]
    starts = [[first for first, _ in each.probe] for each in loads]
    assert starts[0] != starts[1] != starts[2]
    assert profile_load.load("m", 2, 32, 256, 0, 1) == loads[1]
    for load in loads:
        numbers = [arrival.request.request_id for arrival in load.arrivals]
        assert len(load.probe) == len(PROBE)
        assert len(set(numbers)) == len(numbers)
        probed = [number for number in numbers if any(first <= number <= last for first, last in load.probe)]
        assert len(probed) == sum(
            profile_load.DECODES if kind == "decode" else profile_load.PROMPTS
            for phase in PROBE
            for kind in phase.values()
        )
        assert len(numbers) - len(probed) == sum(2 * each.users * each.turns * each.visits for each in LEVELS)
    assert profile_load.load("m", 1, 32, 256, 0).probe == []


def test_users_who_think_leave_engines_idle() -> None:
    """Their requests come a while after the one before has ended."""
    waits = [
        arrival.after.delay_ns
        for arrival in profile_load.load("m", 2, 32, 256, 0).arrivals
        if arrival.after is not None and arrival.after.delay_ns
    ]
    thinking = [each for each in LEVELS if each.think_s]
    assert len(waits) == sum(2 * each.users * each.turns * each.visits for each in thinking)
    assert np.mean(waits) / 1e9 == pytest.approx(thinking[0].think_s, rel=0.5)


def test_launches_share_a_load() -> None:
    """Cut in two, each phase is in one launch or the other."""
    loads = [profile_load.load("m", 2, 32, 256, 0, launch, parts=2) for launch in range(4)]
    for first, second in zip(loads[::2], loads[1::2], strict=True):
        assert len(first.probe) + len(second.probe) == len(PROBE)
        assert len(first.arrivals) + len(second.arrivals) == len(profile_load.load("m", 2, 32, 256, 0).arrivals)
    assert loads[0].arrivals != loads[2].arrivals
