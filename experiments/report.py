"""The report of one or several runs: one HTML file that needs no network, no server and no other file.

It is made from run folders (see `experiments.outputs`), so a report can be made again, or over runs of different days.
"""

import html
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.vocabulary import NS_PER_S, Outcome, Stage
from experiments.outputs import read_executors, read_requests, read_scaling, read_summary
from experiments.report_figures import (
    DARK,
    GREEN,
    GREY,
    ORANGE,
    PINK,
    RED,
    Figure,
    Run,
    cdf,
    heat,
    hold,
    lives,
    time_series,
    together,
)
from experiments.tables import (
    COST,
    METRICS,
    UNKNOWN,
    Metric,
    Row,
    count,
    duration,
    error_text,
    job_lines,
    round_duration,
    share,
    three_digits,
)

CDF_POINTS = 500
MOMENTS = 300
EXECUTOR_ROWS = 64
TOGETHER = 12
DETAILED = 24
"""Most points of a latency curve, moments of a time series, rows of executors, runs in one figure over time, and runs
with figures of their own."""

_OUTCOMES = (
    ("met", "met every objective", GREEN),
    ("late", "finished, missed an objective", ORANGE),
    ("failed", "failed", RED),
    ("refused", "refused", PINK),
    ("cancelled", "cancelled", GREY),
    ("unfinished", "unfinished at the end of the run", DARK),
)
_LATENCIES = (
    ("ttft", "TTFT", "time to first token, queueing included"),
    ("tpot", "TPOT", "time per output token after the first"),
    ("e2e", "E2E", "arrival to last token"),
)
_KINDS = {
    "measured": "timed on the machine named above",
    "published": "taken from a publication",
    "derived": "computed from other numbers",
    "calibrated": "fitted to measurements",
}


@dataclass(frozen=True, slots=True)
class ReportRun:
    """A run to report on: what to call it, and its folder."""

    name: str
    folder: Path


@dataclass(frozen=True, slots=True)
class ReportTable:
    """A table of texts that a report shows ahead of its runs."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    lead: str = ""


def write_report(
    path: Path,
    title: str,
    runs: Sequence[ReportRun],
    comparison: Sequence[Row] = (),
    tables: Sequence[ReportTable] = (),
) -> None:
    """Write the report of `runs` to `path`, an HTML file.

    `comparison`: rows whose `reference` is a real run; the report shows how far each simulated run is off.
    A run whose folder cannot be read is named as such; ValueError if none can be.
    """
    loaded: list[Run] = []
    unread: list[str] = []
    for number, run in enumerate(runs):
        try:
            loaded.append(_load(run, number))
        except ValueError as error:
            unread.append(f"{run.name}: {error}")
    if not loaded:
        raise ValueError(f"no run to report on: {'; '.join(unread) or 'name at least one run folder'}")
    figures: dict[str, Figure] = {}
    sections = [
        _head(title, loaded),
        _alerts(loaded, unread),
        *(_section(each.title, _texts(each), _text(each.lead)) for each in tables),
        _main_metrics(loaded),
        _models(loaded),
        _jobs(loaded),
        _differences(loaded),
        _errors([row for row in comparison if row.reference is not None]),
        _attainment(loaded),
        _latency(loaded, figures),
        _over_time(loaded, figures),
        _cost(loaded),
        _basis(loaded),
        _all_metrics(loaded),
        _notes(loaded),
    ]
    page = _page(title, "\n".join(section for section in sections if section), figures)
    part = path.with_name(path.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    part.write_text(page, encoding="utf-8")
    os.replace(part, path)


def _load(run: ReportRun, number: int) -> Run:
    folder = run.folder
    summary, requests = read_summary(folder), read_requests(folder)
    return Run(run.name, number, summary, requests, read_executors(folder), read_scaling(folder))


# -- the page -----------------------------------------------------------------------------------------------------


def _text(value: object) -> str:
    return html.escape(str(value))


def _section(title: str, body: str, lead: str = "") -> str:
    lead = f'<p class="lead">{lead}</p>' if lead else ""
    return f"<section><h2>{_text(title)}</h2>{lead}{body}</section>" if body else ""


def _table(head: Iterable[str], rows: Iterable[Iterable[str]], kind: str = "") -> str:
    """`head` and cells are HTML; the first column is text, the others are numbers unless `kind` says `texts`."""
    top = "".join(f"<th>{each}</th>" for each in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table class="{kind}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _texts(table: ReportTable) -> str:
    return _table(map(_text, table.head), [map(_text, row) for row in table.rows])


def _plot(figures: dict[str, Figure], figure: Figure, label: str) -> str:
    """A place on the page for a figure, which is drawn when it comes into view."""
    key = f"figure-{len(figures)}"
    figures[key] = figure
    height = figure["layout"]["height"]
    return (
        f'<div class="plot" role="img" aria-label="{_text(label)}" data-figure="{key}" style="height:{height}px"></div>'
    )


def _swatch(run: Run) -> str:
    line = run.line
    dashes = {"solid": "", "dash": "6 4", "dot": "2 3", "dashdot": "6 3 2 3"}[line["dash"]]
    stroke = f'stroke="{line["color"]}" stroke-width="3" stroke-dasharray="{dashes}"'
    return f'<svg class="swatch" viewBox="0 0 24 8" aria-hidden="true"><path d="M0 4h24" {stroke}/></svg>'


def _named(run: Run, runs: Sequence[Run]) -> str:
    """The name of a run, with its colour where there are several."""
    return (f"{_swatch(run)} " if len(runs) > 1 else "") + _text(run.name)


def _page(title: str, body: str, figures: Mapping[str, Figure]) -> str:
    from plotly.offline import get_plotlyjs

    data = json.dumps(figures, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="generator" content="deepflow">
<title>{_text(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
{body}
</main>
<script type="application/json" id="figures">{data}</script>
<script>{get_plotlyjs()}</script>
<script>{_SCRIPT}</script>
</body>
</html>
"""


