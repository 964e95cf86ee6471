"""The report: whole, offline, right in its numbers, and drawn by a browser without complaint."""

import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.metrics import Slo, Window, summarise
from cluster.recorder import Recorder
from cluster.vocabulary import Stage, to_ns
from experiments import report, report_figures
from experiments.outputs import read_requests, read_summary, write_run
from experiments.report import ReportRun, write_report
from experiments.tables import Row, duration, share, three_digits
from policies.scaling.target_utilisation import TargetUtilisation
from sim.node import Failure
from tests.builders import GroupPlan, make_arrival, make_spec, run_sim

SLO = Slo(ttft_s=0.5, tpot_s=0.05)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def write(folder: Path, recorder: Recorder, provenance: dict[str, Any], window: Window | None = None) -> Path:
    write_run(folder, recorder, summarise(recorder, SLO, window), provenance, SLO, window or Window())
    return folder


def provenance(policy: str, **more: Any) -> dict[str, Any]:
    config = {"dispatch": {"_target_": policy}, "seed": 3}
    return {"backend": "sim", "seed": 3, "trace": "made <here>", "config": config, **more}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[ReportRun]:
    """A steady run with warm-up, and an autoscaled one that loses an executor and requests with it."""
    folder = tmp_path_factory.mktemp("runs")
    steady = run_sim((make_arrival(i, at_s=0.02 * i, prompt=100, output=20) for i in range(300)), executors=2)
    basis = ["derived: a <roofline>", "published: stages of table 2"]
    write(folder / "steady", steady.recorder, provenance("a.B", basis=basis), Window(warmup_s=1.0, cooldown_s=0.5))
    scaled = run_sim(
        (make_arrival(i, at_s=0.01 * i, prompt=100, output=60) for i in range(400)),
        groups=[GroupPlan(make_spec(), 1, 1, 4)],
        scaling=TargetUtilisation(0.02, period_s=0.5),
        stages=[(Stage.TE_PRE_LOAD, to_ns(0.2)), (Stage.TE_LOAD, to_ns(0.5))],
        failures=[Failure(3.0, "te-0")],
        max_attempts=1,
        report_period_s=0.1,
    )
    said = provenance("a.C", basis="calibrated: fitted", stand_in=True, notes=["Mind the <gap>."])
    write(folder / "scaled", scaled.recorder, said)
    return [ReportRun("steady", folder / "steady"), ReportRun("scaled & lossy", folder / "scaled")]


class Page(HTMLParser):
    """What a report consists of: text, attributes, scripts."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._in = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.figures: dict[str, Any] = json.loads(self.scripts[0])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._in = tag
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        self._in = ""

    def handle_data(self, data: str) -> None:
        if self._in == "script":
            self.scripts.append(data)
        elif self._in != "style":
            self.text += data


@pytest.fixture(scope="module")
def pages(runs: list[ReportRun], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Reports of one run, of the other, and of both with a comparison."""
    folder = tmp_path_factory.mktemp("reports")
    steady, scaled = (read_summary(run.folder).metrics for run in runs)
    write_report(folder / "one.html", "One <run>", runs[:1])
    write_report(folder / "scaled.html", "Scaled", runs[1:])
    rows = [Row("scaled", scaled, steady), Row("steady", steady)]
    write_report(folder / "both.html", "Both", runs, rows)
    return {path.stem: path for path in folder.glob("*.html")}


@pytest.mark.parametrize("name", ["one", "scaled", "both"])
def test_a_report_needs_nothing_else(pages: dict[str, Path], name: str) -> None:
    """Nothing is loaded from anywhere, the browser is told to refuse it, plotly.js is there once, the file is small."""
    page = Page(pages[name])
    links = [value for attribute, value in page.attributes if attribute in ("src", "href", "srcset", "action")]
    assert links == []
    assert not {"link", "img", "iframe"} & set(page.tags)
    assert page.source.count("plotly.js v") == 1
    policy = next(value for attribute, value in page.attributes if attribute == "content" and "default-src" in value)
    assert "default-src 'none'" in policy
    assert "http" not in policy
    assert pages[name].stat().st_size < 6e6
    assert not list(pages[name].parent.glob("*.part"))


@pytest.mark.parametrize("name", ["one", "scaled", "both"])
def test_every_figure_is_one_that_plotly_knows(pages: dict[str, Path], name: str) -> None:
    """Each property of each figure passes plotly's own validation, and each figure has a place."""
    import plotly.graph_objects as go

    page = Page(pages[name])
    places = [value for attribute, value in page.attributes if attribute == "data-figure"]
    assert sorted(places) == sorted(page.figures)
    for figure in page.figures.values():
        go.Figure(figure)


