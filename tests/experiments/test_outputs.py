"""The files of a run: what is in them, that they can be read back, and what is said when they cannot."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster import events as ev
from cluster.actions import LaunchExecutor
from cluster.client import Client
from cluster.metrics import Slo, Window, summarise
from cluster.recorder import Recorder
from cluster.request import Request
from cluster.vocabulary import ExecutorSpec, Outcome, Role, Stage, to_ns
from experiments import outputs
from experiments.outputs import SCHEMAS, read_executors, read_requests, read_scaling, read_summary, write_run

SLO = Slo(ttft_s=1.0, tpot_s=0.2)
WINDOW = Window(warmup_s=0.5)
SPEC = ExecutorSpec("m", Role.COLOCATED, npus=2)


def recorded() -> Recorder:
    """Two executors, one of which dies, and five requests: on time, late, single token, refused, unfinished."""
    client, recorder = Client([], ("je-0",), np.random.default_rng(0)), Recorder()

    def hear(event: ev.Event, *actions: LaunchExecutor) -> None:
        recorder.record(event, actions, client)

    launches = [LaunchExecutor(f"te-{number}", SPEC) for number in range(2)]
    hear(ev.RunStarted(to="cm", time=0, occurred=0), *launches)
    for number, name in enumerate(("te-0", "te-1")):
        at = to_ns(0.25 * (number + 1))
        hear(
            ev.StageFinished(
                to="cm", time=at, occurred=at, executor=name, stage=Stage.TE_LOAD, took_ns=to_ns(0.2), source="dram"
            )
        )
        ready = ev.ExecutorReady(
            to="cm", time=at, occurred=at, executor=name, spec=SPEC, kv_blocks=100, block_tokens=16, max_sequences=8
        )
        hear(ready)
    # (id, arrival, first token, last token, tokens), seconds
    served = [(0, 1.0, 1.5, 2.5, 11), (1, 1.25, 3.25, 4.25, 11), (2, 1.5, 1.75, 1.75, 1)]
    for request_id, arrival, first, last, tokens in served:
        arrive(client, hear, request_id, arrival)
        at = to_ns(first)
        hear(ev.FirstToken(to="je-0", time=at, occurred=at, request_id=request_id, task_id=0, executor="te-0"))
        at = to_ns(last)
        times = [round(time) for time in np.linspace(to_ns(first), at, tokens)] if tokens > 1 else [at]
        hear(
            ev.TaskFinished(
                to="je-0",
                time=at,
                occurred=at,
                request_id=request_id,
                task_id=0,
                executor="te-0",
                generated=tokens,
                stopped=True,
                tokens=tokens,
                last_token_ns=at,
                token_times=ev.pack_times(times),
                cached_tokens=16,
            )
        )
        end(hear, request_id, last, Outcome.FINISHED, tokens)
    arrive(client, hear, 3, 2.0)
    end(hear, 3, 2.0, Outcome.REFUSED, 0, "too <long>")
    arrive(client, hear, 4, 2.25)
    for number in range(4):
        at = to_ns(1.0 + number)
        report = ev.LoadReport(
            to="cm",
            time=at + to_ns(0.01),
            occurred=at,
            executor=f"te-{number % 2}",
            waiting=number,
            running=2,
            waiting_tokens=10 * number,
            free_blocks=60,
            cached_blocks=5,
            total_blocks=100,
            generated_tokens=7 * number,
            preemptions=0,
        )
        hear(report)
    at = to_ns(4.5)
    hear(ev.ExecutorFailed(to="cm", time=at, occurred=at, executor="te-1", reason="gone"))
    recorder.censor()
    return recorder


def arrive(client, hear, request_id: int, at_s: float) -> None:
    client.due[request_id] = to_ns(at_s)
    request = Request(request_id, 100, 512, "m")
    hear(ev.RequestArrived(to="je-0", time=to_ns(at_s), occurred=to_ns(at_s), request=request))


def end(hear, request_id: int, at_s: float, outcome: Outcome, generated: int, reason: str = "") -> None:
    at = to_ns(at_s)
    ended = ev.RequestEnded(
        to="client", time=at, occurred=at, request_id=request_id, outcome=outcome, generated=generated, reason=reason
    )
    hear(ended)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    recorder = recorded()
    provenance = {"backend": "sim", "seed": 7, "path": Path("x"), "limit": math.inf, "spread": np.float64(0.5)}
    write_run(tmp_path / "run", recorder, summarise(recorder, SLO), provenance, SLO, WINDOW)
    return tmp_path / "run"


def test_all_files_carry_their_schema(folder: Path) -> None:
    """A run's folder has the five files, each with the version of its schema, and no leftovers."""
    expected = {name: schema for name, schema in SCHEMAS.items() if name != "jobs.parquet"}  # it had no jobs
    assert {path.name for path in folder.iterdir()} == set(expected)
    for name, schema in expected.items():
        if name.endswith(".parquet"):
            assert pq.read_schema(folder / name).metadata[b"deepflow.schema"] == schema.encode()
    assert json.loads((folder / "summary.json").read_text())["schema"] == "deepflow-summary/1"
    assert json.loads((folder / "timeline.json").read_text())["otherData"]["schema"] == "deepflow-timeline/2"


