"""Noise: steps of one shape scatter as the profile's did, alike however many are asked for at a time."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cluster.latency import StepShape
from cluster.request import Answer, Arrival
from sim.latency import Constant
from sim.noise import MEAN_RUN, Noise, Noisy
from tests.builders import make_request, run_sim

RESIDUALS = tuple(float(value) for value in np.exp(0.2 * np.random.default_rng(0).standard_normal(500)))
NOISE = Noise(RESIDUALS, 0)
SHAPE = StepShape(0, 0, 0, 3, 100)


def noisy(executor: str = "te-0", draw: int = 0) -> Noisy:
    return Noisy(Constant(0.001), Noise(RESIDUALS, 0, draw), executor)


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(1, 200)), min_size=1, max_size=20))
def test_a_step_has_its_own_noise(cuts: list[tuple[int, int]]) -> None:
    """Whatever was asked for and cut before, the n-th step takes what it takes in a run of single steps."""
    single, model = noisy(), noisy()
    times = [single.step_ns(SHAPE) for _ in range(7000)]
    step = 0
    for forward, count in cuts:
        step += forward
        model.seek(step)
        assert [model.step_ns(SHAPE), *model.decode_ns(3, 100, count)] == times[step : step + count + 1]


def test_old_steps_are_forgotten() -> None:
    """Memory does not grow with the steps of a run, and what is forgotten changes nothing."""
    single, model = noisy(), noisy()
    times = [single.step_ns(SHAPE) for _ in range(60_000)]
    for step in range(0, 60_000, 100):
        model.seek(step)
        assert model.decode_ns(3, 100, 100) == times[step : step + 100]
    assert len(model._factors) < 20_000


def test_residuals_are_drawn_in_runs() -> None:
    """All residuals come alike often, and one is followed by its neighbour but once in `MEAN_RUN` times."""
    drawn = np.array(noisy().decode_ns(3, 100, 400_000)) / 1e6
    assert abs(drawn.mean() / np.mean(RESIDUALS) - 1) < 0.01
    assert abs(np.percentile(drawn, 99) / np.percentile(RESIDUALS, 99) - 1) < 0.02
    place = {round(1e6 * value): number for number, value in enumerate(RESIDUALS)}
    places = np.array([place[round(1e6 * value)] for value in drawn])
    jumps = np.mean((np.diff(places) - 1) % len(RESIDUALS) != 0)
    assert 0.9 < jumps * MEAN_RUN < 1.1


def test_executors_and_draws_differ() -> None:
    """Each executor has noise of its own, and another draw is another noise."""
    runs = [model.decode_ns(3, 100, 50) for model in (noisy(), noisy("te-1"), noisy(draw=1), noisy())]
    assert runs[0] == runs[3]
    assert runs[0] != runs[1] != runs[2] != runs[0]


def test_noise_makes_tails() -> None:
    """Gaps between tokens scatter as the residuals do; without noise they are all the same."""
    gaps = {}
    for noise in (None, NOISE):
        run = run_sim([Arrival(make_request(0, 10, 900), Answer(900))], noise=noise)
        gaps[noise] = np.array(run.recorder.gaps)
    assert np.ptp(gaps[None]) == 0
    assert np.percentile(gaps[NOISE], 99) > 1.3 * np.median(gaps[NOISE])
