"""`deepflow traces`: list, stats, convert, generate."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.experiments.conftest import Command
from tests.experiments.small import SIM
from traces.catalog import KNOWN


def test_known_traces_are_listed(deepflow: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every known trace is listed with its licence and where it lies, or that it was not found."""
    (tmp_path / "here" / "azure2023").mkdir(parents=True)
    file = tmp_path / "here" / KNOWN["azure2023_conv"].file
    file.write_text("")
    monkeypatch.setenv("DEEPFLOW_TRACES", str(tmp_path / "here"))
    monkeypatch.setenv("HOME", str(tmp_path))
    said = deepflow("traces", "list")
    assert said.code == 0
    lines = {line.split()[0]: line for line in said.out.splitlines() if not line.startswith(" ")}
    assert set(KNOWN) <= set(lines)
    assert lines["azure2023_conv"].endswith(str(file))
    assert lines["azure2023_code"].endswith("not found")
    assert str(tmp_path / "here") in said.out.splitlines()[-1]
    assert "CC-BY-4.0" in said.out


def test_generate_convert_and_describe(deepflow: Command) -> None:
    """A generated workload can be described, converted, and run; a conversion keeps every number."""
    said = deepflow(
        "traces", "generate", "azure2023_conv", "made.jsonl", "--rate", "4", "--duration", "30", "--seed", "5"
    )
    assert said.code == 0
    count = len(Path("made.jsonl").read_text().splitlines())
    assert said.out.splitlines() == [f"{count} requests", "made.jsonl"]
    assert 80 < count < 160
    assert deepflow("traces", "convert", "made.jsonl", "made.csv").folder == Path("made.csv")
    described = [deepflow("traces", "stats", name).out for name in ("made.jsonl", "made.csv")]
    assert described[0] == described[1]
    assert str(count) in described[0]
    ran = deepflow("run", *SIM[:2], "trace=deepflow", "trace.reader.path=made.csv", "progress=false")
    assert ran.code == 0
    again = deepflow(
        "traces", "generate", "azure2023_conv", "same.jsonl", "--rate", "4", "--duration", "30", "--seed", "5"
    )
    assert again.code == 0
    assert Path("same.jsonl").read_bytes() == Path("made.jsonl").read_bytes()


def test_a_known_trace(deepflow: Command, trace_file: Callable[[str], Path]) -> None:
    """A known trace is described by its name, and by its path with its format."""
    path = trace_file("mooncake/conversation_trace.jsonl")
    by_name = deepflow("traces", "stats", "mooncake_conversation")
    assert by_name.code == 0
    assert "12031" in by_name.out.replace(",", "").replace("\u202f", "")
    assert deepflow("traces", "stats", str(path), "--format", "mooncake").out == by_name.out
