"""The folder of one run: what was recorded, as files with a schema version, and the way to read them back.

| file | one row or entry per | schema |
|---|---|---|
| requests.parquet | request | deepflow-requests/1 |
| executors.parquet | load report | deepflow-executors/2 |
| scaling.parquet | step in the life of an executor | deepflow-scaling/2 |
| jobs.parquet | job other than serving, where a run has such | deepflow-jobs/1 |
| timeline.json | span, for ui.perfetto.dev | deepflow-timeline/2 |
| summary.json | metric, and what the run rests on | deepflow-summary/1 |

The summary is written last: a folder that has one is complete. Times are counted from the start of the run.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from cluster.jobs.record import JobRecorder, JobRow
from cluster.metrics import RequestTable, Slo, Window
from cluster.recorder import NONE, Recorder
from cluster.vocabulary import NS_PER_S, Stage
from experiments import timeline
from experiments.task_log import TaskLog

if TYPE_CHECKING:
    import pandas as pd

SCHEMAS = {
    "requests.parquet": "deepflow-requests/1",
    "executors.parquet": "deepflow-executors/2",
    "scaling.parquet": "deepflow-scaling/2",
    "jobs.parquet": "deepflow-jobs/1",
    "summary.json": "deepflow-summary/1",
    "timeline.json": timeline.SCHEMA,
}
_KEY = "deepflow.schema"


@dataclass(frozen=True)
class RunSummary:
    """What `summary.json` says: metrics by name (NaN: none), objectives, measured window, and what it rests on."""

    metrics: dict[str, float]
    slo: Slo
    window: Window
    provenance: dict[str, Any]


def write_run(
    folder: Path,
    recorder: Recorder,
    summary: Mapping[str, float],
    provenance: Mapping[str, Any],
    slo: Slo,
    window: Window,
    spans: timeline.Spans | None = None,
    jobs: JobRecorder | None = None,
) -> None:
    """Write all files of a finished run. `summary`: the metrics, as `cluster.metrics.summarise` gives them. `spans`:
    what happened when, for the timeline. `jobs`: what was recorded of jobs other than serving.

    `provenance` may say anything that JSON can; the report looks for these keys, all optional: `backend` (sim or
    real), `basis` (what the times rest on, as "kind: source" or a list of such; kinds are measured, published, derived,
    calibrated), `trace` (where the requests come from), `stand_in` (true: generated in place of a missing file),
    `seed`, `time` (ISO date and time), `machine`, `commit`, `versions` ({package: version}), `config` (nested, as
    composed), `models` (the main metrics by model) and `notes` (sentences).
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").unlink(missing_ok=True)
    _write_table(folder / "requests.parquet", _request_columns(recorder, slo, window))
    _write_table(folder / "executors.parquet", _executor_columns(recorder))
    _write_table(folder / "scaling.parquet", _scaling_columns(recorder))
    if jobs is not None and jobs.rows:
        _write_table(folder / "jobs.parquet", _job_columns(jobs))
    timeline.write_timeline(folder / "timeline.json", recorder, spans or timeline.Spans(TaskLog(0)))
    _write_json(
        folder / "summary.json",
        {
            "schema": SCHEMAS["summary.json"],
            "metrics": summary,
            "slo": msgspec.to_builtins(slo),
            "window": msgspec.to_builtins(window),
            "provenance": provenance,
        },
    )


# -- reading ------------------------------------------------------------------------------------------------------


def read_summary(folder: Path) -> RunSummary:
    """The summary of a run. ValueError: no such file, or one of another schema."""
    path = folder / "summary.json"
    try:
        content = json.loads(_existing(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}): run the experiment again") from None
    _check_schema(path, content.get("schema") if isinstance(content, dict) else None)
    return RunSummary(
        {name: math.nan if value is None else value for name, value in content["metrics"].items()},
        msgspec.convert(content["slo"], Slo),
        msgspec.convert(content["window"], Window),
        content["provenance"],
    )


