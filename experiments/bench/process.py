"""A simulated run as a whole process: start-up until the first event, and what it takes beside simulating.

Lengths of the Azure 2023 conversation trace at 96 requests/s on 16 simulated executors, without report and decisions.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from experiments import compiled
from experiments.bench.harness.result import Options as CommonOptions
from experiments.bench.harness.result import Row, median_row
from traces.catalog import find

TRACE = "azure2023_conv"


class Options(CommonOptions, frozen=True, kw_only=True):
    """`requests`: of the whole run."""

    requests: int = 16_000


def missing(options: Options) -> str | None:
    """Why it cannot run here."""
    return None if find(TRACE) is not None else f"there is no trace {TRACE}: deepflow traces list says where it belongs"


def run(options: Options) -> list[Row]:
    """In pure Python, and on the core compiled by mypyc where there is a C compiler."""
    rows, said = [], f"{options.requests} requests, 16 executors"
    compiled_too, why_not = compiled.try_build()
    for fast in (False, True) if compiled_too else (False,):
        measured = [_process(options.requests, fast) for _ in range(options.repeats)]
        starts, rest = [each.startup_s for each in measured], [each.process_s - each.simulating_s for each in measured]
        walls, peaks = [each.process_s for each in measured], [each.peak_mib for each in measured]
        how = "compiled" if fast else "pure Python"
        rows += [
            median_row(f"{how}: start-up, process to first event", starts, "s", said, at_most=1.0),
            median_row(f"{how}: all but the simulation", rest, "s", "start-up, metrics, all files, exit", at_most=1.5),
            median_row(f"{how}: whole process", walls, "s", said, at_most=3.5 if fast else None),
            median_row(f"{how}: peak memory", peaks, "MiB", said, at_most=400),
        ]
    if not compiled_too:
        rows.append(Row(name="compiled: whole process", value=None, unit="", detail=why_not))
    return rows


class _Measured(NamedTuple):
    startup_s: float
    simulating_s: float
    process_s: float
    peak_mib: float


def _process(requests: int, fast: bool) -> _Measured:
    """Raises CalledProcessError: it fails."""
    with TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "experiments.cli", "run", "fleet.groups.0.executors=16", "trace.rate=17.4"]
        command += ["trace.duration_s=null", f"trace.limit={requests}", "dispatch=round_robin", "report=false"]
        command += ["decisions=false", "progress=false", f"out={folder}/run"]
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=compiled.environment(fast))
        _, status, usage = os.wait4(process.pid, 0)
        process_s = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)
        metrics = json.loads(Path(folder, "run", "summary.json").read_text())["metrics"]
    unit = 1024 * 1024 if sys.platform == "darwin" else 1024
    return _Measured(metrics["startup_s"], metrics["wall_s"], process_s, usage.ru_maxrss / unit)
