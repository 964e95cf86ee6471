"""Logs of engine processes: JSON lines that tell start-up, failures and the end."""

import json
from pathlib import Path

import pytest

from flowserve.core.config import EngineConfig
from flowserve.runtime.log import engine_logger, last_words
from flowserve.runtime.wire import TorchDevice
from tests.builders import make_arrival
from tests.real.engines import run_real


def entries(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_in_its_log(tmp_path: Path) -> None:
    """Stages with their times, readiness with the limits, a task that cannot run as a warning, the end."""
    workload = [make_arrival(0), make_arrival(1, prompt=10_000)]
    run_real(workload, engine=EngineConfig(kv_blocks=50), log_dir=tmp_path)
    lines = entries(tmp_path / "te-0.log") + entries(tmp_path / "te-1.log")
    assert all(list(line)[:4] == ["time", "level", "executor", "event"] for line in lines)
    first = [line for line in lines if line["executor"] == "te-0"]
    assert [line["stage"] for line in first if "stage" in line] == ["te_pre_load", "te_load", "te_post_load"]
    assert all(isinstance(line["seconds"], float) and line["seconds"] >= 0 for line in first if "stage" in line)
    assert next(line["engine"] for line in first if line["event"] == "ready")["kv_blocks"] == 50  # type: ignore[index]
    assert first[-1]["event"] == "told to stop"
    (failed,) = [line for line in lines if line["level"] == "warning"]
    assert (failed["event"], failed["request_id"]) == ("task failed", 1)


def test_levels(tmp_path: Path) -> None:
    """`debug` tells of every task, `error` of nothing in a run that goes well; another word is refused."""
    run_real([make_arrival(0)], log_dir=tmp_path, log_level="debug")
    events = [line["event"] for name in ("te-0", "te-1") for line in entries(tmp_path / f"{name}.log")]
    assert events.count("task finished") == 1
    run_real([make_arrival(0)], log_dir=tmp_path, log_level="error")
    assert (tmp_path / "te-0.log").read_text() == (tmp_path / "te-1.log").read_text() == ""
    with pytest.raises(ValueError, match="log_level is 'loud': allowed are debug, info, warning, error"):
        run_real([], log_level="loud")
    with pytest.raises(ValueError, match="log_level is 'loud'"):
        engine_logger("te-0", "loud")


def test_a_crash_in_its_log(tmp_path: Path) -> None:
    """The traceback is in the log as one entry, and the last words are the error itself."""
    run_real([make_arrival(0)], device=TorchDevice(str(tmp_path / "nowhere")), log_dir=tmp_path)
    crashed = entries(tmp_path / "te-0.log")[-1]
    assert crashed["event"] == "crashed" and "Traceback" in str(crashed["error"])
    assert last_words((tmp_path / "te-0.log").read_text()).startswith("ValueError: ")
    assert last_words("plain text\n\n") == "plain text" and last_words("") == "" and last_words("12\n") == "12"
