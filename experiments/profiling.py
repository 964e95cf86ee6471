"""Measuring the engine here: a closed-loop load that covers light to full batches, and what its steps took."""

import platform
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from omegaconf import DictConfig, OmegaConf

from cluster.actions import DispatchTask
from cluster.events import FirstToken, RequestArrived
from cluster.latency import StepShape
from cluster.recorder import Recorder
from cluster.request import Arrival
from cluster.vocabulary import NS_PER_S, Stage, to_s
from experiments import build, profile_load
from experiments.bystanders import Bystanders, await_idle
from experiments.commands.replay import read_decisions
from experiments.config import CONF
from experiments.progress import ProgressBar
from experiments.run import drive
from flowserve.core.messages import Dispatch
from flowserve.core.record import StepSpan, TurnRecord, read_turns
from real.cluster import RealCluster
from sim import profile as profiles
from sim.contention import Contention

MORE_LAUNCHES = 3
"""So many more than asked for at most, where others disturb."""

PATIENCE_S = 60.0
"""How long to wait for an idle machine before each launch."""

WARM_UP_STEPS = 10

PACE_S = 4.0
"""For so long a machine's pace is taken for constant."""

FEWEST_HANDOVERS = 10
"""Steps with and without a fetch that it takes to compare them."""

FEWEST_RESHAPED = 50
"""Steps of as many rows as the step before, and of more or fewer, that it takes to compare them."""

APART_NS = 5_000_000
"""Requests that come so long after another do not wait for what the control plane does about that."""


class Measured(NamedTuple):
    """A step of an engine, or process, by number. `busy`: what the other engines did meanwhile; `probe`: of the load
    that is there to tell what that does; `disturbed`: others used the machine; `window`: of all engines' time, by
    number; `fetches`: KV caches fetched before it; `reshaped`: it has more or fewer rows than the engine's step before.
    """

    shape: StepShape
    took_ns: int
    busy: profiles.Shares
    engine: int
    probe: bool
    disturbed: bool
    window: int = 0
    fetches: int = 0
    reshaped: bool = False


class Launch(msgspec.Struct, frozen=True):
    """What one launch of the engines told, under the whole load. `there`, `back`: what messages took, in ns. `split`:
    one engine prefilled for one that decodes.
    """

    steps: list[Measured]
    there: list[int]
    back: list[int]
    stages_s: dict[str, float]
    split: bool = False

    @property
    def undisturbed(self) -> int:
        """How many of its steps are."""
        return sum(not step.disturbed for step in self.steps)


def measure(cfg: DictConfig, folder: Path) -> profiles.Profile:
    """Run the profiling load on the configured real engines, all at once, and fit a latency model to its steps.

    The engines are launched `profile_launches` times, because where a process's memory lies makes it faster or slower;
    if more than once, then again where other work on the machine has spoilt more than it left.
    """
    wanted, patience_s = cfg.profile_launches, PATIENCE_S if cfg.profile_launches > 1 else 0.0
    launches: list[Launch] = []
    for number in range(wanted + MORE_LAUNCHES if wanted > 1 else wanted):
        launches.append(measure_launch(cfg, folder / f"launch{number}", patience_s, number))
        if sum(each.undisturbed for each in launches) >= 0.8 * wanted * len(launches[0].steps):
            break
    return profile_of(cfg, [*launches, measure_launch(cfg, folder / "split", patience_s, split=True)])