# -- sections -----------------------------------------------------------------------------------------------------


def _common(runs: Sequence[Run], values: Iterable[object]) -> str:
    """What the runs say, once if they agree."""
    different = list(dict.fromkeys(_text(value) for value in values if value not in (None, "")))
    return "; ".join(different) if len(different) <= 3 else f"{len(different)} different ones, see below"


def _head(title: str, runs: Sequence[Run]) -> str:
    backends = {"sim": "simulated", "real": "real engines"}
    facts = [
        ("Backend", _common(runs, (backends.get(str(run.said("backend")), run.said("backend")) for run in runs))),
        ("Trace", _common(runs, (run.said("trace") for run in runs))),
        ("Objectives", _common(runs, (_objectives(run) for run in runs))),
        ("Seed", _common(runs, (run.said("seed") for run in runs))),
        ("Run at", _common(runs, (str(run.said("time") or "").replace("T", " ") for run in runs))),
        ("Machine", _common(runs, (run.said("machine") for run in runs))),
        ("Commit", _common(runs, (run.said("commit") for run in runs))),
        ("Rests on", " ".join(_badge(kind) for kind in dict.fromkeys(kind for kind, _, _ in _bases(runs)))),
    ]
    items = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts if value)
    return f"<header><h1>{_text(title)}</h1><dl>{items}</dl></header>"


def _objectives(run: Run) -> str:
    limits = ((title, run.objective(key)) for key, title, _ in _LATENCIES)
    return ", ".join(f"{title} ≤ {round_duration(limit)}" for title, limit in limits if limit is not None) or "none"


def _alerts(runs: Sequence[Run], unread: Sequence[str]) -> str:
    """What a reader must know before believing a number. What several runs have in common is said once."""
    bad: dict[str, list[Run]] = {}
    mind: dict[str, list[Run]] = {}
    for run in runs:
        for said, into in ((_problems(run), bad), (_cautions(run), mind)):
            for each in said:
                into.setdefault(each, []).append(run)
    items = [("bad", "Problem", f"no results: {_text(each)}") for each in unread]
    for kind, word, found in (("bad", "Problem", bad), ("mind", "Mind", mind)):
        items += [(kind, word, _who(by, runs) + text) for text, by in found.items()]
    body = "".join(f'<li class="{kind}"><span>{word}</span><div>{text}</div></li>' for kind, word, text in items[:8])
    body += f"<li>and {len(items) - 8} more, see the notes below</li>" if len(items) > 8 else ""
    return f'<ul class="alerts">{body}</ul>' if items else ""


def _who(some: Sequence[Run], runs: Sequence[Run]) -> str:
    """Whom a sentence is about, as its beginning."""
    if len(runs) == 1:
        return ""
    if len(some) == len(runs):
        return "<b>All runs</b>: "
    names = ", ".join(_text(run.name) for run in some[:3])
    return f"<b>{names}</b>{f' and {len(some) - 3} more' if len(some) > 3 else ''}: "


