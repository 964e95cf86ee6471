"""A matrix of cases, each on real engines here and simulated: what the simulator is off by, beside what the machine is.

The step times come from one profile, of a load of its own. Each case runs several times on real engines; how far these
runs are apart is about what a perfect forecast of one of them would be off by. In lockstep, what the engines recorded
is fed into simulated ones, which must schedule the same.
"""

import math
from collections.abc import Sequence
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
from experiments.profiling import Launch, measure_handovers, measure_launch, profile_of, steps_of
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
    """One metric of one case. `difference`: between the real runs, as a share of their mean. `paced`: the error of
    simulations whose steps are as fast, on the whole, as those of the real run each is held against.
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
    took beside what the profile says; `paced`, what was simulated at that pace.
    """

    case: Case
    requests: int
    rate_rps: float
    others: list[float]
    real: list[dict[str, float]]
    simulated: list[dict[str, float]]
    paces: list[float]
    paced: list[dict[str, float]]
    bounds: Bounds
    schedules: list[Schedule]

    @property
    def verdicts(self) -> list[Verdict]:
        return [
            Verdict(
                metric,
                fmean(run[metric] for run in self.real),
                fmean(run[metric] for run in self.simulated),
                _apart([run[metric] for run in self.real]),
                getattr(self.bounds, kind),
                fmean(ours[metric] / real[metric] - 1 for ours, real in zip(self.paced, self.real, strict=True)),
            )
            for metric, (_, kind) in METRICS.items()
        ]

    @property
    def disturbed(self) -> bool:
        return any(each > DISTURBING for each in self.others)


def _apart(values: Sequence[float]) -> float:
    return (max(values) - min(values)) / fmean(values)


def _others(note: Path) -> float:
    """CPUs' worth of others' work that is written there; NaN where it was not known."""
    known = msgspec.json.decode(note.read_bytes(), type=float | None)
    return math.nan if known is None else known


class Matrix:
    """Runs an experiment's cases. What is in `folder` already is not run again, so that a matrix that was interrupted,
    or disturbed, can be gone on with.

    All cases run once on real engines before any runs again, and engines are profiled before, between and after: a
    machine is not equally fast all the time, which must neither hide in the difference of two runs in a row nor be what
    the simulator is judged by.
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
            for case in settings.cases:
                label = f"{case.name}, real CPU {number + 1}"
                others[case.name].append(
                    self._real(self._of(case), self._folder / slug(case.name) / f"real{number}", label)
                )
            launches.append(self._launch(number + 1))
        cfg = self._compose(["backend=real"])
        profile = profile_of(cfg, launches, measure_handovers(cfg, self._profile / "handovers", PATIENCE_S))
        save_profile(profile, self._profile)
        return profile, [self._judge(case, others[case.name], profile) for case in settings.cases]

    def _launch(self, number: int) -> Launch:
        """Profile once, again where others used the machine meanwhile."""
        folder = self._profile / f"launch{number}"
        for attempt in range(self.settings.attempts):
            launch = measure_launch(self._compose(["backend=real"]), folder, PATIENCE_S)
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
        simulated = self._simulate(overrides, profile, self._profile, folder, "sim")
        paces = [self._pace(each, profile) for each in where]
        paced = []
        for number, pace in enumerate(paces):
            slower = [coefficient * pace for coefficient in profile.coefficients_ns]
            own = msgspec.structs.replace(profile, coefficients_ns=slower)
            save_profile(own, folder / f"pace{number}")
            runs = self._simulate(overrides, own, folder / f"pace{number}", folder / f"pace{number}", "sim")
            paced.append({metric: fmean(run[metric] for run in runs) for metric in METRICS})
        requests, rate = self._requests[case.name]
        return CaseResult(
            case,
            requests,
            rate,
            others,
            [read_summary(each).metrics for each in where],
            simulated,
            paces,
            paced,
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

    def _simulate(
        self, overrides: list[str], profile: profiles.Profile, where: Path, folder: Path, name: str
    ) -> list[dict[str, float]]:
        """The metrics of a case from a profile, which is in the folder `where`, by draw of noise."""
        own = used_profile(where / "profile.json", profile)
        found = []
        for noise in range(self.settings.simulations):
            cfg = self._compose(["backend=sim", *own, f"latency.noise={noise}", *overrides])
            label = f"{folder.relative_to(self._folder)}, simulated {noise + 1}"
            found.append(run_one_of_several(cfg, folder / f"{name}{noise}", label).summary)
        return found

    def _pace(self, folder: Path, profile: profiles.Profile) -> float:
        """How long the steps of a real run took, all in all, as a multiple of what the profile says; fetches apart."""
        turns = [list(read_turns(path)) for path in sorted((folder / "engines").glob("*.turns.jsonl"))]
        steps = steps_of(turns)
        freed = profiles.alone(
            [(step.shape, step.end_ns - step.start_ns) for _, step, _ in steps],
            [busy for _, _, busy in steps],
            profile.contention,
        )
        model = profiles.model_of(profile)
        fetches = sum(len(turn.transfers) for each in turns for turn in each if turn.done is not None)
        fetching = fetches * (profile.handover_s or 0.0) * NS_PER_S
        return (sum(took for _, took in freed) - fetching) / sum(model.step_ns(shape) for shape, _ in freed)

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


def paced_table(results: Sequence[CaseResult]) -> ReportTable:
    """The same for simulations at the real runs' pace: what is left when the machine's speed is known."""
    head = ["case", *(title for title, _ in METRICS.values()), "pace"]
    rows, met, number = [], 0, 0
    for result in results:
        inside = [abs(each.paced) <= each.bound for each in result.verdicts]
        met, number = met + sum(inside), number + len(inside)
        cells = [
            error_text(each.paced) + ("" if ok else " !") for each, ok in zip(result.verdicts, inside, strict=True)
        ]
        rows.append([result.case.name, *cells, ", ".join(f"{pace:.2f}" for pace in result.paces)])
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
        f"(simulated - real) / real; in brackets how far the real runs are apart. Bounds: {bounds.p50:.0%} of p50, "
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
        rows += [Row(f"{name}: real", result.real[0]), Row(f"{name}: sim", result.simulated[0], result.real[0])]
    return runs, rows