def profile_of(cfg: DictConfig, launches: Sequence[Launch]) -> profiles.Profile:
    """A profile of all that was measured. Message delays and start-up are those of engines that serve alone."""
    steps: list[Measured] = []
    engines = windows = 0
    for launch in launches:
        steps += [step._replace(engine=step.engine + engines, window=step.window + windows) for step in launch.steps]
        engines += 1 + max(step.engine for step in launch.steps)
        windows += 1 + max(step.window for step in launch.steps)
    alone = [launch for launch in launches if not launch.split]
    return fitted(
        steps,
        machine=f"{platform.machine()}, {_processor()}",
        model=build.model_name(cfg),
        engines=_engines(cfg),
        dispatch_s=to_s(int(np.median([took for launch in alone for took in launch.there]))),
        event_s=to_s(int(np.median([took for launch in alone for took in launch.back]))),
        stages_s={stage: float(np.median([launch.stages_s[stage] for launch in alone])) for stage in Stage},
    )


def fitted(
    steps: list[Measured],
    machine: str,
    model: str,
    engines: int,
    dispatch_s: float | None,
    event_s: float | None,
    stages_s: dict[str, float],
) -> profiles.Profile:
    """A profile of measured steps. Those that others disturbed are left out, unless that leaves next to none.

    How fast the machine was while a step was measured, what other engines did meanwhile, what was fetched before it and
    how many rows it had before are told apart from what the step itself takes.
    """
    usable = _usable(steps)
    contention, handover_s, reshape_s = Contention(), None, None
    slow = [1.0] * len(usable)
    for _ in range(2):
        contention = _contention(usable, slow, [_beside(step, handover_s, reshape_s) for step in usable])
        freed = profiles.alone(
            [(step.shape, step.took_ns) for step in usable], [step.busy for step in usable], contention
        )
        even = profiles.at_mean_pace(freed, slow)
        handover_s, reshape_s = _handover_s(usable, even), _reshape_s(usable, even)
        own = [
            (shape, max(1, took - round(each * _beside(step, handover_s, reshape_s))))
            for step, each, (shape, took) in zip(usable, slow, freed, strict=True)
        ]
        slow = profiles.paces(own, [step.window for step in usable])
    even = profiles.at_mean_pace(own, slow)
    latency = profiles.fit(even)
    error, residuals = profiles.held_out(even)
    noise = np.array(residuals) * slow
    process = np.array([step.engine for step in usable])
    for engine in np.unique(process):  # how launches differ, minutes apart, is no noise from step to step
        noise[process == engine] /= noise[process == engine].mean()
    return profiles.Profile(
        schema=profiles.SCHEMA,
        machine=machine,
        time=datetime.now().astimezone().isoformat(timespec="seconds"),
        versions={name: version(name) for name in ("torch", "numpy")},
        model=model,
        engines=engines,
        steps=len(usable),
        contention=contention,
        residuals=noise.round(4).tolist(),
        disturbed=sum(step.disturbed for step in steps) / len(steps),
        coefficients_ns=list(latency.coefficients_ns),
        knots=list(latency.knots),
        held_out=error,
        ranges=profiles.feature_ranges(even),
        dispatch_s=dispatch_s,
        event_s=event_s,
        stages_s=stages_s,
        handover_s=handover_s,
        reshape_s=reshape_s,
    )


def _contention(steps: Sequence[Measured], slow: Sequence[float], beside: Sequence[float]) -> Contention:
    """Of the probe's steps, where there is a probe."""
    probe = [number for number, step in enumerate(steps) if step.probe]
    if not probe:
        return Contention()
    return profiles.contention_of(
        [(steps[each].shape, max(1, round(steps[each].took_ns / slow[each] - beside[each]))) for each in probe],
        [steps[each].busy for each in probe],
        [steps[each].engine for each in probe],
    )


def _handover_s(steps: Sequence[Measured], even: Sequence[tuple[StepShape, int]]) -> float | None:
    """How much longer steps of an engine that fetches take for one fetch ahead of them; None where there is too little
    to tell.
    """
    fetching = {step.engine for step in steps if step.fetches}
    theirs = [number for number, step in enumerate(steps) if step.engine in fetching]
    fetches = np.array([steps[number].fetches for number in theirs], dtype=np.int64)
    if min((fetches == 0).sum(), (fetches == 1).sum()) < FEWEST_HANDOVERS:
        return None
    model = profiles.fit([step for step, each in zip(even, steps, strict=True) if not each.fetches])
    excess = np.array([took - model.step_ns(shape) for shape, took in (even[number] for number in theirs)])
    return max(0.0, float(np.median(excess[fetches == 1]) - np.median(excess[fetches == 0])) / NS_PER_S)