def _problems(run: Run) -> list[str]:
    said = []
    requests, finished = int(run.metric("requests")), int(run.metric("finished"))
    if not requests:
        said.append("no request arrived in the measured window, so there are no metrics")
    elif not finished:
        said.append(f"none of {count(requests)} requests finished")
    lost = [(each, int(run.metric(each))) for each in ("failed", "refused", "unfinished") if run.metric(each) > 0]
    if lost and finished:
        counts = ", ".join(f"{count(number)} {outcome}" for outcome, number in lost)
        said.append(f"{counts} of {count(requests)} requests")
    if deaths := int((run.scaling.what == "failed").sum()):
        said.append(f"{deaths} executor{'s' if deaths > 1 else ''} failed")
    return said


def _cautions(run: Run) -> list[str]:
    said = []
    finished = int(run.metric("finished"))
    if run.said("stand_in"):
        said.append("the trace is a stand-in, generated from published statistics")
    if 0 < finished < 1000:
        said.append(f"only {finished} requests finished: p99 rests on the slowest {math.ceil(finished / 100)} of them")
    if run.metric("lag_p99_s") > 0.01:
        lag = duration(run.metric("lag_p99_s"))
        said.append(f"the load generator was late, by {lag} at p99: real arrivals differ from the trace")
    return said


def _value(metric: Metric, value: float) -> str:
    match metric.unit:
        case "s":
            return duration(value)
        case "share":
            return share(value)
        case _:
            return three_digits(value)


def _main_metrics(runs: Sequence[Run]) -> str:
    if len(runs) == 1:
        return _section("Results", _tiles(runs[0]) + _percentiles(runs[0]))
    rows = [Row(run.name, run.summary.metrics) for run in runs]
    best: dict[str, float] = {}
    for metric in METRICS:
        usable = [row for row in rows if row.summary.get("finished")]
        known = [value for row in usable if not math.isnan(value := row.value(metric))]
        if len(set(known)) > 1:
            best[metric.key] = min(known) if metric.better == "lower" else max(known)
    body = []
    for run, row in zip(runs, rows, strict=True):
        cells = [_named(run, runs), count(run.metric("requests")), count(run.metric("finished"))]
        for metric in METRICS:
            value = row.value(metric)
            text = _value(metric, value)
            cells.append(f'<b class="best">{text}</b>' if value == best.get(metric.key) else text)
        body.append(cells)
    units = {"/s": "/s", "NPU s": " (s)"}
    head = ["Run", "requests", "finished", *(metric.title + units.get(metric.unit, "") for metric in METRICS)]
    note = "Best of each column in bold." if best else ""
    return _section("Results", _table(head, body), note)


def _models(runs: Sequence[Run]) -> str:
    """The main metrics by model, of runs that served several."""
    body = []
    for run in runs:
        for name, metrics in (run.said("models") or {}).items():
            row = Row(name, metrics)
            cells = [_text(name), count(metrics["requests"]), count(metrics["finished"])]
            body.append(
                [*([_named(run, runs)] if len(runs) > 1 else []), *cells, *(_value(m, row.value(m)) for m in METRICS)]
            )
    units = {"/s": "/s", "NPU s": " (s)"}
    head = ["Model", "requests", "finished", *(metric.title + units.get(metric.unit, "") for metric in METRICS)]
    head = ["Run", *head] if len(runs) > 1 else head
    return _section("By model", _table(head, body) if body else "", "The most asked for first.")


def _jobs(runs: Sequence[Run]) -> str:
    """Jobs other than serving, where there were any."""
    rows = [(_named(run, runs), _text(line)) for run in runs for line in job_lines(run.summary.metrics)]
    return _section("Jobs other than serving", _table(("run", "jobs"), rows)) if rows else ""


def _tiles(run: Run) -> str:
    requests, finished = run.metric("requests"), run.metric("finished")
    lost = requests - finished - run.metric("cancelled") > 0
    tiles = [
        ("SLO attainment", share(run.metric("slo_attainment")), "of all requests met every objective"),
        ("Goodput", f"{three_digits(run.metric('goodput_rps'))} <small>req/s</small>", "met every objective"),
        ("Throughput", f"{three_digits(run.metric('throughput_tokens_per_s'))} <small>tokens/s</small>", "output"),
        ("Finished", f"{count(finished)} <small>of {count(requests)}</small>", "requests measured"),
        ("NPU time", f"{three_digits(run.metric('npu_seconds'))} <small>NPU s</small>", "paid, idle included"),
    ]
    kinds = ["", "", "", "bad" if lost else "", ""]
    if not math.isnan(cost := run.metric(COST.key)):
        tiles.append(("Cost", f"{three_digits(cost)} <small>$</small>", "per million output tokens"))
        kinds.append("")
    return '<div class="tiles">{}</div>'.format(
        "".join(
            f'<div class="tile {kind}"><span>{name}</span><strong>{value}</strong><em>{note}</em></div>'
            for (name, value, note), kind in zip(tiles, kinds, strict=True)
        )
    )


