"""Profiles: step times measured on a real engine, the latency model fitted to them, and the file both live in."""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from cluster.latency import StepShape
from cluster.vocabulary import to_ns
from sim.contention import Contention
from sim.latency import Fitted
from sim.noise import Noise

SCHEMA = "deepflow-profile/3"

KNOTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048)
"""Where the time per row may change, if steps were measured between them."""

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
    `ranges`: what was measured of each part of a step's shape. `contention`: what engines that compute at once do to
    each other. `residuals`: measured over expected time of steps the model was not fitted to, engine by engine in the
    order of time; the machine's pace is in them. `held_out`: at that pace. `disturbed`: share of the steps measured
    during which something else used the machine: left out, but where that would have left next to none; None: nobody
    looked. Delays and start-up stages: medians in seconds, None and none where a log of steps was all there was.
    `handover_s`: for which fetching a KV cache keeps the engine that fetches it from computing; `reshape_s`: what a
    step takes longer whose rows are not as many as those of the step before; None: not measured.
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
    contention: Contention
    residuals: list[float]
    disturbed: float | None
    held_out: FitError
    ranges: dict[str, tuple[float, float]]
    dispatch_s: float | None
    event_s: float | None
    stages_s: dict[str, float]
    handover_s: float | None = None
    reshape_s: float | None = None


def fit(steps: Sequence[tuple[StepShape, int]]) -> Fitted:
    """Non-negative least squares over measured (shape, ns), each step weighted by one over its expected time.

    Weighting by the measured time instead would favour steps that came out short and predict too little in all.
    Raises ValueError: too few steps.
    """
    knots = knots_of(steps)
    names = Fitted.names(knots)
    if len(steps) < 2 * len(names):
        raise ValueError(f"{len(steps)} measured steps cannot fit {len(names)} coefficients: profile longer")
    features = features_of([shape for shape, _ in steps], knots)
    times = np.array([float(duration) for _, duration in steps])
    expected = times
    for _ in range(4):
        coefficients = _non_negative(features / expected[:, None], times / expected)
        expected = np.maximum(features @ coefficients, 1.0)
    return Fitted([float(value) for value in coefficients], knots, feature_ranges(steps))


def features_of(shapes: Sequence[StepShape], knots: Sequence[int]) -> Matrix:
    """`Fitted.features` of many steps, a row each."""
    tokens, attention, chunks, sequences, context, drafts = np.array(shapes, dtype=float).T
    tokens_all = tokens + drafts
    columns = [
        np.ones(len(shapes)),
        tokens > 0,
        tokens_all,
        attention,
        chunks,
        sequences > 0,
        sequences,
        context,
        *(np.clip(sequences + tokens_all - low, 0, high - low) for low, high in pairwise((*knots, np.inf))),
    ]
    return np.column_stack(columns).astype(float)


def expected_ns(model: Fitted, steps: Sequence[tuple[StepShape, int]]) -> Matrix:
    """What a model says of each step, not rounded."""
    return np.maximum(features_of([shape for shape, _ in steps], model.knots) @ model.coefficients_ns, 1.0)


def knots_of(steps: Sequence[tuple[StepShape, int]]) -> list[int]:
    """Those of `KNOTS` that leave enough measured steps in every segment between them."""
    rows = np.sort([shape.decode_sequences + shape.prefill_tokens + shape.draft_tokens for shape, _ in steps])
    knots: list[int] = []
    for knot in KNOTS:
        up_to, before = np.searchsorted(rows, [knot, knots[-1] if knots else 0], side="right")
        if up_to - before >= STEPS_PER_SEGMENT <= len(rows) - up_to:
            knots.append(knot)
    return knots


class Shares(NamedTuple):
    """How many other engines computed during a step, on average over its time, by what they computed."""

    decode: float
    prefill: float


ALONE = Shares(0.0, 0.0)


def contention_of(steps: Sequence[tuple[StepShape, int]], busy: Sequence[Shares], engines: Sequence[int]) -> Contention:
    """What other engines' steps do to an engine's, from steps measured with and without them.

    For each kind of step a plane through the ratios of measured to expected time; what was expected is fitted again to
    steps freed of the contention found so far. `engines`: whose step each is: only steps of one process are compared,
    because where its memory happens to lie makes one faster than another.
    """
    contention = Contention()
    for _ in range(4):
        model = fit(alone(steps, busy, contention))
        ratios = np.array([took for _, took in steps]) / expected_ns(model, steps)
        decodes = np.array([not shape.prefill_tokens for shape, _ in steps])
        found = [_slowed(ratios[kind], np.array(busy)[kind], np.array(engines)[kind]) for kind in (decodes, ~decodes)]
        contention = Contention(*found[0], *found[1])
    return contention


def _slowed(ratios: Matrix, shares: Matrix, engines: npt.NDArray[np.int64]) -> tuple[float, float]:
    """By how much (a decode, a prefill) of another engine slows these steps."""
    if len(ratios) < STEPS_PER_SEGMENT or not np.ptp(shares, axis=0).max() > 0.5:
        return 0.0, 0.0  # alone, or never alone: nothing to compare
    usual = ratios <= np.percentile(ratios, 95)  # a step that something else interrupted says nothing here
    ratios, shares, engines = ratios[usual], shares[usual], engines[usual]
    own = (engines[:, None] == np.unique(engines)).astype(float)
    solution, *_ = np.linalg.lstsq(np.hstack([shares, own]), ratios, rcond=None)
    usually = float(own.sum(axis=0) @ solution[2:] / own.sum())
    by_decode, by_prefill = (max(0.0, float(value) / usually) for value in solution[:2])
    return by_decode, by_prefill


