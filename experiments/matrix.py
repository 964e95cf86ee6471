"""A matrix of cases, each on real engines here and simulated: what the simulator is off by, beside what the machine is.

The step times come from one profile, of a load of its own, for which the engines are launched again and again between
the real runs. Each case runs several times on real engines; how far these runs are
apart is about what a perfect forecast of one of them would be off by. In lockstep, what the engines recorded
is fed into simulated ones, which must schedule the same.
"""

import math
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from shutil import rmtree
from statistics import fmean
from typing import NamedTuple

import msgspec
from omegaconf import DictConfig

from cluster.request import Arrival
from cluster.vocabulary import NS_PER_S, to_ns
from experiments import build
from experiments.bystanders import DISTURBING, Bystanders, await_idle
from experiments.config import compose, typed
from experiments.fidelity import save_profile, slug, used_profile
from experiments.outputs import read_summary
from experiments.profiling import Launch, measure_launch, measured_steps, pace, profile_of
from experiments.report import ReportRun, ReportTable
from experiments.run import run_one_of_several
from experiments.tables import Row, error_text
from flowserve.core.record import read_turns
from sim import profile as profiles
from sim.lockstep import Lockstep

SCHEMA = "deepflow-matrix/1"
PATIENCE_S = 60.0
USABLE = 0.8
"""Of a launch's steps so many must be undisturbed, or it is repeated."""
RUNS_BETWEEN = 2
"""Real runs on end, with the engines profiled before and after."""
SATURATING = 400
"""Requests at once whose throughput is called saturation."""

METRICS = {
    "ttft_p50_s": ("TTFT p50", "p50"),
    "ttft_p99_s": ("TTFT p99", "p99"),
    "tpot_p50_s": ("TPOT p50", "p50"),
    "tpot_p99_s": ("TPOT p99", "p99"),
    "e2e_p50_s": ("E2E p50", "p50"),
    "e2e_p99_s": ("E2E p99", "p99"),
    "throughput_rps": ("req/s", "throughput"),
}
"""What is judged: its title, and which bound is its own."""


class Bounds(msgspec.Struct, frozen=True):
    """The largest errors that are small enough, as shares."""

    p50: float
    p99: float
    throughput: float


class Case(msgspec.Struct, frozen=True):
    """`load`: arrivals, as a share of what is served at most. `window_s`: where in the trace it begins."""

    name: str
    load: float
    window_s: float
    overrides: list[str] = []

    def __post_init__(self) -> None:
        if not self.load > 0 or self.window_s < 0:
            raise ValueError(
                f"case {self.name}: load {self.load}, window_s {self.window_s}: allowed are above 0, from 0 up"
            )


class Settings(msgspec.Struct, frozen=True):
    """The `validation` of an experiment, see conf/experiment/cpu_matrix.yaml."""

    repeats: int
    attempts: int
    simulations: int
    duration_s: float
    saturation_window_s: float
    bounds: Bounds
    cases: list[Case]

    def __post_init__(self) -> None:
        for field in ("repeats", "attempts", "simulations", "duration_s"):
            if not getattr(self, field) > 0:
                raise ValueError(f"validation.{field} is {getattr(self, field)}: allowed is more than 0")
        names = [slug(case.name) for case in self.cases]
        if len(set(names)) < len(names):
            raise ValueError(f"validation.cases are {', '.join(names)}: give each a name of its own")


class Verdict(NamedTuple):
    """One metric of one case. `difference`: between two real runs, as a share of their mean; the mean over all pairs.
    `paced`: the error of simulations whose steps are as fast, on the whole, as those of the real run each is held
    against.
    """

    metric: str
    real: float
    simulated: float
    difference: float
    bound: float
    paced: float

    @property
    def error(self) -> float:
        return (self.simulated - self.real) / self.real

    @property
    def said(self) -> str:
        """Met, or missed, or missed by no more than the real runs miss each other; unknown where a run has no value."""
        if math.isnan(self.error):
            return "unknown"
        if abs(self.error) <= self.bound:
            return "met"
        return "within noise" if abs(self.error) <= self.difference else "missed"


class Schedule(msgspec.Struct, frozen=True):
    """Of the engines in lockstep: what came out differently (None: nothing), and what there was to get wrong."""

    difference: str | None
    turns: int
    cached_prompts: int
    preemptions: int
    transfers: int