def _reshape_s(steps: Sequence[Measured], even: Sequence[tuple[StepShape, int]]) -> float | None:
    """How much longer steps of decodes take that have not as many rows as the step before; None where there is too
    little to tell.
    """
    places = [number for number, step in enumerate(steps) if not step.shape.prefill_tokens and not step.fetches]
    reshaped = np.array([steps[number].reshaped for number in places], dtype=bool)
    if min(reshaped.sum(), (~reshaped).sum()) < FEWEST_RESHAPED:
        return None
    decodes = [even[number] for number in places]
    model = profiles.fit([step for step, each in zip(decodes, reshaped, strict=True) if not each])
    excess = np.array([took for _, took in decodes]) - profiles.expected_ns(model, decodes)
    return max(0.0, float(np.median(excess[reshaped]) - np.median(excess[~reshaped])) / NS_PER_S)


def _beside(step: Measured, handover_s: float | None, reshape_s: float | None) -> float:
    """What a step takes beside its own time, in ns."""
    return (step.fetches * (handover_s or 0.0) + step.reshaped * (reshape_s or 0.0)) * NS_PER_S


def pace(steps: Sequence[Measured], profile: profiles.Profile) -> float:
    """How long steps took, all in all, as a multiple of what the profile says. Those that others disturbed are left
    out, unless that leaves next to none.
    """
    usable = _usable(steps)
    freed = profiles.alone(
        [(step.shape, step.took_ns) for step in usable], [step.busy for step in usable], profile.contention
    )
    beside = sum(_beside(step, profile.handover_s, profile.reshape_s) for step in usable)
    expected = beside + profiles.expected_ns(profiles.model_of(profile), freed).sum()
    return float(sum(took for _, took in freed) / expected)


def _usable(steps: Sequence[Measured]) -> Sequence[Measured]:
    usable = [step for step in steps if not step.disturbed]
    return steps if len(usable) < len(steps) / 5 else usable


def measure_launch(
    cfg: DictConfig, folder: Path, patience_s: float, number: int = 0, split: bool = False, parts: int = 1
) -> Launch:
    """Launch the engines, once others leave the machine alone, and run the load; what was measured stays in `folder`,
    and where it is there already, nothing is run. `split`: launch a prefill and a decode engine instead. `number`,
    `parts`: which of the loads, and into how many launches one is cut.
    """
    file = folder / "launch.json"
    if file.is_file():
        return msgspec.json.decode(file.read_bytes(), type=Launch)
    build.check_types(cfg)
    model = build.model_name(cfg)
    limits = (cfg.engine.max_sequences, cfg.profile_max_prompt, cfg.seed, number, parts)
    probe: list[tuple[int, int]] = []
    if split:
        cfg = cfg.copy()
        cfg.fleet = OmegaConf.load(CONF / "fleet" / "pd_1p1d.yaml")
        arrivals = profile_load.handovers(model, *limits)
    else:
        arrivals, probe = profile_load.load(model, _engines(cfg), *limits)
    recorder, steps = _run(cfg, arrivals, folder, patience_s)
    began = min(step.span.start_ns for step in steps)
    spans = _spans_of(recorder, probe)
    launch = Launch(
        [
            Measured(
                step.span.shape,
                step.span.end_ns - step.span.start_ns,
                step.busy,
                step.engine,
                any(start <= step.span.start_ns and step.span.end_ns <= end for start, end in spans),
                step.disturbed,
                int((step.span.end_ns - began) / (PACE_S * NS_PER_S)),
                step.fetches,
                step.reshaped,
            )
            for step in steps
        ],
        *message_delays(folder),
        stage_times(recorder),
        split,
    )
    file.write_bytes(msgspec.json.encode(launch))
    return launch


