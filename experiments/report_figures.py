"""The figures of the report, as plain data for plotly.js, made from what a run left in its folder."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cluster.vocabulary import NS_PER_S, Stage
from experiments.outputs import RunSummary
from experiments.tables import round_duration

if TYPE_CHECKING:
    import pandas as pd

Floats = npt.NDArray[np.float64]
Figure = dict[str, Any]

# Okabe and Ito's colours, which stay apart for colour-blind readers; without the yellow, too pale on white.
BLUE, RED, GREEN, PINK, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
GREY, DARK, BLACK = "#9a9a9a", "#4d4d4d", "#222222"
_RUN_COLOURS = (BLUE, RED, GREEN, PINK, ORANGE, SKY, "#000000")
_DASHES = ("solid", "dash", "dot", "dashdot")
_STAGE_COLOURS = dict(zip(map(str, Stage), (GREY, ORANGE, BLUE, SKY, PINK), strict=True))
_ENDS = (("failed", "x", RED), ("retired", "line-ns-open", DARK))

_TIME_MARGIN = {"l": 84, "r": 76, "t": 24, "b": 40}
"""The same for all figures over time, so that their time axes are in line."""


@dataclass(frozen=True)
class Run:
    """A run read back from its folder."""

    name: str
    number: int
    summary: RunSummary
    requests: "pd.DataFrame"
    executors: "pd.DataFrame"
    scaling: "pd.DataFrame"

    @cached_property
    def measured(self) -> "pd.DataFrame":
        """The requests that count."""
        return self.requests[self.requests.in_window]

    @cached_property
    def end_s(self) -> float:
        """When the last thing happened that was recorded; never 0, so that it can be the end of an axis."""
        ends = [self.requests.last_token_ns / NS_PER_S, self.requests.arrival_ns / NS_PER_S]
        ends += [self.executors.time_s, self.scaling.time_s]
        return float(max((each.max() for each in ends if each.notna().any()), default=0.0)) or 1e-9

    @property
    def line(self) -> dict[str, Any]:
        """How the run is drawn where several are."""
        dash = _DASHES[self.number // len(_RUN_COLOURS) % len(_DASHES)]
        return {"color": _RUN_COLOURS[self.number % len(_RUN_COLOURS)], "dash": dash, "width": 2}

    @property
    def real(self) -> bool:
        return bool(self.said("backend") == "real")

    def said(self, key: str) -> Any:
        """What the provenance says under a key; None if nothing."""
        return self.summary.provenance.get(key)

    def metric(self, key: str) -> float:
        """NaN if the run has none of this name."""
        return float(self.summary.metrics.get(key, math.nan))

    def objective(self, latency: str) -> float | None:
        """For ttft, tpot or e2e, in seconds."""
        limit: float | None = getattr(self.summary.slo, f"{latency}_s")
        return limit

    def share_met(self, latency: str) -> float:
        """Of the measured requests, those that finished within one objective; NaN where there is no such objective."""
        met = self.measured[f"{latency}_met"].dropna()
        return float(met.astype(bool).mean()) if len(met) else math.nan


def _rounded(values: Iterable[float]) -> list[float | None]:
    """Four significant digits, None for NaN: what a screen can show, in little space."""
    return [float(f"{value:.4g}") if math.isfinite(value) else None for value in values]


def _layout(height: int, **more: Any) -> dict[str, Any]:
    return {
        "height": height,
        "margin": {"l": 52, "r": 16, "t": 24, "b": 36},
        "paper_bgcolor": "#ffffff",
        "plot_bgcolor": "#ffffff",
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": BLACK},
        "modebar": {"bgcolor": "rgba(255,255,255,0.8)", "color": "#b0b0b0", "activecolor": DARK},
        "showlegend": False,
        **more,
    }


def _axis(**more: Any) -> dict[str, Any]:
    return {"gridcolor": "#ececec", "linecolor": "#b0b0b0", "zeroline": False, "ticks": "outside", "ticklen": 3, **more}


# -- distributions ------------------------------------------------------------------------------------------------


def cdf(runs: Sequence[Run], latency: str, points: int) -> Figure | None:
    """Shares of requests within a time, a curve per run, and the objectives; None if no run has a value.

    `latency`: ttft, tpot or e2e; `points`: at most so many per curve.
    """
    traces: list[dict[str, Any]] = []
    bounds: list[float] = []
    for run in runs:
        values = np.sort(run.measured[f"{latency}_s"].dropna().to_numpy())
        values = np.maximum(values, 1e-6)  # a logarithm must exist
        if not len(values):
            continue
        bounds += [float(values[0]), float(values[-1])]
        rows = _thinned(len(values), points)
        curve: Figure = {"type": "scatter", "mode": "lines", "name": run.name, "line": {**run.line, "shape": "hv"}}
        curve |= {"x": _rounded(values[rows]), "y": _rounded(100 * (rows + 1) / len(values))}
        traces.append(curve | {"hovertemplate": "%{y:.1f} % within %{x:.3~s}s<extra>%{fullData.name}</extra>"})
    if not traces:
        return None
    notes = []
    limits = {limit for run in runs if (limit := run.objective(latency)) is not None}
    for number, limit in enumerate(sorted(limits)):
        bounds.append(limit)
        line = {"color": BLACK, "dash": "dot", "width": 1.5}
        traces.append({"type": "scatter", "mode": "lines", "x": [limit, limit], "y": [0, 100], "line": line})
        traces[-1] |= {"name": f"objective {round_duration(limit)}", "hoverinfo": "name"}
        place = {"x": math.log10(limit), "xanchor": "right", "xshift": -3, "y": 4 + 16 * (number % 6)}
        text = {"text": f"objective<br>{round_duration(limit)}", "align": "right", "font": {"size": 11}}
        notes.append({**place, "yanchor": "bottom", "showarrow": False, **text})
    low, high = math.log10(min(bounds)) - 0.05, math.log10(max(bounds)) + 0.05
    ticks = _time_ticks(low, high)
    times = [round_duration(tick) for tick in ticks]
    shares = [0, 25, 50, 75, 90, 99]
    layout = _layout(
        300,
        hovermode="closest",
        annotations=notes,
        xaxis=_axis(type="log", range=[low, high], tickvals=ticks, ticktext=times, tickangle=0),
        yaxis=_axis(range=[0, 101], tickvals=shares, ticktext=[f"{share} %" for share in shares]),
    )
    return {"data": traces, "layout": layout}


def _thinned(count: int, points: int) -> npt.NDArray[np.int64]:
    """Rows of a sorted column that draw its curve: evenly spaced, and closer in the upper tail."""
    if count <= points:
        return np.arange(count)
    tail = points // 3
    shares = np.concatenate([np.linspace(0, 1, points - tail), 1 - np.logspace(-1, -math.log10(count), tail)])
    return np.unique(np.round(shares * (count - 1)).astype(np.int64))


def _time_ticks(low: float, high: float) -> list[float]:
    """Seconds that are round numbers, at most about six, for a logarithmic axis between two powers of ten."""
    span = high - low
    steps = (1, 2, 5) if span < 1.7 else (1, 3) if span < 2.8 else (1,)
    decades = range(math.floor(low), math.ceil(high) + 1, 1 if span < 6 else 2)
    ticks = [float(f"{step}e{decade}") for decade in decades for step in steps]
    return [tick for tick in ticks if low <= math.log10(tick) <= high]


# -- rows of curves over one time axis ----------------------------------------------------------------------------


class _Stack:
    """Rows of curves under each other over one time axis; a row has its title at the left, its legend at the right."""

    _GAP = 26
    _ROW = 108

    def __init__(self, titles: Sequence[str]) -> None:
        self._titles = titles
        self._traces: list[dict[str, Any]] = []

    def add(self, row: int, name: str, x: list[float | None], y: Iterable[float], colour: str, **more: Any) -> None:
        """A curve in a row, counted from the top; None in `x` and NaN in `y` are gaps."""
        line = {"color": colour, "width": 1.6, **more.pop("line", {})}
        trace: Figure = {"type": "scatter", "mode": "lines", "name": name, "x": x, "y": _rounded(y), "xaxis": "x"}
        trace |= {"yaxis": f"y{self._suffix(row)}", "legend": f"legend{self._suffix(row)}", "line": line}
        self._traces.append({**trace, "hovertemplate": "%{y:,.4~g}", **more})

    def _suffix(self, row: int) -> str:
        """The lowest row has the axis without a number, the one that stands on the time axis."""
        number = len(self._titles) - row
        return str(number) if number > 1 else ""

    def figure(self, end_s: float, time: str, **axes: dict[str, Any]) -> Figure:
        """`axes`: more properties of the rows' axes, by row number as in `row2`."""
        unit, size = clock(end_s)
        count = len(self._titles)
        height = count * (self._ROW + self._GAP)
        layout = _layout(height + 64, hovermode="x unified", hoversubplots="axis", showlegend=True, margin=_TIME_MARGIN)
        layout["xaxis"] = _axis(title={"text": f"{time} ({unit})"}, range=[0, end_s / size], anchor="y")
        layout["annotations"] = []
        for row, title in enumerate(self._titles):
            bottom = (count - 1 - row) * (self._ROW + self._GAP) / height
            top = bottom + self._ROW / height
            more = axes.get(f"row{row}", {})
            layout[f"yaxis{self._suffix(row)}"] = _axis(domain=[bottom, top], rangemode="tozero", nticks=5, **more)
            legend = {"orientation": "h", "x": 1, "xanchor": "right", "y": top, "yanchor": "bottom"}
            legend |= {"traceorder": "normal", "bgcolor": "rgba(0,0,0,0)", "font": {"size": 11}}
            layout[f"legend{self._suffix(row)}"] = legend
            place = {"xref": "paper", "yref": "paper", "x": 0, "xanchor": "left", "y": top, "yanchor": "bottom"}
            layout["annotations"].append({**place, "text": f"<b>{title}</b>", "showarrow": False})
        return {"data": self._traces, "layout": layout}


