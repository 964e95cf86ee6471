"""Measuring the engine here: a closed-loop load that covers light to full batches, and what its steps took."""

import platform
from collections.abc import Iterator
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
import numpy.typing as npt
from omegaconf import DictConfig

from cluster.actions import DispatchTask
from cluster.decision_log import Decision
from cluster.events import FirstToken
from cluster.latency import StepShape
from cluster.recorder import Recorder
from cluster.request import Answer, Arrival, Request, Trigger
from cluster.streams import stream
from cluster.vocabulary import Stage, to_s
from experiments import build
from experiments.commands.replay import read_decisions
from experiments.progress import ProgressBar
from experiments.run import drive
from flowserve.core.messages import Dispatch
from flowserve.core.record import TurnRecord, read_turns
from sim import profile as profiles

CONCURRENCY = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 2, 1)
"""Requests at a time per engine, one phase each."""

WARM_UP_STEPS = 10

IDLE_NS = 2_000_000
"""An engine that did nothing for so long was waiting for a message."""


def measure(cfg: DictConfig, folder: Path) -> profiles.Profile:
    """Run the profiling load on the configured real engines, all at once, and fit a latency model to its steps."""
    build.check_types(cfg)
    folder.mkdir(parents=True, exist_ok=True)
    engines = sum(group.initial for group in build.groups(cfg))
    arrivals = list(load(build.model_name(cfg), engines, cfg.engine.max_sequences, cfg.profile_max_prompt, cfg.seed))
    recorder = Recorder()
    cfg = cfg.copy()
    cfg.backend.record, cfg.trace.closed_loop = True, True
    control = build.control_plane(cfg, arrivals, recorder)
    with (
        build.cluster(cfg, folder) as cluster,
        (folder / "decisions.jsonl").open("wb") as log,
        ProgressBar(len(arrivals), "profiling", enabled=cfg.progress) as bar,
    ):
        control.log_to(log)
        if drive(control, cluster, bar, simulated=False):
            raise KeyboardInterrupt  # half a load is no profile
    steps, busy = measured_steps(
        [list(read_turns(path)) for path in sorted((folder / "engines").glob("*.turns.jsonl"))]
    )
    contention = profiles.contention_of(steps, busy)
    steps = profiles.alone(steps, busy, contention)
    dispatch_s, event_s = message_delays(folder)
    model = profiles.fit(steps)
    return profiles.Profile(
        schema=profiles.SCHEMA,
        machine=f"{platform.machine()}, {_processor()}",
        time=datetime.now().astimezone().isoformat(timespec="seconds"),
        versions={name: version(name) for name in ("torch", "numpy")},
        model=build.model_name(cfg),
        engines=engines,
        steps=len(steps),
        contention=contention,
        coefficients_ns=list(model.coefficients_ns),
        knots=list(model.knots),
        held_out=profiles.held_out_error(steps),
        ranges=profiles.feature_ranges(steps),
        dispatch_s=dispatch_s,
        event_s=event_s,
        stages_s=stage_times(recorder),
    )


def from_logs(cfg: DictConfig, paths: list[Path]) -> profiles.Profile:
    """Fit a latency model to the steps that logs tell of, one engine's in each (see `experiments.step_logs`), which ran
    the configured model.
    """
    from experiments.step_logs import read_steps

    shape = build.model_shape(cfg)
    steps = [step for path in paths for step in read_steps(path, shape.layers, shape.head_dim)]
    model = profiles.fit(steps)
    return profiles.Profile(
        schema=profiles.SCHEMA,
        machine="of the log",
        time=datetime.now().astimezone().isoformat(timespec="seconds"),
        versions={},
        model=", ".join(path.name for path in paths),
        engines=len(paths),
        steps=len(steps),
        contention=0.0,
        coefficients_ns=list(model.coefficients_ns),
        knots=list(model.knots),
        held_out=profiles.held_out_error(steps),
        ranges=profiles.feature_ranges(steps),
        dispatch_s=None,
        event_s=None,
        stages_s={},
    )


