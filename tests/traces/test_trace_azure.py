"""The Azure reader: exact times, tolerated line ends, refused rows."""

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.request import Answer, Arrival, Request
from traces.errors import TraceError
from traces.readers.azure2023 import AzureTrace

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


@pytest.fixture
def trace(tmp_path: Path) -> Callable[..., AzureTrace]:
    def of(text: str, **options: int) -> AzureTrace:
        file = tmp_path / "azure.csv"
        file.write_bytes(text.encode())
        return AzureTrace(file, "m", **options)

    return of


def test_times_are_exact_and_start_at_zero(trace: Callable[..., AzureTrace]) -> None:
    """100-ns digits survive, across midnight, and the first row comes at 0."""
    rows = "2023-11-16 23:59:59.9999999,374,44\n2023-11-17 00:00:00.0000001,396,3000\n"
    assert list(trace(HEADER + rows)) == [
        Arrival(Request(0, 374, 2048, "m"), Answer(44), 0),
        Arrival(Request(1, 396, 3000, "m"), Answer(3000), 200),
    ]


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("last", ["", "ending", "blank"])
def test_line_ends(trace: Callable[..., AzureTrace], ending: str, last: str) -> None:
    """CRLF, a missing last line end and an empty last line change nothing."""
    text = (HEADER + "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50,396,109").replace("\n", ending)
    text += {"": "", "ending": ending, "blank": ending * 2}[last]
    assert [arrival.at_ns for arrival in trace(text)] == [0, 3_319_410_000]


def test_stamps_of_2024(trace: Callable[..., AzureTrace]) -> None:
    """The 2024 files mix stamps with and without a fraction, all with an offset of 0."""
    rows = "2024-05-10 00:00:00.009930+00:00,1,1\n2024-05-10 00:00:01+00:00,1,1\n"
    assert [arrival.at_ns for arrival in trace(HEADER + rows)] == [0, 990_070_000]


def test_starts_afresh(trace: Callable[..., AzureTrace]) -> None:
    """A reader can be iterated twice."""
    reader = trace(HEADER + "2023-11-16 18:15:46.6805900,374,44\n")
    assert list(reader) == list(reader)


def test_streams_in_constant_memory(trace: Callable[..., AzureTrace]) -> None:
    """Ten thousand rows take no more memory than a few."""
    times = (f"{i // 3600:02}:{i // 60 % 60:02}:{i % 60:02}" for i in range(10_000))
    reader = trace(HEADER + "".join(f"2023-11-16 {time}.5,{i + 1},7\n" for i, time in enumerate(times)))
    tracemalloc.start()
    try:
        count = sum(1 for _ in reader)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 10_000
    assert peak < 200_000


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            "2023-11-16 18:15:46.6,0,44",
            r"azure.csv:3: field ContextTokens is '0': allowed is a whole number from 1 .*; ",
        ),
        ("2023-11-16 18:15:46.6,12.5,44", "field ContextTokens is '12.5'"),
        ("2023-11-16 18:15:46.6,-3,44", "field ContextTokens is '-3'"),
        ("2023-11-16 18:15:46.6,,44", "field ContextTokens is ''"),
        ("2023-11-16 18:15:46.6,1_0,44", "field ContextTokens is '1_0'"),
        ("2023-11-16 18:15:46.6,999999999999,44", "field ContextTokens is '999999999999'"),
        ("2023-11-16 18:15:46.6,7,-1", "field GeneratedTokens is '-1'"),
        ("2023-11-16 18:15:46.6,7,0", "field GeneratedTokens is '0': allowed is at least 1 token; min_output=1"),
        ("2023-11-16 18:15:44.9,7,1", "field TIMESTAMP is '2023-11-16 18:15:44.9': allowed is a time not before"),
        ("2023-11-46 18:15:44.9,7,1", "field TIMESTAMP is '2023-11-46 18:15:44.9': allowed is a date and time"),
        ("noon,7,1", "field TIMESTAMP is 'noon'"),
        ("2023-11-16 18:15:46.6,7", "azure.csv:3: the row has 2 fields: allowed is 3"),
    ],
)
def test_bad_rows(trace: Callable[..., AzureTrace], row: str, message: str) -> None:
    """A row that cannot be used is named by file, line and field, and the rows above it were delivered."""
    arrivals = iter(trace(HEADER + "2023-11-16 18:15:45.0,1,1\n" + row))
    next(arrivals)
    with pytest.raises(TraceError, match=message):
        next(arrivals)


def test_empty_outputs_on_request(trace: Callable[..., AzureTrace]) -> None:
    """`min_output=1` takes an output of 0 tokens for one token."""
    (arrival,) = trace(HEADER + "2023-11-16 18:15:45.0,1,0\n", min_output=1)
    assert arrival.answer.output_tokens == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"azure.csv:1: field TIMESTAMP is missing: allowed is a header with TIMESTAMP, ContextTokens"),
        ("TIMESTAMP,ContextTokens\n", "azure.csv:1: field GeneratedTokens is missing"),
        (HEADER, "azure.csv: the trace has no rows"),
    ],
)
def test_bad_files(trace: Callable[..., AzureTrace], text: str, message: str) -> None:
    """A missing column and an empty trace are errors."""
    with pytest.raises(TraceError, match=message):
        list(trace(text))


def test_not_text(tmp_path: Path) -> None:
    """A file that is not UTF-8 text is an error, not a crash in the decoder."""
    file = tmp_path / "azure.csv"
    file.write_bytes(HEADER.encode() + b"\xff\xfe,1,1\n")
    with pytest.raises(TraceError, match=r"azure.csv:\d+: the text cannot be read .*: allowed is CSV in UTF-8"):
        list(AzureTrace(file, "m"))


@pytest.mark.parametrize(("option", "value"), [("max_tokens", 0), ("min_output", -1)])
def test_bad_arguments(trace: Callable[..., AzureTrace], option: str, value: int) -> None:
    """Limits out of range are refused at once."""
    with pytest.raises(ValueError, match=f"{option} is {value}: allowed is .*; "):
        trace(HEADER, **{option: value})