def clock(end_s: float) -> tuple[str, float]:
    """Unit and its size in seconds for a time axis that ends there."""
    return ("s", 1.0) if end_s <= 600 else ("min", 60.0) if end_s <= 6 * 3600 else ("h", 3600.0)


def time_series(run: Run, moments: int) -> Figure:
    """Load, queues, latency, KV cache and executors of a run, at so many moments."""
    stack = _Stack(("Requests per second", "Requests in the cluster", "TTFT", "KV cache in use", "Executors"))
    size = clock(run.end_s)[1]
    rates = _rates(run)
    bins = _rounded(rates.middles / size)
    stack.add(0, "arrived", bins, rates.arrived, DARK, line={"dash": "dot"})
    stack.add(0, "finished", bins, rates.finished, BLUE)
    held = hold(run, moments)
    now = _rounded(held.moments / size)
    area = {"stackgroup": "requests", "line": {"width": 0.8}}
    stack.add(1, "running", now, np.nansum(held.running, axis=0), BLUE, **area)
    stack.add(1, "waiting", now, np.nansum(held.waiting, axis=0), ORANGE, **area)
    stack.add(2, "p50", bins, rates.p50, BLUE, mode="lines+markers", marker={"size": 3})
    stack.add(2, "p99", bins, rates.p99, RED, mode="lines+markers", marker={"size": 3})
    if (limit := run.objective("ttft")) is not None:
        ends: list[float | None] = [0, run.end_s / size]
        stack.add(2, "objective", ends, [limit, limit], BLACK, line={"dash": "dot"}, hoverinfo="skip")
    if len(held.names) > 1:
        edge = {"line": {"width": 0}, "showlegend": False}
        stack.add(3, "least", now, 100 * held.over_executors(np.nanmin), SKY, **edge)
        fill = {"fill": "tonexty", "fillcolor": "rgba(86,180,233,0.35)", "showlegend": True}
        stack.add(3, "most", now, 100 * held.over_executors(np.nanmax), SKY, **{**edge, **fill})
    stack.add(3, "mean", now, 100 * held.over_executors(np.nanmean), BLUE)
    times, launching, serving = _counts(run)
    steps = _rounded(times / size)
    area = {"stackgroup": "executors", "line": {"shape": "hv", "width": 0.8}}
    stack.add(4, "ready or draining", steps, serving, BLUE, **area)
    if launching.any():
        stack.add(4, "launching", steps, launching, ORANGE, **area)
    time = "time" if run.real else "simulated time"
    whole = {"tickformat": "d"} | ({"dtick": 1} if (launching + serving).max() <= 4 else {})
    figure = stack.figure(run.end_s, time, row2={"ticksuffix": " s"}, row3={"ticksuffix": " %"}, row4=whole)
    figure["layout"]["shapes"] = _shaded(run, size)
    return figure


