"""Steps from what Ascend's profilers export.

| file | of | what is read |
|---|---|---|
| op_summary_*.csv | msprof | every kernel: OP Type, Task Start Time(us), Task Duration(us), Input Shapes |
| kernel_details.csv | torch_npu.profiler | the same: Type, Start Time(us), Duration(us), Input Shapes; Step Id |
| step_trace_*.csv | msprof, of captured graphs | Iteration ID, Iteration Time(us) |
| step_trace_time.csv | torch_npu.profiler | Step; Computing + Communication(Not Overlapped) + Free, in us |

Kernels tell what a step computed: attention's query says how many tokens, and where it is given a list of lengths, of
how many sequences. A step with more tokens than sequences is taken for one chunk of a prompt beside decodes. Contexts
are in no export. The traces of steps have times only: what they computed stands in a table beside them (`contents`).
"""

import csv
import re
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from cluster.latency import StepShape

Step = tuple[StepShape, int]

ATTENTION = re.compile(r"(infer|incre|prompt|paged|self|flash).*attention", re.IGNORECASE)
"""Types of attention kernels: fused inference, incremental, prompt, and those of the ATB library."""

IDLE_US = 2000.0
"""A device that does nothing for so long waits for requests, and not for its host."""

TRACE_TIMES = ("Computing", "Communication(Not Overlapped)", "Free")


class Kernel(NamedTuple):
    """One row of the exports: times in microseconds; `step`: its mark, empty where there is none."""

    kind: str
    start: float
    took: float
    shapes: str
    step: str


def is_export(path: Path) -> bool:
    """Whether a file is called like an export."""
    return path.suffix == ".csv" and path.stem.startswith(("op_summary", "kernel_details", "step_trace"))


def read_export(path: Path, layers: int, head_dim: int) -> list[Step]:
    """The steps of one device, in order. `layers`, `head_dim`: of the model that was profiled. ValueError: what cannot
    be read, or attention that is not called once per layer and step.
    """
    if path.stem.startswith("step_trace"):
        return _traced(path)
    kernels = sorted(_kernels(path), key=lambda kernel: kernel.start)
    return list(_steps(path, kernels, layers, head_dim))


# -- kernels ------------------------------------------------------------------------------------------------------


def _kernels(path: Path) -> Iterator[Kernel]:
    for number, row in _rows(path):
        kind = row.get("OP Type") or row.get("Type")
        start = row.get("Task Start Time(us)") or row.get("Start Time(us)")
        took = row.get("Task Duration(us)") or row.get("Duration(us)")
        if kind is None or start is None or took is None:
            raise ValueError(
                f"{path}, line {number}: needed are the columns of op_summary (OP Type, Task Start Time(us), Task "
                "Duration(us)) or of kernel_details (Type, Start Time(us), Duration(us))"
            )
        step = row.get("Step Id") or row.get("Step ID") or ""
        where = f"{path}, line {number}"
        yield Kernel(kind, _time(start, where), _time(took, where), row.get("Input Shapes") or "", step)


def _steps(path: Path, kernels: list[Kernel], layers: int, head_dim: int) -> Iterator[Step]:
    """From the first attention of one step to that of the next; the last one, which has no next, is left out."""
    attention = [place for place, kernel in enumerate(kernels) if ATTENTION.search(kernel.kind)]
    if not attention:
        raise ValueError(
            f"{path}: no attention among the types of {len(kernels)} kernels: is it an export of inference?"
        )
    if any(kernels[place].step for place in attention):
        firsts = [attention[0]]
        firsts += [place for before, place in pairwise(attention) if kernels[before].step != kernels[place].step]
    else:
        if len(attention) % layers:
            raise ValueError(
                f"{path}: {len(attention)} attention kernels are no whole number of steps of {layers} layers: name the "
                "profiled model (model=OPTION), or mark steps in the profiler (Step Id)"
            )
        firsts = attention[::layers]
    for first, following in pairwise(firsts):
        inside = kernels[first : following + 1]
        idle = max(later.start - (kernel.start + kernel.took) for kernel, later in pairwise(inside))
        took = kernels[following].start - kernels[first].start - (idle if idle > IDLE_US else 0.0)
        yield _shape(kernels[first], head_dim, path), max(1, round(took * 1e3))


def _shape(kernel: Kernel, head_dim: int, path: Path) -> StepShape:
    """What a step computed, from the inputs of its first attention: dimensions by commas, inputs by semicolons."""
    try:
        inputs = [[int(size) for size in each.split(",") if size] for each in kernel.shapes.strip('" ').split(";")]
    except ValueError:
        inputs = [[]]
    query = inputs[0]
    if not query:
        raise ValueError(f"{path}: {kernel.kind} has Input Shapes {kernel.shapes!r}: profile with shapes (level 1)")
    by_sequence = len(query) == 4 or (len(query) == 3 and query[2] != head_dim)  # BSND or BSH, else TND or TH
    tokens = query[0] * query[1] if by_sequence else query[0]
    if by_sequence or "paged" in kernel.kind.lower():
        sequences = query[0]
    else:
        sequences = next((each[0] for each in inputs[1:] if len(each) == 1 and 0 < each[0] <= tokens), 1)
    if tokens == sequences:
        return StepShape(0, 0, 0, sequences, 0)
    prompt = tokens - (sequences - 1)
    return StepShape(prompt, prompt * (prompt + 1) // 2, 1, sequences - 1, 0)


# -- traces of steps ----------------------------------------------------------------------------------------------


def contents(path: Path) -> Path:
    """The table beside a trace of steps: a row per step with its number and the columns of a table of steps."""
    return path.with_name(f"{path.stem}.contents.csv")


def _traced(path: Path) -> list[Step]:
    from experiments.step_logs import shape_of

    beside = contents(path)
    if not beside.is_file():
        raise ValueError(
            f"{path} tells how long steps took and not what they computed: needed is {beside.name} beside it, with the "
            "columns step, prefill_tokens, prefill_chunks, prefill_context, decode_sequences and decode_context"
        )
    shapes = {row.get("step"): shape_of(row, f"{beside}, line {number}") for number, row in _rows(beside)}
    steps = []
    for number, row in _rows(path):
        where = f"{path}, line {number}"
        if "Iteration Time(us)" in row:
            name, took = row.get("Iteration ID"), _time(row["Iteration Time(us)"], where)
        elif all(column in row for column in TRACE_TIMES):
            name, took = row.get("Step"), sum(_time(row[column], where) for column in TRACE_TIMES)
        else:
            raise ValueError(
                f"{where}: needed are the columns of step_trace_*.csv (Iteration ID, Iteration Time(us)) or of "
                f"step_trace_time.csv (Step, {', '.join(TRACE_TIMES)})"
            )
        if name in shapes:
            steps.append((shapes[name], max(1, round(took * 1e3))))
    return steps


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, str]]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        for number, row in enumerate(csv.DictReader(file), 2):
            yield number, {key.strip(): (value or "").strip() for key, value in row.items() if key}


def _time(text: str, where: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{where}: {text!r} is no time in microseconds") from None