class CaseResult(msgspec.Struct, frozen=True):
    """All there is of a case. By real run: `others`, CPUs' worth of other work meanwhile; `paces`, how long its steps
    took beside what the profile says; `paced`, what was simulated at that pace. `simulated`: at the profile's.
    """

    case: Case
    requests: int
    rate_rps: float
    others: list[float]
    real: list[dict[str, float]]
    simulated: dict[str, float]
    paces: list[float]
    paced: list[dict[str, float]]
    bounds: Bounds
    schedules: list[Schedule]

    @property
    def verdicts(self) -> list[Verdict]:
        found = []
        for metric, (_, kind) in METRICS.items():
            real = fmean(run[metric] for run in self.real)
            found.append(
                Verdict(
                    metric,
                    real,
                    self.simulated[metric],
                    _apart([run[metric] for run in self.real]),
                    getattr(self.bounds, kind),
                    fmean(run[metric] for run in self.paced) / real - 1,
                )
            )
        return found

    @property
    def disturbed(self) -> bool:
        return any(each > DISTURBING for each in self.others)


def _apart(values: Sequence[float]) -> float:
    if len(values) < 2:
        return math.nan
    return fmean(abs(one - other) for one, other in combinations(values, 2)) / fmean(values)


def _others(note: Path) -> float:
    """CPUs' worth of others' work that is written there; NaN where it was not known."""
    known = msgspec.json.decode(note.read_bytes(), type=float | None)
    return math.nan if known is None else known


