"""Statistics: by hand on small workloads, against published numbers on real ones."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.request import Answer, Arrival, Request, Trigger
from traces.errors import TraceError
from traces.formats import open_trace
from traces.prefixes import PrefixSet
from traces.stats import Lengths, stats_of, table

S = 1_000_000_000


def arrival(at_s: float, prompt: int = 40, ids: tuple[int, ...] | None = None) -> Arrival:
    return Arrival(Request(0, prompt, 9, "m", ids), Answer(9), round(at_s * S))


def test_by_hand() -> None:
    """Counts, times and reuse of four requests; the closed-loop one has no time."""
    stats = stats_of(
        [
            arrival(10, 40, (1, 2)),
            arrival(12, 40, (1, 3)),
            arrival(90, 20),
            Arrival(Request(9, 16, 9, "m", (1,)), Answer(9), after=Trigger("ended", 0)),
        ]
    )
    assert (stats.requests, stats.closed_loop, stats.known_prefixes) == (4, 1, 3)
    assert stats.span_s == 80
    assert stats.mean_rps == 3 / 80
    assert stats.peak_rps == 2 / 60
    assert stats.iat_cv == pytest.approx(38 / 40)
    assert stats.prompt == Lengths(30, 40, 40, 40)
    assert stats.reuse_blocks == 2 / 5
    assert stats.reuse_tokens == 32 / 96


def test_what_is_not_known_is_none() -> None:
    """One request has no span; lengths alone have no reuse; the table says unknown."""
    stats = stats_of([arrival(3)])
    assert (stats.mean_rps, stats.iat_cv, stats.reuse_blocks, stats.reuse_tokens) == (None, None, None, None)
    assert stats_of([arrival(3), arrival(3)]).iat_cv is None
    assert "inter-arrival CV               unknown" in table(stats)


def test_table_is_aligned() -> None:
    """Names left, values in one column."""
    lines = table(stats_of([arrival(0), arrival(60)])).splitlines()
    assert lines[0] == "requests                       2"
    assert lines[5] == "prompt tokens p50/p90/p99/max  40 / 40 / 40 / 40"


def test_bad_workloads() -> None:
    """An empty workload and one that goes back in time are errors."""
    with pytest.raises(TraceError, match="the workload has no arrivals: allowed is at least one; "):
        stats_of([])
    with pytest.raises(TraceError, match=r"request 0 arrives at 1.0 s: allowed is not before .* 2.0 s; sort"):
        stats_of([arrival(2), arrival(1)])


@given(paths=st.lists(st.lists(st.integers(0, 2), max_size=8), max_size=30), shift=st.sampled_from([0, -50]))
def test_prefix_set_is_a_set_of_prefixes(paths: list[list[int]], shift: int) -> None:
    """Runs that are split and grown find exactly the prefixes that were there, for ids of either sign."""
    names: dict[tuple[int, ...], int] = {}
    runs, seen = PrefixSet(), set[int]()
    for path in paths:
        prefixes = [tuple(path[: n + 1]) for n in range(len(path))]
        ids = tuple(names.setdefault(prefix, len(names)) + shift for prefix in prefixes)
        assert runs.add(ids) == sum(block in seen for block in ids)
        seen.update(ids)


@pytest.mark.parametrize(
    ("name", "requests", "span_s", "rates", "cv", "prompt", "output"),
    [
        ("azure2023_code", 8819, 3436, (2.57, 10.53), 13.15, (1469, 5188, 7436, 7437), (13, 55, 251, 1899)),
        ("azure2023_conv", 19366, 3502, (5.53, 8.45), 1.09, (1020, 2735, 4142, 14050), (129, 424, 601, 1000)),
        (
            "mooncake_conversation",
            12031,
            3537,
            (3.40, 4.12),
            3.03,
            (6909, 27367, 85400, 126195),
            (350, 597, 1119, 2000),
        ),
    ],
)
def test_published_traces(
    real_trace: Callable[[str], Path],
    name: str,
    requests: int,
    span_s: float,
    rates: tuple[float, float],
    cv: float,
    prompt: tuple[int, ...],
    output: tuple[int, ...],
) -> None:
    """Real files have the statistics that an independent count found."""
    real_trace(name)
    stats = stats_of(open_trace(name, "m", spread=False) if name.startswith("mooncake") else open_trace(name, "m"))
    assert stats.requests == requests
    assert stats.span_s == pytest.approx(span_s, abs=0.5)
    assert (stats.mean_rps, stats.peak_rps) == pytest.approx(rates, abs=0.006)
    assert stats.iat_cv == pytest.approx(cv, abs=0.006)
    for found, expected in ((stats.prompt, prompt), (stats.output, output)):
        assert (found.p50, found.p90, found.p99, found.max) == pytest.approx(expected, abs=0.6)
    if name.startswith("mooncake"):  # counted on the file's own 512-token blocks: 37.4 % of tokens, 36.6 % of blocks
        assert stats.reuse_tokens == pytest.approx(0.374, abs=0.001)
        assert stats.reuse_blocks == pytest.approx(0.374, abs=0.001)
    else:
        assert stats.reuse_blocks is None


def test_spread_mooncake_is_near_poisson(real_trace: Callable[[str], Path]) -> None:
    """Spread out, the arrivals lose the grid's burstiness and keep their number and rate."""
    real_trace("mooncake_conversation")
    stats = stats_of(open_trace("mooncake_conversation", "m"))
    assert stats.requests == 12031
    assert stats.mean_rps == pytest.approx(3.40, abs=0.01)
    assert stats.iat_cv == pytest.approx(1.0, abs=0.05)
