"""A run as a process: what it loads, and what it says of its start."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import compose, run
from experiments.process import age_s, memory_bytes

SMALL = ["trace=synthetic", "trace.limit=3", "report=false", "progress=false"]
WATCHED = """
import importlib, sys
from experiments import compose, run
module = importlib.import_module("experiments.run")
drive, heavy = module.drive, ("matplotlib", "pandas", "plotly", "pyarrow", "scipy", "torch")
def watched(*arguments):
    print("before the run:", *(name for name in heavy if name in sys.modules))
    return drive(*arguments)
module.drive = watched
run(compose(sys.argv[1:]))
print("at its end:", *(name for name in heavy if name in sys.modules))
"""


def test_slow_libraries_stay_out_of_a_run(tmp_path: Path) -> None:
    """None is loaded before the first event, and without a report only what writes tables is loaded at all."""
    command = [sys.executable, "-c", WATCHED, *SMALL, f"out={tmp_path}"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.splitlines() == ["before the run:", "at its end: pyarrow"]


def test_start_up_counts_from_where_the_caller_says(tmp_path: Path) -> None:
    """The summary has the seconds until the first event, with those that went by before the call."""
    summary = run(compose(SMALL), tmp_path, spent_s=1000.0).summary
    assert 1000.0 < summary["startup_s"] < 1100.0
    assert json.loads((tmp_path / "summary.json").read_text())["metrics"]["startup_s"] == summary["startup_s"]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="this system does not tell a process's age")
def test_a_process_knows_its_age_and_memory() -> None:
    """Age grows with time, and a Python process holds megabytes."""
    before = age_s()
    assert 0 < before <= age_s()
    assert (memory_bytes() or 0) > 1_000_000