def test_the_numbers_of_a_run_are_in_its_report(runs: list[ReportRun], pages: dict[str, Path]) -> None:
    """Attainment, goodput, NPU time and percentiles stand in the text as the summary has them."""
    metrics, text = read_summary(runs[0].folder).metrics, Page(pages["one"]).text
    assert share(metrics["slo_attainment"]) in text
    assert three_digits(metrics["goodput_rps"]) in text
    assert three_digits(metrics["npu_seconds"]) in text
    for latency in ("ttft", "tpot", "e2e", "itl"):
        for percentile in ("p50", "p99"):
            assert duration(metrics[f"{latency}_{percentile}_s"]) in text
    assert "TTFT ≤ 500 ms, TPOT ≤ 50 ms" in text


def test_what_the_numbers_rest_on_is_said(pages: dict[str, Path]) -> None:
    """Kinds of sources, trace, warm-up rule, stand-ins and notes are in the report, with the text of users escaped."""
    one, scaled = Page(pages["one"]), Page(pages["scaled"])
    assert "One <run>" in one.text
    for kind, source in (("derived", "a <roofline>"), ("published", "stages of table 2")):
        assert kind in one.text
        assert source in one.text
    assert "Requests: made <here>" in one.text
    assert "in the first 1 s or the last 500 ms do not count: 225 of 300 do" in one.text
    assert "stand-in" not in one.text
    assert "the trace is a stand-in" in scaled.text
    assert "calibrated" in scaled.text
    assert "Mind the <gap>." in scaled.text
    assert "every request counts" in scaled.text


def test_what_went_wrong_comes_first(runs: list[ReportRun], pages: dict[str, Path]) -> None:
    """Failed requests and executors stand ahead of the results, their reasons below."""
    text = Page(pages["scaled"]).text
    failed = int(read_summary(runs[1].folder).metrics["failed"])
    assert failed > 0
    assert text.index(f"{failed} failed of 400 requests") < text.index("Results")
    assert text.index("1 executor failed") < text.index("Results")
    assert "executor lost" in text
    assert "Problem" not in Page(pages["one"]).text


def test_several_runs_are_set_side_by_side(runs: list[ReportRun], pages: dict[str, Path]) -> None:
    """Each run has a row, the best value is marked, what differs in the configuration is listed, errors have signs."""
    page = Page(pages["both"])
    assert page.text.count("scaled & lossy") >= 5
    best = min(read_summary(run.folder).metrics["npu_seconds"] for run in runs)
    assert f'<b class="best">{three_digits(best)}</b>' in page.source
    assert "dispatch._target_" in page.text
    differing = page.source[page.source.index("What differs") : page.source.index("Simulated against real")]
    assert "seed" not in differing
    steady, scaled = (read_summary(run.folder).metrics for run in runs)
    error = scaled["npu_seconds"] / steady["npu_seconds"] - 1
    assert f"{error:+.0%}" in page.source
    assert "Simulated against real" in page.text
    assert "Simulated against real" not in Page(pages["one"]).text


def test_the_stages_and_ends_of_executors_are_drawn(pages: dict[str, Path]) -> None:
    """A run with scaling shows each stage, time in service and the failure; a fixed one says that nothing happened."""
    figures = Page(pages["scaled"]).figures.values()
    names = {trace.get("name") for figure in figures for trace in figure["data"]}
    assert {"te_pre_load", "te_load", "serving", "failed", "launching"} <= names
    one = Page(pages["one"])
    assert "2 executors were ready at once and stayed to the end." in one.text
    assert "serving" not in {trace.get("name") for figure in one.figures.values() for trace in figure["data"]}


def test_curves_of_large_runs_are_thinned_but_keep_their_tail() -> None:
    """At most so many points, the first and the last among them, and closer ones above the 90th percentile."""
    rows = report_figures._thinned(1_000_000, 500)
    assert len(rows) <= 500
    assert rows[0] == 0
    assert rows[-1] == 999_999
    assert (rows > 999_000).sum() >= 50
    assert report_figures._thinned(7, 500).tolist() == list(range(7))


def test_a_curve_is_the_distribution(runs: list[ReportRun], pages: dict[str, Path]) -> None:
    """The curve of TTFT passes through the percentiles of the measured requests."""
    table = read_requests(runs[0].folder)
    values = table.ttft_s[table.in_window].dropna().to_numpy()
    curve = Page(pages["one"]).figures["figure-0"]["data"][0]
    for level in (25, 50, 90):
        at = next(x for x, y in zip(curve["x"], curve["y"], strict=True) if y >= level)
        assert at == pytest.approx(np.percentile(values, level, method="inverted_cdf"), rel=1e-3)