def together(runs: Sequence[Run], moments: int) -> Figure:
    """The same quantities of several runs over one time axis, each from its own start, a colour per run."""
    stack = _Stack(("Requests in the cluster", "TTFT p99", "KV cache in use, mean", "Executors"))
    end_s = max(run.end_s for run in runs)
    size = clock(end_s)[1]
    for run in runs:
        style: dict[str, Any] = {"line": {**run.line, "width": 1.5}, "showlegend": False}
        held, rates = hold(run, moments), _rates(run)
        now = _rounded(held.moments / size)
        stack.add(0, run.name, now, np.nansum(held.running + held.waiting, axis=0), "", **style)
        stack.add(1, run.name, _rounded(rates.middles / size), rates.p99, "", **style)
        stack.add(2, run.name, now, 100 * held.over_executors(np.nanmean), "", **style)
        times, launching, serving = _counts(run)
        style["line"] = {**style["line"], "shape": "hv"}
        stack.add(3, run.name, _rounded(times / size), launching + serving, "", **style)
    whole = {"tickformat": "d"}
    return stack.figure(
        end_s, "time from the start of each run", row1={"ticksuffix": " s"}, row2={"ticksuffix": " %"}, row3=whole
    )


@dataclass(frozen=True)
class _Rates:
    """By slice of time: requests/s that arrived and finished in it; TTFT in seconds of those that arrived in it."""

    middles: Floats
    arrived: Floats
    finished: Floats
    p50: Floats
    p99: Floats


