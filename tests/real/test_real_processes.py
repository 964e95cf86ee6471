"""Engine processes: how they start, how they fail to, and that none outlives its run."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster import events as ev
from cluster.actions import LaunchExecutor
from cluster.manager import GroupPlan
from flowserve.core.config import EngineConfig
from flowserve.runtime.wire import TorchDevice
from real.cluster import Engine, RealCluster
from tests.builders import make_arrival, make_spec
from tests.contract.backends import ACTORS, Driver, real_cluster
from tests.real.engines import alive, engine_processes, run_real, shared_memory

GUARD_S = 60.0
COMMAND = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have started us with Ctrl-C ignored
from experiments.cli import main
sys.exit(main(sys.argv[1:]))
"""


DIES_AT_ONCE = """
import os, signal
from cluster.actions import LaunchExecutor
from tests.builders import make_spec
from tests.contract.backends import real_cluster
cluster = real_cluster()
cluster.submit(LaunchExecutor("te-0", make_spec()))
print(cluster.process_ids()["te-0"], flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def wait_until(happened: Callable[[], object], what: str) -> None:
    """Guard against waiting for ever: nothing is asserted about speed."""
    until = time.monotonic() + GUARD_S
    while not happened():
        assert time.monotonic() < until, f"waited in vain until {what}"
        time.sleep(0.01)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in which everything temporary goes, here and in processes started from here."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return folder


@pytest.mark.parametrize("error", [False, True])
def test_nothing_is_left_after_close(temporary: Path, error: bool) -> None:
    """After close, also on an exception, no process, socket, file or shared memory of the cluster is left."""
    before = len(os.listdir("/proc/self/fd"))
    pids: list[int] = []

    def serve() -> None:
        with real_cluster() as cluster:
            driver = Driver(cluster)
            driver.launch("te-0")
            driver.submit(LaunchExecutor("te-1", make_spec()))
            driver.dispatch("te-0", driver.open(0, output=5000), 0)
            driver.wait(ev.FirstToken)
            pids.extend(cluster.process_ids().values())
            assert len(pids) == 2
            assert all(alive(pid) for pid in pids)
            assert list(temporary.iterdir())
            if error:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) if error else contextlib.nullcontext():
        serve()
    assert [pid for pid in pids if alive(pid)] == []
    assert list(temporary.iterdir()) == []
    assert shared_memory() == set()
    assert len(os.listdir("/proc/self/fd")) <= before


def test_logs_and_records(tmp_path: Path) -> None:
    """What an engine says goes to its log, and with `record` every turn of its loop to a file beside it."""
    with real_cluster(log_dir=tmp_path, record=True, pin=True) as cluster:
        driver = Driver(cluster)
        driver.launch("te-0")
        driver.serve("te-0", 0, 0)
    assert '"event": "told to stop"' in (tmp_path / "te-0.log").read_text()
    (record,) = [path for path in tmp_path.iterdir() if path.suffix == ".jsonl"]
    assert record.read_text().count("\n") >= 10


@pytest.fixture
def broken_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Lets engine processes find a torch whose import raises what is given."""

    def breaks(error: str) -> None:
        (tmp_path / "path" / "torch").mkdir(parents=True)
        (tmp_path / "path" / "torch" / "__init__.py").write_text(f"raise {error}\n")
        monkeypatch.syspath_prepend(str(tmp_path / "path"))

    return breaks


def test_an_engine_that_cannot_start_says_why(tmp_path: Path, broken_torch: Callable[[str], None]) -> None:
    """An engine whose set-up raises is reported as failed in words; its log has the traceback."""
    broken_torch("ImportError('this torch is broken')")
    engine = Engine(EngineConfig(kv_blocks=10), TorchDevice("nowhere"))
    with RealCluster(ACTORS, lambda spec: engine, lambda model: 1000, log_dir=tmp_path) as cluster:
        driver = Driver(cluster)
        driver.submit(LaunchExecutor("te-0", make_spec()))
        failed = driver.wait(ev.ExecutorFailed)
        assert (failed.to, failed.executor) == ("cm", "te-0")
        assert failed.reason == "ImportError: this torch is broken"
        assert driver.of(ev.ExecutorReady) == []
        assert cluster.process_ids() == {}
    assert "Traceback" in (tmp_path / "te-0.log").read_text()


