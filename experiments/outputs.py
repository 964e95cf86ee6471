"""The folder of one run: what was recorded, as files with a schema version, and the way to read them back.

| file | one row or entry per | schema |
|---|---|---|
| requests.parquet | request | deepflow-requests/1 |
| executors.parquet | load report | deepflow-executors/1 |
| scaling.parquet | step in the life of an executor | deepflow-scaling/1 |
| jobs.parquet | job other than serving, where a run has such | deepflow-jobs/1 |
| timeline.json | span, for ui.perfetto.dev | deepflow-timeline/1 |
| summary.json | metric, and what the run rests on | deepflow-summary/1 |

The summary is written last: a folder that has one is complete. Times are counted from the start of the run.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from cluster.jobs.record import JobRecorder, JobRow
from cluster.metrics import NONE, Recorder, RequestTable, Slo, Window
from cluster.vocabulary import NS_PER_S, Outcome, Stage
from flowserve.core.record import StepSpan

if TYPE_CHECKING:
    import pandas as pd

SCHEMAS = {
    "requests.parquet": "deepflow-requests/1",
    "executors.parquet": "deepflow-executors/1",
    "scaling.parquet": "deepflow-scaling/1",
    "jobs.parquet": "deepflow-jobs/1",
    "summary.json": "deepflow-summary/1",
    "timeline.json": "deepflow-timeline/1",
}
_KEY = "deepflow.schema"
_STAGES = frozenset(str(stage) for stage in Stage)

TIMELINE_REQUESTS = 20_000
TIMELINE_COUNTERS = 50_000
TIMELINE_STEPS = 200_000
"""The timeline shows the first so many requests and engine steps, and thins load reports out to so many: viewers choke
on more."""


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
    steps: Iterable[StepSpan] = (),
    jobs: JobRecorder | None = None,
) -> None:
    """Write all files of a finished run. `summary`: the metrics, as `cluster.metrics.summarise` gives them. `steps`: of
    the engines, in order of each, for the timeline.

    `provenance` may say anything that JSON can; the report looks for these keys, all optional: `backend` (sim or
    real), `basis` (what the times rest on, as "kind: source" or a list of such; kinds are measured, published, derived,
    calibrated), `trace` (where the requests come from), `stand_in` (true: generated in place of a missing file),
    `seed`, `time` (ISO date and time), `machine`, `commit`, `versions` ({package: version}), `config` (nested, as
    composed) and `notes` (sentences).
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").unlink(missing_ok=True)
    _write_table(folder / "requests.parquet", _request_columns(recorder, slo, window))
    _write_table(folder / "executors.parquet", _executor_columns(recorder))
    _write_table(folder / "scaling.parquet", _scaling_columns(recorder))
    if jobs is not None and jobs.rows:
        _write_table(folder / "jobs.parquet", _job_columns(jobs))
    _write_timeline(folder / "timeline.json", recorder, steps)
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

    The columns of `Recorder`; `outcome`, `reason`, `executor` (that of the first task to finish); `ttft_s`, `tpot_s`
    and `e2e_s`, NaN where the request never got that far; `in_window`: it counts in the metrics; `slo_met`, and
    `ttft_met`, `tpot_met`, `e2e_met`: it finished and met all objectives, or this one (null: no such objective).
    """
    return _read_table(folder / "requests.parquet")


def read_executors(folder: Path) -> "pd.DataFrame":
    """One row per load report, in the order they arrived. ValueError: no such file, or one of another schema.

    `time_s`: when the executor was in this state; `age_s`: how old the report was on arrival; `waiting` and `running`
    requests; `waiting_tokens` of prompts; blocks of KV cache: `kv_used` by requests, `kv_total`, and `cached_blocks`
    with an identity, in use or not; `generated_tokens` and `preemptions` since the executor started.
    """
    return _read_table(folder / "executors.parquet")


def read_scaling(folder: Path) -> "pd.DataFrame":
    """One row per step in the life of an executor. ValueError: no such file, or one of another schema.

    `what`: launch, a finished stage of starting up, ready, drained, retired or failed, or "serves" and a role that it
    has switched to; `took_s`: of a stage, else 0.
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

    def column(values: Iterator[int]) -> Any:
        return np.fromiter(values, np.int64, len(loads))

    occurred = column(load.occurred for load in loads)
    total = column(load.total_blocks for load in loads)
    return {
        "time_s": occurred / NS_PER_S,
        "executor": [load.executor for load in loads],
        "waiting": column(load.waiting for load in loads),
        "running": column(load.running for load in loads),
        "waiting_tokens": column(load.waiting_tokens for load in loads),
        "kv_used": total - column(load.free_blocks for load in loads),
        "kv_total": total,
        "cached_blocks": column(load.cached_blocks for load in loads),
        "generated_tokens": column(load.generated_tokens for load in loads),
        "preemptions": column(load.preemptions for load in loads),
        "age_s": (column(load.time for load in loads) - occurred) / NS_PER_S,
    }


