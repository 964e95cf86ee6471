"""Steps of the same shape that do not take the same time: a latency model around another one."""

from collections.abc import Sequence

import msgspec
import numpy as np

from cluster.latency import LatencyModel, StepShape
from cluster.streams import stream

MEAN_RUN = 50
"""Residuals in a row, on average, that are taken as they were measured: a machine is slow for many steps on end."""

_AT_A_TIME = 4096


class Noise(msgspec.Struct, frozen=True):
    """`residuals`: measured over expected time of steps that a model was not fitted to, in the order of time.
    `draw`: one number, one way to draw from them, for each seed.
    """

    residuals: tuple[float, ...]
    seed: int
    draw: int = 0


class Noisy(LatencyModel):
    """Another model's times, each multiplied by a residual of the profile.

    The stationary bootstrap (Politis & Romano 1994): from a random place on residuals are taken in their order, for a
    number that is geometric with mean `MEAN_RUN`, then from another place. An executor's n-th step gets the n-th of
    them, however many steps were asked for at a time: so a simulation that coalesces steps, and may ask again after a
    segment was cut, gives what single steps give.
    """

    varies = True

    def __init__(self, model: LatencyModel, noise: Noise, executor: str) -> None:
        self.stages, self.reshape_ns = model.stages, model.reshape_ns
        self._model = model
        self._residuals = np.array(noise.residuals)
        self._rng = stream(noise.seed, f"step noise {noise.draw} {executor}")
        self._place = int(self._rng.integers(len(self._residuals)))
        self._factors: list[float] = []
        self._first = 0
        self._step = 0

    def seek(self, step: int) -> None:
        self._step = step
        if step - self._first > 2 * _AT_A_TIME:  # an executor never goes back behind a step that it has launched
            del self._factors[: step - self._first]
            self._first = step

    def step_ns(self, shape: StepShape) -> int:
        return max(1, round(self._model.step_ns(shape) * self._next(1)[0]))

    def fill_ns(self, shape: StepShape) -> int:
        return self._model.fill_ns(shape)

    def decode_ns(self, sequences: int, context: int, steps: int) -> list[int]:
        times = self._model.decode_ns(sequences, context, steps)
        return [max(1, round(time * factor)) for time, factor in zip(times, self._next(steps), strict=True)]

    def _next(self, steps: int) -> Sequence[float]:
        start = self._step - self._first
        while len(self._factors) < start + steps:
            self._draw()
        self._step += steps
        return self._factors[start : start + steps]

    def _draw(self) -> None:
        jumps = self._rng.random(_AT_A_TIME) < 1 / MEAN_RUN
        places = self._rng.integers(len(self._residuals), size=_AT_A_TIME)
        since = np.maximum.accumulate(np.where(jumps, np.arange(_AT_A_TIME), -1))
        begun = np.where(since >= 0, places[since], self._place + 1)
        along = np.arange(_AT_A_TIME) - np.where(since >= 0, since, 0)
        taken = (begun + along) % len(self._residuals)
        self._place = int(taken[-1])
        self._factors += self._residuals[taken].tolist()