def test_requests_hold_the_columns_of_the_recorder(folder: Path) -> None:
    """Every column that was recorded comes back as it was, with null for what never happened."""
    recorder, table = recorded(), read_requests(folder)
    for name in Recorder.REQUEST_COLUMNS:
        assert table[name].fillna(-1).astype(int).tolist() == list(recorder.requests[name]), name
    assert table.outcome.tolist() == ["finished", "finished", "finished", "refused", "unfinished"]
    assert table.reason[3] == "too <long>"
    assert table.executor.tolist() == ["te-0", "te-0", "te-0", "", ""]
    assert pq.read_schema(folder / "requests.parquet").field("first_token_ns").type == pa.int64()


def test_requests_hold_what_the_metrics_are_made_of(folder: Path) -> None:
    """Latencies, and which objectives were met, are those of cluster.metrics."""
    table = read_requests(folder)
    assert table.ttft_s.tolist()[:3] == [0.5, 2.0, 0.25]
    assert table.tpot_s.tolist()[:2] == [pytest.approx(0.1), pytest.approx(0.1)]
    assert table.e2e_s.tolist()[:3] == [1.5, 3.0, 0.25]
    assert table.loc[2:, "tpot_s"].isna().all()
    assert table.loc[3:, ["ttft_s", "e2e_s"]].isna().all().all()
    assert table.slo_met.tolist() == [True, False, True, False, False]
    assert table.ttft_met.tolist() == [True, False, True, False, False]
    assert table.tpot_met.tolist() == [True, True, True, False, False]
    assert table.e2e_met.isna().all()
    assert table.slo_met.mean() == read_summary(folder).metrics["slo_attainment"]


def test_the_measured_window_is_marked(tmp_path: Path) -> None:
    """Requests outside of warm-up and cool-down stay in the table, and are marked."""
    recorder = recorded()
    write_run(tmp_path, recorder, {}, {}, SLO, Window(warmup_s=0.3, cooldown_s=0.25))
    assert read_requests(tmp_path).in_window.tolist() == [False, False, True, True, False]
    write_run(tmp_path, recorder, {}, {}, SLO, Window(warmup_s=9))
    assert not read_requests(tmp_path).in_window.any()


def test_load_reports_and_scaling_come_back(folder: Path) -> None:
    """Load reports have blocks in use and their age, scaling has stages and ends, in seconds."""
    loads, scaling = read_executors(folder), read_scaling(folder)
    assert loads.time_s.tolist() == [1.0, 2.0, 3.0, 4.0]
    assert loads.executor.tolist() == ["te-0", "te-1", "te-0", "te-1"]
    assert loads.age_s.tolist() == pytest.approx([0.01] * 4)
    assert loads.kv_used.tolist() == [40] * 4
    assert loads.kv_total.tolist() == [100] * 4
    assert loads.waiting_tokens.tolist() == [0, 10, 20, 30]
    stages = scaling[scaling.what == "te_load"]
    assert stages.took_s.tolist() == [0.2, 0.2]
    assert stages.source.tolist() == ["dram", "dram"]
    assert scaling.what.tolist()[:2] == ["launch", "launch"]
    assert scaling.iloc[-1].tolist() == [4.5, "te-1", "failed", 0.0, ""]