def _rates(run: Run) -> _Rates:
    requests = run.requests
    count = int(min(80, max(8, len(requests) / 25)))
    edges = np.linspace(0, run.end_s, count + 1)
    width = run.end_s / count
    arrivals, ends = requests.arrival_ns.to_numpy() / NS_PER_S, requests.last_token_ns.dropna().to_numpy() / NS_PER_S
    by_slice = requests.ttft_s.groupby(np.clip((arrivals / width).astype(int), 0, count - 1))
    p50, p99 = (by_slice.quantile(level).reindex(range(count)).to_numpy(float) for level in (0.5, 0.99))
    arrived, finished = (np.histogram(times, edges)[0] / width for times in (arrivals, ends))
    return _Rates((edges[:-1] + edges[1:]) / 2, arrived, finished, p50, p99)


def _counts(run: Run) -> tuple[Floats, Floats, Floats]:
    """Times in seconds, and how many executors were launching and how many serving from each on."""
    state: dict[str, str] = {}
    count = {"launch": 0, "ready": 0}
    points = [(0.0, 0, 0)]
    for step in run.scaling.sort_values("time_s", kind="stable").itertuples():
        if step.what not in ("launch", "ready", "retired", "failed"):
            continue
        before = state.pop(step.executor, None)
        if before is not None:
            count[before] -= 1
        if step.what in count:
            state[step.executor] = step.what
            count[step.what] += 1
        if points[-1][0] == step.time_s:
            points.pop()
        points.append((step.time_s, count["launch"], count["ready"]))
    points.append((run.end_s, count["launch"], count["ready"]))
    times, launching, serving = np.array(points, float).T
    return times, launching, serving