def _percentiles(run: Run) -> str:
    rows = []
    for key, title, meaning in (*_LATENCIES, ("itl", "ITL", "gap between tokens, pooled over all")):
        names = [f"{key}_{each}_s" for each in ("p50", "p90", "p99", "mean")]
        values = (duration(run.metric(name)) if name in run.summary.metrics else "" for name in names)
        limit = run.objective(key) if key != "itl" else None
        objective = "" if limit is None else f"≤ {round_duration(limit)}"
        met = "" if limit is None else _bar(run.share_met(key))
        rows.append([f"<b>{title}</b> <small>{meaning}</small>", *values, objective, met])
    return _table(["", "p50", "p90", "p99", "mean", "objective", "met by"], rows, "percentiles")


_COSTS = (
    ("npu_hours", "NPU-hours"),
    ("busy_share", "computing"),
    ("energy_kwh", "energy (kWh)"),
    ("cost_usd", "cost ($)"),
    ("npu_hours_per_million_tokens", "NPU-hours per M tokens"),
    ("energy_kwh_per_million_tokens", "kWh per M tokens"),
    (COST.key, "$ per M tokens"),
)


def _cost(runs: Sequence[Run]) -> str:
    """What the whole run took, and what a million output tokens came to."""
    known = [(key, title) for key, title in _COSTS if any(not math.isnan(run.metric(key)) for run in runs)]
    body = [
        [_named(run, runs), *((share if key == "busy_share" else three_digits)(run.metric(key)) for key, _ in known)]
        for run in runs
    ]
    lead = (
        "Of the whole run, each executor at the rates of its own hardware, starting up and idle included; prices and "
        "watts, and whether they are published or assumed, stand in conf/hardware. Tokens are those of the answers."
    )
    return _section("Cost", _table(["Run", *(title for _, title in known)], body) if known else "", lead)


def _errors(rows: Sequence[Row]) -> str:
    """How far simulated runs are off the real ones."""

    def cell(row: Row, metric: Metric) -> str:
        error = row.error(metric)
        size = "" if math.isnan(error) else "near" if abs(error) <= 0.05 else "off" if abs(error) <= 0.15 else "far"
        values = f"{_value(metric, row.value(metric))}<br>real {_value(metric, row.referred(metric))}"
        return f'<b class="error {size}">{_text(error_text(error))}</b><small>{values}</small>'

    body = [[_text(row.label), *(cell(row, metric) for metric in METRICS)] for row in rows]
    table = _table(["Run", *(metric.title for metric in METRICS)], body, "errors") if rows else ""
    lead = "(simulated − real) / real, with both values below. Light shade: more than 5 % off, strong: more than 15 %."
    return _section("Simulated against real", table, lead)


def _bar(part: float) -> str:
    """A share as a bar in a table cell."""
    width = 0 if math.isnan(part) else 100 * part
    return f'<div class="bar"><i style="width:{width:.2f}%"></i><span>{share(part)}</span></div>'


def _attainment(runs: Sequence[Run]) -> str:
    legend = "".join(f'<span><i style="background:{colour}"></i>{text}</span>' for _, text, colour in _OUTCOMES)
    below = f'<p class="legend">{legend}</p>{_reasons(runs)}'
    lead = "Share of all requests that arrived in the measured window. What did not finish counts as missed."
    columns = [(key, title) for key, title, _ in _LATENCIES if any(run.objective(key) is not None for run in runs)]
    if not columns:
        lead += " No objectives were set, so every request that finished met them."
    if len(runs) == 1:
        return _section("Objectives met", _stack(runs[0]) + below, lead)
    head = ["Run", "every objective"]
    for key, title in columns:
        limits = {run.objective(key) for run in runs}
        same = limits.pop() if len(limits) == 1 else None
        head.append(title if same is None else f"{title} ≤ {round_duration(same)}")
    body = [
        [
            _named(run, runs),
            _bar(run.metric("slo_attainment")),
            *(_bar(run.share_met(key)) for key, _ in columns),
            _stack(run),
        ]
        for run in runs
    ]
    return _section("Objectives met", _table([*head, "what became of the requests"], body, "attainment") + below, lead)