def alone(
    steps: Sequence[tuple[StepShape, int]], busy: Sequence[Shares], contention: Contention
) -> list[tuple[StepShape, int]]:
    """The steps as long as they would have been without the others."""
    freed = []
    for (shape, took), shares in zip(steps, busy, strict=True):
        by_decode, by_prefill = contention.by(shape.prefill_tokens > 0)
        freed.append((shape, round(took / (1 + by_decode * shares.decode + by_prefill * shares.prefill))))
    return freed


def paces(steps: Sequence[tuple[StepShape, int]], windows: Sequence[int]) -> list[float]:
    """How slow the machine was during each step, for all engines alike: 1.03 took 3 % longer than on average.

    `windows`: a number for each stretch of time within which a machine's pace is taken for constant. What the steps of
    a window took, beside what steps like these take, is its pace; what they take is then fitted again at that pace.
    """
    places = np.unique(windows, return_inverse=True)[1]
    took = np.array([float(duration) for _, duration in steps])
    found = np.ones(len(steps))
    for _ in range(3):
        expected = expected_ns(fit(at_mean_pace(steps, found)), steps)
        by_window = np.bincount(places, took) / np.bincount(places, expected)
        found = by_window[places] * expected.sum() / took.sum()
    return found.tolist()


def at_mean_pace(steps: Sequence[tuple[StepShape, int]], pace: Iterable[float]) -> list[tuple[StepShape, int]]:
    """The steps as long as they would have been at pace 1."""
    return [(shape, round(took / slow)) for (shape, took), slow in zip(steps, pace, strict=True)]


def _non_negative(features: Matrix, target: Matrix) -> Matrix:
    """Least squares with coefficients of 0 and more: drop the most negative one until none is."""
    active = np.flatnonzero(np.abs(features).sum(axis=0) > 0)
    scale = np.zeros(features.shape[1])
    scale[active] = np.abs(features[:, active]).mean(axis=0)
    rotation, features = np.linalg.qr(features)  # as many rows as columns: the same sums of squares but for a constant
    target = rotation.T @ target
    while True:
        solution, *_ = np.linalg.lstsq(features[:, active] / scale[active], target, rcond=None)
        if len(active) == 0 or solution.min() >= 0:
            break
        active = np.delete(active, int(solution.argmin()))
    coefficients = np.zeros(features.shape[1])
    coefficients[active] = solution / scale[active]
    return coefficients


def held_out(steps: Sequence[tuple[StepShape, int]], folds: int = 5) -> tuple[FitError, list[float]]:
    """The error of a fit, and each step's residual, measured over predicted.

    Cross-validated over contiguous stretches of time, so that neighbours of a step do not vouch for it.
    """
    predicted = np.zeros(len(steps))
    for part in np.array_split(np.arange(len(steps)), folds):
        inside = set(part.tolist())
        model = fit([step for number, step in enumerate(steps) if number not in inside])
        predicted[part] = expected_ns(model, [steps[number] for number in part])
    measured = np.array([float(duration) for _, duration in steps])
    relative = np.abs(predicted - measured) / measured
    error = FitError(
        steps=len(steps),
        median=float(np.median(relative)),
        p90=float(np.percentile(relative, 90)),
        total=float((predicted.sum() - measured.sum()) / measured.sum()),
    )
    return error, [round(float(ratio), 4) for ratio in measured / predicted]


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


def load_latency(path: str | Path, noise: int | None = 0, seed: int = 0) -> Fitted:
    """The latency model of a profile. `noise`: which draw of its residuals, so that steps scatter as they did when
    measured; None: steps of one shape always take the same time.
    """
    profile = load(path)
    drawn = None if noise is None or not profile.residuals else Noise(tuple(profile.residuals), seed, noise)
    return Fitted(profile.coefficients_ns, profile.knots, profile.ranges, drawn, to_ns(profile.reshape_s or 0.0))


def model_of(profile: Profile) -> Fitted:
    """Its latency model, without noise."""
    return Fitted(profile.coefficients_ns, profile.knots, profile.ranges, None, to_ns(profile.reshape_s or 0.0))


def describe(profile: Profile) -> str:
    """A profile in a few lines of text."""
    lines = [
        f"{profile.steps} steps of {profile.engines} engines at once, {profile.model}, {profile.machine}",
        f"held-out error of a step: median {profile.held_out.median:.1%}, p90 {profile.held_out.p90:.1%}, "
        f"of the total time {profile.held_out.total:+.2%}",
    ]
    if profile.disturbed:
        lines.append(f"others used the machine during {profile.disturbed:.0%} of the steps measured")
    if profile.dispatch_s is not None and profile.event_s is not None:
        longer = profile.contention
        lines.append(
            "longer for each other engine that computes: "
            f"decodes {longer.decode_by_decode:.1%} by decodes, {longer.decode_by_prefill:.1%} by prompts; "
            f"prompts {longer.prefill_by_decode:.1%} and {longer.prefill_by_prefill:.1%}"
        )
        lines.append(f"messages: {profile.dispatch_s * 1e6:.0f} us to an engine, {profile.event_s * 1e6:.0f} us back")
    if profile.handover_s is not None:
        lines.append(f"fetching a KV cache: {profile.handover_s * 1e6:.0f} us of the engine's own time")
    if profile.reshape_s is not None:
        lines.append(f"a step of more or fewer rows than the one before: {profile.reshape_s * 1e6:.0f} us more")
    for name, value in zip(Fitted.names(profile.knots), profile.coefficients_ns, strict=True):
        low, high = profile.ranges.get(name, (0.0, 0.0))
        measured = f"   measured {low:g} to {high:g}" if name in profile.ranges else ""
        lines.append(f"  {name:<22}{value / 1e3:12.3f} us{measured}")
    return "\n".join(lines)
