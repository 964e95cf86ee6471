"""The command line end to end: runs, their files, replays, sweeps."""

import json
import re
from pathlib import Path

import pytest

from experiments.cli import COMMANDS
from experiments.outputs import read_executors, read_requests, read_scaling, read_summary
from tests.experiments.conftest import Command
from tests.experiments.small import NULL, SIM, WORKLOAD

FILES = {
    "config.yaml",
    "decisions.jsonl",
    "executors.parquet",
    "report.html",
    "requests.parquet",
    "scaling.parquet",
    "summary.json",
    "timeline.json",
}
"""What design.md promises of a run, and the configuration that `replay` needs."""


# -- help ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_the_help_lists_the_commands(deepflow: Command, arguments: list[str]) -> None:
    """`deepflow` by itself says which commands there are, one line each."""
    said = deepflow(*arguments)
    assert said.code == 0
    assert [line.split()[0] for line in said.out.splitlines() if line.startswith("  ")] == list(COMMANDS)
    assert said.err == ""


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("option", ["--help", "-h"])
def test_every_command_has_help(deepflow: Command, command: str, option: str) -> None:
    """Each command says how it is used, and does nothing else."""
    said = deepflow(command, option)
    assert said.code == 0
    assert said.out.startswith(f"usage: deepflow {command}")
    assert said.err == ""
    assert list(Path().iterdir()) == []


def test_the_help_of_run_lists_every_option(deepflow: Command) -> None:
    """Groups and their options are listed as conf/ has them."""
    said = deepflow("run", "--help")
    assert "  dispatch         deepflow, least_outstanding, round_robin\n" in said.out
    assert "  backend          real, sim\n" in said.out


# -- run ----------------------------------------------------------------------------------------------------------


def test_a_simulated_run_writes_what_is_promised(deepflow: Command) -> None:
    """`deepflow run` leaves the files of design.md in a new folder below runs/, whose path is the last line."""
    said = deepflow("run", "coldstart=none", *WORKLOAD)
    assert said.code == 0
    assert said.folder.parent == Path("runs")
    assert {path.name for path in said.folder.iterdir()} == FILES
    summary = read_summary(said.folder)
    requests = read_requests(said.folder)
    assert summary.metrics["finished"] == summary.metrics["requests"] == len(requests) > 50
    assert set(requests["outcome"]) == {"finished"}
    assert set(read_executors(said.folder)["executor"]) == {f"te-{number}" for number in range(4)}
    assert list(read_scaling(said.folder)["what"]).count("ready") == 4
    assert summary.provenance["backend"] == "sim"
    assert summary.provenance["seed"] == 0
    assert summary.provenance["basis"].startswith("derived")
    assert summary.provenance["stand_in"] is False
    assert "traceEvents" in json.loads((said.folder / "timeline.json").read_text())
    assert "LeastOutstanding" in said.out
    assert said.err == ""


def test_a_real_run_writes_the_same_files(deepflow: Command) -> None:
    """A run on engine processes leaves the same files, and the logs of its engines."""
    said = deepflow("run", *NULL)
    assert said.code == 0, said
    assert {path.name for path in said.folder.iterdir()} == FILES - {"report.html"} | {"engines"}
    assert {path.name for path in (said.folder / "engines").iterdir()} == {"te-0.log", "te-1.log", "metrics.prom"}
    summary = read_summary(said.folder)
    assert summary.metrics["finished"] == 60
    assert summary.metrics["lag_max_s"] >= 0
    assert summary.provenance["backend"] == "real"
    assert "sleep" in summary.provenance["basis"]


def test_a_real_run_on_a_model_of_ones_own(deepflow: Command, tmp_path: Path) -> None:
    """`model.folder=FOLDER` serves any supported model; here a mixture of experts in bfloat16."""
    from flowserve.runtime.checkpoint import CheckpointShape, make_checkpoint

    shape = CheckpointShape(family="qwen3_moe", num_layers=2, num_experts=8, experts_per_token=2, expert_size=64)
    folder = make_checkpoint("mixture", shape, tmp_path)
    model = ["backend.device=cpu", "backend.dtype=bfloat16", f"model.folder={folder}"]
    said = deepflow("run", *NULL, *model, "fleet.groups.0.executors=1", "trace.limit=5", "report=true")
    assert said.code == 0, said
    summary = read_summary(said.folder)
    assert summary.metrics["finished"] == 5
    assert folder.name in (said.folder / "report.html").read_text(encoding="utf-8")


