"""`deepflow profile`, `validate` and `heatmap`, on engines that sleep and on small grids."""

from pathlib import Path

import pytest

from cluster.fleet import Fleet
from cluster.request import Task
from experiments import fidelity, profile_load, profiling
from experiments.commands import heatmap
from experiments.outputs import read_summary
from experiments.profile_load import Level
from policies.dispatch.heat_map import HeatMap
from sim import profile as profiles
from tests.experiments.conftest import Command
from tests.experiments.small import PROFILE, SIM, undisturbed

IMPATIENT = """
from policies.dispatch.round_robin import RoundRobin

class Impatient(RoundRobin):
    left = 5

    def place(self, task, fleet, now_ns):
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt
        return super().place(task, fleet, now_ns)
"""

NULL_ENGINE = ("backend.device=null", "backend.step_s=0.001", "progress=false", "profile_launches=1")


@pytest.fixture
def short_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few requests at a time, and nothing but sleeping engines."""
    monkeypatch.setattr(profile_load, "LEVELS", (Level(1, 3), Level(3, 3), Level(2, 2, 2, 0.01)))
    monkeypatch.setattr(profile_load, "PROMPTS", 3)
    monkeypatch.setattr(profile_load, "HANDED_OVER", (Level(2, 12),))
    monkeypatch.setattr(profile_load, "DECODE_TOKENS", 12)
    undisturbed(monkeypatch)
    monkeypatch.setattr(fidelity, "REAL_BASE", [*fidelity.REAL_BASE, *NULL_ENGINE[2:]])


@pytest.mark.usefixtures("short_load")
def test_a_profile_is_measured_and_used(deepflow: Command) -> None:
    """A profile covers what was run, says where and when, and serves as latency model of a simulation."""
    said = deepflow("profile", *NULL_ENGINE, "out=measured")
    assert said.code == 0, said
    assert said.folder == Path("measured/profile.json")
    profile = profiles.load(said.folder)
    assert profile.model == "tiny-llama"
    assert profile.engines == 2
    assert profile.steps > 100
    assert min(profile.coefficients_ns) >= 0
    assert profile.ranges["decode_sequences"][1] >= 3
    assert len(profile.residuals) == profile.steps
    assert profile.disturbed == 0
    assert profile.handover_s is not None
    assert profile.dispatch_s > 0
    assert profile.event_s > 0
    ran = deepflow("run", *SIM, "latency=profile", f"latency.path={said.folder}")
    assert ran.code == 0
    assert read_summary(ran.folder).provenance["basis"].startswith("calibrated")


@pytest.fixture
def measured_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is measured: the profile is there."""
    monkeypatch.setattr(profiling, "measure", lambda cfg, folder: PROFILE)


@pytest.mark.usefixtures("short_load", "measured_before")
def test_both_backends_are_compared(deepflow: Command) -> None:
    """`validate` runs each variant on real engines and in simulation, and prints what the simulation is off by."""
    said = deepflow("validate", "backend.device=null", "trace=synthetic", "trace.limit=8", "fleet=colocated2,pd_1p1d")
    assert said.code == 0, said
    rows = [line for line in said.out.splitlines() if line.startswith("fleet=")]
    assert len(rows) == 4
    assert all("%" in row for row in rows if "sim" in row)
    assert (said.folder / "report.html").is_file()
    for path in said.folder.glob("*/*/summary.json"):
        assert read_summary(path.parent).metrics["finished"] == 8
    assert len(list(said.folder.glob("*/*/summary.json"))) == 4


@pytest.mark.usefixtures("short_load", "measured_before")
def test_ctrl_c_ends_all_of_a_comparison(deepflow: Command) -> None:
    """Ctrl-C in one of several runs ends the command: the others are not begun, and nothing is compared."""
    Path("impatient_policy.py").write_text(IMPATIENT)
    policy = "dispatch._target_=impatient_policy.Impatient"
    said = deepflow("validate", "backend.device=null", "trace=synthetic", policy)
    assert (said.code, said.err) == (130, "deepflow: interrupted\n")
    assert {path.parent.name for path in Path().glob("**/summary.json")} == {"real"}
    assert list(Path().glob("**/report.html")) == []


@pytest.mark.usefixtures("short_load")
def test_ctrl_c_leaves_no_profile(deepflow: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while measuring: no profile is fitted to half of the load."""
    place, left = profile_load.ByNumber.place, iter(range(5))

    def impatient(policy: profile_load.ByNumber, task: Task, fleet: Fleet, now_ns: int) -> str | None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return place(policy, task, fleet, now_ns)

    monkeypatch.setattr(profile_load.ByNumber, "place", impatient)
    said = deepflow("profile", *NULL_ENGINE)
    assert (said.code, said.out, said.err) == (130, "", "deepflow: interrupted\n")
    assert list(Path().glob("**/profile.json")) == []


def test_a_heat_map_is_written_and_used(deepflow: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """A heat map has a cell per prompt length and ratio, and can be given to the policy."""
    monkeypatch.setattr(heatmap, "PREFILL_TOKENS", (128, 2048))
    monkeypatch.setattr(heatmap, "RATIOS", (0.1, 1.0))
    monkeypatch.setattr(heatmap, "RATES", (2.0,))
    monkeypatch.setattr(heatmap, "REQUESTS", 10)
    said = deepflow("heatmap", "made/map.json", "progress=false")
    assert said.code == 0, said
    assert said.folder == Path("made/map.json")
    heat_map = HeatMap.load(said.folder)
    assert len(heat_map.cells) == len(heat_map.cells[0]) == 2
    assert "llama3-8b" in heat_map.source
    ran = deepflow("run", *SIM, "fleet=mixed", "dispatch=deepflow", f"dispatch.heat_map.path={said.folder}")
    assert ran.code == 0
