"""One run: build, drive, record, write the results."""

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from cluster.client import Client
from cluster.control import ControlPlane
from cluster.jobs.metrics import summarise_jobs
from cluster.jobs.record import JobRecorder
from cluster.metrics import by_model, summarise
from cluster.recorder import Recorder
from cluster.seam import Cluster
from cluster.vocabulary import to_ns
from experiments import build
from experiments import snapshot as snapshots
from experiments.config import plain
from experiments.models import served
from experiments.progress import ProgressBar
from experiments.task_log import TaskLog
from experiments.timeline import TIMELINE_REQUESTS, Spans
from experiments.watch import Watch
from sim.cluster import SimCluster

_TICK = 512


class RunResult(NamedTuple):
    """What a run leaves: its folder, the metrics by name (times in seconds), the records behind them.

    `source`: where the workload is from, a stand-in said to be one. `models`: the main metrics by model, where requests
    asked for several. `notes`: what a reader of the results must know. `label`: the dispatch policy. `jobs`: records of
    jobs other than serving.
    """

    folder: Path
    summary: dict[str, float]
    recorder: Recorder
    interrupted: bool
    source: str
    models: dict[str, dict[str, float]]
    notes: list[str]
    label: str
    jobs: JobRecorder


def _temporary(folder: Path) -> IO[bytes]:
    return TemporaryFile(dir=folder)


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """No search for cycles: simulating leaves none behind, and looking for some takes a tenth of its time."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def run(cfg: DictConfig, folder: Path | None = None, label: str | None = None, spent_s: float = 0.0) -> RunResult:
    """Run one experiment and write its results to `folder` (default: `cfg.out`, else a new folder below `runs/`).

    `spent_s`: seconds that went by before this call and count as start-up (`startup_s` in the summary). Raises
    ValueError for whatever the user can mend. Ctrl-C ends the run early; what there is, is written.
    """
    called = time.monotonic()
    folder = folder or (Path(cfg.out) if cfg.out else _new_folder(str(cfg.backend.name)))
    build.check_types(cfg)
    workload = build.workload(cfg)
    with contextlib.ExitStack() as stack:
        # A snapshot takes the records along, so they must be in memory.
        spill = None if cfg.snapshot_at is not None else partial(_temporary, folder)
        control = build.control_plane(cfg, workload.arrivals, Recorder(spill))
        cluster = stack.enter_context(build.cluster(cfg, folder))
        folder.mkdir(parents=True, exist_ok=True)
        log = stack.enter_context((folder / "decisions.jsonl").open("wb")) if cfg.decisions else None
        session = _Session(cfg, folder, workload, control, cluster, TaskLog(TIMELINE_REQUESTS), log)
        done = session.drive(label or f"{cfg.backend.name} run", stack)
    return session.finish(done, spent_s + done.started - called)


def resume(
    snapshot: Path,
    overrides: Sequence[str] = (),
    config_dirs: Sequence[str] = (),
    folder: Path | None = None,
    spent_s: float = 0.0,
) -> RunResult:
    """Go on from a snapshot to the end of the run, in a folder of its own. Without overrides that is the run it was
    taken from, to the last bit.

    `snapshot`: the file, or the run's folder that it lies in. `overrides`: Hydra's, of `dispatch`, `scaling`, `slo`,
    `trace.rate` and what is written. New policies know nothing of what was before. A new rate is that of all arrivals
    from the snapshot on: the same requests, closer together or farther apart. Raises ValueError as `run` does, and for
    a file that this code has not written. **Resume only files that you trust: reading one can run any code.**
    """
    called = time.monotonic()
    if snapshot.is_dir():
        snapshot /= "snapshot.bin"
    taken = snapshots.load(snapshot)
    cfg, changed = snapshots.configure(taken.config, list(overrides), list(config_dirs))
    if not any(each.startswith("out=") for each in overrides):
        cfg.out = None
    if not any(each.startswith("snapshot_at=") for each in overrides):
        cfg.snapshot_at = None
    build.check_types(cfg)
    workload, (cluster, control, tasks) = snapshots.go_on(taken, cfg, changed)
    folder = folder or (Path(cfg.out) if cfg.out else _new_folder(str(cfg.backend.name)))
    folder.mkdir(parents=True, exist_ok=True)
    cfg.resumed = {"snapshot": str(snapshot.resolve()), "at_s": taken.header.at_ns / 1e9, "changed": sorted(changed)}
    with contextlib.ExitStack() as stack:
        stack.enter_context(cluster)
        log = stack.enter_context(_log_from(snapshot, taken.header, folder)) if cfg.decisions else None
        session = _Session(cfg, folder, workload, control, cluster, tasks, log)
        done = session.drive(f"resumed at {snapshots.seconds(taken.header)}", stack)
    return session.finish(done, spent_s + done.started - called)


def _log_from(snapshot: Path, header: snapshots.Header, folder: Path) -> IO[bytes]:
    """decisions.jsonl of a resumed run: what its run had decided until then, ready for what comes."""
    size, before = header.decisions_bytes, snapshot.parent / "decisions.jsonl"
    if size is None or not before.is_file() or before.stat().st_size < size:
        raise ValueError(
            f"{before} does not hold the decisions until {snapshots.seconds(header)}: put it beside the snapshot "
            "again, or resume with decisions=false"
        )
    log = (folder / "decisions.jsonl").open("xb" if folder.samefile(snapshot.parent) else "wb")
    with before.open("rb") as file:
        while size:
            part = file.read(min(size, 1 << 20))
            log.write(part)
            size -= len(part)
    return log


class _Driven(NamedTuple):
    interrupted: bool
    started: float
    wall_s: float
    notes: list[str]


class _Session(NamedTuple):
    """A run under way, new or resumed. `log`: of decisions, open."""

    cfg: DictConfig
    folder: Path
    workload: build.Workload
    control: ControlPlane[Client]
    cluster: Cluster
    tasks: TaskLog
    log: IO[bytes] | None

    def drive(self, label: str, stack: contextlib.ExitStack) -> _Driven:
        """To the end of the run."""
        cfg, notes = self.cfg, list[str]()
        if self.log is not None:
            self.control.log_to(self.log)
        bar: ProgressBar
        if cfg.watch:
            bar = Watch(self.control, cfg.trace.limit, label)
        else:
            bar = ProgressBar(cfg.trace.limit, label, enabled=cfg.progress)
        started = time.monotonic()
        pause = None if cfg.snapshot_at is None else Pause(to_ns(cfg.snapshot_at), self._snapshot)
        simulated = cfg.backend.name == "sim"
        stack.enter_context(bar)
        with without_collector() if simulated else contextlib.nullcontext():
            interrupted = drive(self.control, self.cluster, bar, simulated, self.tasks, pause)
        if pause is not None and not pause.over:
            notes.append(f"no snapshot was taken: the run ended before {cfg.snapshot_at} s")
        return _Driven(interrupted, started, time.monotonic() - started, notes)

    def _snapshot(self) -> None:
        assert isinstance(self.cluster, SimCluster)
        written = None
        if self.log is not None:
            self.log.flush()
            written = self.log.tell()
        state = snapshots.State(self.cluster, self.control, self.tasks)
        snapshots.save(self.folder / "snapshot.bin", state, self.cfg, self.workload.source, written)

    def finish(self, done: _Driven, startup_s: float) -> RunResult:
        """Metrics, and all files. ValueError: no request arrived."""
        cfg, folder, control = self.cfg, self.folder, self.control
        recorder = control.recorder
        recorder.censor()
        jobs = control.work.recorder if control.work is not None else JobRecorder()
        if not recorder.ended and not jobs.rows:
            if done.interrupted:
                raise KeyboardInterrupt  # before the first request: there is nothing to write
            raise ValueError("no request arrived: the trace is empty, or every arrival waits for one that never comes")
        slo, window = build.objectives(cfg)
        summary = summarise(recorder, slo, window) | summarise_jobs(jobs, recorder)
        summary |= build.costs(cfg, recorder)
        summary |= {"startup_s": startup_s, "wall_s": done.wall_s, "never_sent": control.client.never_sent}
        OmegaConf.save(cfg, folder / "config.yaml", resolve=True)
        spans = build.spans(self.cluster, folder, self.tasks)
        notes = [*done.notes, *build.notes(self.cluster)]
        if resumed := cfg.get("resumed"):
            changed = f", with other {' and '.join(resumed.changed)} from there on" if resumed.changed else ""
            notes.append(f"resumed at {resumed.at_s:g} s from {resumed.snapshot}{changed}")
        models = by_model(recorder, slo, window) if len(set(recorder.models)) > 1 else {}
        about = provenance(cfg, self.workload) | {"notes": notes} | ({"models": models} if models else {})
        _write(folder, cfg, recorder, summary, about, slo, window, spans, jobs)
        source = self.workload.source
        return RunResult(folder, summary, recorder, done.interrupted, source, models, notes, _policy(cfg), jobs)


def run_one_of_several(cfg: DictConfig, folder: Path, label: str) -> RunResult:
    """The same for a run that others follow: Ctrl-C ends them all."""
    result = run(cfg, folder, label)
    if result.interrupted:
        raise KeyboardInterrupt
    return result


class Pause:
    """Something to do once, between two events, at the first event from `at_ns` on. `over`: it is done."""

    def __init__(self, at_ns: int, action: Callable[[], None]) -> None:
        self.at_ns = at_ns
        self.over = False
        self._action = action

    def take(self) -> None:
        self.over = True
        self._action()


def drive(
    control: ControlPlane[Client],
    cluster: Cluster,
    bar: ProgressBar,
    simulated: bool,
    tasks: TaskLog | None = None,
    pause: Pause | None = None,
) -> bool:
    """Let the control plane run the cluster until the run ends. True if the user interrupted it.

    `tasks`: notes them for the timeline.
    """
    due = float("inf") if pause is None else pause.at_ns
    note = (tasks or TaskLog(0)).record
    ticks = 0
    recorder, open_requests = control.recorder, control.client.due

    def tell(now_ns: int) -> None:
        bar.update(recorder.ended, now_ns / 1e9 if simulated else None, len(open_requests))

    try:
        while (event := cluster.next_event()) is not None:
            actions = control.on_event(event)
            for action in actions:
                cluster.submit(action)
            note(event, actions)
            if event.time >= due:
                assert pause is not None
                pause.take()
                due = float("inf")
            ticks += 1
            if not ticks % _TICK:
                tell(event.time)
    except KeyboardInterrupt:
        return True
    tell(recorder.end_ns)
    return False


def _write(
    folder: Path,
    cfg: DictConfig,
    recorder: Recorder,
    summary: Any,
    about: dict[str, Any],
    slo: Any,
    window: Any,
    spans: Spans,
    jobs: JobRecorder,
) -> None:
    from experiments.outputs import write_run

    write_run(folder, recorder, summary, about, slo, window, spans, jobs)
    if cfg.report:
        from experiments.report import ReportRun, write_report

        write_report(folder / "report.html", f"{title(cfg)}", [ReportRun(title(cfg), folder)])


def _policy(cfg: DictConfig) -> str:
    return str(cfg.dispatch["_target_"]).rsplit(".", 1)[-1]


def title(cfg: DictConfig) -> str:
    """A run in a few words."""
    models = served(cfg)
    what = next(iter(models)) if len(models) == 1 else f"{len(models)} models"
    return f"{_policy(cfg)} on {cfg.backend.name} {cfg.hardware.name}, {what}"


def provenance(cfg: DictConfig, workload: build.Workload) -> dict[str, Any]:
    """What the numbers of a run rest on."""
    import platform
    from importlib.metadata import version

    real = cfg.backend.name == "real"
    if real:
        null = build.device_name(cfg) == "null"
        basis = "null engine: steps sleep" if null else "measured: real engines on this machine"
    elif "path" in cfg.latency:
        how = "fitted to the profile" if "profile" in str(cfg.latency["_target_"]) else "interpolated in"
        basis = f"calibrated: step times {how} {cfg.latency.path}"
    else:
        basis = f"derived: {str(cfg.latency['_target_']).rsplit('.', 1)[-1]} of conf/hardware, sources stand there"
    return {
        "title": title(cfg),
        "backend": str(cfg.backend.name),
        "basis": basis,
        "trace": workload.source,
        "stand_in": workload.stand_in,
        "seed": int(cfg.seed),
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {platform.system()} {platform.release()}",
        "versions": {name: version(name) for name in ("simpy", "numpy", "torch")},
        "config": plain(cfg),
    }


def _new_folder(name: str) -> Path:
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    folder = Path("runs") / f"{stamp}_{name}"
    number = 1
    while folder.exists():
        number += 1
        folder = Path("runs") / f"{stamp}_{name}_{number}"
    return folder
