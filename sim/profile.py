"""Profiles: step times measured on a real engine, the latency model fitted to them, and the file both live in."""

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from cluster.latency import StepShape
from sim.latency import Fitted

SCHEMA = "deepflow-profile/2"

KNOTS = (2, 4, 8, 16, 32, 64, 128, 256, 512)
"""Where the time per decoding sequence may change, if steps were measured between them."""

STEPS_PER_SEGMENT = 25

Matrix = npt.NDArray[np.float64]


class FitError(msgspec.Struct, frozen=True):
    """How far the fitted model is off on steps it was not fitted to: shares of the measured time."""

    steps: int
    median: float
    p90: float
    total: float
    """(sum of predicted - sum of measured) / sum of measured."""


class Profile(msgspec.Struct, frozen=True):
    """What `deepflow profile` writes. `coefficients_ns`, `knots`: of the fitted model of an engine that computes alone.
    `ranges`: what was measured of each part of a step's shape. `contention`: how much longer a step takes while the
    other engines compute, as a share per engine. Delays and start-up stages: medians in seconds, None and none where a
    log of steps was all there was.
    """

    schema: str
    machine: str
    time: str
    versions: dict[str, str]
    model: str
    engines: int
    steps: int
    coefficients_ns: list[float]
    knots: list[int]
    contention: float
    held_out: FitError
    ranges: dict[str, tuple[float, float]]
    dispatch_s: float | None
    event_s: float | None
    stages_s: dict[str, float]


def fit(steps: Sequence[tuple[StepShape, int]]) -> Fitted:
    """Non-negative least squares over measured (shape, ns), each step weighted by one over its expected time.

    Weighting by the measured time instead would favour steps that came out short and predict too little in all.
    Raises ValueError: too few steps.
    """
    knots = knots_of(steps)
    names = Fitted.names(knots)
    if len(steps) < 2 * len(names):
        raise ValueError(f"{len(steps)} measured steps cannot fit {len(names)} coefficients: profile longer")
    features = np.array([Fitted.features(shape, knots) for shape, _ in steps])
    times = np.array([float(duration) for _, duration in steps])
    expected = times
    for _ in range(4):
        coefficients = _non_negative(features / expected[:, None], times / expected)
        expected = np.maximum(features @ coefficients, 1.0)
    return Fitted([float(value) for value in coefficients], knots, feature_ranges(steps))


def knots_of(steps: Sequence[tuple[StepShape, int]]) -> list[int]:
    """Those of `KNOTS` that leave enough measured steps in every segment between them."""
    sizes = np.sort([shape.decode_sequences for shape, _ in steps if shape.decode_sequences])
    knots: list[int] = []
    for knot in KNOTS:
        up_to, before = np.searchsorted(sizes, [knot, knots[-1] if knots else 0], side="right")
        if up_to - before >= STEPS_PER_SEGMENT <= len(sizes) - up_to:
            knots.append(knot)
    return knots


def contention_of(steps: Sequence[tuple[StepShape, int]], busy: Sequence[float]) -> float:
    """How much longer a step takes per other engine that computes meanwhile, as a share of its time alone.

    `busy`: for each step, the mean number of other engines that computed during it. A straight line through the ratios
    of measured to fitted time, after the fit was freed of the contention found so far.
    """
    shares, contention = np.asarray(busy, float), 0.0
    if np.ptp(shares) < 0.5:
        return 0.0  # alone, or never alone: nothing to compare
    for _ in range(4):
        model = fit(alone(steps, busy, contention))
        ratios = np.array([duration / model.step_ns(shape) for shape, duration in steps])
        usual = ratios <= np.percentile(ratios, 95)  # a step that something else interrupted says nothing here
        slope, at_zero = np.polyfit(shares[usual], ratios[usual], 1)
        contention = max(0.0, float(slope / at_zero))
    return contention


