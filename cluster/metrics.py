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

from collections.abc import Iterator, Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from cluster.recorder import NONE, Recorder
from cluster.spool import AT_ONCE, Ints, order_statistics
from cluster.vocabulary import NS_PER_S, Outcome

Floats = npt.NDArray[np.float64]


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
        columns = recorder.requests
        arrival = columns["arrival_ns"]
        keep = np.ones(len(arrival), bool)
        if len(arrival):
            low, high = arrival.min() + window.warmup_s * NS_PER_S, arrival.max() - window.cooldown_s * NS_PER_S
            keep = (arrival >= low) & (arrival <= high)
        self.columns = {name: column[keep] for name, column in columns.items()}
        self._keep, self._gaps, self._gap_counts = keep, recorder.gaps, recorder.gap_counts
        self.outcome = np.array(recorder.outcomes, dtype=object)[keep]
        self.model = np.array(recorder.models, dtype=object)[keep]

    def __len__(self) -> int:
        return len(self.outcome)

    def _since_arrival(self, column: str) -> Floats:
        times = self.columns[column]
        return np.where(times == NONE, np.nan, (times - self.columns["arrival_ns"]) / NS_PER_S)

    @property
    def itl(self) -> Floats:
        """Gaps between tokens: hundreds per request, so ask once, and of a long run only for `itl_percentiles`."""
        return np.concatenate([np.zeros(0, np.int64), *self._gap_parts()]) / NS_PER_S

    def _gap_parts(self) -> Iterator[Ints]:
        """Gaps in ns of the requests that count, some at a time."""
        ends = np.cumsum(self._gap_counts)
        start = 0
        while start < len(ends):
            first = int(ends[start - 1]) if start else 0
            end = max(start + 1, int(np.searchsorted(ends, first + AT_ONCE, side="right")))
            part = self._gaps[first : int(ends[end - 1])]
            keep = self._keep[start:end]
            yield part if keep.all() else part[np.repeat(keep, self._gap_counts[start:end])]
            start = end

    def itl_percentiles(self, shares: Sequence[float]) -> list[float]:
        """Percentiles of `itl`, in little memory; between two values the lower one where there are very many."""
        count = int(self._gap_counts[self._keep].sum())
        if count <= AT_ONCE:
            return percentiles(self.itl, shares)
        ranks = [int(share / 100 * (count - 1)) for share in shares]
        return [value / NS_PER_S for value in order_statistics(self._gap_parts, count, ranks)]

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
    return percentiles(values, (share,))[0]


def percentiles(values: Floats, shares: Sequence[float]) -> list[float]:
    """Several of them, for the price of one."""
    known = values[~np.isnan(values)]
    if not len(known):
        return [float("nan")] * len(shares)
    return [float(value) for value in np.percentile(known, shares, overwrite_input=True)]


def summarise(recorder: Recorder, slo: Slo, window: Window | None = None) -> dict[str, float]:
    """All metrics of a run, by name; times in seconds."""
    table = RequestTable(recorder, window or Window())
    summary: dict[str, float] = {"requests": len(table)}
    for outcome in (*Outcome, "unfinished"):
        summary[str(outcome)] = int((table.outcome == str(outcome)).sum())
    for name, values in (("ttft", table.ttft), ("tpot", table.tpot), ("e2e", table.e2e)):
        for share, value in zip((50, 90, 99), percentiles(values, (50, 90, 99)), strict=True):
            summary[f"{name}_p{share}_s"] = value
        known = values[~np.isnan(values)]
        summary[f"{name}_mean_s"] = float(known.mean()) if len(known) else float("nan")
    summary["itl_p50_s"], summary["itl_p99_s"] = table.itl_percentiles((50, 99))
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


def by_model(recorder: Recorder, slo: Slo, window: Window | None = None) -> dict[str, dict[str, float]]:
    """The main metrics of the requests for each model, the most asked for first: same names as in `summarise`, rates
    over the span of all requests. NPU-seconds are those of executors that serve the model.
    """
    table = RequestTable(recorder, window or Window())
    if not len(table):
        return {}
    names, codes = np.unique(table.model.astype(str), return_inverse=True)
    met, finished = table.met(slo), table.outcome == str(Outcome.FINISHED)
    arrivals, ends = table.columns["arrival_ns"], table.columns["last_token_ns"]
    span = (max(int(arrivals.max()), int(ends.max())) - int(arrivals.min())) / NS_PER_S
    times = (("ttft", table.ttft), ("tpot", table.tpot), ("e2e", table.e2e))
    found = {}
    for code in np.argsort(-np.bincount(codes), kind="stable"):
        of_model, name = codes == code, str(names[code])
        summary: dict[str, float] = {"requests": int(of_model.sum()), "finished": int(finished[of_model].sum())}
        for metric, values in times:
            chosen = values[of_model]
            summary |= {f"{metric}_p{share}_s": percentile(chosen, share) for share in (50, 99)}
        summary["slo_attainment"] = float(met[of_model].mean())
        summary["goodput_rps"] = float(met[of_model].sum()) / span if span else float("nan")
        summary["npu_seconds"] = recorder.npu_seconds(name)
        found[name] = summary
    return found
