"""The live table of a running experiment: on a terminal, in a log, and what it says."""

import importlib
import io
import re

import pytest

from experiments import compose, run
from experiments.watch import Watch
from tests.experiments.test_progress import Terminal

module = importlib.import_module("experiments.run")
RUN = ["trace=synthetic", "trace.duration_s=60", "report=false", "fleet=pd_1p1d", "dispatch=deepflow", "watch=true"]


def watched(monkeypatch: pytest.MonkeyPatch, tmp_path, stream: io.StringIO, every_s: float) -> list[str]:
    """What a run says on `stream`, drawn every so many seconds."""

    class Often(Watch):
        def __init__(self, control, total, label) -> None:
            super().__init__(control, total, label, stream=stream)
            self._every_s = every_s

    monkeypatch.setattr(module, "Watch", Often)
    run(compose(RUN), tmp_path)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue()).splitlines()


def test_in_a_log_each_group_is_a_line(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """A line of progress, then one per TE group with executors, queues, KV cache, TTFT and rate; last how it ended."""
    lines = watched(monkeypatch, tmp_path, io.StringIO(), 0.0)
    assert len(lines) % 3 == 0
    assert len(lines) > 3
    head, prefill, decode = lines[-3:]
    assert re.match(r"sim run: [\d,]+ requests, .* at [\d.,]+x, ", head)
    assert prefill.startswith("  group prefill llama3-8b, ready 1, start 0, drain 0, wait 0, run 0, KV ")
    assert re.search(r" KV \d+%, TTFT p50 [\d.]+ ms, req/s [\d.]+$", prefill)
    assert re.fullmatch(r"  group decode llama3-8b, ready 1, .*, TTFT p50 –, req/s –", decode)


def test_on_a_terminal_it_is_a_table(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """Both groups stand in one table under the line of progress, and the cursor is back at the end."""
    out = Terminal()
    lines = watched(monkeypatch, tmp_path, out, 0.0)
    assert any(line.split()[:2] == ["group", "ready"] for line in lines)
    assert sum("prefill" in line for line in lines[-4:]) == 1
    assert "\x1b[?25h" in out.getvalue()


def test_off_it_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """Without `watch=true` nothing of it is even made."""

    def never(*arguments: object) -> None:
        raise AssertionError("made")

    monkeypatch.setattr(module, "Watch", never)
    run(compose([*RUN[:-1], "progress=false"]), tmp_path)
