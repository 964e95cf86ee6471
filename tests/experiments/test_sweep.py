"""Sweeps over several launchers, and how far they say to be."""

import io
import math
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from experiments.outputs import read_summary
from experiments.sweep_progress import SweepProgress, runs_of
from tests.experiments.conftest import Said
from tests.experiments.small import ONE_BY_ONE, SIM


def test_the_number_of_runs_is_known_beforehand() -> None:
    """Choices and ranges multiply; what is not swept over does not count, and a continuous interval has no number."""
    keys = frozenset({"dispatch", "seed"})
    assert runs_of(["dispatch=a,b", "seed=range(0,5)", "trace=synthetic", "x=[1,2]"]) == (10, keys)
    assert runs_of(["trace.rate=interval(0,1)"]) == (None, frozenset({"trace.rate"}))


def test_each_run_that_ends_is_said(tmp_path: Path) -> None:
    """A line per run, by what makes it different; on a terminal one line that is written over."""
    for number, rate in enumerate((1, 2)):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "overrides").write_text(f"report=False\ntrace.rate={rate}")
        (tmp_path / str(number) / "summary.json").write_text("{}")
    out = io.StringIO()
    with SweepProgress(tmp_path, 2, frozenset({"trace.rate"}), out):
        pass
    assert out.getvalue().splitlines() == [
        "sweep: 1 of 2 runs after 0 s, the last was trace.rate=1",
        "sweep: 2 of 2 runs after 0 s, the last was trace.rate=2",
    ]


def test_a_sweep_tells_how_far_it_is(deepflow: Callable[..., Said]) -> None:
    """Standard error has a line per run, standard output the comparison."""
    said = deepflow("sweep", ONE_BY_ONE, "seed=1,2", *SIM)
    assert said.code == 0, said
    lines = [line for line in said.err.splitlines() if line.startswith("sweep: ")]
    assert lines[-1].startswith("sweep: 2 of 2 runs after ")
    assert lines[-1].endswith("the last was seed=2")


@pytest.mark.skipif(find_spec("hydra_plugins.hydra_ray_launcher") is not None, reason="the extra is installed")
def test_a_launcher_that_is_not_installed_is_named_with_its_extra(deepflow: Callable[..., Said]) -> None:
    """One line says what to install."""
    said = deepflow("sweep", "hydra/launcher=ray", "seed=1,2", *SIM)
    assert said.code == 2
    assert "pip install -e '.[ray]'" in said.err


@pytest.mark.skipif(
    find_spec("hydra_plugins.hydra_submitit_launcher") is None,
    reason="needs the extra slurm: pip install -e '.[slurm]'",
)
def test_submitit_gives_what_joblib_gives(deepflow: Callable[..., Said]) -> None:
    """Slurm's launcher with its local executor: the same metrics as in this process, run by run."""
    folders = [
        deepflow("sweep", *launcher, "seed=1,2", *SIM).folder
        for launcher in (("hydra/launcher=submitit_local",), (ONE_BY_ONE,))
    ]
    for number in ("0", "1"):
        here, there = (read_summary(folder / number).metrics for folder in folders)
        assert all(
            here[key] == value or (math.isnan(here[key]) and math.isnan(value))
            for key, value in there.items()
            if key not in ("wall_s", "startup_s")
        )
