"""Transforms: counts, order and shared prefixes survive; senseless arguments do not."""

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.request import Answer, Arrival, Request, Trigger
from traces.errors import TraceError
from traces.stats import stats_of
from traces.transforms import ClipLengths, LengthScale, Limit, RateScale, TimeWindow

S = 1_000_000_000


def plain(*times_s: float) -> list[Arrival]:
    return [Arrival(Request(i, 100, 60, "m"), Answer(50), round(t * S)) for i, t in enumerate(times_s)]


WORKLOADS = st.lists(st.integers(0, 5 * S), min_size=1, max_size=20).map(
    lambda times: [Arrival(Request(i, 7 * i + 1, 60, "m"), Answer(50), t) for i, t in enumerate(sorted(times))]
)
FACTORS = st.floats(0.01, 100)


def turn(number: int, prompt: int, output: int, common: int) -> Arrival:
    """A context whose first `common` blocks are 0, 1, 2 … and the rest its own."""
    total = (prompt + output) // 16
    ids = tuple(i if i < common else 1000 * (number + 1) + i for i in range(total))
    return Arrival(Request(number, prompt, 60, "m", ids[: prompt // 16]), Answer(output, ids))


def test_window_is_rebased_and_half_open() -> None:
    """The window starts at 0, holds its first instant and not its last, and keeps request ids."""
    window = TimeWindow(plain(0, 1, 1.5, 2, 3), start_s=1, duration_s=1)
    assert [(arrival.request.request_id, arrival.at_ns) for arrival in window] == [(1, 0), (2, S // 2)]
    assert [arrival.at_ns for arrival in TimeWindow(plain(0, 3), start_s=2)] == [S]


def test_window_stops_reading() -> None:
    """Nothing behind the window's end is read, however long the trace goes on."""
    source = iter(plain(0, 1, 2, 3))
    assert len(list(TimeWindow(source, duration_s=1))) == 1
    assert [arrival.request.request_id for arrival in source] == [2, 3]


def test_window_without_arrivals() -> None:
    """A window that selects nothing is an error that names it."""
    with pytest.raises(TraceError, match=r"the time window from 5 s to 7.5 s has no arrivals: .*; move or lengthen"):
        list(TimeWindow(plain(0, 9), start_s=5, duration_s=2.5))
    with pytest.raises(TraceError, match="from 10 s to the end has no arrivals"):
        list(TimeWindow(plain(0, 9), start_s=10))


def test_window_refuses_closed_loop() -> None:
    """A window that cuts refuses closed-loop rows, whose times only a run knows; one that cuts nothing passes them."""
    after = Arrival(Request(1, 1, 1, "m"), Answer(1), 0, Trigger("ended", 0))
    with pytest.raises(TraceError, match=r"request 1 waits for another one: .*; cut closed-loop workloads by number"):
        list(TimeWindow([*plain(0), after], duration_s=1))
    assert list(TimeWindow([*plain(0), after])) == [*plain(0), after]


def test_limit() -> None:
    """The first arrivals, as they are; a short workload stays short."""
    assert list(Limit(plain(0, 1, 2), 2)) == plain(0, 1)
    assert list(Limit(plain(0), 2)) == plain(0)


@given(arrivals=WORKLOADS, factor=FACTORS)
def test_rate_scale(arrivals: list[Arrival], factor: float) -> None:
    """Every arrival stays, in order, and nothing but its time changes; the factor divides times."""
    scaled = list(RateScale(arrivals, factor=factor))
    times = [arrival.at_ns for arrival in scaled]
    assert times == sorted(times)
    assert [arrival.request for arrival in scaled] == [arrival.request for arrival in arrivals]
    assert times == pytest.approx([arrival.at_ns / factor for arrival in arrivals], abs=1)


@given(arrivals=WORKLOADS, rate=FACTORS)
def test_target_rate(arrivals: list[Arrival], rate: float) -> None:
    """A target rate is the mean rate of the result, or refused where the workload spans no time."""
    if arrivals[0].at_ns == arrivals[-1].at_ns:
        with pytest.raises(TraceError, match="the workload spans no time"):
            list(RateScale(arrivals, target_rate=rate))
        return
    if arrivals[-1].at_ns - arrivals[0].at_ns > 10**6:  # else rounding to nanoseconds shows
        assert stats_of(RateScale(arrivals, target_rate=rate)).mean_rps == pytest.approx(rate, rel=1e-4)


def test_target_rate_needs_two_passes() -> None:
    """A one-time stream is refused, also behind another transform, instead of giving an empty workload."""
    with pytest.raises(ValueError, match=r"arrivals is .*: allowed is a workload that can be read twice"):
        RateScale(iter(plain(0, 1)), target_rate=1)
    with pytest.raises(TraceError, match="the workload has no arrivals: allowed is one that can be read twice"):
        list(RateScale(Limit(iter(plain(0, 1)), 2), target_rate=1))


def test_think_times_stay() -> None:
    """Scaling the rate leaves closed-loop delays alone."""
    after = Arrival(Request(1, 1, 1, "m"), Answer(1), 0, Trigger("ended", 0, delay_ns=7), 9)
    assert list(RateScale([*plain(0), after], factor=10))[1] == after


@given(arrivals=WORKLOADS, prompt_scale=FACTORS, output_scale=FACTORS)
def test_length_scale(arrivals: list[Arrival], prompt_scale: float, output_scale: float) -> None:
    """Lengths scale, stay at least 1, and the client's limit still admits the output."""
    scaled = list(LengthScale(arrivals, prompt_scale, output_scale))
    assert len(scaled) == len(arrivals)
    for old, new in zip(arrivals, scaled, strict=True):
        assert new.at_ns == old.at_ns
        assert new.request.prompt_tokens == max(1, round(old.request.prompt_tokens * prompt_scale))
        assert new.answer.output_tokens == max(1, round(old.answer.output_tokens * output_scale))
        assert new.request.max_tokens == max(60, new.answer.output_tokens)
        assert new.request.block_ids is None


@given(
    prompts=st.tuples(st.integers(1, 400), st.integers(1, 400)),
    output=st.integers(1, 100),
    common=st.integers(0, 30),
    scale=FACTORS,
)
def test_scaled_ids_stay_consistent(prompts: tuple[int, int], output: int, common: int, scale: float) -> None:
    """As many ids as full blocks, shared prefixes stay shared, and the answer's ids begin with the prompt's."""
    old = [turn(i, prompt, output, common) for i, prompt in enumerate(prompts)]
    new = list(LengthScale(old, prompt_scale=scale, output_scale=scale))
    prefixes = []
    for arrival in new:
        ids, answer_ids = arrival.request.block_ids, arrival.answer.block_ids
        assert ids is not None
        assert answer_ids is not None
        assert len(ids) == arrival.request.prompt_tokens // 16
        assert len(answer_ids) == (arrival.request.prompt_tokens + arrival.answer.output_tokens) // 16
        assert answer_ids[: len(ids)] == ids
        assert len(set(answer_ids)) == len(answer_ids)
        prefixes.append(ids)
    kept = min(common, *(len(ids) for ids in prefixes), *(prompt // 16 for prompt in prompts))
    assert prefixes[0][:kept] == prefixes[1][:kept] == tuple(range(kept))
    assert not set(prefixes[0][kept:]) & set(prefixes[1][kept:]) - set(range(common))


def test_next_turn_still_finds_the_answer() -> None:
    """Shrunk by one factor, a session's next prompt still begins with prompt and output of the turn before."""
    context = tuple(range(110))
    first = Arrival(Request(0, 1600, 999, "m", context[:100]), Answer(160, context))
    second = Arrival(Request(1, 1800, 999, "m", (*context, 501, 502)), Answer(8))
    one, two = LengthScale([first, second], prompt_scale=0.5, output_scale=0.5)
    assert two.request.block_ids is not None
    assert one.answer.block_ids == two.request.block_ids[:55]


def test_clip() -> None:
    """Prompt, output and client's limit are cut; ids follow; None leaves a side alone."""
    (clipped,) = ClipLengths([turn(0, 100, 50, 0)], max_prompt_tokens=40, max_output_tokens=10)
    ids = turn(0, 100, 50, 0).request.block_ids
    assert ids is not None
    assert clipped == Arrival(Request(0, 40, 10, "m", ids[:2]), Answer(10, ids[:3]))
    assert list(ClipLengths(plain(0))) == plain(0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TimeWindow([], start_s=-1), "start_s is -1: allowed is 0 or more seconds; "),
        (lambda: TimeWindow([], duration_s=0), "duration_s is 0: allowed is more than 0 seconds; "),
        (lambda: TimeWindow([], duration_s=math.nan), "duration_s is nan"),
        (lambda: Limit([], 0), "count is 0: allowed is at least 1 request; "),
        (lambda: RateScale([], factor=-2), "factor is -2: allowed is a number above 0; "),
        (lambda: RateScale([], target_rate=0), "target_rate is 0: allowed is a number above 0; "),
        (lambda: RateScale([], factor=math.inf), "factor is inf"),
        (lambda: RateScale([]), "the rate is .*: allowed is exactly one of factor and target_rate; "),
        (lambda: RateScale([], factor=1, target_rate=1), "exactly one of factor and target_rate"),
        (lambda: LengthScale([], prompt_scale=0), "prompt_scale is 0: allowed is a number above 0; "),
        (lambda: LengthScale([], output_scale=-1), "output_scale is -1: allowed is a number above 0; "),
        (lambda: ClipLengths([], max_prompt_tokens=0), "max_prompt_tokens is 0: allowed is at least 1 token; "),
        (lambda: ClipLengths([], max_output_tokens=-5), "max_output_tokens is -5"),
    ],
)
def test_bad_arguments(make: Callable[[], object], message: str) -> None:
    """Senseless arguments are refused when the transform is made."""
    with pytest.raises(ValueError, match=message):
        make()