def alone(
    steps: Sequence[tuple[StepShape, int]], busy: Sequence[float], contention: float
) -> list[tuple[StepShape, int]]:
    """The steps as long as they would have been without the others."""
    return [(shape, round(took / (1 + contention * share))) for (shape, took), share in zip(steps, busy, strict=True)]


def _non_negative(features: Matrix, target: Matrix) -> Matrix:
    """Least squares with coefficients of 0 and more: drop the most negative one until none is."""
    active = np.flatnonzero(np.abs(features).sum(axis=0) > 0)
    scale = np.zeros(features.shape[1])
    scale[active] = np.abs(features[:, active]).mean(axis=0)
    while True:
        solution, *_ = np.linalg.lstsq(features[:, active] / scale[active], target, rcond=None)
        if len(active) == 0 or solution.min() >= 0:
            break
        active = np.delete(active, int(solution.argmin()))
    coefficients = np.zeros(features.shape[1])
    coefficients[active] = solution / scale[active]
    return coefficients


def held_out_error(steps: Sequence[tuple[StepShape, int]], folds: int = 5) -> FitError:
    """Cross-validated over contiguous stretches of time, so that neighbours of a step do not vouch for it."""
    predicted = np.zeros(len(steps))
    for part in np.array_split(np.arange(len(steps)), folds):
        inside = set(part.tolist())
        model = fit([step for number, step in enumerate(steps) if number not in inside])
        for number in part:
            predicted[number] = model.step_ns(steps[number][0])
    measured = np.array([float(duration) for _, duration in steps])
    relative = np.abs(predicted - measured) / measured
    return FitError(
        steps=len(steps),
        median=float(np.median(relative)),
        p90=float(np.percentile(relative, 90)),
        total=float((predicted.sum() - measured.sum()) / measured.sum()),
    )


def feature_ranges(steps: Sequence[tuple[StepShape, int]]) -> dict[str, tuple[float, float]]:
    """Smallest and largest value of each part of a step's shape."""
    columns = np.array([shape for shape, _ in steps], dtype=float)
    return {
        name: (float(column.min()), float(column.max()))
        for name, column in zip(StepShape._fields, columns.T, strict=True)
    }


def load(path: str | Path) -> Profile:
    """Read a profile. ValueError: missing, malformed, or of another schema."""
    try:
        profile = msgspec.json.decode(Path(path).read_bytes(), type=Profile)
    except FileNotFoundError as error:
        raise ValueError(f"profile {path} does not exist; make one with `deepflow profile`") from error
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise ValueError(f"profile {path}: {error}") from error
    if profile.schema != SCHEMA:
        raise ValueError(f"profile {path}: its schema is {profile.schema!r}, this version reads {SCHEMA!r}")
    return profile


def load_latency(path: str | Path) -> Fitted:
    """The latency model of a profile."""
    profile = load(path)
    return Fitted(profile.coefficients_ns, profile.knots, profile.ranges)


def describe(profile: Profile) -> str:
    """A profile in a few lines of text."""
    lines = [
        f"{profile.steps} steps of {profile.engines} engines at once, {profile.model}, {profile.machine}",
        f"held-out error of a step: median {profile.held_out.median:.1%}, p90 {profile.held_out.p90:.1%}, "
        f"of the total time {profile.held_out.total:+.2%}",
    ]
    if profile.dispatch_s is not None and profile.event_s is not None:
        lines.append(f"a step takes {profile.contention:.0%} longer for each other engine that computes")
        lines.append(f"messages: {profile.dispatch_s * 1e6:.0f} us to an engine, {profile.event_s * 1e6:.0f} us back")
    for name, value in zip(Fitted.names(profile.knots), profile.coefficients_ns, strict=True):
        low, high = profile.ranges.get(name, (0.0, 0.0))
        measured = f"   measured {low:g} to {high:g}" if name in profile.ranges else ""
        lines.append(f"  {name:<22}{value / 1e3:12.3f} us{measured}")
    return "\n".join(lines)