def load(model: str, engines: int, max_sequences: int, max_prompt: int, seed: int) -> Iterator[Arrival]:
    """Phases of more and more requests at a time; each phase begins when the last has ended.

    Lengths are log-uniform: 8 to `max_prompt` tokens in, 8 to 96 out.
    """
    rng = stream(seed, "profiling load")
    number, ended = 0, 0
    for concurrency in CONCURRENCY:
        users = engines * min(concurrency, max_sequences)
        rounds = 6 if concurrency <= 2 else 3
        for turn in range(rounds):
            for _ in range(users):
                prompt = int(np.exp(rng.uniform(np.log(8), np.log(max_prompt))))
                output = int(np.exp(rng.uniform(np.log(8), np.log(96))))
                after = Trigger("ended", request_id=number - users) if turn else Trigger("ended", count=ended)
                yield Arrival(Request(number, prompt, 128, model), Answer(output), after=after)
                number += 1
        ended += users * rounds


def measured_steps(engines: list[list[TurnRecord]]) -> tuple[list[tuple[StepShape, int]], list[float]]:
    """(shape, ns) of the completed plans, and the mean number of other engines that computed during each.

    A step counts from the end of the one before, or from its own start after a pause.
    """
    spans = [np.array([(turn.start_ns, turn.end_ns) for turn in turns if turn.done is not None]) for turns in engines]
    steps: list[tuple[StepShape, int]] = []
    busy: list[float] = []
    for number, turns in enumerate(engines):
        others = [span for other, span in enumerate(spans) if other != number and len(span)]
        last_end, warm = turns[0].start_ns, 0
        shapes: dict[int, StepShape] = {}
        for turn in turns:
            shapes |= {plan.number: plan.shape for plan in turn.plans}
            if turn.done is not None:
                start = last_end if turn.start_ns - last_end < IDLE_NS else turn.start_ns
                warm += 1
                if warm > WARM_UP_STEPS:
                    steps.append((shapes[turn.done], turn.end_ns - start))
                    busy.append(sum(_overlap(span, start, turn.end_ns) for span in others))
            last_end = turn.end_ns
    return steps, busy


def _overlap(spans: npt.NDArray[np.int64], start: int, end: int) -> float:
    """The share of [start, end) that lies within the (start, end) rows, which rise and do not overlap."""
    first, behind = np.searchsorted(spans[:, 1], start), np.searchsorted(spans[:, 0], end)
    inside = np.minimum(spans[first:behind, 1], end) - np.maximum(spans[first:behind, 0], start)
    return float(inside.sum() / (end - start))


def stage_times(recorder: Recorder) -> dict[str, float]:
    """Median seconds of each start-up stage."""
    return {
        str(stage): to_s(int(np.median([took for _, _, what, took in recorder.scaling if what == stage])))
        for stage in Stage
    }


def message_delays(folder: Path) -> tuple[float, float]:
    """Median seconds from a decision to an idle engine that acts on it, and from an engine back to the decision."""
    dispatched: dict[int, int] = {}
    back: list[int] = []
    for _, decision in read_decisions(folder / "decisions.jsonl"):
        _note(decision, dispatched, back)
    there = []
    for path in (folder / "engines").glob("*.turns.jsonl"):
        last_end = 0
        for turn in read_turns(path):
            if turn.start_ns - last_end >= IDLE_NS:
                there += [turn.start_ns - dispatched[m.task.task_id] for m in turn.messages if isinstance(m, Dispatch)]
            last_end = turn.end_ns
    return to_s(int(np.median(there))), to_s(int(np.median(back)))


def _note(decision: Decision, dispatched: dict[int, int], back: list[int]) -> None:
    event = decision.event
    if isinstance(event, FirstToken):
        back.append(event.time - event.occurred)
    for action in decision.actions:
        if isinstance(action, DispatchTask):
            dispatched[action.task.task_id] = event.time


def _processor() -> str:
    """The CPU's name as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown processor"
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown processor"
    )