def _stack(run: Run) -> str:
    measured = run.measured
    finished, met = measured.outcome == str(Outcome.FINISHED), measured.slo_met
    counts = {"met": int(met.sum()), "late": int((finished & ~met).sum())}
    counts |= {key: int((measured.outcome == key).sum()) for key, _, _ in _OUTCOMES[2:]}
    parts = []
    for key, text, colour in _OUTCOMES:
        if counts[key]:
            title = f"{counts[key]} {text}"
            parts.append(f'<i style="flex-grow:{counts[key]};background:{colour}" title="{title}"></i>')
    return f'<div class="stack">{"".join(parts)}</div>'


def _reasons(runs: Sequence[Run]) -> str:
    """Why requests did not finish, the most frequent first."""
    several = len(runs) > 1
    rows = []
    for run in runs:
        lost = run.measured[run.measured.outcome != str(Outcome.FINISHED)]
        groups = lost.groupby(["outcome", "reason"]).agg(size=("arrival_ns", "size"), first=("arrival_ns", "min"))
        for (outcome, reason), row in groups.sort_values("size", ascending=False).head(8).iterrows():
            cells = [_text(outcome), _text(reason) or UNKNOWN, count(row["size"]), duration(row["first"] / NS_PER_S)]
            rows.append([_named(run, runs), *cells] if several else cells)
    if not rows:
        return ""
    head = [*(["Run"] if several else []), "outcome", "reason", "requests", "first arrived at"]
    return "<h3>Requests that did not finish</h3>" + _table(head, rows, "reasons")