def read_requests(folder: Path) -> "pd.DataFrame":
    """One row per request, in the order they ended. ValueError: no such file, or one of another schema.

    The columns of `Recorder`; `outcome`, `reason`, `executor` (that of the first task to finish) and `model`; `ttft_s`,
    `tpot_s` and `e2e_s`, NaN where the request never got that far; `in_window`: it counts in the metrics; `slo_met`,
    and `ttft_met`, `tpot_met`, `e2e_met`: it finished and met all objectives, or this one (null: no such objective).
    """
    return _read_table(folder / "requests.parquet")


def read_executors(folder: Path) -> "pd.DataFrame":
    """One row per load report, in the order they arrived. ValueError: no such file, or one of another schema.

    `time_s`: when the executor was in this state; `age_s`: how old the report was on arrival; `waiting` and `running`
    requests; `waiting_tokens` of prompts; blocks of KV cache: `kv_used` by requests, `kv_total`, and `cached_blocks`
    with an identity, in use or not; `generated_tokens`, `preemptions` and `busy_s` since the executor started.
    """
    return _read_table(folder / "executors.parquet")


def read_scaling(folder: Path) -> "pd.DataFrame":
    """One row per step in the life of an executor. ValueError: no such file, or one of another schema.

    `what`: launch, a finished stage of starting up, ready, drained, retired or failed, or "serves" and a role that it
    has switched to; `took_s`: of a stage, else 0; `source` of the weights, for the stage te_load: dram, ssd, or the
    executor that they were forked from and what joins the two; empty where the backend does not say.
    """
    return _read_table(folder / "scaling.parquet")


def read_jobs(folder: Path) -> "pd.DataFrame":
    """One row per job other than serving, in order of their start. ValueError: no such file, or one of another schema.

    `request_id`: of the request it belongs to, the same for the jobs of one fine-tuning; `kind`: agent, preprocess,
    train or evaluate; `started_s`, `jct_s` (none where it did not end); `waited_s`, `ran_s`: of its tasks, added up;
    `npu_s`: NPUs times the time its tasks ran; `tokens`, `steps`: of training and preprocessing; `calls` of the LLM and
    `generated_tokens` of their answers.
    """
    return _read_table(folder / "jobs.parquet")


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise ValueError(f"{path} is missing: a run folder has {', '.join(SCHEMAS)}; name the folder of a finished run")
    return path


def _check_schema(path: Path, schema: str | None) -> None:
    known = SCHEMAS[path.name]
    if schema != known:
        raise ValueError(
            f"{path} has schema {schema!r}, this version reads {known!r}: read it with the version that wrote it, "
            "or run the experiment again"
        )


