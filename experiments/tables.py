"""Comparison tables in plain text: one row per run, and how far a simulated run is off the real one."""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TextIO

UNKNOWN = "–"
"""Stands for a number that a run does not have."""

_THIN = "\u202f"
"""Between groups of three digits: a narrow space that breaks no line."""


@dataclass(frozen=True, slots=True)
class Metric:
    """A number of `summary.json` that runs are compared by. `unit`: s, share (of one), /s, NPU s, or $."""

    key: str
    group: str
    column: str
    unit: Literal["s", "share", "/s", "NPU s", "$"]
    better: Literal["lower", "higher"]

    @property
    def title(self) -> str:
        return f"{self.group} {self.column}".strip()


METRICS = (
    Metric("ttft_p50_s", "TTFT", "p50", "s", "lower"),
    Metric("ttft_p99_s", "TTFT", "p99", "s", "lower"),
    Metric("tpot_p50_s", "TPOT", "p50", "s", "lower"),
    Metric("tpot_p99_s", "TPOT", "p99", "s", "lower"),
    Metric("e2e_p50_s", "E2E", "p50", "s", "lower"),
    Metric("e2e_p99_s", "E2E", "p99", "s", "lower"),
    Metric("slo_attainment", "SLO met", "", "share", "higher"),
    Metric("goodput_rps", "goodput", "", "/s", "higher"),
    Metric("npu_seconds", "NPU time", "", "NPU s", "lower"),
)
COST = Metric("cost_usd_per_million_tokens", "cost per M tokens", "", "$", "lower")
"""Shown where it is known. Its error would be that of the NPU time."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table: metrics as `cluster.metrics.summarise` names them; `reference`: those of the real run."""

    label: str
    summary: Mapping[str, float]
    reference: Mapping[str, float] | None = None

    def value(self, metric: Metric) -> float:
        """NaN where the run does not have it."""
        return _known(self.summary, metric.key)

    def referred(self, metric: Metric) -> float:
        """What the reference has; NaN where there is none."""
        return math.nan if self.reference is None else _known(self.reference, metric.key)

    def error(self, metric: Metric) -> float:
        """(this - reference) / reference; NaN where either is missing or the reference is 0 and this is not."""
        value, reference = self.value(metric), self.referred(metric)
        if value == reference:
            return 0.0
        return (value - reference) / reference if reference else math.nan


def _known(summary: Mapping[str, float], key: str) -> float:
    value = summary.get(key)
    return math.nan if value is None else float(value)


def duration(value_s: float) -> str:
    """Seconds as people read them, three digits: 950 µs, 25.5 ms, 7.94 s, 1240 s."""
    if math.isnan(value_s):
        return UNKNOWN
    for unit, size in (("µs", 1e-6), ("ms", 1e-3), ("s", 1.0)):
        if unit == "s" or float(f"{abs(value_s) / size:.3g}") < 1000:
            break
    return f"{three_digits(value_s / size)} {unit}" if value_s else "0 s"


def round_duration(value_s: float) -> str:
    """The same without zeros at the end, for limits and axes: 2 s, 50 ms."""
    number, _, unit = duration(value_s).rpartition(" ")
    return f"{number.rstrip('0').rstrip('.') if '.' in number else number} {unit}".strip()


def three_digits(value: float) -> str:
    """Three significant digits without an exponent; large numbers keep all digits before the point."""
    if math.isnan(value):
        return UNKNOWN
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(float(f"{value:.3g}")))))
    return f"{value:,.{digits}f}".replace(",", _THIN)


def count(value: float) -> str:
    """A whole number, its digits in groups of three."""
    return UNKNOWN if math.isnan(value) else f"{round(value):,}".replace(",", _THIN)


def share(value: float) -> str:
    """A share of one in per cent. Only all is 100 %, and only none is 0 %."""
    if math.isnan(value):
        return UNKNOWN
    shown = f"{100 * value:.1f}"
    if (shown == "100.0") != (value == 1) or (shown == "0.0") != (value == 0):
        shown = ">99.9" if value > 0.5 else "<0.1"
    return f"{shown.removesuffix('.0')} %" if value in (0, 1) else f"{shown} %"


def error_text(error: float) -> str:
    """A relative error in per cent with its sign, at most five characters: +1.2%, -34%, >10x."""
    if math.isnan(error):
        return UNKNOWN
    if abs(error) >= 9.995:
        return ">10x" if error > 0 else "<-10x"
    return f"{error:+.0%}" if abs(error) >= 0.0995 else f"{error:+.1%}".replace("-0.0%", "+0.0%")


@dataclass(slots=True)
class _Column:
    """Cells under a heading of two lines; neighbours with the same `group` share it."""

    group: str
    name: str
    cells: list[str]

    @property
    def width(self) -> int:
        return max(len(self.name), *map(len, self.cells))


