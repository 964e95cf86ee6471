"""The Mooncake reader: shared prefixes, and stamps of 3 s spread out."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from traces.errors import TraceError
from traces.readers.mooncake import MooncakeTrace

S = 1_000_000_000


def write(file: Path, rows: Iterable[dict[str, Any]], tail: str = "") -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return file


def row(timestamp: Any = 0, tokens: Any = 600, hashes: Any = (0, 1), output: Any = 5) -> dict[str, Any]:
    return {"timestamp": timestamp, "input_length": tokens, "output_length": output, "hash_ids": hashes}


def test_block_ids_follow_the_hashes(tmp_path: Path) -> None:
    """Equal leading hashes give equal leading ids, one per full 16 tokens; other models share nothing."""
    file = write(tmp_path / "m.jsonl", [row(tokens=1000, hashes=[0, 1]), row(tokens=1100, hashes=[0, 2, 3])])
    first, second = (arrival.request.block_ids for arrival in MooncakeTrace(file, "m"))
    assert first is not None
    assert second is not None
    assert (len(first), len(second)) == (62, 68)
    assert first[:32] == second[:32]
    assert not set(first[32:]) & set(second[32:])
    (other, _) = (arrival.request.block_ids for arrival in MooncakeTrace(file, "n"))
    assert other is not None
    assert not set(first) & set(other)


def test_grid_as_published(tmp_path: Path) -> None:
    """Without spreading, times are the file's milliseconds and ids the row indexes."""
    file = write(tmp_path / "m.jsonl", [row(0), row(0), row(2999)])
    arrivals = list(MooncakeTrace(file, "m", spread=False))
    assert [(arrival.request.request_id, arrival.at_ns) for arrival in arrivals] == [(0, 0), (1, 0), (2, 2_999_000_000)]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
@given(gaps=st.lists(st.integers(0, 5000), min_size=1, max_size=30), seed=st.integers(0, 1000))
def test_spread_keeps_order_and_cell(tmp_path: Path, gaps: list[int], seed: int) -> None:
    """Each request stays between its stamp and the next one, at most 3 s behind it, in file order, for any seed."""
    stamps = [sum(gaps[: i + 1]) for i in range(len(gaps))]
    reader = MooncakeTrace(write(tmp_path / "m.jsonl", map(row, stamps)), "m", seed=seed)
    times = [arrival.at_ns for arrival in reader]
    assert times == sorted(times)
    assert [arrival.request.request_id for arrival in reader] == list(range(len(gaps)))
    assert times == [arrival.at_ns for arrival in reader]
    for stamp, time in zip(stamps, times, strict=True):
        following = min((later for later in stamps if later > stamp), default=stamp + 3000)
        assert stamp * 10**6 <= time < min(following, stamp + 3000) * 10**6


def test_seed_moves_the_spread(tmp_path: Path) -> None:
    """Another seed gives other times."""
    file = write(tmp_path / "m.jsonl", [row()] * 9)
    one, two = ([arrival.at_ns for arrival in MooncakeTrace(file, "m", seed=seed)] for seed in (1, 2))
    assert one != two


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (row(hashes=[0]), r"m.jsonl:2: field hash_ids is \[0\]: allowed is a list of 2 whole numbers .* \(found 1\); "),
        (row(hashes=[0, "x"]), "field hash_ids"),
        (row(hashes=None), "field hash_ids is None"),
        (row(tokens=0), "m.jsonl:2: field input_length is 0: allowed is a whole number from 1"),
        (row(tokens=600.5), "field input_length is 600.5"),
        (row(tokens=True), "field input_length is True"),
        (row(output=0), "field output_length is 0: allowed is at least 1 token; min_output=1"),
        (row(output=-4), "field output_length is -4"),
        (row(timestamp=8), "field timestamp is 8: allowed is a time not before the row above"),
        (row(timestamp=-1), "field timestamp is -1: allowed is a number from 0"),
        (row(timestamp="noon"), "field timestamp is 'noon'"),
        ({"timestamp": 9, "input_length": 3}, "field hash_ids is missing"),
        ([1], r"m.jsonl:2: the line is '\[1\]': allowed is one whole JSON object"),
    ],
)
def test_bad_rows(tmp_path: Path, bad: Any, message: str) -> None:
    """A row that cannot be used is named by file, line and field."""
    file = write(tmp_path / "m.jsonl", [row(9), bad])
    with pytest.raises(TraceError, match=message):
        list(MooncakeTrace(file, "m"))


def test_cut_last_line(tmp_path: Path) -> None:
    """A file that ends inside a row is an error that says so."""
    file = write(tmp_path / "m.jsonl", [row()], tail=json.dumps(row())[:-20])
    with pytest.raises(TraceError, match=r"m.jsonl:2: the line is '\{.*: allowed is one whole JSON object; fetch the"):
        list(MooncakeTrace(file, "m"))


def test_empty(tmp_path: Path) -> None:
    """A file without rows is an error."""
    with pytest.raises(TraceError, match=r"m\.jsonl: the trace has no rows"):
        list(MooncakeTrace(write(tmp_path / "m.jsonl", []), "m"))


def test_real_file_streams(real_trace: Callable[[str], Path]) -> None:
    """The published file yields its first rows, all with the shared first block."""
    arrivals = iter(MooncakeTrace(real_trace("mooncake_conversation"), "m"))
    first, second = next(arrivals), next(arrivals)
    assert (first.request.prompt_tokens, first.answer.output_tokens) == (6758, 500)
    assert 0 <= first.at_ns <= second.at_ns < 3 * S
    assert first.request.block_ids is not None
    assert second.request.block_ids is not None
    assert first.request.block_ids[:32] == second.request.block_ids[:32]
