"""The one place that defines the metrics, computed alike from the events of either backend.

* `ttft`: arrival at the frontend to first token, queueing included.
* `itl`: gaps between consecutive tokens of a request, pooled over all requests.
* `tpot`: (e2e - ttft) / (n - 1) of a request with n tokens; none for n = 1, which counts as met.
* `e2e`: arrival to last token.
* `slo_attainment`: share of all requests that met every SLO; refused, failed, cancelled and unfinished ones did not.
* `goodput`: requests per second that met every SLO.
* `npu_seconds`: NPUs times the seconds they were held, starting up, idle and draining included.

Only requests that arrived in the measured window count: `warmup_s` after the first arrival to `cooldown_s` before the
last (but `npu_seconds`, which is of the whole run). Times of a request are taken where the token was produced; `lag`
is how late the client was in sending.
"""

from array import array
from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from cluster import events as ev
from cluster.actions import Action, LaunchExecutor
from cluster.client import ClientActor
from cluster.vocabulary import NS_PER_S, ExecutorSpec, Outcome, Role

Floats = npt.NDArray[np.float64]
NONE = -1
"""Stands for "never" in the integer columns of records, which turn it into NaN when they are read."""


class Slo(msgspec.Struct, frozen=True):
    """Objectives in seconds per request; None: no objective."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None

    def __post_init__(self) -> None:
        for field in ("ttft_s", "tpot_s", "e2e_s"):
            value = getattr(self, field)
            if value is not None and not value > 0:
                raise ValueError(f"slo.{field} is {value}: allowed are seconds above 0, or null for no objective")


class _Live:
    __slots__ = (
        "arrival",
        "attempts",
        "cached",
        "dram",
        "first",
        "gap_end",
        "gaps",
        "last",
        "preemptions",
        "prompt",
        "speculation",
        "ssd",
        "started",
    )

    def __init__(self, arrival: int, prompt: int) -> None:
        self.arrival = arrival
        self.prompt = prompt
        self.first = NONE
        self.last = NONE
        self.gap_end = NONE
        self.gaps = array("q")
        self.cached = 0
        self.dram = 0
        self.ssd = 0
        self.preemptions = 0
        self.speculation = (0, 0, 0)
        self.attempts = 0
        self.started = ""


class Recorder:
    """Turns events into records: per request, per load report, per step of scaling. Columns of integers."""

    REQUEST_COLUMNS = (
        "request_id",
        "arrival_ns",
        "lag_ns",
        "first_token_ns",
        "last_token_ns",
        "prompt_tokens",
        "output_tokens",
        "cached_tokens",
        "dram_tokens",
        "ssd_tokens",
        "preemptions",
        "failed_tasks",
        "draft_tokens",
        "accepted_tokens",
        "draft_rejections",
    )

    def __init__(self) -> None:
        self.requests: dict[str, array[int]] = {name: array("q") for name in self.REQUEST_COLUMNS}
        self.outcomes: list[str] = []
        self.reasons: list[str] = []
        self.executors: list[str] = []
        self.gaps = array("q")
        """Gaps between tokens in ns, request after request; `gap_counts` says how many are whose."""
        self.gap_counts = array("q")
        self.loads: list[ev.LoadReport] = []
        self.scaling: list[tuple[int, str, str, int]] = []
        """(time_ns, executor, what, took_ns): launches, stages, state changes."""
        self.end_ns = 0
        self._specs: dict[str, ExecutorSpec] = {}
        self._held: dict[str, tuple[int, int]] = {}
        self._live: dict[int, _Live] = {}
        self._lags: dict[int, int] = {}

    def record(self, event: ev.Event, actions: Sequence[Action], client: ClientActor) -> None:
        """Note what an event says. `client` knows when its requests were due."""
        if event.time > self.end_ns:
            self.end_ns = event.time
        match event:
            case ev.TimerFired() | ev.TaskProgress():
                pass
            case ev.RequestArrived() | ev.CallArrived():
                request = event.request
                self._live[request.request_id] = _Live(event.occurred, request.prompt_tokens)
                # A job is never late with its calls.
                self._lags[request.request_id] = event.occurred - client.due.get(request.request_id, event.occurred)
            case ev.FirstToken():
                live = self._live.get(event.request_id)
                if live is not None and live.first == NONE:
                    live.first = live.last = live.gap_end = event.occurred
            case ev.TaskFinished():
                self._task_finished(event)
            case ev.TaskFailed():
                if (live := self._live.get(event.request_id)) is not None:
                    live.attempts += 1
                    live.gap_end = NONE  # when the lost executor's last token came is not known here
            case ev.RequestEnded() | ev.CallEnded():
                self._ended(event)
            case ev.LoadReport() if event.to == "cm":
                self.loads.append(event)
            case ev.StageFinished():
                self.scaling.append((event.occurred, event.executor, str(event.stage), event.took_ns))
            case ev.ExecutorReady():
                self.scaling.append((event.occurred, event.executor, "ready", 0))
            case ev.ExecutorDrained():
                self.scaling.append((event.occurred, event.executor, "drained", 0))
            case ev.RoleSwitched():
                self.scaling.append((event.occurred, event.executor, f"serves {event.spec.role}", 0))
            case ev.ExecutorRetired() | ev.ExecutorFailed():
                what = "retired" if isinstance(event, ev.ExecutorRetired) else "failed"
                self.scaling.append((event.occurred, event.executor, what, 0))
                launched, until = self._held[event.executor]
                self._held[event.executor] = (launched, event.occurred if until == NONE else until)
        for action in actions:
            if type(action) is LaunchExecutor:
                self._specs[action.executor] = action.spec
                self._held[action.executor] = (event.time, NONE)
                self.scaling.append((event.time, action.executor, "launch", 0))

    def _task_finished(self, event: ev.TaskFinished) -> None:
        live = self._live.get(event.request_id)
        if live is None:
            return
        live.preemptions += event.preemptions
        if event.cached_tokens > live.cached:
            live.cached, live.dram, live.ssd = event.cached_tokens, event.dram_tokens, event.ssd_tokens
        drafted, accepted, rejections = live.speculation
        live.speculation = (
            drafted + event.draft_tokens,
            accepted + event.accepted_tokens,
            rejections + event.draft_rejections,
        )
        live.started = live.started or event.executor
        live.last = event.last_token_ns
        gaps = event.token_gaps_ns
        if live.first != NONE:
            started = event.last_token_ns - sum(gaps)
            if live.gap_end != NONE and started > live.gap_end:
                live.gaps.append(started - live.gap_end)
        live.gaps.extend(gaps)
        live.gap_end = event.last_token_ns

    def _ended(self, event: ev.RequestEnded | ev.CallEnded) -> None:
        self._append(event.request_id, self._live.pop(event.request_id), event.outcome, event.reason, event.generated)

    def _append(self, request_id: int, live: _Live, outcome: str, reason: str, generated: int) -> None:
        values = (
            request_id,
            live.arrival,
            self._lags.pop(request_id),
            live.first,
            live.last if outcome == Outcome.FINISHED else NONE,
            live.prompt,
            generated,
            live.cached,
            live.dram,
            live.ssd,
            live.preemptions,
            live.attempts,
            *live.speculation,
        )
        for column, value in zip(self.requests.values(), values, strict=True):
            column.append(value)
        self.gaps += live.gaps
        self.gap_counts.append(len(live.gaps))
        self.outcomes.append(str(outcome))
        self.reasons.append(reason)
        self.executors.append(live.started)

    def censor(self) -> None:
        """The run is over: what has not ended by now is recorded as unfinished."""
        for request_id, live in list(self._live.items()):
            self._append(request_id, live, "unfinished", "the run ended first", 0)
        self._live.clear()

    def npu_seconds(self, role: Role | None = None) -> float:
        """NPUs times seconds held, from launch to retirement (or to the end of the run), by executors of this role."""
        held = 0
        for name, (launched, until) in self._held.items():
            if role is not None and self._specs[name].role is not role:
                continue
            held += self._specs[name].npus * ((self.end_ns if until == NONE else until) - launched)
        return held / NS_PER_S


class Window(msgspec.Struct, frozen=True):
    """Which requests count, in seconds from the first and back from the last arrival."""

    warmup_s: float = 0.0
    cooldown_s: float = 0.0

    def __post_init__(self) -> None:
        if not (self.warmup_s >= 0 and self.cooldown_s >= 0):
            raise ValueError(
                f"metrics: warmup_s is {self.warmup_s}, cooldown_s is {self.cooldown_s}: allowed are 0 and more"
            )


class RequestTable:
    """Records of the measured window as columns in seconds, NaN where a request never got that far."""

    def __init__(self, recorder: Recorder, window: Window) -> None:
        columns = {name: np.frombuffer(column, np.int64) for name, column in recorder.requests.items() if len(column)}
        columns = columns or {name: np.zeros(0, np.int64) for name in recorder.REQUEST_COLUMNS}
        arrival = columns["arrival_ns"]
        keep = np.ones(len(arrival), bool)
        if len(arrival):
            low, high = arrival.min() + window.warmup_s * NS_PER_S, arrival.max() - window.cooldown_s * NS_PER_S
            keep = (arrival >= low) & (arrival <= high)
        self.columns = {name: column[keep] for name, column in columns.items()}
        gaps = np.frombuffer(recorder.gaps, np.int64) if len(recorder.gaps) else np.zeros(0, np.int64)
        self.itl: Floats = gaps[np.repeat(keep, np.array(recorder.gap_counts, np.int64))] / NS_PER_S
        self.outcome = np.array(recorder.outcomes, dtype=object)[keep] if len(keep) else np.zeros(0, object)

    def __len__(self) -> int:
        return len(self.outcome)

    def _since_arrival(self, column: str) -> Floats:
        times = self.columns[column]
        return np.where(times == NONE, np.nan, (times - self.columns["arrival_ns"]) / NS_PER_S)

    @property
    def ttft(self) -> Floats:
        return self._since_arrival("first_token_ns")

    @property
    def e2e(self) -> Floats:
        return self._since_arrival("last_token_ns")

    @property
    def tpot(self) -> Floats:
        gaps = self.columns["output_tokens"] - 1
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(gaps > 0, (self.e2e - self.ttft) / gaps, np.nan)

    def met(self, slo: Slo) -> npt.NDArray[np.bool_]:
        """Which requests finished and met every objective."""
        good = self.outcome == str(Outcome.FINISHED)
        single = self.columns["output_tokens"] == 1
        for values, limit, excused in (
            (self.ttft, slo.ttft_s, None),
            (self.tpot, slo.tpot_s, single),
            (self.e2e, slo.e2e_s, None),
        ):
            if limit is not None:
                within = np.nan_to_num(values, nan=np.inf) <= limit
                good = good & (within if excused is None else within | excused)
        return np.asarray(good, bool)


def percentile(values: Floats, share: float) -> float:
    """A percentile over those who have a value; NaN where nobody has."""
    known = values[~np.isnan(values)]
    return float(np.percentile(known, share)) if len(known) else float("nan")


def summarise(recorder: Recorder, slo: Slo, window: Window | None = None) -> dict[str, float]:
    """All metrics of a run, by name; times in seconds."""
    table = RequestTable(recorder, window or Window())
    summary: dict[str, float] = {"requests": len(table)}
    for outcome in (*Outcome, "unfinished"):
        summary[str(outcome)] = int((table.outcome == str(outcome)).sum())
    for name, values in (("ttft", table.ttft), ("tpot", table.tpot), ("e2e", table.e2e)):
        for share in (50, 90, 99):
            summary[f"{name}_p{share}_s"] = percentile(values, share)
        known = values[~np.isnan(values)]
        summary[f"{name}_mean_s"] = float(known.mean()) if len(known) else float("nan")
    for share in (50, 99):
        summary[f"itl_p{share}_s"] = percentile(table.itl, share)
    met = table.met(slo)
    arrivals, ends = table.columns["arrival_ns"], table.columns["last_token_ns"]
    span = (max(int(arrivals.max()), int(ends.max())) - int(arrivals.min())) / NS_PER_S if len(table) else 0.0
    summary["span_s"] = span
    summary["slo_attainment"] = float(met.mean()) if len(table) else float("nan")
    summary["goodput_rps"] = float(met.sum()) / span if span else float("nan")
    summary["throughput_rps"] = summary["finished"] / span if span else float("nan")
    summary["throughput_tokens_per_s"] = float(table.columns["output_tokens"].sum()) / span if span else float("nan")
    for tier in ("cached", "dram", "ssd"):  # the first is all of them
        summary[f"{tier}_token_share"] = float(table.columns[f"{tier}_tokens"].sum()) / max(
            1, float(table.columns["prompt_tokens"].sum())
        )
    summary["preemptions"] = int(table.columns["preemptions"].sum())
    accepted, rejections = (int(table.columns[name].sum()) for name in ("accepted_tokens", "draft_rejections"))
    summary["draft_tokens"] = int(table.columns["draft_tokens"].sum())
    summary["accepted_tokens"] = accepted
    # Per guess whose predecessors were right, as `Acceptance.rate` has it; accepted / drafted is less by nature.
    tried = accepted + rejections
    summary["draft_acceptance"] = accepted / tried if tried else float("nan")
    summary["failed_tasks"] = int(table.columns["failed_tasks"].sum())
    summary["npu_seconds"] = recorder.npu_seconds()
    lags = table.columns["lag_ns"] / NS_PER_S
    summary["lag_p99_s"] = percentile(lags, 99)
    summary["lag_max_s"] = float(lags.max()) if len(lags) else float("nan")
    return summary