def _scaling_columns(recorder: Recorder) -> dict[str, Any]:
    steps = recorder.scaling
    return {
        "time_s": np.array([time for time, _, _, _ in steps], np.int64) / NS_PER_S,
        "executor": [executor for _, executor, _, _ in steps],
        "what": [what for _, _, what, _ in steps],
        "took_s": np.array([took for _, _, _, took in steps], np.int64) / NS_PER_S,
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

    arrays = {
        name: pa.array(values, pa.string()) if isinstance(values, list) else pa.array(values, from_pandas=True)
        for name, values in columns.items()
    }
    table = pa.table(arrays).replace_schema_metadata({_KEY: SCHEMAS[path.name]})
    pq.write_table(table, path, compression="zstd")


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


# -- timeline -----------------------------------------------------------------------------------------------------


def _write_timeline(path: Path, recorder: Recorder, steps: Iterable[StepSpan]) -> None:
    """Trace events as Chrome and Perfetto read them: a process per executor, with its life, its load, its requests."""
    names = dict.fromkeys(executor for _, executor, _, _ in recorder.scaling)
    names |= dict.fromkeys(load.executor for load in recorder.loads)
    names |= dict.fromkeys(name for name in recorder.executors if name)
    pids = {name: number for number, name in enumerate(names, start=1)}
    pids[""] = len(pids) + 1
    encode = msgspec.json.Encoder().encode
    other = {
        "schema": SCHEMAS[path.name],
        "requests": f"{min(len(recorder.outcomes), TIMELINE_REQUESTS)} of {len(recorder.outcomes)}",
        "executor": "a request is drawn at the executor that finished its first task",
    }
    with path.open("wb") as out:
        out.write(b'{"displayTimeUnit":"ms","otherData":' + encode(other) + b',"traceEvents":[\n')
        separator = b""
        parts = (_names(pids), _life(recorder, pids), _steps(steps, pids))
        for part in (*parts, _counters(recorder, pids), _requests(recorder, pids)):
            for event in part:
                out.write(separator + encode(event))
                separator = b",\n"
        out.write(b"\n]}\n")


def _names(pids: Mapping[str, int]) -> Iterator[dict[str, Any]]:
    for name, pid in pids.items():
        shown = name or "no executor finished these"
        yield {"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": shown}}
        yield {"ph": "M", "name": "process_sort_index", "pid": pid, "tid": 0, "args": {"sort_index": pid}}
        yield {"ph": "M", "name": "thread_name", "pid": pid, "tid": 1, "args": {"name": "life"}}
        yield {"ph": "M", "name": "thread_name", "pid": pid, "tid": 2, "args": {"name": "steps"}}


def _life(recorder: Recorder, pids: Mapping[str, int]) -> Iterator[dict[str, Any]]:
    """Spans from launch to ready, with the stages in them, and from ready to the end of the executor or of the run."""
    since: dict[str, tuple[str, int]] = {}
    spans: list[tuple[int, int, str, str]] = []
    for time, executor, what, took in sorted(recorder.scaling, key=lambda step: step[0]):
        if what in _STAGES:
            spans.append((time - took, time, what, executor))
            continue
        if what in ("ready", "retired", "failed") and executor in since:
            name, start = since.pop(executor)
            spans.append((start, time, name, executor))
        if what in ("launch", "ready"):
            since[executor] = ("launching" if what == "launch" else "serving", time)
        else:
            yield {"ph": "i", "s": "p", "name": what, "ts": time / 1e3, "pid": pids[executor], "tid": 1, "cat": "life"}
    spans += [(start, max(start, recorder.end_ns), name, executor) for executor, (name, start) in since.items()]
    for start, end, name, executor in sorted(spans, key=lambda span: (span[0], -span[1])):  # the outer one first
        where = {"pid": pids[executor], "tid": 1, "cat": "life"}
        yield {"ph": "X", "name": name, "ts": start / 1e3, "dur": (end - start) / 1e3, **where}