class Matrix:
    """Runs an experiment's cases. What is in `folder` already is not run again, so that a matrix that was interrupted,
    or disturbed, can be gone on with.

    All cases run once on real engines before any runs again, every other time in reverse, and engines are profiled
    before and after every few runs: a machine is not equally fast all the time, which must neither hide in the
    difference of two runs in a row nor be what the simulator is judged by.
    """

    def __init__(self, overrides: list[str], config_dirs: list[str], folder: Path) -> None:
        self._overrides, self._config_dirs, self._folder = overrides, config_dirs, folder
        cfg = compose(overrides, config_dirs)
        if "validation" not in cfg:
            raise ValueError("this experiment has no cases to validate: give it a `validation` as cpu_matrix has")
        self.settings = typed(cfg.validation, Settings, "validation")
        self._profile = folder / "profile"
        self._requests: dict[str, tuple[int, float]] = {}

    def run(self) -> tuple[profiles.Profile, list[CaseResult]]:
        """Everything: the profile, and each case."""
        settings = self.settings
        launches = [self._launch(0)]
        self._requests = self._loads(launches)
        others: dict[str, list[float]] = {case.name: [] for case in settings.cases}
        for number in range(settings.repeats):
            for place, case in enumerate(settings.cases[:: -1 if number % 2 else 1]):
                if sum(map(len, others.values())) and not place % RUNS_BETWEEN:
                    launches.append(self._launch(len(launches)))
                label = f"{case.name}, real CPU {number + 1}"
                others[case.name].append(
                    self._real(self._of(case), self._folder / slug(case.name) / f"real{number}", label)
                )
        launches.append(self._launch(len(launches)))
        profile = profile_of(self._compose(["backend=real"]), launches)
        save_profile(profile, self._profile)
        return profile, [self._judge(case, others[case.name], profile) for case in settings.cases]

    def _launch(self, number: int) -> Launch:
        """Profile once, again where others used the machine meanwhile: all of the load at first, then the halves of one
        by turns, every other launch with engines that hand over.
        """
        split, parts = number % 2 > 0, 2 if number else 1
        folder = self._profile / f"launch{number}"
        for attempt in range(self.settings.attempts):
            cfg = self._compose(["backend=real"])
            launch = measure_launch(cfg, folder, PATIENCE_S, (number + 3) // 2, split, parts)
            if launch.undisturbed > USABLE * len(launch.steps) or attempt == self.settings.attempts - 1:
                break
            rmtree(folder)
        return launch

    def _loads(self, launches: Sequence[Launch]) -> dict[str, tuple[int, float]]:
        """(requests, requests/s) by case, from what the first launch says is served at most; kept for later runs."""
        file = self._folder / "loads.json"
        if not file.is_file():
            first = profile_of(self._compose(["backend=real"]), launches)
            save_profile(first, self._profile / "launch0")
            served = {tuple(case.overrides): 0.0 for case in self.settings.cases}
            for overrides in served:
                served[overrides] = self._saturation(overrides, first)
            rates = {case.name: case.load * served[tuple(case.overrides)] for case in self.settings.cases}
            loads = {name: (max(2, round(rate * self.settings.duration_s)), rate) for name, rate in rates.items()}
            file.write_bytes(msgspec.json.encode(loads))
        return msgspec.json.decode(file.read_bytes(), type=dict[str, tuple[int, float]])

    def _saturation(self, overrides: Sequence[str], profile: profiles.Profile) -> float:
        """Requests/s that are served where they are all there at once: simulated from the profile, no case's window."""
        start = self.settings.saturation_window_s / 1e9
        at_once = ["trace.rate=1e9", f"trace.start_s={start}", "warmup_s=0"]  # they all arrive in the warm-up
        own = used_profile(self._profile / "launch0" / "profile.json", profile)
        cfg = self._compose(["backend=sim", *own, *overrides, *at_once, f"trace.limit={SATURATING}"])
        folder = self._folder / "saturation" / slug(" ".join(overrides) or "all")
        return run_one_of_several(cfg, folder, "saturation").summary["throughput_rps"]

    def _of(self, case: Case) -> list[str]:
        """The overrides that make a case: its own, and those that let its requests, from the window's begin on, arrive
        within `duration_s`.
        """
        requests, _ = self._requests[case.name]
        cut = [*case.overrides, "trace.rate=1", f"trace.start_s={case.window_s}", f"trace.limit={requests}"]
        arrivals = list(build.workload(self._compose(cut)).arrivals)
        if len(arrivals) < requests:
            raise ValueError(f"case {case.name}: {len(arrivals)} requests from {case.window_s} s on, {requests} needed")
        factor = arrivals[-1].at_ns / NS_PER_S / self.settings.duration_s
        window = [f"trace.rate={factor!r}", f"trace.start_s={case.window_s / factor!r}", f"trace.limit={requests}"]
        return [*case.overrides, *window]

    def _judge(self, case: Case, others: list[float], profile: profiles.Profile) -> CaseResult:
        folder, overrides = self._folder / slug(case.name), self._of(case)
        where = [folder / f"real{number}" for number in range(self.settings.repeats)]
        paces = [self._pace(each, profile) for each in where]
        requests, rate = self._requests[case.name]
        return CaseResult(
            case,
            requests,
            rate,
            others,
            [read_summary(each).metrics for each in where],
            self._simulate(overrides, profile, 1.0, folder),
            paces,
            [self._simulate(overrides, profile, at, folder / f"pace{n}") for n, at in enumerate(paces)],
            self.settings.bounds,
            [self._lockstep(overrides, each) for each in where],
        )

    def _real(self, overrides: list[str], folder: Path, label: str) -> float:
        """Run it on real engines, again where others used the machine meanwhile; how much they did in the last run."""
        note = folder / "others.json"
        for attempt in range(self.settings.attempts):
            if note.is_file():
                if not (others := _others(note)) > DISTURBING:
                    return others
                rmtree(folder)
            await_idle(PATIENCE_S)
            with Bystanders() as bystanders:
                run_one_of_several(self._compose([*overrides, "backend.record=true"]), folder, f"{label}.{attempt + 1}")
            note.write_bytes(msgspec.json.encode(bystanders.share()))
        return _others(note)

    def _simulate(self, overrides: list[str], profile: profiles.Profile, at: float, folder: Path) -> dict[str, float]:
        """The metrics of a case from a profile, at a multiple of its step times; their means over draws of noise."""
        slower = msgspec.structs.replace(
            profile,
            coefficients_ns=[coefficient * at for coefficient in profile.coefficients_ns],
            reshape_s=None if profile.reshape_s is None else profile.reshape_s * at,
            handover_s=None if profile.handover_s is None else profile.handover_s * at,
        )
        save_profile(slower, folder)
        own = used_profile(folder / "profile.json", profile)
        found = []
        for noise in range(self.settings.simulations):
            cfg = self._compose(["backend=sim", *own, f"latency.noise={noise}", *overrides])
            label = f"{folder.relative_to(self._folder)}, simulated {noise + 1}"
            found.append(run_one_of_several(cfg, folder / f"sim{noise}", label).summary)
        return {metric: fmean(run[metric] for run in found) for metric in METRICS}

    def _pace(self, folder: Path, profile: profiles.Profile) -> float:
        """How long the steps of a real run took, all in all, as a multiple of what the profile says."""
        turns = [list(read_turns(path)) for path in sorted((folder / "engines").glob("*.turns.jsonl"))]
        return pace(measured_steps(turns), profile)

    def _lockstep(self, overrides: list[str], folder: Path) -> Schedule:
        cfg = self._compose(overrides)
        arrivals = [arrival for arrival in build.workload(cfg).arrivals if isinstance(arrival, Arrival)]
        answers = {arrival.request.request_id: arrival.answer for arrival in arrivals}
        specs = [group.spec for group in build.groups(cfg) for _ in range(group.initial)]
        found = Schedule(None, 0, 0, 0, 0)
        for number, spec in enumerate(specs):
            turns = list(read_turns(folder / "engines" / f"te-{number}.turns.jsonl"))
            lockstep = Lockstep(
                f"te-{number}", spec, build.engine_config(cfg, spec), turns, answers, to_ns(cfg.backend.report_period_s)
            )
            difference = lockstep.run()
            said = None if difference is None else f"te-{number}, turn {difference.turn}: {difference.what}"
            first: dict[int, int] = {}
            for task_id, start, _ in (chunk for turn in turns for plan in turn.plans for chunk in plan.chunks):
                first.setdefault(task_id, start)
            found = Schedule(
                found.difference or said,
                found.turns + lockstep.compared,
                found.cached_prompts + sum(start > 0 for start in first.values()),
                found.preemptions + max((turn.preemptions for turn in turns), default=0),
                found.transfers + sum(len(turn.transfers) for turn in turns),
            )
        return found

    def _compose(self, overrides: Sequence[str]) -> DictConfig:
        return compose([*self._overrides, "report=false", *overrides], self._config_dirs)


def pace_table(results: Sequence[CaseResult]) -> ReportTable:
    """The same for simulations at the real runs' own pace: what is left when the machine's speed is known."""
    head = ["case", *(title for title, _ in METRICS.values()), "pace"]
    rows, met, number = [], 0, 0
    for result in results:
        inside = [abs(each.paced) <= each.bound for each in result.verdicts]
        met, number = met + sum(inside), number + len(inside)
        cells = [
            error_text(each.paced) + ("" if ok else " !") for each, ok in zip(result.verdicts, inside, strict=True)
        ]
        rows.append([result.case.name, *cells, ", ".join(f"{each:.2f}" for each in result.paces)])
    lead = (
        "Simulated with steps as fast, on the whole, as those of each real run, which no forecast can know: what is "
        "left is the simulator's own error. Pace: time of a real run's steps over what the profile says. "
        f"{met} of {number} within the bounds."
    )
    return ReportTable("At the pace of each real run", head, rows, lead)


def table(results: Sequence[CaseResult]) -> ReportTable:
    """A row per case; per metric the error, what the real runs differ by, and a mark where a bound is missed."""
    head = ["case", *(title for title, _ in METRICS.values()), "schedule in lockstep"]
    rows = []
    for result in results:
        cells = [f"{error_text(each.error)}{_MARK[each.said]} ({abs(each.difference):.1%})" for each in result.verdicts]
        rows.append([f"{result.case.name}{' *' if result.disturbed else ''}", *cells, lockstep_text(result.schedules)])
    return ReportTable("Simulated against real", head, rows, legend(results))


_MARK = {"met": "", "within noise": " ~", "missed": " !", "unknown": " ?"}


def lockstep_text(schedules: Sequence[Schedule]) -> str:
    """Whether engines in lockstep scheduled the same, and what there was to get wrong."""
    different = next((each.difference for each in schedules if each.difference is not None), None)
    if different is not None:
        return f"different: {different}"
    hits, turns = sum(each.cached_prompts for each in schedules), sum(each.turns for each in schedules)
    preemptions, transfers = sum(each.preemptions for each in schedules), sum(each.transfers for each in schedules)
    return f"identical in {turns} turns ({hits} hits, {preemptions} preemptions, {transfers} transfers)"


def legend(results: Sequence[CaseResult]) -> str:
    """What the table's numbers and marks mean, and how many met their bounds."""
    verdicts = [each.said for result in results for each in result.verdicts]
    bounds = results[0].bounds
    met, noise, missed = (verdicts.count(said) for said in ("met", "within noise", "missed"))
    said = (
        f"(simulated - real) / real; in brackets how far two real runs are apart. Bounds: {bounds.p50:.0%} of p50, "
        f"{bounds.p99:.0%} of p99, {bounds.throughput:.0%} of throughput. {met} of {len(verdicts)} met; "
        f"~ {noise} missed by no more than the real runs differ; ! {missed} missed."
    )
    if any(result.disturbed for result in results):
        said += " * other work used the machine during a real run."
    return said


def print_matrix(table: ReportTable) -> None:
    """The table in plain text, and what it means."""
    rows = [list(table.head), *(list(row) for row in table.rows)]
    widths = [max(len(row[place]) for row in rows) for place in range(len(table.head))]
    for number, row in enumerate(rows):
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
        if not number:
            print("-" * (sum(widths) + 2 * len(widths) - 2))
    print(table.lead)


def save(results: Sequence[CaseResult], profile: profiles.Profile, path: Path) -> None:
    """All numbers as JSON."""
    content = {
        "schema": SCHEMA,
        "machine": profile.machine,
        "time": profile.time,
        "model": profile.model,
        "cases": [
            msgspec.to_builtins(result)
            | {"verdicts": [{**each._asdict(), "error": each.error, "said": each.said} for each in result.verdicts]}
            for result in results
        ],
    }
    path.write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=1))


def report_runs(results: Sequence[CaseResult], folder: Path) -> tuple[list[ReportRun], list[Row]]:
    """For a report: the first real run of each case beside the first simulated one."""
    runs, rows = [], []
    for result in results:
        name = result.case.name
        where = folder / slug(name)
        runs += [ReportRun(f"{name}: real", where / "real0"), ReportRun(f"{name}: sim", where / "sim0")]
        rows += [Row(f"{name}: real", result.real[0]), Row(f"{name}: sim", result.simulated, result.real[0])]
    return runs, rows