def test_a_run_on_engines_that_speculate(deepflow: Command, tmp_path: Path) -> None:
    """The summary says how many guesses there were and what share was right: all, of a model for itself."""
    from flowserve.runtime.checkpoint import CheckpointShape, make_checkpoint

    folder = make_checkpoint("one-layer", CheckpointShape(num_layers=1), tmp_path)
    model = ["backend.device=cpu", f"model.folder={folder}", "engine.drafter=model", f"backend.draft_model={folder}"]
    options = ["fleet.groups.0.executors=1", "trace.limit=8", "engine.speculative_tokens=3", "report=true"]
    said = deepflow("run", *NULL, *model, *options)
    assert said.code == 0, said
    metrics = read_summary(said.folder).metrics
    assert metrics["finished"] == 8
    assert metrics["draft_tokens"] > metrics["accepted_tokens"] > 0  # ends cut what was guessed
    assert metrics["draft_acceptance"] == 1


@pytest.mark.parametrize("device", ["null", "'null'", '"null"'])
def test_null_engines_by_any_spelling(deepflow: Command, device: str) -> None:
    """What a shell or YAML makes of backend.device="null" is always the engine that sleeps."""
    said = deepflow("run", *NULL, f"backend.device={device}", "trace.limit=3")
    assert said.code == 0
    assert "sleep" in read_summary(said.folder).provenance["basis"]


def test_a_folder_of_ones_own(deepflow: Command) -> None:
    """`out=FOLDER` names the folder of the results."""
    said = deepflow("run", *SIM, "out=mine/first", "decisions=false")
    assert said.code == 0
    assert said.folder == Path("mine/first")
    assert {path.name for path in said.folder.iterdir()} == FILES - {"report.html", "decisions.jsonl"}


def test_one_seed_one_result(deepflow: Command) -> None:
    """The same seed gives the same metrics, the same table of requests and the same decisions; another does not."""
    seeds = {"a": 3, "b": 3, "c": 4}
    folders = [deepflow("run", *SIM, f"out={out}", f"seed={seed}").folder for out, seed in seeds.items()]
    first, second, other = ({**read_summary(folder).metrics, "wall_s": 0, "startup_s": 0} for folder in folders)
    assert str(first) == str(second) != str(other)
    assert read_requests(folders[0]).equals(read_requests(folders[1]))
    assert not read_requests(folders[0]).equals(read_requests(folders[2]))
    a, b = ((folder / "decisions.jsonl").read_bytes() for folder in folders[:2])
    assert a == b


def test_failed_requests_are_explained(deepflow: Command) -> None:
    """A run says on the screen how many requests did not finish and why; exit code 1 where none did."""
    some = deepflow("run", *SIM, "engine.kv_blocks=12", "trace.prompt_scale=2")
    assert some.code == 0
    failed = read_summary(some.folder).metrics["failed"]
    assert failed > 0
    requests = read_summary(some.folder).metrics["requests"]
    assert f"{failed} of {requests} requests failed: prompt and output limit do not fit" in some.out
    none = deepflow("run", *SIM, "engine.kv_blocks=1", "trace.prompt_scale=20")
    assert none.code == 1
    assert f"{requests} of {requests} requests failed" in none.out