def _shaded(run: Run, size: float) -> list[dict[str, Any]]:
    """What lies outside the measured window, and a line where an executor failed."""
    shapes: list[dict[str, Any]] = []
    arrivals, window = run.requests.arrival_ns / NS_PER_S, run.summary.window
    spans = []
    if len(arrivals) and window.warmup_s:
        spans.append((0.0, arrivals.min() + window.warmup_s))
    if len(arrivals) and window.cooldown_s:
        spans.append((arrivals.max() - window.cooldown_s, run.end_s))
    for start, end in spans:
        shape = {"type": "rect", "layer": "below", "fillcolor": "rgba(0,0,0,0.07)", "line": {"width": 0}}
        shapes.append({**shape, "yref": "paper", "y0": 0, "y1": 1, "x0": start / size, "x1": end / size})
    for time in run.scaling.time_s[run.scaling.what == "failed"].head(40):
        shape = {"type": "line", "line": {"color": RED, "width": 1.5, "dash": "dot"}}
        shapes.append({**shape, "yref": "paper", "y0": 0, "y1": 1, "x0": time / size, "x1": time / size})
    return shapes


# -- executors ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Held:
    """State of each executor at each moment, NaN while it does not serve: arrays of executors by moments."""

    names: list[str]
    moments: Floats
    running: Floats
    waiting: Floats
    kv_share: Floats

    def over_executors(self, reduce: Any) -> Floats:
        """One number per moment from the shares of KV cache in use; NaN where no executor serves."""
        serving = ~np.isnan(self.kv_share).all(axis=0)
        result = np.full(len(self.moments), np.nan)
        result[serving] = reduce(self.kv_share[:, serving], axis=0) if serving.any() else np.nan
        return result


def hold(run: Run, moments: int) -> Held:
    """Each executor as its last report had it, from ready to its end, at so many moments."""
    now = np.linspace(0, run.end_s, moments)
    steps = run.scaling
    ready = steps[steps.what == "ready"].groupby("executor").time_s.min()
    ended = steps[steps.what.isin(["retired", "failed"])].groupby("executor").time_s.max()
    reports = dict(iter(run.executors.groupby("executor", sort=False)))
    names = list(dict.fromkeys([*steps.executor[steps.what == "ready"], *reports]))
    running, waiting, kv_share = (np.full((len(names), moments), np.nan) for _ in range(3))
    for row, name in enumerate(names):
        report = reports.get(name)
        times = np.zeros(0) if report is None else report.time_s.to_numpy()
        begin = ready.get(name, times[0] if len(times) else 0.0)
        alive = (now >= begin) & (now <= ended.get(name, math.inf))
        last = np.searchsorted(times, now, side="right") - 1
        for target, column in ((running, "running"), (waiting, "waiting"), (kv_share, "kv_used")):
            values = np.zeros(1)  # the last place, -1, is the state before the first report
            if report is not None:
                scale = np.maximum(1, report.kv_total.to_numpy()) if column == "kv_used" else 1
                values = np.append(report[column].to_numpy() / scale, 0.0)
            target[row] = np.where(alive, values[last], np.nan)
    return Held(names, now, running, waiting, kv_share)