def format_table(rows: Sequence[Row], width: int = 150) -> str:
    """All rows under one heading, numbers right-aligned, one unit per column; labels are cut to fit into `width`.

    Columns "sim vs real", the relative error of each metric, are there when a row has a reference; the cost per
    million output tokens otherwise, where it is known.
    """
    if not rows:
        return "no runs to compare"
    values = [_column(rows, metric) for metric in METRICS]
    errors = []
    if all(row.reference is None for row in rows):
        values += [_column(rows, COST)] if any(not math.isnan(row.value(COST)) for row in rows) else []
    else:
        errors = [_error_column(rows, metric) for metric in METRICS]
    lines: list[str] = []
    for gap in (2, 1):
        lines = _render(values, gap)
        if errors:
            band = _render(errors, 1)
            title = "sim vs real".center(len(band[0])).rstrip()
            lines = [" " * len(lines[0]), *lines]
            lines = [f"{left} | {right}" for left, right in zip(lines, [title, *band], strict=True)]
        room = width - max(map(len, lines))
        if room >= 16:
            break
    labels = [_cut(row.label, max(8, room)) for row in rows]
    column = max(map(len, labels))
    heading = [""] * (len(lines) - len(rows) - 1) + ["run"]
    lines = [f"{label:<{column}}{line}".rstrip() for label, line in zip([*heading, *labels], lines, strict=True)]
    rule = "-" * max(map(len, lines))
    return "\n".join([*lines[: len(heading)], rule, *lines[len(heading) :]])


def print_table(rows: Sequence[Row], file: TextIO | None = None, width: int = 150) -> None:
    """Print `format_table` to standard output or to `file`."""
    print(format_table(rows, width), file=file or sys.stdout)


def _column(rows: Sequence[Row], metric: Metric) -> _Column:
    values = [row.value(metric) for row in rows]
    match metric.unit:
        case "s":
            peers = [other for other in METRICS if other.group == metric.group]
            unit, size, digits = _unit([row.value(peer) for row in rows for peer in peers])
            return _Column(f"{metric.group} {unit}", metric.column, [_fixed(value / size, digits) for value in values])
        case "share":
            return _Column("SLO", "met %", [share(value).removesuffix(" %") for value in values])
        case "/s":
            return _Column("goodput", "req/s", [_fixed(value, _digits(values)) for value in values])
        case "$":
            return _Column("cost", "$/Mtok", [_fixed(value, _digits(values)) for value in values])
        case _:
            return _Column("NPU", "s", [_fixed(value, _digits(values)) for value in values])


def _error_column(rows: Sequence[Row], metric: Metric) -> _Column:
    group, name = {
        "SLO met": ("SLO", "met"),
        "goodput": ("goodput", ""),
        "NPU time": ("NPU", "time"),
    }.get(metric.group, (metric.group, metric.column))
    cells = ["" if row.reference is None else error_text(row.error(metric)) for row in rows]
    return _Column(group, name, cells)


def _unit(values_s: Sequence[float]) -> tuple[str, float, int]:
    """One unit for times that stand under each other: its name, its size in seconds, digits after the point."""
    known = [value for value in values_s if value and not math.isnan(value)]
    largest, smallest = max(known, default=0.0), min(known, default=0.0)
    if largest < 1 or (largest < 10 and smallest < 0.02):
        return ("ms", 1e-3, 2 if largest < 0.1 else 1)
    return ("s", 1.0, _digits(values_s))


def _digits(values: Sequence[float]) -> int:
    """Digits after the point that leave even the smallest value three digits; at most three."""
    sizes = [abs(value) for value in values if value and not math.isnan(value)]
    if not sizes:
        return 1
    return min(3, max(0, 2 - math.floor(math.log10(min(sizes)))))


def _fixed(value: float, digits: int) -> str:
    return UNKNOWN if math.isnan(value) else f"{value:.{digits}f}"


def _render(columns: Sequence[_Column], gap: int) -> list[str]:
    """Two lines of heading, then one per row, all equally long and beginning with the gap."""
    widths = [column.width for column in columns]
    groups: list[tuple[str, list[int]]] = []
    for index, column in enumerate(columns):
        if groups and groups[-1][0] == column.group:
            groups[-1][1].append(index)
        else:
            groups.append((column.group, [index]))
    top = ""
    for name, members in groups:
        span = sum(widths[index] for index in members) + gap * (len(members) - 1)
        if len(name) > span:
            widths[members[0]] += len(name) - span
            span = len(name)
        top += " " * gap + (f"{name:>{span}}" if len(members) == 1 else f"{name:^{span}}")
    lines = [top, "".join(" " * gap + f"{column.name:>{width}}" for column, width in zip(columns, widths, strict=True))]
    for row in range(len(columns[0].cells)):
        cells = (column.cells[row] for column in columns)
        lines.append("".join(" " * gap + f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)))
    return lines


def _cut(label: str, room: int) -> str:
    """The label, or its two ends: runs of a sweep differ at either."""
    if len(label) <= room:
        return label
    head = (room - 1) // 2
    return f"{label[:head]}…{label[len(label) - (room - 1 - head) :]}"


def job_lines(summary: Mapping[str, float]) -> list[str]:
    """Jobs other than serving in a line each: how many, and how long; none where a run had none."""
    lines = []
    for kind in ("agent", "preprocess", "train", "evaluate"):
        if f"job_{kind}" not in summary:
            continue
        line = f"{kind} jobs: {count(summary[f'job_{kind}_finished'])} of {count(summary[f'job_{kind}'])} finished"
        if f"job_{kind}_jct_p50_s" in summary:
            line += (
                f", p50 {duration(summary[f'job_{kind}_jct_p50_s'])}, p99 {duration(summary[f'job_{kind}_jct_p99_s'])}"
            )
        if kind == "agent" and "tool_wait_mean_s" in summary:
            mean, p99 = summary["tool_wait_mean_s"], summary["tool_wait_p99_s"]
            line += f"; tools wait {duration(mean)} on average, p99 {duration(p99)}"
        if kind == "train" and "train_tokens_per_s" in summary:
            line += f"; {count(summary['train_tokens_per_s'])} tokens/s, a step {duration(summary['train_step_s'])}"
        lines.append(line)
    return lines
