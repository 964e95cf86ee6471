"""One run: build, drive, record, write the results."""

import contextlib
import time
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from cluster.client import Client
from cluster.control import ControlPlane
from cluster.jobs.metrics import summarise_jobs
from cluster.jobs.record import JobRecorder
from cluster.metrics import by_model, summarise
from cluster.recorder import Recorder
from cluster.seam import Cluster
from experiments import build
from experiments.config import plain
from experiments.models import served
from experiments.progress import ProgressBar
from experiments.task_log import TaskLog
from experiments.timeline import TIMELINE_REQUESTS, Spans
from experiments.watch import Watch

_TICK = 512


class RunResult(NamedTuple):
    """What a run leaves: its folder, the metrics by name (times in seconds), the records behind them.

    `source`: where the workload is from, a stand-in said to be one. `models`: the main metrics by model, where requests
    asked for several. `notes`: what a reader of the results must know. `jobs`: records of jobs other than serving.
    """

    folder: Path
    summary: dict[str, float]
    recorder: Recorder
    interrupted: bool
    source: str
    models: dict[str, dict[str, float]]
    notes: list[str]
    jobs: JobRecorder


def run(cfg: DictConfig, folder: Path | None = None, label: str | None = None, spent_s: float = 0.0) -> RunResult:
    """Run one experiment and write its results to `folder` (default: `cfg.out`, else a new folder below `runs/`).

    `spent_s`: seconds that went by before this call and count as start-up (`startup_s` in the summary). Raises
    ValueError for whatever the user can mend. Ctrl-C ends the run early; what there is, is written.
    """
    called = time.monotonic()
    folder = folder or (Path(cfg.out) if cfg.out else _new_folder(str(cfg.backend.name)))
    build.check_types(cfg)
    slo, window = build.objectives(cfg)
    workload = build.workload(cfg)
    recorder = Recorder()
    with contextlib.ExitStack() as stack:
        control = build.control_plane(cfg, workload.arrivals, recorder)
        cluster = stack.enter_context(build.cluster(cfg, folder))
        folder.mkdir(parents=True, exist_ok=True)
        if cfg.decisions:
            control.log_to(stack.enter_context((folder / "decisions.jsonl").open("wb")))
        started = time.monotonic()
        label = label or f"{cfg.backend.name} run"
        bar = (
            Watch(control, cfg.trace.limit, label)
            if cfg.watch
            else ProgressBar(cfg.trace.limit, label, enabled=cfg.progress)
        )
        tasks = TaskLog(TIMELINE_REQUESTS)
        interrupted = drive(control, cluster, stack.enter_context(bar), cfg.backend.name == "sim", tasks)
        wall_s = time.monotonic() - started
    recorder.censor()
    jobs = control.work.recorder if control.work is not None else JobRecorder()
    if not len(recorder.outcomes) and not jobs.rows:
        if interrupted:
            raise KeyboardInterrupt  # before the first request: there is nothing to write
        raise ValueError("no request arrived: the trace is empty, or every arrival waits for one that never comes")
    summary = summarise(recorder, slo, window) | summarise_jobs(jobs, recorder)
    summary |= build.costs(cfg, recorder)
    summary["startup_s"] = spent_s + started - called
    summary["wall_s"] = wall_s
    summary["never_sent"] = control.client.never_sent
    OmegaConf.save(cfg, folder / "config.yaml", resolve=True)
    models = by_model(recorder, slo, window) if len(set(recorder.models)) > 1 else {}
    notes = build.notes(cluster)
    about = provenance(cfg, workload) | {"notes": notes} | ({"models": models} if models else {})
    _write(folder, cfg, recorder, summary, about, slo, window, build.spans(cluster, folder, tasks), jobs)
    return RunResult(folder, summary, recorder, interrupted, workload.source, models, notes, jobs)


def run_one_of_several(cfg: DictConfig, folder: Path, label: str) -> RunResult:
    """The same for a run that others follow: Ctrl-C ends them all."""
    result = run(cfg, folder, label)
    if result.interrupted:
        raise KeyboardInterrupt
    return result


def drive(
    control: ControlPlane[Client], cluster: Cluster, bar: ProgressBar, simulated: bool, tasks: TaskLog | None = None
) -> bool:
    """Let the control plane run the cluster until the run ends. True if the user interrupted it.

    `tasks`: notes them for the timeline.
    """
    note = (tasks or TaskLog(0)).record
    ticks = 0
    ended, open_requests = control.recorder.outcomes, control.client.due

    def tell(now_ns: int) -> None:
        bar.update(len(ended), now_ns / 1e9 if simulated else None, len(open_requests))

    try:
        while (event := cluster.next_event()) is not None:
            actions = control.on_event(event)
            for action in actions:
                cluster.submit(action)
            note(event, actions)
            ticks += 1
            if not ticks % _TICK:
                tell(event.time)
    except KeyboardInterrupt:
        return True
    tell(control.recorder.end_ns)
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


def title(cfg: DictConfig) -> str:
    """A run in a few words."""
    policy = str(cfg.dispatch["_target_"]).rsplit(".", 1)[-1]
    models = served(cfg)
    what = next(iter(models)) if len(models) == 1 else f"{len(models)} models"
    return f"{policy} on {cfg.backend.name} {cfg.hardware.name}, {what}"


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
