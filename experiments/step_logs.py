"""Steps that engines logged, as (shape, ns): our own records, tables of other engines, vLLM's own log lines, and what
Ascend's profilers export.
"""

import csv
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from cluster.latency import StepShape
from experiments import msprof
from experiments.profiling import steps_of
from flowserve.core.record import read_turns

Step = tuple[StepShape, int]

DURATIONS_NS = {"duration_s": 1e9, "duration_ms": 1e6, "duration_us": 1e3, "duration_ns": 1.0}
COUNTS = {
    "prefill_tokens": 0.0,
    "prefill_chunks": 1.0,
    "prefill_context": 0.0,
    "decode_sequences": 0.0,
    "decode_context": 0.0,
    "draft_tokens": 0.0,
}
"""Columns of a table, and what they are where there is no such column."""

VLLM_LINE = re.compile(
    r"Iteration\(\d+\): (\d+) context requests, (\d+) context tokens, (\d+) generation requests, "
    r"(\d+) generation tokens, iteration elapsed time: ([\d.]+) ms"
)
"""vLLM with --enable-logging-iteration-details."""


def read_steps(path: Path, layers: int = 1, head_dim: int = 0) -> list[Step]:
    """The steps of one engine, in order. `layers`, `head_dim`: of its model, for exports of kernels. ValueError, with
    file and line: what cannot be read as such.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist: name a log of engine steps (deepflow profile --help tells which)")
    if path.name.endswith(".turns.jsonl"):
        steps = _turns(path)
    elif msprof.is_export(path):
        steps = msprof.read_export(path, layers, head_dim)
    elif path.suffix in (".csv", ".jsonl"):
        steps = [_step(row, where) for where, row in (_csv(path) if path.suffix == ".csv" else _json_lines(path))]
    elif path.suffix in (".log", ".txt"):
        steps = list(_vllm(path))
    else:
        raise ValueError(f"{path}: allowed are *.turns.jsonl, *.jsonl, *.csv, *.log and *.txt")
    if not steps:
        raise ValueError(f"{path}: there is no step in it")
    return steps


def _turns(path: Path) -> list[Step]:
    try:
        turns = list(read_turns(path))
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise ValueError(f"{path}: not a record of an engine's turns ({error})") from error
    return [(step.shape, step.end_ns - step.start_ns) for _, step, _ in steps_of([turns])]


def _csv(path: Path) -> Iterator[tuple[str, Mapping[str, object]]]:
    with path.open(newline="", encoding="utf-8") as file:
        for number, row in enumerate(csv.DictReader(file), 2):
            yield f"{path}, line {number}", row


def _json_lines(path: Path) -> Iterator[tuple[str, Mapping[str, object]]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not JSON ({error})") from None
            if not isinstance(row, dict):
                raise ValueError(f"{where}: an object with the step's columns was expected, not {line.strip()!r}")
            yield where, row


def _step(row: Mapping[str, object], where: str) -> Step:
    unit = next((name for name in DURATIONS_NS if name in row), None)
    if unit is None:
        raise ValueError(f"{where}: there is no duration: one of {', '.join(DURATIONS_NS)} is needed")
    took = _number(row[unit], unit, where) * DURATIONS_NS[unit]
    if took <= 0:
        raise ValueError(f"{where}: {unit} is {row[unit]}: a step takes time and computes something")
    return shape_of(row, where), round(took)


def shape_of(row: Mapping[str, object], where: str) -> StepShape:
    """What a step computed, by the columns of a table."""
    values = {name: _number(row.get(name, default), name, where) for name, default in COUNTS.items()}
    tokens, sequences = values["prefill_tokens"], values["decode_sequences"]
    if tokens + sequences <= 0:
        raise ValueError(
            f"{where}: prefill_tokens {tokens:g}, decode_sequences {sequences:g}: a step takes time and computes "
            "something"
        )
    chunks = max(values["prefill_chunks"], 1.0) if tokens else 0.0
    keys = (values["prefill_context"] + (tokens + chunks) / 2) / chunks if tokens else 0.0
    return StepShape(
        round(tokens),
        round(tokens * keys),
        round(chunks),
        round(sequences),
        round(values["decode_context"]),
        round(values["draft_tokens"]),
    )


def _number(value: object, name: str, where: str) -> float:
    try:
        number = float(str(value))
    except ValueError:
        raise ValueError(f"{where}: {name} is {value!r}, not a number") from None
    if not 0 <= number < float("inf"):
        raise ValueError(f"{where}: {name} is {value}: allowed are numbers from 0 up")
    return number


def _vllm(path: Path) -> Iterator[Step]:
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            match = VLLM_LINE.search(line)
            if match is None:
                if "Iteration(" in line:
                    raise ValueError(f"{path}, line {number}: not an iteration as vLLM writes it: {line.strip()!r}")
                continue
            chunks, tokens, sequences, generated = (int(group) for group in match.groups()[:4])
            took = round(float(match[5]) * 1e6)
            if took and tokens + sequences:
                attention = round(tokens * (tokens / chunks + 1) / 2) if chunks else 0
                yield StepShape(tokens, attention, chunks, sequences, 0, max(0, generated - sequences)), took