def test_totals_over_time_are_those_of_the_reports(runs: list[ReportRun]) -> None:
    """At each moment the executors are as their latest report had them, and absent once they are gone."""
    run = report._load(runs[1], 0)
    held = report_figures.hold(run, 50)
    te_0 = run.executors[run.executors.executor == "te-0"]
    row = held.names.index("te-0")
    for moment, value in zip(held.moments, held.running[row], strict=True):
        if moment > 3.0 or moment < 0.7:
            assert math.isnan(value)
        else:
            latest = te_0.running[te_0.time_s <= moment]
            assert value == (latest.iloc[-1] if len(latest) else 0)


def test_counts_of_executors_follow_their_lives(runs: list[ReportRun]) -> None:
    """One launches at the start, it is ready after its stages, and its failure takes it away."""
    times, launching, serving = report_figures._counts(report._load(runs[1], 0))
    assert (times[0], launching[0], serving[0]) == (0.0, 1.0, 0.0)
    ready = int(np.flatnonzero(serving)[0])
    assert times[ready] == pytest.approx(0.7)
    lost = int(np.searchsorted(times, 3.0))
    assert times[lost] == 3.0
    assert serving[lost] == serving[lost - 1] - 1


def test_many_executors_share_rows(tmp_path: Path) -> None:
    """A fleet larger than the picture is drawn as means of neighbours."""
    busy = run_sim((make_arrival(i, at_s=0.01 * i, prompt=64, output=4) for i in range(100)), executors=70)
    run = report._load(ReportRun("wide", write(tmp_path, busy.recorder, {})), 0)
    caption, figure = report_figures.heat(run, report_figures.hold(run, 40), 20)
    assert "mean of 3.5 executors" in caption
    assert len(figure["data"][0]["z"]) == 20


@pytest.fixture(scope="module")
def hopeless(tmp_path_factory: pytest.TempPathFactory) -> list[ReportRun]:
    """A run in which nothing finished, one without requests, and a folder that is not there."""
    folder = tmp_path_factory.mktemp("hopeless")
    refused = run_sim(make_arrival(i, at_s=0.1 * i, prompt=100_000) for i in range(20))
    write(folder / "refused", refused.recorder, {})
    write(folder / "empty", Recorder(), {})
    return [ReportRun(name, folder / name) for name in ("refused", "empty", "gone")]


def test_runs_without_results_are_reported_as_such(hopeless: list[ReportRun], tmp_path: Path) -> None:
    """Nothing finished, nothing arrived, nothing there: each is said, none breaks the report."""
    write_report(tmp_path / "report.html", "Hopeless", hopeless)
    text = Page(tmp_path / "report.html").text
    assert "refused: none of 20 requests finished" in text
    assert "empty: no request arrived in the measured window" in text
    assert re.search(r"no results: gone: .*summary.json is missing", text)
    assert "No request got as far as a first token." in text
    for run in hopeless[:2]:
        write_report(tmp_path / "report.html", "Hopeless", [run])
    with pytest.raises(ValueError, match=r"no run to report on: gone: .*summary.json is missing"):
        write_report(tmp_path / "report.html", "Hopeless", hopeless[2:])
    with pytest.raises(ValueError, match="name at least one run folder"):
        write_report(tmp_path / "report.html", "Hopeless", [])


def test_a_sweep_of_many_runs_stays_small(runs: list[ReportRun], tmp_path: Path) -> None:
    """Sixty runs make one report below 6 MB, with figures of their own for the first runs only."""
    write_report(tmp_path / "sweep.html", "Sweep", [ReportRun(f"seed={i}", runs[i % 2].folder) for i in range(60)])
    assert (tmp_path / "sweep.html").stat().st_size < 6e6
    assert f"The first {report.DETAILED} of 60 runs" in Page(tmp_path / "sweep.html").text


@pytest.mark.slow
def test_a_browser_draws_it_without_complaint(
    pages: dict[str, Path], hopeless: list[ReportRun], tmp_path: Path
) -> None:
    """Headless Chromium logs no error, the content policy included, and draws every figure of the page."""
    if CHROMIUM is None:
        pytest.skip("needs Chromium, and there is no chromium, chromium-browser or google-chrome")
    write_report(tmp_path / "hopeless.html", "</script><script>nonsense", hopeless)
    for path in (pages["both"], tmp_path / "hopeless.html"):
        unfolded = tmp_path / f"unfolded_{path.name}"
        unfolded.write_text(path.read_text(encoding="utf-8").replace("<details>", "<details open>"), encoding="utf-8")
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--enable-logging=stderr"]
        options += [
            f"--user-data-dir={tmp_path / 'profile'}",
            "--window-size=1300,16000",
            "--virtual-time-budget=10000",
        ]
        command = [CHROMIUM, *options, "--dump-dom", unfolded.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0
        assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
        figures = Page(path).figures
        places = done.stdout[: done.stdout.index('<script type="application/json"')]
        assert "data-figure" not in places  # taken away as each is drawn
        assert places.count("js-plotly-plot") == len(figures) >= 3