@pytest.mark.parametrize(
    ("error", "launches"), [("ImportError: this torch is broken", 1), ("RuntimeError: the device is busy", 3)]
)
def test_a_fleet_that_cannot_start(broken_torch: Callable[[str], None], error: str, launches: int) -> None:
    """The cluster manager gives up after one launch that no other can better, else after three: all requests fail with
    the reason, and the run ends.
    """
    broken_torch("{}('{}')".format(*error.split(": ")))
    run = run_real(
        [make_arrival(n, at_s=0.01 * n) for n in range(5)],
        groups=[GroupPlan(make_spec(), 1, 1, 1)],
        device=TorchDevice("nowhere"),
    )
    assert [event.executor for event in run.of(ev.ExecutorFailed)] == ["te-0", "te-1", "te-2"][:launches]
    assert run.ends == dict.fromkeys(range(5), ("failed", 0))
    assert set(run.recorder.reasons) == {f"no executor for m could be launched: {error}"}
    assert not any(alive(pid) for pid in run.pids.values())


@pytest.fixture
def process(temporary: Path, tmp_path: Path) -> "Iterator[subprocess.Popen[str]]":
    """`deepflow run` on null engines that both serve, with far more work than the test waits for."""
    arguments = [
        "run",
        "backend=real",
        "backend.device=null",
        "backend.record=true",
        "backend.step_s=0.005",
        "model=tiny_llama",
        "engine=small",
        "hardware=cpu",
        "fleet=colocated2",
        "trace=synthetic",
        "trace.prompt_scale=0.1",
        "trace.rate=4",
        "report=false",
        f"out={tmp_path / 'run'}",
    ]
    with subprocess.Popen(
        [sys.executable, "-c", COMMAND, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            wait_until(lambda: serving(tmp_path / "run") or process.poll() is not None, "the engines serve")
            yield process
        finally:
            process.kill()


def serving(folder: Path) -> bool:
    """Both engines have run some steps."""
    records = list((folder / "engines").glob("*.jsonl"))
    return len(records) == 2 and all(path.stat().st_size > 20_000 for path in records)


def test_ctrl_c_ends_a_run_tidily(process: "subprocess.Popen[str]", temporary: Path, tmp_path: Path) -> None:
    """Ctrl-C in the middle of a run: exit code 130, results of what was done until then, no process, no file left."""
    engines = engine_processes(process.pid)
    assert len(engines) == 2
    os.killpg(process.pid, signal.SIGINT)  # a terminal signals the whole group
    output, errors = process.communicate(timeout=GUARD_S)
    assert process.returncode == 130, errors
    assert [pid for pid in engines if alive(pid)] == []
    assert list(temporary.iterdir()) == []
    assert "Traceback" not in errors
    lines = output.splitlines()
    assert any(line.startswith("interrupted") for line in lines)
    assert lines[-1] == str(tmp_path / "run")
    from experiments.outputs import read_requests, read_summary

    summary = read_summary(tmp_path / "run").metrics
    requests = read_requests(tmp_path / "run")
    assert summary["requests"] == len(requests) > 0
    assert summary["unfinished"] == (requests["outcome"] == "unfinished").sum()
    assert (tmp_path / "run" / "decisions.jsonl").read_bytes().endswith(b"}\n")


def test_engines_do_not_outlive_a_killed_driver(process: "subprocess.Popen[str]") -> None:
    """When the driving process is killed, its engines end by themselves."""
    engines = engine_processes(process.pid)
    assert len(engines) == 2
    process.kill()
    process.communicate(timeout=GUARD_S)
    wait_until(lambda: not any(alive(pid) for pid in engines), "the engines have ended")


@pytest.mark.usefixtures("temporary")
def test_engines_do_not_outlive_a_driver_killed_at_once() -> None:
    """Engines end by themselves also when the driver dies before they could ask to be told."""
    driver = subprocess.run([sys.executable, "-c", DIES_AT_ONCE], stdout=subprocess.PIPE, timeout=GUARD_S)
    assert driver.returncode == -signal.SIGKILL
    pid = int(driver.stdout)
    wait_until(lambda: not alive(pid), "the engine has ended")
