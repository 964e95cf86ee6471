"""`deepflow run` with agents and fine-tuning: the mixed example, what it writes, its replay, and what it refuses."""

import json
from pathlib import Path

import pytest

from experiments.cli import main
from experiments.outputs import read_jobs, read_summary

MIXED = (
    "jobs=mixed",
    "jobs.sources.0.sessions=3",
    "jobs.sources.0.max_context=20000",
    "jobs.sources.0.time_scale=0.01",
    "jobs.sources.1.jobs.0.tokens=700000",
    "jobs.sources.1.jobs.0.evaluations=5",
    "fleet=with_workers",
    "trace=synthetic",
    "trace.duration_s=20",
    "coldstart=none",
    "progress=false",
)
ROWS = (
    {"arrival_s": 0, "prompt_tokens": 40, "output_tokens": 10},
    {
        "arrival_s": 0,
        "work": {
            "type": "Agent",
            "rounds": [[{"type": "Call", "prompt_tokens": 20, "max_tokens": 9}], [{"type": "Tool"}]],
        },
        "lengths": [9, 0.05],
    },
    {
        "arrival_s": 0,
        "work": {"type": "FineTuning", "tokens": 100, "steps": 2, "sequence_tokens": 16, "batch_sequences": 1},
    },
)
REAL = ("backend=real", "model=tiny_llama", "engine=small", "hardware=cpu", "trace=deepflow", "progress=false")
FLEET = "fleet.groups=[{role: colocated, executors: 1},{role: cpu, executors: 1},{role: training, executors: 1}]"


