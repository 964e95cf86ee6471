"""One run: build, drive, record, write the results."""

import contextlib
import time
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from cluster.client import Client
from cluster.control import ControlPlane
from cluster.jobs.metrics import summarise_jobs
from cluster.jobs.record import JobRecorder
from cluster.metrics import Recorder, summarise
from cluster.seam import Cluster
from experiments import build
from experiments.config import plain
from experiments.progress import ProgressBar
from flowserve.core.record import StepSpan

_TICK = 512


class RunResult(NamedTuple):
    """What a run leaves: its folder, the metrics by name (times in seconds), the records behind them.

    `source`: where the workload is from, a stand-in said to be one. `jobs`: records of jobs other than serving.
    """

    folder: Path
    summary: dict[str, float]
    recorder: Recorder
    interrupted: bool
    source: str
    jobs: JobRecorder


def run(cfg: DictConfig, folder: Path | None = None, label: str | None = None) -> RunResult:
    """Run one experiment and write its results to `folder` (default: `cfg.out`, else a new folder below `runs/`).

    Raises ValueError for whatever the user can mend. Ctrl-C ends the run early; what there is, is written.
    """
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
        bar = ProgressBar(cfg.trace.limit, label or f"{cfg.backend.name} run", enabled=cfg.progress)
        interrupted = drive(control, cluster, stack.enter_context(bar), cfg.backend.name == "sim")
        wall_s = time.monotonic() - started
    recorder.censor()
    jobs = control.work.recorder if control.work is not None else JobRecorder()
    if not len(recorder.outcomes) and not jobs.rows:
        if interrupted:
            raise KeyboardInterrupt  # before the first request: there is nothing to write
        raise ValueError("no request arrived: the trace is empty, or every arrival waits for one that never comes")
    summary = summarise(recorder, slo, window) | summarise_jobs(jobs, recorder)
    summary["wall_s"] = wall_s
    summary["never_sent"] = control.client.never_sent
    OmegaConf.save(cfg, folder / "config.yaml", resolve=True)
    steps, notes = build.steps(cluster, folder), build.notes(cluster)
    _write(folder, cfg, recorder, summary, workload, slo, window, steps, notes, jobs)
    return RunResult(folder, summary, recorder, interrupted, workload.source, jobs)


def run_one_of_several(cfg: DictConfig, folder: Path, label: str) -> RunResult:
    """The same for a run that others follow: Ctrl-C ends them all."""
    result = run(cfg, folder, label)
    if result.interrupted:
        raise KeyboardInterrupt
    return result


def drive(control: ControlPlane[Client], cluster: Cluster, bar: ProgressBar, simulated: bool) -> bool:
    """Let the control plane run the cluster until the run ends. True if the user interrupted it."""
    ticks = 0
    try:
        while (event := cluster.next_event()) is not None:
            for action in control.on_event(event):
                cluster.submit(action)
            ticks += 1
            if not ticks % _TICK:
                bar.update(len(control.recorder.outcomes), event.time / 1e9 if simulated else None)
    except KeyboardInterrupt:
        return True
    bar.update(len(control.recorder.outcomes), control.recorder.end_ns / 1e9 if simulated else None)
    return False


def _write(
    folder: Path,
    cfg: DictConfig,
    recorder: Recorder,
    summary: Any,
    workload: Any,
    slo: Any,
    window: Any,
    steps: Iterable[StepSpan],
    notes: list[str],
    jobs: JobRecorder,
) -> None:
    from experiments.outputs import write_run

    write_run(folder, recorder, summary, provenance(cfg, workload) | {"notes": notes}, slo, window, steps, jobs)
    if cfg.report:
        from experiments.report import ReportRun, write_report

        write_report(folder / "report.html", f"{title(cfg)}", [ReportRun(title(cfg), folder)])


def title(cfg: DictConfig) -> str:
    """A run in a few words."""
    policy = str(cfg.dispatch["_target_"]).rsplit(".", 1)[-1]
    return f"{policy} on {cfg.backend.name} {cfg.hardware.name}, {build.model_name(cfg)}"


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
