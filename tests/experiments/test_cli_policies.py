"""Policies from outside the repository, and what a run has loaded when it starts."""

import subprocess
import sys
from pathlib import Path

import pytest

from experiments.outputs import read_requests, read_summary
from tests.experiments.conftest import Command
from tests.experiments.small import NULL, ONE_BY_ONE, SIM

LATE = ("torch", "pandas", "pyarrow", "matplotlib.pyplot", "plotly")

LAST = """
from cluster.policy import DispatchPolicy

class LastOne(DispatchPolicy):
    def __init__(self, offset=1):
        self.offset = offset

    def place(self, task, fleet, now_ns):
        groups = fleet.candidates(task)
        return groups[-1].names[-self.offset] if groups else None
"""

CURIOUS = f"""
import sys
from policies.dispatch.round_robin import RoundRobin

class Curious(RoundRobin):
    def place(self, task, fleet, now_ns):
        if not hasattr(self, "told"):
            self.told = [name for name in {LATE!r} if name in sys.modules]
            print("loaded at the first request:", self.told)
        return super().place(task, fleet, now_ns)
"""

IMPATIENT = """
from policies.dispatch.round_robin import RoundRobin
from traces.synthetic import SyntheticTrace

class Impatient(RoundRobin):
    left = 20

    def place(self, task, fleet, now_ns):
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt
        return super().place(task, fleet, now_ns)

def too_early(path, model, max_tokens):
    raise KeyboardInterrupt
    yield
"""


@pytest.mark.parametrize(("arguments", "executor"), [(SIM, "te-2"), (NULL, "te-0")], ids=["sim", "real"])
def test_a_policy_from_elsewhere(deepflow: Command, arguments: tuple[str, ...], executor: str) -> None:
    """A policy in the current folder, named by its import path, decides on either backend; its runs replay."""
    Path("outside_policy.py").write_text(LAST)
    said = deepflow("run", *arguments, "dispatch._target_=outside_policy.LastOne", "+dispatch.offset=2")
    assert said.code == 0, said
    assert set(read_requests(said.folder)["executor"]) == {executor}
    assert "LastOne" in said.out
    assert deepflow("replay", str(said.folder)).code == 0


def test_a_folder_of_options(deepflow: Command) -> None:
    """Options of one's own lie in a folder laid out like conf/, named by --config-dir; runs and sweeps take them."""
    Path("outside_policy.py").write_text(LAST)
    Path("options/dispatch").mkdir(parents=True)
    Path("options/dispatch/last.yaml").write_text("_target_: outside_policy.LastOne\noffset: 1\n")
    said = deepflow("run", "--config-dir", "options", *SIM, "dispatch=last")
    assert said.code == 0, said
    assert set(read_requests(said.folder)["executor"]) == {"te-3"}
    swept = deepflow("sweep", ONE_BY_ONE, "--config-dir", "options", "dispatch=last,round_robin", *SIM)
    assert swept.code == 0, swept
    assert set(read_requests(swept.folder / "0")["executor"]) == {"te-3"}


@pytest.mark.parametrize("trace", ["synthetic", "azure2023_conv"])
def test_slow_libraries_load_after_the_run(tmp_path: Path, trace: str) -> None:
    """When the first request of a simulated run is placed, no library is loaded that only its results need."""
    (tmp_path / "curious.py").write_text(CURIOUS)
    arguments = ["run", *SIM, f"trace={trace}", "trace.limit=5", "dispatch._target_=curious.Curious"]
    done = subprocess.run(
        [sys.executable, "-m", "experiments.cli", *arguments],
        cwd=tmp_path,
        env={"PATH": "", "PYTHONPATH": str(Path(__file__).resolve().parents[2]), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "loaded at the first request: []"


def test_ctrl_c_keeps_what_was_done(deepflow: Command) -> None:
    """Ctrl-C in a simulated run: exit code 130, and results with the requests that were under way as unfinished."""
    Path("impatient_policy.py").write_text(IMPATIENT)
    said = deepflow("run", *SIM, "dispatch._target_=impatient_policy.Impatient")
    assert said.code == 130
    assert "interrupted" in said.out
    metrics = read_summary(said.folder).metrics
    assert 0 < metrics["requests"] < 20
    assert metrics["unfinished"] > 0
    assert metrics["finished"] + metrics["unfinished"] == metrics["requests"]
    assert {"requests.parquet", "timeline.json", "config.yaml"} <= {path.name for path in said.folder.iterdir()}
    assert deepflow("replay", str(said.folder)).code == 0


def test_ctrl_c_before_the_first_request(deepflow: Command) -> None:
    """Ctrl-C before anything was done: exit code 130, one line, and no claim about the trace."""
    Path("impatient_policy.py").write_text(IMPATIENT)
    said = deepflow(
        "run", *SIM, "trace=deepflow", "trace.reader._target_=impatient_policy.too_early", "trace.reader.path=x"
    )
    assert (said.code, said.out, said.err) == (130, "", "deepflow: interrupted\n")