def heat(run: Run, held: Held, rows: int) -> tuple[str, Figure]:
    """(caption, figure): requests at each executor over time. Neighbours share one of at most `rows` rows."""
    load, names = held.running + held.waiting, held.names
    caption = "Running and waiting requests at each executor. Grey: not serving."
    if len(names) > rows:
        groups = np.array_split(np.arange(len(names)), rows)
        counts = np.array([(~np.isnan(load[group])).sum(axis=0) for group in groups])
        sums = np.array([np.nansum(load[group], axis=0) for group in groups])
        load = np.where(counts > 0, sums / np.maximum(1, counts), np.nan)
        caption = f"Running and waiting requests, mean of {len(names) / rows:.3g} executors per row. Grey: not serving."
        names = [f"{names[group[0]]} …" for group in groups]
    unit, size = clock(run.end_s)
    trace = {
        "type": "heatmap",
        "x": _rounded(held.moments / size),
        "y": names,
        "z": [[None if math.isnan(value) else round(float(value), 1) for value in row] for row in load],
        "colorscale": [[0, "#f7fbff"], [0.25, "#c6dbef"], [0.5, "#6baed6"], [0.75, "#2171b5"], [1, "#08306b"]],
        "zmin": 0,
        "zmax": max(1.0, float(np.nanmax(load, initial=0))),
        "colorbar": {"thickness": 10, "outlinewidth": 0, "x": 1.01, "nticks": 5},
        "hovertemplate": f"%{{y}} at %{{x}} {unit}: %{{z}} requests<extra></extra>",
        "ygap": 1 if len(names) <= 32 else 0,
    }
    layout = _layout(
        max(170, 64 + _row_height(len(names)) * len(names)),
        plot_bgcolor="#dcdcdc",
        margin=_TIME_MARGIN,
        xaxis=_axis(showgrid=False, range=[0, run.end_s / size], title={"text": f"time ({unit})"}),
        yaxis=_axis(showgrid=False, autorange="reversed", type="category"),
    )
    return caption, {"data": [trace], "layout": layout}


def _row_height(rows: int) -> int:
    return 18 if rows <= 32 else 11


def lives(run: Run, rows: int) -> Figure:
    """The first executors to be launched, at most `rows`: stages of starting up and time in service, as bars."""
    unit, size = clock(run.end_s)
    names = list(dict.fromkeys(run.scaling.executor))[:rows]
    bars: dict[str, list[tuple[str, float, float]]] = {str(stage): [] for stage in Stage}
    bars["serving"] = []
    ends: dict[str, tuple[float, str]] = {}
    ready: dict[str, float] = {}
    for step in run.scaling[run.scaling.executor.isin(names)].sort_values("time_s", kind="stable").itertuples():
        if step.what in bars:
            bars[step.what].append((step.executor, step.time_s - step.took_s, step.took_s))
        elif step.what == "ready":
            ready[step.executor] = step.time_s
        elif step.what in ("retired", "failed"):
            ends[step.executor] = (step.time_s, step.what)
    for name, start in ready.items():
        bars["serving"].append((name, start, ends.get(name, (run.end_s, ""))[0] - start))
    colours = {**_STAGE_COLOURS, "serving": "#cfe3d9"}
    traces: list[dict[str, Any]] = []
    for what, spans in bars.items():
        drawn = [span for span in spans if span[2] > 0]
        bar: Figure = {"type": "bar", "orientation": "h", "name": what, "marker": {"color": colours[what]}}
        bar |= {"y": [name for name, _, _ in drawn], "base": _rounded(start / size for _, start, _ in drawn)}
        bar |= {"x": _rounded(took / size for _, _, took in drawn), "textposition": "none"}
        bar |= {"text": [round_duration(took) for _, _, took in drawn]}
        if drawn:
            traces.append(bar | {"hovertemplate": "%{y} %{fullData.name}: %{text}<extra></extra>"})
    for what, symbol, colour in _ENDS:
        gone = [(name, time) for name, (time, how) in ends.items() if how == what]
        mark = {"symbol": symbol, "color": colour, "size": 10, "line": {"width": 2, "color": colour}}
        points: Figure = {
            "type": "scatter",
            "mode": "markers",
            "name": what,
            "marker": mark,
            "y": [name for name, _ in gone],
        }
        points |= {"x": _rounded(time / size for _, time in gone)}
        if gone:
            traces.append(points | {"hovertemplate": f"%{{y}} {what} at %{{x}} {unit}<extra></extra>"})
    layout = _layout(
        max(170, 90 + _row_height(len(names)) * len(names)),
        barmode="overlay",
        showlegend=True,
        legend={"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom", "font": {"size": 11}},
        margin={**_TIME_MARGIN, "t": 34},
        xaxis=_axis(range=[0, run.end_s / size], title={"text": f"time ({unit})"}),
        yaxis=_axis(categoryorder="array", categoryarray=names, autorange="reversed", type="category", showgrid=False),
    )
    return {"data": traces, "layout": layout}