def test_a_stand_in_says_that_it_is_one(deepflow: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where the trace's file is not found, its generator stands in, and screen and summary say so."""
    monkeypatch.delenv("DEEPFLOW_TRACES", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    said = deepflow("run", "coldstart=none", "report=false", "trace.duration_s=10", "progress=false")
    assert said.code == 0
    (line,) = [line for line in said.out.splitlines() if line.startswith("trace: ")]
    assert "stand-in" in line
    assert "DEEPFLOW_TRACES" in line
    provenance = read_summary(said.folder).provenance
    assert provenance["stand_in"] is True
    assert line == f"trace: {provenance['trace']}"


def test_an_injected_failure(deepflow: Command) -> None:
    """`backend.failures` kills a simulated executor; its requests are served by others."""
    said = deepflow("run", *SIM, "backend.failures=[{at_s: 5, executor: te-1}]")
    assert said.code == 0
    metrics = read_summary(said.folder).metrics
    assert metrics["finished"] == metrics["requests"]
    assert metrics["failed_tasks"] > 0
    assert "failed" in set(read_scaling(said.folder)["what"])
    assert deepflow("replay", str(said.folder)).code == 0


# -- replay -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [SIM, (*SIM, "fleet=mixed", "dispatch=deepflow", "job_executors=2"), NULL])
def test_a_run_replays(deepflow: Command, arguments: tuple[str, ...]) -> None:
    """`deepflow replay` of a simulated or real run says that all decisions were the same."""
    folder = deepflow("run", *arguments).folder
    said = deepflow("replay", str(folder))
    assert said.code == 0
    lines = (folder / "decisions.jsonl").read_text().count("\n")
    assert said.out.splitlines() == [f"{lines - 1} decisions, all the same", str(folder)]


def _edit(folder: Path, line: int, edit: object) -> None:
    """Change one line of the log, counted from 1; None: delete it."""
    lines = (folder / "decisions.jsonl").read_text().splitlines(keepends=True)
    lines[line - 1] = "" if edit is None else edit(lines[line - 1])  # type: ignore[operator]
    (folder / "decisions.jsonl").write_text("".join(lines))


def _first(folder: Path, text: str) -> int:
    """The number of the first line with this text."""
    lines = (folder / "decisions.jsonl").read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if text in line)


@pytest.mark.parametrize(
    ("what", "edit"),
    [
        ('"DispatchTask"', lambda line: re.sub(r'"executor":"te-\d"', '"executor":"te-9"', line)),
        ('"DispatchTask"', lambda line: line.replace('"actions":[', '"actions":[{"type":"EndRun"},')),
        ('"RequestArrived"', lambda line: line.replace('"to":"je-0"', '"to":"nobody"')),
        ('"TaskFinished"', None),
    ],
    ids=["another executor", "another action", "another actor", "a line less"],
)
def test_a_tampered_log_is_found_out(deepflow: Command, what: str, edit: object) -> None:
    """A log that was changed gives exit code 1 and the line where it differs."""
    folder = deepflow("run", *SIM, "trace.limit=10").folder
    line = _first(folder, what)
    _edit(folder, line, edit)
    said = deepflow("replay", str(folder))
    assert said.code == 1
    assert said.out.startswith(f"decisions.jsonl:{line}: ")
    assert said.folder == folder


def test_a_log_that_was_cut(deepflow: Command) -> None:
    """A log with half a line is an error that names the file and the line."""
    folder = deepflow("run", *SIM, "trace.limit=10").folder
    _edit(folder, 7, lambda line: line[:40])
    said = deepflow("replay", str(folder))
    assert (said.code, said.out) == (2, "")
    assert said.err.startswith(f"deepflow: error: {folder / 'decisions.jsonl'}:7: ")
    assert said.err.count("\n") == 1


def test_another_policy_decides_otherwise(deepflow: Command) -> None:
    """Replayed with another policy in its configuration, a run is not the same."""
    folder = deepflow("run", *SIM, "dispatch=round_robin", "trace.rate=4").folder
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("round_robin.RoundRobin", "least_outstanding.LeastOutstanding"))
    assert deepflow("replay", str(folder)).code == 1


# -- sweep --------------------------------------------------------------------------------------------------------


def test_a_sweep_compares_its_runs(deepflow: Command) -> None:
    """`deepflow sweep` runs every combination, and leaves a folder per run and one report."""
    said = deepflow(
        "sweep", "dispatch=round_robin,least_outstanding", "seed=1,2", "coldstart=none", *WORKLOAD, "decisions=false"
    )
    assert said.code == 0, said
    assert sorted(path.name for path in said.folder.iterdir() if path.is_dir()) == ["0", "1", "2", "3"]
    assert (said.folder / "report.html").is_file()
    rows = [line.partition("   ")[0].split() for line in said.out.splitlines() if "dispatch=" in line]
    assert [row[:2] for row in rows] == [
        [f"dispatch={policy}", f"seed={seed}"] for policy in ("round_robin", "least_outstanding") for seed in (1, 2)
    ]
    policies = [read_summary(said.folder / str(number)).provenance["config"]["dispatch"] for number in range(4)]
    assert len({str(policy) for policy in policies}) == 2
    assert deepflow("run", *SIM, "trace.limit=5").code == 0  # Hydra can be used again
