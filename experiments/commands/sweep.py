"""`deepflow sweep`: a Hydra multirun over any keys, runs in parallel by joblib, Slurm or Ray, and one comparison."""

import contextlib
import io
import os
import sys
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from experiments.commands.usage import split, wants_help
from experiments.config import CONF
from experiments.sweep_progress import SweepProgress, runs_of

USAGE = """usage: deepflow sweep [--config-dir DIR] KEY=VALUE,VALUE,... [KEY=VALUE ...]

Runs every combination, as many at a time as there are cores (hydra.launcher.n_jobs=N changes that), and compares them
in one table and one report.html. The folder, whose path is the last line, holds one folder per run. On more machines,
which share this folder, this program and its environment:

  deepflow sweep dispatch=round_robin,least_outstanding trace.rate=0.5,1,2
  deepflow sweep hydra/launcher=submitit_slurm hydra.launcher.partition=NAME KEY=VALUE,...    pip install -e '.[slurm]'
  deepflow sweep hydra/launcher=ray +hydra.launcher.ray.init.address=auto KEY=VALUE,...       pip install -e '.[ray]'
"""
LAUNCHER = "hydra/launcher="
EXTRAS = {
    "submitit_slurm": ("hydra_submitit_launcher", "slurm"),
    "submitit_local": ("hydra_submitit_launcher", "slurm"),
    "ray": ("hydra_ray_launcher", "ray"),
}
"""Launchers that come with an optional extra: their plugin, and the extra."""


def main(arguments: list[str]) -> int:
    if wants_help(arguments, USAGE):
        return 0
    config_dirs, overrides = split(arguments)
    launchers = [each.removeprefix(LAUNCHER) for each in overrides if each.startswith(LAUNCHER)]
    for launcher in launchers:
        plugin, extra = EXTRAS.get(launcher, ("", ""))
        if plugin and find_spec(f"hydra_plugins.{plugin}") is None:
            raise ValueError(f"{LAUNCHER}{launcher} is not installed here: pip install -e '.[{extra}]'")
    swept = [each for each in overrides if not each.startswith("hydra")]
    if not any("," in override.partition("=")[2] for override in swept):
        raise ValueError("nothing to sweep over: give a key several values, e.g. trace.rate=0.5,1,2")
    folder = Path("runs") / f"{datetime.now():%Y-%m-%d_%H-%M-%S}_sweep"
    search = ",".join(f"file://{Path(path).resolve()}" for path in config_dirs)
    sys.argv = [
        "deepflow sweep",
        "--multirun",
        f"hydra.sweep.dir={folder.resolve()}",
        "hydra.sweep.subdir=${hydra.job.num}",
        *([] if launchers else [f"{LAUNCHER}joblib", "hydra.launcher.n_jobs=-1"]),
        "hydra/job_logging=none",
        "hydra/hydra_logging=none",
        *([f"hydra.searchpath=[{search}]"] if search else []),
        "progress=false",
        "watch=false",
        "report=false",
        *overrides,
    ]
    with SweepProgress(folder, *runs_of(swept)):
        _run_all()
    _compare(folder)
    print(folder)
    return 0


def _run_all() -> None:
    """Let Hydra run them; an error comes out as it was raised, with the overrides that led to it."""
    said = io.StringIO()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # else Hydra prints errors itself and leaves
    try:
        with contextlib.redirect_stderr(said):
            _multirun()
    except ValueError as error:
        # Hydra says in which run it was: "Error executing job with overrides: [...]".
        _, _, where = said.getvalue().partition("with overrides: ")
        raise ValueError(f"{error} (in the run {where.splitlines()[0]})" if where else str(error)) from error
    finally:
        del os.environ["HYDRA_FULL_ERROR"]


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def _multirun(cfg: DictConfig) -> None:
    from experiments.run import run

    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    (folder / "overrides").write_text("\n".join(hydra_config.overrides.task))
    run(cfg, folder)


def _compare(folder: Path) -> None:
    from experiments.outputs import read_summary
    from experiments.report import ReportRun, write_report
    from experiments.tables import Row, print_table

    runs = sorted((path.parent for path in folder.glob("*/summary.json")), key=lambda path: int(path.name))
    labels = _labels([(path / "overrides").read_text().splitlines() for path in runs])
    print_table([Row(label, read_summary(path).metrics) for label, path in zip(labels, runs, strict=True)])
    write_report(
        folder / "report.html", "Sweep", [ReportRun(label, path) for label, path in zip(labels, runs, strict=True)]
    )


def _labels(overrides: list[list[str]]) -> list[str]:
    """What makes each run different from the others; for a single one, the last of its overrides."""
    common = set.intersection(*map(set, overrides)) if len(overrides) > 1 else set()
    return [" ".join(each for each in listed if each not in common) or listed[-1] for listed in overrides]
