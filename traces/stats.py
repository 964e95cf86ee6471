"""What a workload is like: one pass over any stream of arrivals.

Definitions: the span is first to last arrival; the mean rate is arrivals / span; the peak rate is the busiest of
the 60-s bins counted from the first arrival; the coefficient of variation (CV) of inter-arrival times is that of the
whole stream; percentiles interpolate linearly. Requests that wait for another one (closed loop) have lengths but no
times. Reuse is what a prefix cache without a size would serve: of the full 16-token blocks, and of all prompt tokens,
of requests whose block ids are known.
"""

import math
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from cluster.request import Arrival
from cluster.vocabulary import BLOCK_TOKENS, NS_PER_S, to_s
from cluster.work import AnyArrival, Call, block_ids, calls_and_tools
from traces.errors import TraceError
from traces.prefixes import PrefixSet

BIN_NS = 60 * NS_PER_S


@dataclass(frozen=True, slots=True)
class Lengths:
    """Percentiles of a length, in tokens."""

    p50: float
    p90: float
    p99: float
    max: int


@dataclass(frozen=True, slots=True)
class TraceStats:
    """Statistics of a workload; None where it does not say (times without a span, reuse without block ids).

    LLM calls of jobs are requests in closed loop.
    """

    requests: int
    closed_loop: int
    span_s: float
    mean_rps: float | None
    peak_rps: float | None
    iat_cv: float | None
    prompt: Lengths
    output: Lengths
    known_prefixes: int
    reuse_blocks: float | None
    reuse_tokens: float | None


def stats_of(arrivals: Iterable[AnyArrival]) -> TraceStats:
    """Statistics in one pass. Memory: 8 bytes per request for exact percentiles, 8 per distinct block.

    TraceError: no arrivals, or arrivals that go back in time.
    """
    times, reuse = _Times(), _Reuse()
    prompts, outputs = array("i"), array("i")
    for arrival in arrivals:
        if not isinstance(arrival, Arrival):
            for step, length in zip(calls_and_tools(arrival.request), arrival.answer.lengths, strict=True):
                if isinstance(step, Call):
                    prompts.append(step.prompt_tokens)
                    outputs.append(length)
                    if (ids := block_ids(arrival.request, step)) is not None:
                        reuse.add(step.prompt_tokens, ids)
            continue
        prompts.append(arrival.request.prompt_tokens)
        outputs.append(arrival.answer.output_tokens)
        if arrival.after is None:
            times.add(arrival)
        if arrival.request.block_ids is not None:
            reuse.add(arrival.request.prompt_tokens, arrival.request.block_ids)
    if not prompts:
        raise TraceError("the workload has no arrivals: allowed is at least one; check the reader and the transforms")
    span_ns = times.latest_ns - times.first_ns
    return TraceStats(
        requests=len(prompts),
        closed_loop=len(prompts) - times.count,
        span_s=to_s(span_ns),
        mean_rps=times.count / to_s(span_ns) if span_ns else None,
        peak_rps=times.peak * NS_PER_S / BIN_NS if times.count else None,
        iat_cv=times.iat_cv,
        prompt=_lengths(prompts),
        output=_lengths(outputs),
        known_prefixes=reuse.requests,
        reuse_blocks=reuse.hits / reuse.blocks if reuse.blocks else None,
        reuse_tokens=reuse.hits * BLOCK_TOKENS / reuse.tokens if reuse.tokens else None,
    )


def table(stats: TraceStats) -> str:
    """The statistics as aligned text, a line each."""
    prompt, output = (
        f"{lengths.p50:,.0f} / {lengths.p90:,.0f} / {lengths.p99:,.0f} / {lengths.max:,}"
        for lengths in (stats.prompt, stats.output)
    )
    rows = [
        ("requests", f"{stats.requests:,}" + (f" ({stats.closed_loop:,} closed loop)" if stats.closed_loop else "")),
        ("span", f"{stats.span_s:,.1f} s"),
        ("mean rate", _number(stats.mean_rps, "{:.2f} requests/s")),
        ("peak 60-s rate", _number(stats.peak_rps, "{:.2f} requests/s")),
        ("inter-arrival CV", _number(stats.iat_cv, "{:.2f}")),
        ("prompt tokens p50/p90/p99/max", prompt),
        ("output tokens p50/p90/p99/max", output),
        ("prefix reuse, 16-token blocks", _number(stats.reuse_blocks, "{:.1%}")),
        ("prefix reuse, prompt tokens", _number(stats.reuse_tokens, "{:.1%}")),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


@dataclass(slots=True)
class _Times:
    """Arrival times in whole numbers: sums of nanoseconds stay exact."""

    count: int = 0
    first_ns: int = 0
    latest_ns: int = 0
    peak: int = 0
    squares: int = 0
    _bin: int = 0
    _in_bin: int = 0

    def add(self, arrival: Arrival) -> None:
        at_ns = arrival.at_ns
        if self.count == 0:
            self.first_ns = self.latest_ns = at_ns
        if at_ns < self.latest_ns:
            raise TraceError(
                f"request {arrival.request.request_id} arrives at {to_s(at_ns)} s: allowed is not before the one ahead "
                f"of it, at {to_s(self.latest_ns)} s; sort the workload by time"
            )
        self.squares += (at_ns - self.latest_ns) ** 2
        self.latest_ns = at_ns
        self.count += 1
        place = (at_ns - self.first_ns) // BIN_NS
        self._in_bin = self._in_bin + 1 if place == self._bin else 1
        self._bin = place
        self.peak = max(self.peak, self._in_bin)

    @property
    def iat_cv(self) -> float | None:
        """Population standard deviation over mean of the gaps; None without gaps or span."""
        gaps, total = self.count - 1, self.latest_ns - self.first_ns
        return math.sqrt(gaps * self.squares - total**2) / total if total else None


@dataclass(slots=True)
class _Reuse:
    """Prefix blocks that earlier requests had, over those whose content is named."""

    requests: int = 0
    tokens: int = 0
    blocks: int = 0
    hits: int = 0
    _seen: PrefixSet = field(default_factory=PrefixSet)

    def add(self, prompt_tokens: int, ids: tuple[int, ...]) -> None:
        full = ids[: prompt_tokens // BLOCK_TOKENS]
        self.requests += 1
        self.tokens += prompt_tokens
        self.blocks += len(full)
        self.hits += self._seen.add(full)


def _lengths(values: "array[int]") -> Lengths:
    p50, p90, p99 = np.percentile(np.frombuffer(values, dtype=np.intc), (50, 90, 99)).tolist()
    return Lengths(p50, p90, p99, max(values))


def _number(value: float | None, layout: str) -> str:
    return "unknown" if value is None else layout.format(value)
