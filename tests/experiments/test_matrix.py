"""`deepflow validate experiment=...`: a small matrix on engines that sleep, and what its numbers are called."""

import json
from pathlib import Path

import msgspec
import pytest

from experiments import matrix, profile_load
from experiments.matrix import Bounds, Case, CaseResult, Schedule, Verdict
from experiments.profile_load import Level
from tests.experiments.conftest import Command
from tests.experiments.small import undisturbed

EXPERIMENT = """# @package _global_
defaults:
  - override /backend: real
  - override /model: tiny_llama
  - override /engine: small
  - override /hardware: cpu
  - override /fleet: colocated2
  - override /trace: synthetic
backend: {device: "null", step_s: 0.002}
profile_launches: 1
profile_max_prompt: 64
progress: false
trace: {prompt_scale: 0.05, output_scale: 0.05, max_prompt_tokens: 64, duration_s: null}
validation:
  repeats: 2
  attempts: 2
  simulations: 2
  duration_s: 1.0
  saturation_window_s: 0
  bounds: {p50: 0.03, p99: 0.05, throughput: 0.02}
  cases:
    - {name: near saturation, load: 0.5, window_s: 10}
    - name: 1P1D prefixes
      load: 0.3
      window_s: 0
      overrides: [fleet=pd_1p1d, trace=shared_prefix, trace.reader.prefix_tokens=32, trace.prompt_scale=1]
"""


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder with the experiment; the profile's load is short."""
    monkeypatch.setattr(profile_load, "LEVELS", (Level(1, 3), Level(3, 3), Level(12, 2)))
    monkeypatch.setattr(profile_load, "PROMPTS", 3)
    monkeypatch.setattr(profile_load, "HANDED_OVER", (Level(2, 12),))
    monkeypatch.setattr(profile_load, "DECODE_TOKENS", 12)
    monkeypatch.setattr(matrix, "SATURATING", 60)
    undisturbed(monkeypatch)
    (tmp_path / "options" / "experiment").mkdir(parents=True)
    (tmp_path / "options" / "experiment" / "small.yaml").write_text(EXPERIMENT)
    return str(tmp_path / "options")


def test_a_matrix_is_run_judged_and_gone_on_with(options: str, deepflow: Command) -> None:
    """Every case has real runs, simulated ones, verdicts and a schedule that lockstep finds identical, and engines are
    profiled around the runs; what is there is not run again, but what was disturbed is.
    """
    arguments = ("validate", "--config-dir", options, "experiment=small", "out=judged")
    said = deepflow(*arguments)
    assert said.code == 0, said
    assert said.folder == Path("judged")
    content = json.loads(Path("judged/matrix.json").read_text())
    assert [case["case"]["name"] for case in content["cases"]] == ["near saturation", "1P1D prefixes"]
    for case in content["cases"]:
        runs = (case[each] for each in ("real", "paces", "paced", "schedules"))
        assert [len(each) for each in runs] == [2] * 4
        assert {run["finished"] for run in case["real"]} == {case["requests"]}
        assert all(schedule["difference"] is None for schedule in case["schedules"])
        assert [each["metric"] for each in case["verdicts"]] == list(matrix.METRICS)
    prefixes = content["cases"][1]["schedules"][0]
    assert prefixes["cached_prompts"] > 0
    assert prefixes["transfers"] > 0
    assert "1P1D prefixes" in Path("judged/report.html").read_text()
    assert said.out.count("identical in") == 2
    launches = [json.loads(Path(f"judged/profile/launch{number}/launch.json").read_text()) for number in range(3)]
    assert [each["split"] for each in launches] == [False, True, False]
    runs = {path: path.stat().st_mtime_ns for path in Path("judged").glob("*/real*/requests.parquet")}
    assert len(runs) == 4
    again = Path("judged/near_saturation/real1")
    (again / "others.json").write_text("0.7")
    assert deepflow(*arguments).code == 0
    assert [path.parent for path, time in runs.items() if path.stat().st_mtime_ns != time] == [again]


def test_an_experiment_without_cases_is_refused(deepflow: Command, tmp_path: Path) -> None:
    """By what it lacks."""
    (tmp_path / "more" / "experiment").mkdir(parents=True)
    (tmp_path / "more" / "experiment" / "bare.yaml").write_text("# @package _global_\nseed: 1\n")
    said = deepflow("validate", "--config-dir", str(tmp_path / "more"), "experiment=bare")
    assert said.code == 2
    assert "no cases to validate" in said.err


@pytest.mark.parametrize(
    ("simulated", "difference", "said"),
    [(1.02, 0.0, "met"), (0.98, 0.0, "met"), (1.04, 0.01, "missed"), (0.95, 0.06, "within noise")],
)
def test_a_verdict_knows_bound_and_noise(simulated: float, difference: float, said: str) -> None:
    """An error is judged by its bound; where it is larger, by what two real runs differ by."""
    assert Verdict("ttft_p50_s", 1.0, simulated, difference, 0.03, 0.0).said == said
    assert Verdict("tpot_p50_s", float("nan"), simulated, difference, 0.03, 0.0).said == "unknown"


def test_numbers_of_a_case() -> None:
    """Means of the runs on either side, and how far the real ones are apart; one different schedule is named."""
    run = dict.fromkeys(matrix.METRICS, 1.0)
    schedules = [Schedule(None, 10, 2, 3, 4), Schedule("te-1, turn 7: plans", 7, 0, 0, 0)]
    bounds = Bounds(0.03, 0.05, 0.02)
    result = CaseResult(
        Case("one", 0.5, 0.0),
        10,
        2.0,
        [0.0, 0.5],
        [run, {**run, "e2e_p99_s": 1.5}],
        {**run, "e2e_p99_s": 1.2},
        [1.0, 1.1],
        [{**run, "e2e_p99_s": 0.9}, {**run, "e2e_p99_s": 1.5}],
        bounds,
        schedules,
    )
    last = result.verdicts[5]
    assert (last.metric, last.real, last.simulated, last.bound) == ("e2e_p99_s", 1.25, pytest.approx(1.2), 0.05)
    assert last.difference == pytest.approx(0.4)
    assert last.said == "met"
    assert last.paced == pytest.approx(-0.04)
    assert matrix.pace_table([result]).rows[0][6:] == ["-4.0%", "+0.0%", "1.00, 1.10"]
    assert result.disturbed
    assert matrix.lockstep_text(schedules) == "different: te-1, turn 7: plans"
    assert matrix.lockstep_text(schedules[:1]) == "identical in 10 turns (2 hits, 3 preemptions, 4 transfers)"
    shown = matrix.table([result])
    assert shown.rows[0][0] == "one *"
    assert shown.rows[0][6] == "-4.0% (40.0%)"
    assert "7 of 7 met" in shown.lead


def test_settings_are_checked() -> None:
    """By name and value."""
    with pytest.raises(ValueError, match="case light: load 0"):
        Case("light", 0.0, 0.0)
    plain = msgspec.to_builtins(
        matrix.Settings(2, 1, 1, 1.0, 0.0, Bounds(0.1, 0.1, 0.1), [Case("a b", 1, 0), Case("c", 1, 0)])
    )
    with pytest.raises(ValueError, match="repeats is 0"):
        msgspec.convert({**plain, "repeats": 0}, matrix.Settings)
    with pytest.raises(ValueError, match="give each a name of its own"):
        msgspec.convert({**plain, "cases": [plain["cases"][0], {**plain["cases"][1], "name": "a_b"}]}, matrix.Settings)