def _read_table(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(_existing(path))
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is not a parquet file ({error}): run the experiment again") from None
    schema = (table.schema.metadata or {}).get(_KEY.encode())
    _check_schema(path, None if schema is None else schema.decode())
    return table.to_pandas()


# -- tables -------------------------------------------------------------------------------------------------------


def _request_columns(recorder: Recorder, slo: Slo, window: Window) -> dict[str, Any]:
    table = RequestTable(recorder, Window())
    columns: dict[str, Any] = {name: np.asarray(values) for name, values in table.columns.items()}
    arrival = columns["arrival_ns"]
    measured = RequestTable(recorder, window).columns["arrival_ns"]
    in_window = np.zeros(len(arrival), bool)
    if len(measured):
        in_window = (arrival >= measured.min()) & (arrival <= measured.max())
    for name in ("first_token_ns", "last_token_ns"):
        columns[name] = np.ma.masked_equal(columns[name], NONE)
    columns |= {"outcome": recorder.outcomes, "reason": recorder.reasons, "executor": recorder.executors}
    columns["model"] = recorder.models
    columns |= {"ttft_s": table.ttft, "tpot_s": table.tpot, "e2e_s": table.e2e, "in_window": in_window}
    columns["slo_met"] = table.met(slo)
    for name, limit in (("ttft", slo.ttft_s), ("tpot", slo.tpot_s), ("e2e", slo.e2e_s)):
        met: Any = np.ma.array(np.zeros(len(arrival), bool), mask=True)
        if limit is not None:
            met = table.met(Slo(**{f"{name}_s": limit}))
        columns[f"{name}_met"] = met
    return columns


def _executor_columns(recorder: Recorder) -> dict[str, Any]:
    loads = recorder.loads

    occurred, total = loads.column("occurred"), loads.column("total_blocks")
    same = ("waiting", "running", "waiting_tokens", "cached_blocks", "generated_tokens", "preemptions")
    return {
        "time_s": occurred / NS_PER_S,
        "executor": loads.executors,
        **{name: loads.column(name) for name in same[:3]},
        "kv_used": total - loads.column("free_blocks"),
        "kv_total": total,
        **{name: loads.column(name) for name in same[3:]},
        "busy_s": loads.column("busy_ns") / NS_PER_S,
        "age_s": (loads.column("time") - occurred) / NS_PER_S,
    }


def _scaling_columns(recorder: Recorder) -> dict[str, Any]:
    steps = recorder.scaling
    return {
        "time_s": np.array([time for time, _, _, _ in steps], np.int64) / NS_PER_S,
        "executor": [executor for _, executor, _, _ in steps],
        "what": [what for _, _, what, _ in steps],
        "took_s": np.array([took for _, _, _, took in steps], np.int64) / NS_PER_S,
        "source": [recorder.weights_from.get(name, "") if what == Stage.TE_LOAD else "" for _, name, what, _ in steps],
    }


def _job_columns(jobs: JobRecorder) -> dict[str, Any]:
    rows = jobs.rows

    def column(name: str) -> Any:
        return np.fromiter((getattr(row, name) for row in rows), np.int64, len(rows))

    def seconds(name: str) -> Any:
        return column(name) / NS_PER_S

    def took(row: JobRow) -> float:
        return math.nan if row.ended_ns is None else (row.ended_ns - row.started_ns) / NS_PER_S

    texts = {name: [getattr(row, name) for row in rows] for name in ("kind", "tenant", "outcome", "reason")}
    counts = ("calls", "tasks", "failed_tasks", "tokens", "steps", "generated_tokens")
    return {
        "request_id": column("request_id"),
        **texts,
        "arrived_s": seconds("arrived_ns"),
        "started_s": seconds("started_ns"),
        "jct_s": np.array([took(row) for row in rows]),
        "waited_s": seconds("waited_ns"),
        "ran_s": seconds("ran_ns"),
        "npu_s": seconds("npu_ns"),
        **{name: column(name) for name in counts},
    }


def _write_table(path: Path, columns: Mapping[str, Any]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrays = [_array(values) for values in columns.values()]
    table = pa.Table.from_arrays(arrays, names=list(columns), metadata={_KEY: SCHEMAS[path.name]})
    pq.write_table(table, path, compression="zstd")


def _array(values: Any) -> Any:
    """A column of pyarrow, null where a float is NaN or a masked value is masked.

    Made from buffers: whatever goes through `pyarrow.array` imports pandas, which takes longer than all the writing.
    """
    import pyarrow as pa

    size = len(values)
    if isinstance(values, list):
        texts = [value.encode() for value in values]
        ends = np.zeros(size + 1, np.int32)
        np.cumsum(np.fromiter(map(len, texts), np.int32, size), out=ends[1:])
        return pa.StringArray.from_buffers(size, pa.py_buffer(ends), pa.py_buffer(b"".join(texts)))
    data, missing = np.ma.getdata(values), np.ma.getmaskarray(values)
    if data.dtype.kind == "f":
        missing = missing | np.isnan(data)
    kind = pa.from_numpy_dtype(data.dtype)
    if data.dtype.kind == "b":
        data = np.packbits(data, bitorder="little")
    valid = pa.py_buffer(np.packbits(~missing, bitorder="little")) if missing.any() else None
    return pa.Array.from_buffers(kind, size, [valid, pa.py_buffer(np.ascontiguousarray(data))])


# -- JSON ---------------------------------------------------------------------------------------------------------


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    """The file appears when it is complete."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(_plain(content), indent=2, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, path)


def _plain(value: Any) -> Any:
    """The same in JSON's types: null where a number is not finite, text for what JSON does not know."""
    match value:
        case Mapping():
            return {str(key): _plain(each) for key, each in value.items()}
        case list() | tuple() | set() | frozenset():
            return [_plain(each) for each in value]
        case np.ndarray() | np.generic():
            return _plain(value.tolist())
        case float():
            return value if math.isfinite(value) else None
        case None | bool() | int():
            return value
        case _:
            return str(value)
