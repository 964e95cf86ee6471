"""Profiles from logs of engines: what is read, what is refused and where, and a model that a simulation uses."""

from pathlib import Path

import pytest

from cluster.latency import StepShape
from experiments.step_logs import read_steps
from sim import profile as profiles
from tests.experiments.conftest import Command
from tests.experiments.small import NULL, SIM

HEADER = "duration_ms,prefill_tokens,prefill_chunks,prefill_context,decode_sequences,decode_context\n"


def file(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_tables_of_steps(tmp_path: Path) -> None:
    """A row per step, as CSV or JSON lines; keys that prompts attend to follow from what was cached before them."""
    table = file(tmp_path, "a.csv", HEADER + "12.5,100,2,30,3,900\n2,0,1,0,3,903\n")
    assert read_steps(table) == [
        (StepShape(100, 100 * (30 + 51) // 2, 2, 3, 900), 12_500_000),
        (StepShape(0, 0, 0, 3, 903), 2_000_000),
    ]
    lines = file(
        tmp_path, "a.jsonl", '{"duration_s": 0.004, "prefill_tokens": 4}\n{"duration_us": 7, "decode_sequences": 1}\n'
    )
    assert read_steps(lines) == [(StepShape(4, 10, 1, 0, 0), 4_000_000), (StepShape(0, 0, 0, 1, 0), 7000)]


def test_log_lines_of_vllm(tmp_path: Path) -> None:
    """What --enable-logging-iteration-details prints, among other lines; tokens beyond requests are guesses."""
    said = "Engine 000: Iteration({}): {} context requests, {} context tokens, {} generation requests, "
    said += "{} generation tokens"
    log = file(
        tmp_path,
        "serve.log",
        "INFO ready\n"
        + said.format(0, 1, 100, 2, 2)
        + ", iteration elapsed time: 10.50 ms, GPU KV cache usage: 1%\n"
        + said.format(1, 0, 0, 3, 6)
        + ", iteration elapsed time: 4.00 ms\n",
    )
    assert read_steps(log) == [
        (StepShape(100, 5050, 1, 2, 0), 10_500_000),
        (StepShape(0, 0, 0, 3, 0, 3), 4_000_000),
    ]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "prefill_tokens\n3\n", r"a\.csv, line 2: there is no duration: one of duration_s"),
        ("a.csv", HEADER + "1,2,1,0,0,0\nfast,2,1,0,0,0\n", r"a\.csv, line 3: duration_ms is 'fast', not a number"),
        ("a.csv", HEADER + "1,-2,1,0,0,0\n", r"line 2: prefill_tokens is -2: allowed are numbers from 0 up"),
        ("a.csv", HEADER + "1,0,1,0,0,0\n", r"line 2: .* a step takes time and computes something"),
        ("a.csv", HEADER, r"a\.csv: there is no step in it"),
        ("a.jsonl", "[1]\n", r"a\.jsonl, line 1: an object .* not '\[1\]'"),
        ("a.jsonl", "{\n", r"a\.jsonl, line 1: not JSON"),
        ("a.turns.jsonl", "{}\n", r"not a record of an engine's turns"),
        ("a.log", "Iteration(3): fast\n", r"a\.log, line 1: not an iteration as vLLM writes it"),
        ("a.parquet", "", r"allowed are \*\.turns\.jsonl, "),
    ],
)
def test_broken_logs_are_refused(name: str, text: str, message: str, tmp_path: Path) -> None:
    """By file, line and column."""
    with pytest.raises(ValueError, match=message):
        read_steps(file(tmp_path, name, text))


def test_a_profile_from_a_log(deepflow: Command, tmp_path: Path) -> None:
    """The times of a log are found again in the profile, which a simulation then uses."""
    rows = [
        f"{5 + 0.01 * tokens + 0.2 * batch},{tokens},1,0,{batch},{batch * 50}\n"
        for tokens in (0, 64, 256)
        for batch in range(1, 30)
    ]
    said = deepflow("profile", "--from", str(file(tmp_path, "steps.csv", HEADER + "".join(rows))), "out=fitted")
    assert said.code == 0, said
    profile = profiles.load(said.folder)
    assert (profile.model, profile.steps, profile.dispatch_s) == ("steps.csv", 87, None)
    assert profile.held_out.p90 < 0.02
    assert profiles.load_latency(said.folder).step_ns(StepShape(64, 2080, 1, 10, 500)) == pytest.approx(
        7.64e6, rel=0.02
    )
    assert deepflow("run", *SIM, "latency=profile", f"latency.path={said.folder}").code == 0


def test_a_profile_from_our_own_turns(deepflow: Command) -> None:
    """What backend.record leaves of a real run is such a log."""
    ran = deepflow("run", *NULL, "backend.record=true", "out=ran")
    assert ran.code == 0, ran
    said = deepflow("profile", "--from", "ran/engines/te-0.turns.jsonl", "ran/engines/te-1.turns.jsonl", "out=fitted")
    assert said.code == 0, said
    assert profiles.load(said.folder).engines == 2


def test_a_log_must_be_named(deepflow: Command) -> None:
    """And be there."""
    assert "name the logs to read" in deepflow("profile", "--from").err
    assert "nowhere.csv does not exist" in deepflow("profile", "--from", "nowhere.csv").err
