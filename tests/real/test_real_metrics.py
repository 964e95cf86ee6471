"""What operators scrape: the series agree with what the run's own records say."""

import socket
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster import events as ev
from cluster.actions import Action
from flowserve.core.config import EngineConfig
from real.cluster import RealCluster
from real.metrics import PREFIX, ServingMetrics
from tests.builders import disaggregated, make_arrival
from tests.real.engines import run_real

Series = dict[tuple[str, ...], float]


def read(text: str) -> dict[str, Series]:
    """{sample name: {label values, engine first: value}}, the prefix taken off."""
    found: dict[str, Series] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = dict(sample.labels)
            key = (labels.pop("engine"), *(value for name, value in labels.items() if name != "model_name"))
            found.setdefault(sample.name.removeprefix(PREFIX), {})[key] = sample.value
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("roles", ["colocated", "disaggregated"])
def test_series_agree_with_the_records(roles: str, tmp_path: Path) -> None:
    """Requests, tokens, cache hits and latencies, added up over engines, are those of the recorder."""
    shared = (11, 12, 13, 14)
    workload = [make_arrival(n, prompt=80, output=5 + n, ids=shared, limit=20) for n in range(16)]
    options = {"groups": disaggregated(1, 1)} if roles == "disaggregated" else {}
    run = run_real(workload, engine=EngineConfig(kv_blocks=400), log_dir=tmp_path, **options)
    series = read((tmp_path / "metrics.prom").read_text())
    tokens = sum(arrival.answer.output_tokens for arrival in workload)
    assert sum(series["generation_tokens_total"].values()) == tokens
    assert sum(series["prompt_tokens_total"].values()) == 16 * 80
    reasons = {key[-1]: 0.0 for key in series["request_success_total"]}
    for key, value in series["request_success_total"].items():
        reasons[key[-1]] += value
    assert reasons == {"length": 1.0, "stop": 15.0}
    ended = run.of(ev.TaskFinished)
    assert sum(series["prefix_cache_hits_total"].values()) == sum(event.cached_tokens for event in ended) > 0
    assert sum(series["time_to_first_token_seconds_count"].values()) == 16
    assert sum(series["e2e_request_latency_seconds_count"].values()) == 16
    columns = run.recorder.requests
    e2e = sum(last - at for last, at in zip(columns["last_token_ns"], columns["arrival_ns"], strict=True)) / 1e9
    # From dispatch, not from arrival: shorter by what a decision takes.
    assert 0.5 * e2e < sum(series["e2e_request_latency_seconds_sum"].values()) <= e2e
    stages = {key[-1] for key in series["startup_stage_seconds"]}
    assert {"scaler_pre", "te_pre_load", "te_load", "te_post_load", "scaler_post"} == stages


def test_served_while_the_run_lasts(tmp_path: Path) -> None:
    """A scrape in mid-run shows running requests; after the run the port is free; a dead engine's gauges are gone."""
    port, pages = free_port(), []

    def scrape(event: ev.Event, actions: list[Action], cluster: RealCluster) -> None:
        if isinstance(event, ev.LoadReport) and event.running and len(pages) < 2:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
                pages.append(page.read().decode())

    run_real([make_arrival(n, output=60) for n in range(8)], watch=scrape, metrics=ServingMetrics(port))
    assert max(read(pages[-1])["num_requests_running"].values()) > 0
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0
    metrics = ServingMetrics()
    metrics.launched("te-0", "m")
    report = {"waiting": 1, "running": 2, "waiting_tokens": 3, "free_blocks": 25, "cached_blocks": 0, "preemptions": 4}
    at = {"to": "cm", "time": 1, "occurred": 1, "executor": "te-0"}
    metrics.observe(ev.LoadReport(**at, **report, total_blocks=100, generated_tokens=9))
    series = read(metrics.text().decode())
    assert series["kv_cache_usage_perc"] == {("te-0",): 0.75} and series["num_preemptions_total"] == {("te-0",): 4}
    metrics.observe(ev.ExecutorFailed(**at, reason="killed"))
    gone = read(metrics.text().decode())
    assert "num_requests_running" not in gone and gone["num_preemptions_total"] == {("te-0",): 4}


def test_a_port_in_use_is_said() -> None:
    """The error names the port and what is allowed."""
    with socket.socket() as holder:
        holder.bind(("0.0.0.0", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(ValueError, match=f"metrics port {port}: .*allowed is a free port"):
            ServingMetrics(port)
    with pytest.raises(ValueError, match="metrics port 99999"):
        ServingMetrics(99999)