def _steps(steps: Iterable[StepSpan], pids: Mapping[str, int]) -> Iterator[dict[str, Any]]:
    """What each engine computed: a span per step, or for as many steps as only went on decoding one batch."""
    for number, step in enumerate(steps):
        if number == TIMELINE_STEPS:
            return
        shape = step.shape
        parts = [f"{shape.prefill_tokens} prompt tokens"] if shape.prefill_tokens else []
        parts += [f"{shape.decode_sequences} decodes"] if shape.decode_sequences else []
        args = {"steps": step.steps, **shape._asdict()}
        times = {"ts": step.start_ns / 1e3, "dur": (step.end_ns - step.start_ns) / 1e3}
        yield {
            "ph": "X",
            "name": " + ".join(parts),
            "cat": "step",
            "pid": pids.get(step.executor, pids[""]),
            "tid": 2,
            **times,
            "args": args,
        }


def _counters(recorder: Recorder, pids: Mapping[str, int]) -> Iterator[dict[str, Any]]:
    every = math.ceil(len(recorder.loads) / TIMELINE_COUNTERS)
    seen: dict[str, int] = {}
    for load in recorder.loads:
        number = seen[load.executor] = seen.get(load.executor, -1) + 1
        if number % every:
            continue
        where = {"ph": "C", "ts": load.occurred / 1e3, "pid": pids[load.executor]}
        yield {**where, "name": "running", "args": {"requests": load.running}}
        yield {**where, "name": "waiting", "args": {"requests": load.waiting}}
        used = (load.total_blocks - load.free_blocks) / max(1, load.total_blocks)
        yield {**where, "name": "KV cache used", "args": {"percent": round(100 * used, 2)}}


def _requests(recorder: Recorder, pids: Mapping[str, int]) -> Iterator[dict[str, Any]]:
    """Per request a span from arrival to end, in it prefill (to the first token, queueing included) and decode."""
    columns = [recorder.requests[name] for name in ("request_id", "arrival_ns", "first_token_ns", "last_token_ns")]
    details = [recorder.requests[name] for name in ("prompt_tokens", "output_tokens", "cached_tokens", "preemptions")]
    for row in _first_to_arrive(columns[1]):
        request_id, arrival, first, last = (column[row] for column in columns)
        outcome = recorder.outcomes[row]
        unfinished = outcome == "unfinished"
        known_end = recorder.end_ns if unfinished else last if last != NONE else first if first != NONE else arrival
        args: dict[str, Any] = {"request": request_id, "outcome": outcome}
        args |= {name: column[row] for name, column in zip(_DETAILS, details, strict=True)}
        if outcome != Outcome.FINISHED:
            args["reason"] = recorder.reasons[row]
        common = {"cat": "request", "id": hex(request_id), "pid": pids[recorder.executors[row]], "tid": 1}

        def edge(ph: str, name: str, time: int, common: dict[str, Any] = common, **more: Any) -> dict[str, Any]:
            return {"ph": ph, "name": name, "ts": time / 1e3, **common, **more}

        yield edge("b", "request", arrival, args=args)
        phases = [("prefill", arrival, first if first != NONE else known_end)]
        if first != NONE and known_end > first:
            phases.append(("decode", first, known_end))
        for name, start, end in phases:
            if end > start:
                yield edge("b", name, start)
                yield edge("e", name, end)
        yield edge("e", "request", known_end)


_DETAILS = ("prompt_tokens", "output_tokens", "cached_tokens", "preemptions")


def _first_to_arrive(arrivals: Sequence[int]) -> list[int]:
    order = np.argsort(np.asarray(arrivals, np.int64), kind="stable")[:TIMELINE_REQUESTS]
    return [int(row) for row in order]