def _latency(runs: Sequence[Run], figures: dict[str, Figure]) -> str:
    points = max(80, min(CDF_POINTS, 8000 // len(runs)))
    legend = "".join(f"<span>{_named(run, runs)}</span>" for run in runs) if len(runs) > 1 else ""
    plots = "".join(
        f"<figure><figcaption><b>{title}</b> {meaning}</figcaption>{_plot(figures, figure, title)}</figure>"
        for key, title, meaning in _LATENCIES
        if (figure := cdf(runs, key, points)) is not None
    )
    body = (f'<p class="legend">{legend}</p>' if legend else "") + f'<div class="grid">{plots}</div>'
    lead = "Share of requests that took at most so long, among those that got so far. Logarithmic time axis."
    return _section("Latency", body if plots else '<p class="empty">No request got as far as a first token.</p>', lead)


def _over_time(runs: Sequence[Run], figures: dict[str, Figure]) -> str:
    moments = max(60, min(MOMENTS, 1500 // len(runs)))
    rows = max(12, min(EXECUTOR_ROWS, 320 // len(runs)))
    lead = "Shaded: outside the measured window. Dotted red line: an executor failed."
    if len(runs) == 1:
        return _section("Over time", _of_one(runs[0], moments, rows, figures), lead)
    parts = []
    if len(runs) <= TOGETHER:
        legend = "".join(f"<span>{_named(run, runs)}</span>" for run in runs)
        parts = [f'<p class="legend">{legend}</p>', _plot(figures, together(runs, moments), "all runs over time")]
    if len(runs) > DETAILED:
        parts.append(f"<p>The first {DETAILED} of {len(runs)} runs. Each run can have a report of its own.</p>")
    for run in runs[:DETAILED]:
        body = _of_one(run, moments, rows, figures)
        parts.append(f"<details><summary>{_named(run, runs)}</summary><p>{lead}</p>{body}</details>")
    return _section("Over time", "".join(parts))


def _of_one(run: Run, moments: int, rows: int, figures: dict[str, Figure]) -> str:
    body = _plot(figures, time_series(run, moments), f"{run.name} over time")
    held = hold(run, moments)
    if len(held.names) > 1:
        caption, figure = heat(run, held, rows)
        body += f'<h3>Load of each executor</h3><p class="lead">{caption}</p>' + _plot(figures, figure, caption)
    return body + _scaling(run, rows, figures)


def _scaling(run: Run, rows: int, figures: dict[str, Figure]) -> str:
    """Launches, stages and ends; one sentence where nothing happened after an immediate start."""
    steps = run.scaling
    launched = int((steps.what == "launch").sum())
    stages = steps[steps.what.isin([str(stage) for stage in Stage])]
    if (steps.time_s <= 0).all() and not stages.took_s.any():
        many = "executor was" if launched == 1 else "executors were"
        return f"<h3>Scaling</h3><p>{launched} {many} ready at once and stayed to the end.</p>" if launched else ""
    ended = ", ".join(f"{int((steps.what == what).sum())} {what}" for what in ("retired", "failed"))
    text = f"<h3>Scaling</h3><p>{launched} launched, {int((steps.what == 'ready').sum())} became ready, {ended}."
    if launched > rows:
        text += f" Drawn: the first {rows} to be launched."
    text += "</p>" + _plot(figures, lives(run, rows), f"{run.name}: life of executors")
    if stages.took_s.any():
        body = []
        for stage in Stage:
            took = stages.took_s[stages.what == str(stage)]
            if len(took):
                body.append([stage, count(len(took)), duration(took.mean()), duration(took.max())])
        text += _table(["stage of starting", "times", "mean", "longest"], body, "narrow")
    return text


def _bases(runs: Sequence[Run]) -> list[tuple[str, str, str]]:
    """(kind, source, runs) of everything the runs say their numbers rest on."""
    users: dict[tuple[str, str], list[str]] = {}
    for run in runs:
        said = run.said("basis")
        for each in [said] if isinstance(said, str) else said or []:
            kind, _, source = str(each).partition(":")
            if kind.strip().lower() not in _KINDS:
                kind, source = "stated", str(each)
            users.setdefault((kind.strip().lower(), source.strip()), []).append(run.name)
    return [
        (kind, source, "all\u00a0runs" if len(names) == len(runs) else ", ".join(names))
        for (kind, source), names in users.items()
    ]


def _badge(kind: str) -> str:
    return f'<span class="badge {kind}">{kind}</span>'


def _basis(runs: Sequence[Run]) -> str:
    several = len(runs) > 1
    rows = [[_badge(kind), _text(source), *([_text(names)] if several else [])] for kind, source, names in _bases(runs)]
    traces: dict[tuple[str, bool], list[str]] = {}
    for run in runs:
        if run.said("trace"):
            traces.setdefault((str(run.said("trace")), bool(run.said("stand_in"))), []).append(run.name)
    for (trace, stand_in), names in traces.items():
        kind = _badge("stand-in") if stand_in else _badge("trace")
        who = "all\u00a0runs" if len(names) == len(runs) else ", ".join(names)
        rows.append([kind, f"Requests: {_text(trace)}", *([_text(who)] if several else [])])
    table = "<p>Nothing is stated.</p>"
    if rows:
        table = _table(["kind", "source", *(["runs"] if several else [])], rows, "texts")
    kinds = "; ".join(f"<b>{kind}</b>: {meaning}" for kind, meaning in _KINDS.items())
    versions = "".join(
        f"<details><summary>Configuration and versions{f' of {_text(run.name)}' if several else ''}</summary>"
        f"<pre>{_text(_printed(run))}</pre></details>"
        for run in runs[:50]
    )
    return _section("What the numbers rest on", table + versions, f"{kinds}.")


def _printed(run: Run) -> str:
    keep = {key: value for key, value in run.summary.provenance.items() if key not in ("basis", "models", "notes")}
    return json.dumps(keep, indent=2, ensure_ascii=False)


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    if isinstance(value, dict):
        flat: dict[str, str] = {}
        for key, each in value.items():
            flat |= _flat(each, f"{prefix}.{key}" if prefix else str(key))
        return flat
    return {prefix: json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value}


def _differences(runs: Sequence[Run]) -> str:
    """What sets the runs apart: the keys of their configurations that have several values."""
    flat = [_flat(run.said("config") or {}) for run in runs]
    keys = [key for key in dict.fromkeys(key for each in flat for key in each) if key not in ("out", "label")]
    different = [key for key in keys if len({each.get(key) for each in flat}) > 1]
    if len(runs) == 1 or not different:
        return ""
    shown = different[:30]
    rows = [
        [_named(run, runs), *(_text(each.get(key, UNKNOWN)) for key in shown)]
        for run, each in zip(runs, flat, strict=True)
    ]
    lead = "Keys of the configuration that are not the same in all runs."
    if len(different) > len(shown):
        lead += f" The first {len(shown)} of {len(different)}."
    return _section("What differs between the runs", _table(["Run", *map(_text, shown)], rows, "texts"), lead)


def _all_metrics(runs: Sequence[Run]) -> str:
    keys = list(dict.fromkeys(key for run in runs for key in run.summary.metrics))

    def shown(key: str, run: Run) -> str:
        value = run.metric(key)
        if key.endswith(("_share", "attainment")):
            return share(value)
        if isinstance(run.summary.metrics.get(key), int):
            return count(value)
        return duration(value) if key.endswith("_s") and not key.endswith("_per_s") else three_digits(value)

    rows = [[f"<code>{_text(key)}</code>", *(shown(key, run) for run in runs)] for key in keys]
    table = _table(["metric", *(_named(run, runs) for run in runs)], rows, "narrow")
    return _section("All metrics", f"<details><summary>{len(keys)} numbers of each run</summary>{table}</details>")


def _notes(runs: Sequence[Run]) -> str:
    notes = []
    for run in runs:
        name = f"<b>{_text(run.name)}</b>: " if len(runs) > 1 else ""
        window, total, counted = run.summary.window, len(run.requests), int(run.requests.in_window.sum())
        if window.warmup_s or window.cooldown_s:
            notes.append(
                f"{name}requests that arrived in the first {round_duration(window.warmup_s)} or the last "
                f"{round_duration(window.cooldown_s)} do not count: {count(counted)} of {count(total)} do."
            )
        censored = int((run.requests.outcome == "unfinished").sum())
        if censored:
            notes.append(
                f"{name}{count(censored)} requests had not ended when the run did. They count as missed, and "
                "latencies are those of the others, so percentiles look better than they are."
            )
        if run.real:
            p99, most = duration(run.metric("lag_p99_s")), duration(run.metric("lag_max_s"))
            notes.append(f"{name}the load generator sent requests late by {p99} at p99 and {most} at most.")
        if run.metric("never_sent") > 0:
            sent = count(run.metric("never_sent"))
            notes.append(f"{name}{sent} requests of the trace waited for another request's cue that never came.")
        if run.said("stand_in"):
            notes.append(f"{name}the trace is a stand-in: {_text(run.said('trace'))}.")
        notes += [f"{name}{_text(note)}" for note in run.said("notes") or []]
    if not any(run.summary.window.warmup_s or run.summary.window.cooldown_s for run in runs):
        notes.append("No warm-up and no cool-down is left out: every request counts.")
    notes.append(
        "TTFT: arrival to first token, queueing included. TPOT: (E2E − TTFT) / (tokens − 1), none for one token, which "
        "counts as met. E2E: arrival to last token. ITL: gaps between tokens, pooled. Goodput: requests per second "
        "that met every objective. NPU time: NPUs times the seconds they were held, starting up and idle included."
    )
    notes.append(
        f"Curves are thinned to at most {CDF_POINTS} points, series to {MOMENTS} moments; executors are shown as their "
        "last load report had them. Tables use all data."
    )
    items = "".join(f"<li>{note[:1].upper()}{note[1:]}</li>" for note in notes[:60])
    return _section("Notes", f"<ul>{items}</ul>")


# -- style and script ---------------------------------------------------------------------------------------------

# Nothing is loaded from anywhere: the browser itself sees to it.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
    "base-uri 'none'; form-action 'none'"
)

_STYLE = """
:root { color-scheme: light; --ink: #1d2129; --soft: #5b6270; --rule: #e3e6ea; --blue: #0072b2; --red: #b34700; }
* { box-sizing: border-box; }
body { margin: 0; background: #f4f5f7; color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 24px 16px 48px; }
header, section, .alerts li { background: #fff; border: 1px solid var(--rule); border-radius: 8px; }
header, section { padding: 18px 22px; margin: 0 0 16px; }
h1 { font-size: 24px; line-height: 1.25; margin: 0 0 12px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 0 0 8px; }
h3 { font-size: 15px; margin: 22px 0 4px; }
p { margin: 0 0 8px; }
.lead, small, figcaption, em { color: var(--soft); font-style: normal; }
.lead { max-width: 110ch; }
dl { display: flex; flex-wrap: wrap; gap: 6px 28px; margin: 0; }
dt { color: var(--soft); font-size: 12px; }
dd { margin: 0; overflow-wrap: anywhere; max-width: 70ch; }
.wide { overflow-x: auto; margin: 8px 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { color: var(--soft); font-weight: 600; font-size: 13px; border-bottom: 1px solid #c6cbd2; vertical-align: bottom; }
th, td { padding: 6px 10px; text-align: right; white-space: nowrap; }
td { border-bottom: 1px solid var(--rule); }
tr:last-child td { border-bottom: 0; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td:first-child { white-space: normal; overflow-wrap: anywhere; min-width: 150px; }
table.texts th, table.texts td { text-align: left; white-space: normal; vertical-align: top; }
table.texts td:first-child { white-space: nowrap; }
table.reasons th:nth-last-child(n+3), table.reasons td:nth-last-child(n+3) { text-align: left; white-space: normal; }
table.narrow { width: auto; }
td > small { display: block; }
td:first-child > small { display: inline; margin-left: 4px; }
.best { color: #005a8c; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); gap: 12px; margin: 4px 0 12px; }
.tile { border: 1px solid var(--rule); border-left: 4px solid var(--blue); border-radius: 6px; padding: 10px 14px; }
.tile.bad { border-left-color: var(--red); }
.tile span { display: block; font-size: 13px; color: var(--soft); }
.tile strong { display: block; font-size: 26px; line-height: 1.3; font-weight: 650; white-space: nowrap; }
.tile small { font-size: 14px; font-weight: 400; }
.tile em { font-size: 12px; }
.bar { position: relative; height: 22px; min-width: 110px; background: #eef0f3; border-radius: 3px; overflow: hidden; }
.bar i { position: absolute; inset: 0 auto 0 0; background: #9ccbe8; }
.bar span { position: absolute; right: 6px; line-height: 22px; font-size: 13px; font-weight: 600; }
.stack { display: flex; height: 22px; min-width: 200px; border-radius: 3px; overflow: hidden; gap: 1px; }
.stack i { flex-basis: 2px; min-width: 2px; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 18px; font-size: 13px; color: var(--soft); }
.legend i { display: inline-block; width: 11px; height: 11px; border-radius: 2px; margin-right: 5px; }
.swatch { width: 24px; height: 8px; vertical-align: middle; margin-right: 4px; }
.alerts { list-style: none; margin: 0 0 16px; padding: 0; }
.alerts li { display: flex; border-left: 4px solid #e69f00; padding: 7px 14px; margin: 0 0 6px; }
.alerts li.bad { border-left-color: var(--red); background: #fff7f2; }
.alerts span { flex: 0 0 82px; font-weight: 650; color: #7a5200; }
.alerts .bad span { color: var(--red); }
.badge { display: inline-block; border: 1px solid #b9c2cc; border-radius: 10px; padding: 0 9px; font-size: 13px; }
.badge.measured { background: #e0f2ec; border-color: #7cc3aa; }
.badge.published { background: #e2f0fa; border-color: #86bfe3; }
.badge.derived { background: #fdf1d8; border-color: #e3b95c; }
.badge.calibrated { background: #f6e6f0; border-color: #d79dbf; }
.badge.stand-in { background: #fff0e6; border-color: #e08a52; }
.error { display: inline-block; padding: 0 5px; border-radius: 3px; }
.error.off { background: #fdf1d8; }
.error.far { background: #fbdccb; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(340px, 100%), 1fr)); gap: 12px; }
figure { margin: 0; min-width: 0; }
.plot { width: 100%; }
details { border-top: 1px solid var(--rule); padding: 8px 0; }
summary { cursor: pointer; font-weight: 600; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f7f8f9; padding: 12px; font-size: 12.5px; }
.empty { color: var(--soft); }
@media (max-width: 700px) { main { padding: 8px 6px; } header, section { padding: 14px 12px; } }
@media print { body { background: #fff; } section { break-inside: avoid; } }
"""

_SCRIPT = """
const figures = JSON.parse(document.getElementById("figures").textContent);
const draw = (place) => {
  const figure = figures[place.dataset.figure];
  delete place.dataset.figure;
  if (figure) Plotly.newPlot(place, figure.data, figure.layout, {
    responsive: true, displaylogo: false, modeBarButtons: [["toImage", "resetScale2d"]]});
};
const places = document.querySelectorAll("[data-figure]");
const watch = new IntersectionObserver((seen) => seen.forEach((each) => {
  if (each.isIntersecting) { watch.unobserve(each.target); draw(each.target); }
}), {rootMargin: "600px"});
// What can be seen at once is drawn at once, whether or not the browser ever paints a frame (headless ones may not).
const near = (place) => place.checkVisibility() && place.getBoundingClientRect().top < innerHeight + 600;
places.forEach((place) => near(place) ? draw(place) : watch.observe(place));
addEventListener("beforeprint", () => places.forEach((place) => { if (place.dataset.figure) draw(place); }));
"""
