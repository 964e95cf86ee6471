"""Prometheus metrics of a cluster of real engines, made from the events that pass through it.

Names and meanings are those that operators of vLLM know, under our own prefix: a dashboard moves over by renaming
`vllm:` to `flowserve:`. Every series carries `model_name` and `engine` (the executor). Times are of the engine side:
from the first dispatch of a request to an executor.
"""

from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, start_http_server

from cluster import events as ev
from cluster.request import Task
from cluster.vocabulary import to_s

PREFIX = "flowserve:"
_LABELS = ("model_name", "engine")
_TTFT_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_ITL_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
_E2E_S = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
_TOKENS = tuple(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5))


class _Open(NamedTuple):
    """A request that some executor works on. `since`: when the first of them got it, in ns."""

    since: int
    prompt_tokens: int
    max_tokens: int


class ServingMetrics:
    """One registry for all engines of a cluster. `port`: where `/metrics` is served; None: nowhere, see `text`.

    Raises ValueError where the port cannot be had.
    """

    def __init__(self, port: int | None = None) -> None:
        self.registry = CollectorRegistry()
        self._running = self._gauge("num_requests_running", "Requests in the running batch.")
        self._waiting = self._gauge("num_requests_waiting", "Requests waiting for a place in the batch.")
        self._kv_usage = self._gauge("kv_cache_usage_perc", "Share of KV cache blocks in use, 1 is all.")
        self._startup = self._gauge("startup_stage_seconds", "Time of each stage of starting the engine.", "stage")
        self._prompt = self._counter("prompt_tokens", "Prompt tokens of finished requests.")
        self._generated = self._counter("generation_tokens", "Tokens generated.")
        self._preemptions = self._counter("num_preemptions", "Sequences put back to the queue for want of KV cache.")
        self._success = self._counter("request_success", "Requests finished.", "finished_reason")
        self._failures = self._counter("task_failures", "Tasks that an engine gave back.", "reason")
        self._queries = self._counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.")
        self._hits = self._counter("prefix_cache_hits", "Prompt tokens found in the prefix cache.")
        self._draft = self._counter("spec_decode_num_draft_tokens", "Tokens guessed in speculative decoding.")
        self._accepted = self._counter("spec_decode_num_accepted_tokens", "Guessed tokens that were right.")
        self._ttft = self._histogram("time_to_first_token_seconds", "Dispatch to first token.", _TTFT_S)
        self._itl = self._histogram("inter_token_latency_seconds", "Time between two tokens.", _ITL_S)
        self._tpot = self._histogram("request_time_per_output_token_seconds", "Mean of a request's gaps.", _ITL_S)
        self._e2e = self._histogram("e2e_request_latency_seconds", "Dispatch to last token.", _E2E_S)
        self._prompt_size = self._histogram("request_prompt_tokens", "Prompt tokens per request.", _TOKENS)
        self._output_size = self._histogram("request_generation_tokens", "Generated tokens per request.", _TOKENS)
        self._open: dict[int, _Open] = {}
        self._models: dict[str, str] = {}
        self._seen_preemptions: dict[str, int] = {}
        self._server = None
        if port is not None:
            try:
                self._server, self._thread = start_http_server(port, registry=self.registry)
            except (OSError, OverflowError) as error:
                raise ValueError(f"metrics port {port}: {error}; allowed is a free port from 1 to 65535") from error

    def launched(self, executor: str, model: str) -> None:
        """An executor starts: from now on its series exist."""
        self._models[executor] = model

    def dispatched(self, executor: str, task: Task, now: int) -> None:
        """A task goes to an executor at `now` (ns)."""
        request = task.request
        self._open.setdefault(request.request_id, _Open(now, request.prompt_tokens, request.max_tokens))

    def ended(self, request_id: int) -> None:
        """A request is over, however it ended."""
        self._open.pop(request_id, None)

    def observe(self, event: ev.Event) -> None:
        """Count what an executor says."""
        match event:
            case ev.LoadReport() if event.total_blocks:  # a worker has no KV cache, and none of these series
                self._load(event)
            case ev.FirstToken(executor=executor, request_id=number) if number in self._open:
                self._ttft.labels(*self._labels(executor)).observe(to_s(event.occurred - self._open[number].since))
            case ev.TaskFinished():
                self._finished(event)
            case ev.TaskFailed():
                self._failures.labels(*self._labels(event.executor), event.reason.value).inc()
            case ev.TaskAborted():
                self._success.labels(*self._labels(event.executor), "abort").inc()
            case ev.StageFinished():
                self._startup.labels(*self._labels(event.executor), event.stage.value).set(to_s(event.took_ns))
            case ev.ExecutorRetired() | ev.ExecutorFailed():
                self._gone(event.executor)
            case _:
                pass

    def text(self) -> bytes:
        """All series in Prometheus' text format."""
        return generate_latest(self.registry)

    def close(self) -> None:
        """Stop serving."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()
            self._server = None

    # -- events ---------------------------------------------------------------------------------------------------

    def _load(self, event: ev.LoadReport) -> None:
        labels = self._labels(event.executor)
        self._running.labels(*labels).set(event.running)
        self._waiting.labels(*labels).set(event.waiting)
        self._kv_usage.labels(*labels).set(1 - event.free_blocks / event.total_blocks)
        before = self._seen_preemptions.get(event.executor, 0)
        self._preemptions.labels(*labels).inc(event.preemptions - before)
        self._seen_preemptions[event.executor] = event.preemptions

    def _finished(self, event: ev.TaskFinished) -> None:
        labels = self._labels(event.executor)
        self._generated.labels(*labels).inc(event.tokens)
        self._draft.labels(*labels).inc(event.draft_tokens)
        self._accepted.labels(*labels).inc(event.accepted_tokens)
        gaps = [to_s(gap) for gap in event.token_gaps_ns]
        itl = self._itl.labels(*labels)
        for gap in gaps:
            itl.observe(gap)
        known = self._open.get(event.request_id)
        if known is None:
            return
        self._queries.labels(*labels).inc(known.prompt_tokens)
        self._hits.labels(*labels).inc(event.cached_tokens)
        if not event.stopped:
            return
        self._prompt.labels(*labels).inc(known.prompt_tokens)
        self._success.labels(*labels, "length" if event.generated >= known.max_tokens else "stop").inc()
        self._e2e.labels(*labels).observe(to_s(event.last_token_ns - known.since))
        if gaps:
            self._tpot.labels(*labels).observe(sum(gaps) / len(gaps))
        self._prompt_size.labels(*labels).observe(known.prompt_tokens)
        self._output_size.labels(*labels).observe(event.generated)

    def _gone(self, executor: str) -> None:
        """What is true at a moment ends with the executor; what was counted stays."""
        labels = self._labels(executor)
        for gauge in (self._running, self._waiting, self._kv_usage):
            gauge.remove_by_labels(dict(zip(_LABELS, labels, strict=True)))
        self._startup.remove_by_labels(dict(zip(_LABELS, labels, strict=True)))
        self._seen_preemptions.pop(executor, None)

    def _labels(self, executor: str) -> tuple[str, str]:
        return self._models.get(executor, ""), executor

    # -- making series --------------------------------------------------------------------------------------------

    def _gauge(self, name: str, text: str, *more: str) -> Gauge:
        return Gauge(PREFIX + name, text, (*_LABELS, *more), registry=self.registry)

    def _counter(self, name: str, text: str, *more: str) -> Counter:
        return Counter(PREFIX + name, text, (*_LABELS, *more), registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(PREFIX + name, text, _LABELS, buckets=buckets, registry=self.registry)