def test_the_mixed_example(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Chat, agents and one fine-tuning job on one cluster: all end, are in the results, and replay bit for bit."""
    folder = tmp_path / "run"
    assert main(["run", *MIXED, f"out={folder}"]) == 0
    printed = capsys.readouterr().out
    assert "train jobs: 1 of 1 finished" in printed and "tools wait" in printed
    jobs, metrics = read_jobs(folder), read_summary(folder).metrics
    assert set(jobs.outcome) == {"finished"}
    assert set(jobs.kind) == {"agent", "preprocess", "train", "evaluate"}
    train = jobs[jobs.kind == "train"].iloc[0]
    assert (train.tokens, train.steps) == (11 * 65536, 11)
    assert metrics["train_tokens_per_s"] == pytest.approx(train.tokens / train.jct_s)
    assert train.npu_s == pytest.approx(8 * train.ran_s) == metrics["npu_seconds_busy_train"]
    assert metrics["npu_seconds"] == pytest.approx(metrics["npu_seconds_colocated"] + metrics["npu_seconds_training"])
    assert metrics["job_agent"] == (jobs.kind == "agent").sum() >= 3
    assert "Jobs other than serving" in (folder / "report.html").read_text()
    assert main(["replay", str(folder)]) == 0
    assert "all the same" in capsys.readouterr().out


@pytest.mark.pure
def test_a_look_into_a_run_with_jobs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The live table has a line per group of workers; simulated again from a snapshot, it is the same run."""
    folder = tmp_path / "run"
    options = [*MIXED[:-1], "report=false", "snapshot_at=3", "watch=true", f"out={folder}"]
    assert main(["run", *options]) == 0
    shown = capsys.readouterr().err
    assert "group cpu, ready 2, " in shown and "group training, ready 1, " in shown
    assert main(["inspect", str(folder), "t=5", "step=3"]) == 0
    said = capsys.readouterr().out
    assert "the same run so far" in said and "from its snapshot at 3" in said
    assert [line.split()[1] for line in said.splitlines() if line.startswith("  te-")][:7].count("cpu") == 2
    assert main(["inspect", str(folder), "t=300", f"request={read_jobs(folder).request_id[0]}"]) == 0
    assert ": agent finished" in capsys.readouterr().out
    resumed = tmp_path / "resumed"
    assert main(["run", f"resume={folder / 'snapshot.bin'}", "progress=false", "watch=false", f"out={resumed}"]) == 0
    assert (resumed / "decisions.jsonl").read_bytes() == (folder / "decisions.jsonl").read_bytes()
    assert (resumed / "timeline.json").read_bytes() == (folder / "timeline.json").read_bytes()
    assert read_jobs(resumed).equals(read_jobs(folder))


def test_jobs_alone(tmp_path: Path) -> None:
    """Without a trace there are only the requests that jobs make."""
    folder = tmp_path / "run"
    assert main(["run", "trace=none", *MIXED[:7], *MIXED[9:], "report=false", f"out={folder}"]) == 0
    assert read_summary(folder).provenance["trace"] == "jobs only"
    assert set(read_jobs(folder).outcome) == {"finished"}


def test_tools_wait_where_slots_are_few(tmp_path: Path) -> None:
    """One slot in place of eight: agents wait for tools, and take longer."""
    found = {}
    for slots in (1, 8):
        folder = tmp_path / str(slots)
        fleet = f"fleet.groups=[{{role: colocated, executors: 4}},{{role: cpu, executors: 1, slots: {slots}}}]"
        jobs = ("jobs=agents", "jobs.sources.0.sessions=12", "jobs.sources.0.rate=5", "jobs.sources.0.time_scale=0.1")
        more = ("jobs.sources.0.max_context=30000", "trace=none", "report=false", *MIXED[9:])
        assert main(["run", *jobs, *more, fleet, f"out={folder}"]) == 0
        found[slots] = read_summary(folder).metrics
    assert found[1]["tool_wait_mean_s"] > 10 * found[8]["tool_wait_mean_s"]
    assert found[1]["job_agent_jct_mean_s"] > found[8]["job_agent_jct_mean_s"]


@pytest.fixture
def trace(tmp_path: Path) -> str:
    path = tmp_path / "w.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return f"trace.reader.path={path}"


def test_workers_that_sleep(tmp_path: Path, trace: str) -> None:
    """On engines that only sleep, tools and training do too, through the same control plane, and replay."""
    folder = tmp_path / "run"
    assert main(["run", *REAL, "backend.device='null'", trace, FLEET, "report=false", f"out={folder}"]) == 0
    jobs = read_jobs(folder).set_index("kind")
    assert set(jobs.outcome) == {"finished"}
    assert jobs.jct_s["agent"] >= 0.05
    assert main(["replay", str(folder)]) == 0


def test_nothing_trains_on_a_device(trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Real training is refused before anything starts, and a workload that nothing runs where it comes."""
    assert main(["run", *REAL, trace, FLEET]) == 2
    assert "nothing here trains on a device; take backend=sim" in capsys.readouterr().err
    assert main(["run", *REAL[1:], trace, "fleet=colocated2", "coldstart=none"]) == 2
    assert "give fleet.groups executors of role cpu" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ("[{role: colocated, executors: 1},{role: cpu, executors: 1, npus: 2}]", "workers of role cpu take none"),
        ("[{role: colocated, executors: 1},{role: training, executors: 1, slots: 2}]", "slots is 2: allowed are 1"),
        ("[{role: cpu, executors: 1}]", "fleet.groups has only workers"),
    ],
)
def test_groups_of_workers_are_checked(groups: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A group that makes no sense is one line, and exit code 2."""
    assert main(["run", f"fleet.groups={groups}", "progress=false"]) == 2
    assert message in capsys.readouterr().err


def test_a_job_that_cannot_run_says_why(tmp_path: Path, trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Without training workers the fine-tuning request is refused, the rest is served."""
    fleet = "fleet.groups=[{role: colocated, executors: 1},{role: cpu, executors: 1}]"
    arguments = ("model=tiny_llama", "engine=small", "hardware=cpu", "trace=deepflow", "coldstart=none", "report=false")
    assert main(["run", *arguments, "progress=false", trace, fleet, f"out={tmp_path / 'run'}"]) == 0
    assert "1 train job refused: the fleet has no workers of role training" in capsys.readouterr().out
