"""Workloads made from workloads: cut in time or number, at another rate, with other lengths.

Each transform is an iterable of arrivals over another one, streams, and checks its arguments at once.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import msgspec

from cluster import identity
from cluster.request import Arrival
from cluster.vocabulary import BLOCK_TOKENS, NS_PER_S, to_ns
from cluster.work import AnyArrival
from traces.errors import TraceError, require

_TWICE = "that can be read twice, as a target rate needs"


@dataclass(frozen=True, slots=True)
class TimeWindow:
    """Arrivals in `[start_s, start_s + duration_s)`, re-based so that the window starts at 0; None: to the end.

    Reading stops at the first arrival behind the window. TraceError: the window holds no arrival, or it cuts a
    closed-loop workload (whether a request that waits for another falls into the window is known only in a run).
    """

    arrivals: Iterable[AnyArrival]
    start_s: float = 0.0
    duration_s: float | None = None

    def __post_init__(self) -> None:
        require(0 <= self.start_s < math.inf, "start_s", self.start_s, "0 or more seconds", "start within the trace")
        length = self.duration_s
        ok = length is None or (math.isfinite(length) and to_ns(length) > 0)
        require(ok, "duration_s", length, "more than 0 seconds", "leave it out for the rest of the trace")

    def __iter__(self) -> Iterator[AnyArrival]:
        start = to_ns(self.start_s)
        end = None if self.duration_s is None else start + to_ns(self.duration_s)
        cuts, empty = start > 0 or end is not None, True
        for arrival in self.arrivals:
            if arrival.after is not None and cuts:
                raise TraceError(
                    f"request {arrival.request.request_id} waits for another one: allowed in a time window are "
                    "requests with a time; cut closed-loop workloads by number with Limit"
                )
            if end is not None and arrival.at_ns >= end:
                break
            if arrival.at_ns >= start:
                empty = False
                yield msgspec.structs.replace(arrival, at_ns=arrival.at_ns - start)
        if empty:
            window = "the end" if end is None else f"{end / NS_PER_S} s"
            raise TraceError(
                f"the time window from {self.start_s} s to {window} has no arrivals: allowed is at least one; "
                "move or lengthen the window"
            )


@dataclass(frozen=True, slots=True)
class Limit:
    """The first `count` arrivals."""

    arrivals: Iterable[AnyArrival]
    count: int

    def __post_init__(self) -> None:
        require(self.count >= 1, "count", self.count, "at least 1 request", "leave Limit out to keep all")

    def __iter__(self) -> Iterator[AnyArrival]:
        return islice(self.arrivals, self.count)


@dataclass(frozen=True, slots=True)
class RateFrom:
    """The same arrivals, those after `since_ns` closer together or farther apart: `factor` times the rate."""

    arrivals: Iterable[AnyArrival]
    since_ns: int
    factor: float

    def __post_init__(self) -> None:
        require(0 < self.factor < math.inf, "factor", self.factor, "more than 0", "give 1 to keep the rate")

    def __iter__(self) -> Iterator[AnyArrival]:
        since = self.since_ns
        for arrival in self.arrivals:
            later = arrival.at_ns - since
            at = arrival.at_ns if later <= 0 else since + round(later / self.factor)
            yield arrival if arrival.after is not None else msgspec.structs.replace(arrival, at_ns=at)


@dataclass(frozen=True, slots=True)
class RateScale:
    """The same arrivals, closer together or farther apart: `factor` times the rate, or `target_rate` requests/s.

    A target is met by the mean over the span, as `traces.stats` defines it; it takes one more pass over the workload,
    which must therefore be able to start afresh. Only arrival times change: think times and cancellations are people's.
    """

    arrivals: Iterable[AnyArrival]
    factor: float | None = None
    target_rate: float | None = None

    def __post_init__(self) -> None:
        if (self.factor is None) == (self.target_rate is None):
            given = {"factor": self.factor, "target_rate": self.target_rate}
            require(False, "the rate", given, "exactly one of factor and target_rate", "give one of them")
        for name, value in (("factor", self.factor), ("target_rate", self.target_rate)):
            require(value is None or 0 < value < math.inf, name, value, "a number above 0", "choose a positive one")
        fresh = self.factor is not None or iter(self.arrivals) is not self.arrivals
        require(fresh, "arrivals", self.arrivals, f"a workload {_TWICE}", "give a factor instead")

    def __iter__(self) -> Iterator[AnyArrival]:
        factor = self.factor if self.factor is not None else self._factor_for_target()
        empty = True
        for arrival in self.arrivals:
            empty = False
            yield msgspec.structs.replace(arrival, at_ns=round(arrival.at_ns / factor))
        if empty:
            raise TraceError(f"the workload has no arrivals: allowed is one {_TWICE}; give a factor instead")

    def _factor_for_target(self) -> float:
        assert self.target_rate is not None
        count, first, last = 0, 0, 0
        for arrival in self.arrivals:
            if arrival.after is None:
                first = first if count else arrival.at_ns
                last = arrival.at_ns
                count += 1
        if last == first:
            raise TraceError("the workload spans no time: allowed is arrivals at two times or more; give a factor")
        return self.target_rate * (last - first) / (count * NS_PER_S)


@dataclass(frozen=True, slots=True)
class LengthScale:
    """Prompts and outputs times a factor each, at least 1 token.

    Scaled contexts keep their leading block ids, so shared prefixes stay shared; what grows beyond the known ids is
    shared with nobody. A client's limit is raised where the output outgrows it. Work other than serving stays as it is.
    """

    arrivals: Iterable[AnyArrival]
    prompt_scale: float = 1.0
    output_scale: float = 1.0

    def __post_init__(self) -> None:
        for name, value in (("prompt_scale", self.prompt_scale), ("output_scale", self.output_scale)):
            require(0 < value < math.inf, name, value, "a number above 0", "1 keeps the lengths")

    def __iter__(self) -> Iterator[AnyArrival]:
        for arrival in self.arrivals:
            if not isinstance(arrival, Arrival):
                yield arrival
                continue
            yield with_lengths(
                arrival,
                prompt_tokens=max(1, round(arrival.request.prompt_tokens * self.prompt_scale)),
                output_tokens=max(1, round(arrival.answer.output_tokens * self.output_scale)),
            )


@dataclass(frozen=True, slots=True)
class ClipLengths:
    """Longer prompts and outputs cut to what an engine can hold; the client's limit is cut like the output.

    Work other than serving stays as it is.
    """

    arrivals: Iterable[AnyArrival]
    max_prompt_tokens: int | None = None
    max_output_tokens: int | None = None

    def __post_init__(self) -> None:
        limits = (("max_prompt_tokens", self.max_prompt_tokens), ("max_output_tokens", self.max_output_tokens))
        for name, value in limits:
            require(value is None or value >= 1, name, value, "at least 1 token", "leave it out to keep all")

    def __iter__(self) -> Iterator[AnyArrival]:
        for arrival in self.arrivals:
            if not isinstance(arrival, Arrival):
                yield arrival
                continue
            request, output = arrival.request, arrival.answer.output_tokens
            limit = _least(request.max_tokens, self.max_output_tokens)
            clipped = with_lengths(
                arrival,
                prompt_tokens=_least(request.prompt_tokens, self.max_prompt_tokens),
                output_tokens=_least(output, self.max_output_tokens),
            )
            yield msgspec.structs.replace(clipped, request=msgspec.structs.replace(clipped.request, max_tokens=limit))


def with_lengths(arrival: Arrival, prompt_tokens: int, output_tokens: int) -> Arrival:
    """The arrival with other lengths and block ids to match; the client's limit is at least the output."""
    request, answer = arrival.request, arrival.answer
    block_ids, answer_ids = request.block_ids, answer.block_ids
    if block_ids is not None:
        full = prompt_tokens // BLOCK_TOKENS
        if full > len(block_ids) and answer_ids is not None:
            answer_ids = block_ids  # the prompt grew over the output's old place
        block_ids = _first_ids(block_ids, full, request.request_id)
    if answer_ids is not None:
        answer_ids = _first_ids(answer_ids, (prompt_tokens + output_tokens) // BLOCK_TOKENS, request.request_id)
    return msgspec.structs.replace(
        arrival,
        request=msgspec.structs.replace(
            request,
            prompt_tokens=prompt_tokens,
            max_tokens=max(request.max_tokens, output_tokens),
            block_ids=block_ids,
        ),
        answer=msgspec.structs.replace(answer, output_tokens=output_tokens, block_ids=answer_ids),
    )


def _first_ids(known: tuple[int, ...], count: int, request_id: int) -> tuple[int, ...]:
    """The first `count` ids; positions beyond the known ones get ids of this request alone."""
    return known[:count] + tuple(identity.unique(request_id)[len(known) : count])


def _least(value: int, limit: int | None) -> int:
    return value if limit is None else min(value, limit)