def test_summary_comes_back(folder: Path) -> None:
    """Metrics, objectives, window and provenance survive; what JSON does not know becomes null or text."""
    text = (folder / "summary.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    summary = read_summary(folder)
    assert (summary.slo, summary.window) == (SLO, WINDOW)
    expected = summarise(recorded(), SLO)
    assert summary.metrics.keys() == expected.keys()
    assert all(summary.metrics[key] == pytest.approx(expected[key], nan_ok=True) for key in expected)
    assert isinstance(summary.metrics["requests"], int)
    assert summary.provenance == {"backend": "sim", "seed": 7, "path": "x", "limit": None, "spread": 0.5}


def test_a_number_that_is_none_is_null_and_comes_back_as_nan(tmp_path: Path) -> None:
    """A metric nobody has a value for is null in JSON and NaN in Python."""
    recorder = Recorder()
    write_run(tmp_path, recorder, summarise(recorder, SLO), {}, SLO, WINDOW)
    assert json.loads((tmp_path / "summary.json").read_text())["metrics"]["ttft_p50_s"] is None
    assert math.isnan(read_summary(tmp_path).metrics["ttft_p50_s"])


def test_nothing_recorded_gives_empty_tables_of_the_same_types(tmp_path: Path, folder: Path) -> None:
    """An empty run has the columns, and the types, of any other."""
    write_run(tmp_path / "empty", Recorder(), {}, {}, SLO, WINDOW)
    for name, read in (
        ("requests.parquet", read_requests),
        ("executors.parquet", read_executors),
        ("scaling.parquet", read_scaling),
    ):
        assert len(read(tmp_path / "empty")) == 0
        assert pq.read_schema(tmp_path / "empty" / name).equals(pq.read_schema(folder / name)), name


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("requests.parquet", read_requests),
        ("executors.parquet", read_executors),
        ("scaling.parquet", read_scaling),
        ("summary.json", read_summary),
    ],
)
def test_a_missing_or_broken_file_is_said_so(folder: Path, name: str, read) -> None:
    """A file that is absent, not what its name says, or of another schema, gives a ValueError that names it."""
    path = folder / name
    if name.endswith(".parquet"):
        table = pq.read_table(path)
        pq.write_table(table.replace_schema_metadata({"deepflow.schema": "deepflow-other/9"}), path)
    else:
        path.write_text(path.read_text().replace("deepflow-summary/1", "deepflow-other/9"))
    with pytest.raises(ValueError, match=rf"{name} has schema 'deepflow-other/9', this version reads 'deepflow-"):
        read(folder)
    if name.endswith(".parquet"):
        pq.write_table(table.replace_schema_metadata(None), path)
        with pytest.raises(ValueError, match="has schema None"):
            read(folder)
    path.write_text("no such thing")
    with pytest.raises(ValueError, match=rf"{name} is not .*: run the experiment again"):
        read(folder)
    path.unlink()
    with pytest.raises(ValueError, match=rf"{name} is missing: a run folder has requests.parquet"):
        read(folder)


def test_a_summary_stands_for_a_complete_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing over an older run removes its summary first, so that half a run never looks like a whole one."""

    def stop(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(outputs.timeline, "write_timeline", stop)
    with pytest.raises(OSError, match="disk full"):
        write_run(folder, recorded(), {}, {}, SLO, WINDOW)
    with pytest.raises(ValueError, match=r"summary.json is missing"):
        read_summary(folder)


def test_nothing_heavy_loads_before_a_run() -> None:
    """Importing what a run needs at its start does not load pandas, pyarrow, plotly or rich."""
    program = (
        "import sys, experiments.outputs, experiments.report, experiments.progress, experiments.tables;"
        "print(sorted({'pandas', 'pyarrow', 'plotly', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