def _spans_of(recorder: Recorder, phases: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """From the first arrival to the last token of the requests from one number to another, in ns."""
    columns = (recorder.requests[name].tolist() for name in ("request_id", "arrival_ns", "last_token_ns"))
    times = {number: (arrival, last) for number, arrival, last in zip(*columns, strict=True)}
    found = []
    for first, last in phases:
        known = [times[number] for number in range(first, last + 1) if number in times]
        found.append((min(arrival for arrival, _ in known), max(end for _, end in known)))
    return found


class _Step(NamedTuple):
    engine: int
    span: StepSpan
    busy: profiles.Shares
    disturbed: bool
    fetches: int
    reshaped: bool


def _run(cfg: DictConfig, arrivals: list[Arrival], folder: Path, patience_s: float) -> tuple[Recorder, list[_Step]]:
    """Run a load on the configured engines: what the control plane recorded, and the engines' steps."""
    build.check_types(cfg)
    cfg = cfg.copy()
    cfg.backend.record, cfg.trace.closed_loop = True, True
    cfg.dispatch = {"_target_": "experiments.profile_load.ByNumber"}
    folder.mkdir(parents=True, exist_ok=True)
    recorder = Recorder()
    control = build.control_plane(cfg, arrivals, recorder)
    await_idle(patience_s)
    with (
        Bystanders() as bystanders,
        build.cluster(cfg, folder) as cluster,
        (folder / "decisions.jsonl").open("wb") as log,
        ProgressBar(len(arrivals), f"profiling, {folder.name}", enabled=cfg.progress) as bar,
    ):
        control.log_to(log)
        if drive(control, cluster, bar, simulated=False):
            raise KeyboardInterrupt  # half a load is no profile
        assert isinstance(cluster, RealCluster)
        began = time.monotonic_ns() - cluster.now()
    turns = [list(read_turns(path)) for path in sorted((folder / "engines").glob("*.turns.jsonl"))]
    details = _details(turns)
    return recorder, [
        _Step(
            engine,
            span,
            busy,
            bystanders.disturb(began + span.start_ns, began + span.end_ns),
            *details[engine][span.end_ns],
        )
        for engine, span, busy in steps_of(turns)
    ]


def _engines(cfg: DictConfig) -> int:
    return sum(group.initial for group in build.groups(cfg))


def from_logs(cfg: DictConfig, paths: list[Path]) -> profiles.Profile:
    """Fit a latency model to the steps that logs tell of, one engine's in each (see `experiments.step_logs`), which ran
    the configured model.
    """
    from experiments.step_logs import read_steps

    model = build.model_shape(cfg)
    steps = [
        Measured(shape, took_ns, profiles.ALONE, engine, False, False)
        for engine, path in enumerate(paths)
        for shape, took_ns in read_steps(path, model.layers, model.head_dim)
    ]
    profile = fitted(steps, "of the log", ", ".join(path.name for path in paths), len(paths), None, None, {})
    return msgspec.structs.replace(profile, versions={}, disturbed=None)


def measured_steps(engines: list[list[TurnRecord]]) -> list[Measured]:
    """The steps of engines that nobody disturbed."""
    details = _details(engines)
    return [
        Measured(step.shape, step.end_ns - step.start_ns, busy, engine, False, False, 0, *details[engine][step.end_ns])
        for engine, step, busy in steps_of(engines)
    ]


def _details(engines: list[list[TurnRecord]]) -> list[dict[int, tuple[int, bool]]]:
    """Of each engine's steps, by their end: KV caches asked for in its turn, and whether its number of rows is new."""
    found = []
    for turns in engines:
        of_step, rows = dict[int, tuple[int, bool]](), 0
        transfers = {turn.end_ns: len(turn.transfers) for turn in turns if turn.done is not None}
        for step in _spans(turns):
            of_step[step.end_ns] = transfers[step.end_ns], step.shape.rows != rows
            rows = step.shape.rows
        found.append(of_step)
    return found


def steps_of(engines: list[list[TurnRecord]]) -> list[tuple[int, StepSpan, profiles.Shares]]:
    """(engine, step, what the other engines computed during it) of all completed plans but each engine's first few.

    A step counts from the end of the one before, so that all that the host does is in it; from its own start where the
    engine had nothing to do before.
    """
    spans = [list(_spans(turns)) for turns in engines]
    ends = [_Overlap(steps) for steps in spans]
    found = []
    for number, steps in enumerate(spans):
        others = [overlap for other, overlap in enumerate(ends) if other != number]
        for step in steps[WARM_UP_STEPS:]:
            shares = [other.of(step.start_ns, step.end_ns) for other in others]
            busy = profiles.Shares(sum(each.decode for each in shares), sum(each.prefill for each in shares))
            found.append((number, step, busy))
    return found


def _spans(turns: list[TurnRecord]) -> Iterator[StepSpan]:
    shapes: dict[int, StepShape] = {}
    last_end: int | None = None
    for turn in turns:
        shapes |= {plan.number: plan.shape for plan in turn.plans}
        if turn.done is not None:
            start = turn.start_ns if last_end is None else last_end
            yield StepSpan("", start, turn.end_ns, 1, shapes.pop(turn.done))
        last_end = None if turn.done is None else turn.end_ns


class _Overlap:
    """When an engine computed what."""

    def __init__(self, steps: list[StepSpan]) -> None:
        self._times = np.array([(step.start_ns, step.end_ns) for step in steps], dtype=np.int64).reshape(-1, 2)
        self._prefills = np.array([step.shape.prefill_tokens > 0 for step in steps], dtype=bool)

    def of(self, start: int, end: int) -> profiles.Shares:
        """The shares of [start, end) that it spent on decodes alone, and on steps with prompts."""
        times = self._times
        first, behind = np.searchsorted(times[:, 1], start), np.searchsorted(times[:, 0], end)
        inside = np.minimum(times[first:behind, 1], end) - np.maximum(times[first:behind, 0], start)
        prefills = self._prefills[first:behind]
        return profiles.Shares(
            float(inside[~prefills].sum() / (end - start)), float(inside[prefills].sum() / (end - start))
        )


def stage_times(recorder: Recorder) -> dict[str, float]:
    """Median seconds of each start-up stage."""
    return {
        str(stage): to_s(int(np.median([took for _, _, what, took in recorder.scaling if what == stage])))
        for stage in Stage
    }


def message_delays(folder: Path) -> tuple[list[int], list[int]]:
    """ns from a request's arrival to an idle engine that acts on it, of those that came alone; and from an engine's
    first token back to the control plane.
    """
    dispatched: dict[int, int] = {}
    back: list[int] = []
    before = -APART_NS
    for _, decision in read_decisions(folder / "decisions.jsonl"):
        event = decision.event
        if isinstance(event, FirstToken):
            back.append(event.time - event.occurred)
        for action in decision.actions:
            if isinstance(action, DispatchTask) and isinstance(event, RequestArrived):
                if event.occurred - before >= APART_NS:
                    dispatched[action.task.task_id] = event.occurred
                before = event.time
    there = []
    for path in (folder / "engines").glob("*.turns.jsonl"):
        idle = True
        for turn in read_turns(path):
            tasks = [message.task.task_id for message in turn.messages if idle and isinstance(message, Dispatch)]
            there += [turn.start_ns - dispatched[task_id] for task_id in tasks if task_id in dispatched]
            idle = turn.done is None
    return there, back


def _processor() -> str:
    """The CPU's name as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown processor"
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown processor"
    )
