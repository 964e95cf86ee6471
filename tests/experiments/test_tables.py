"""The comparison table: units, widths, alignment, and errors against a real run."""

import io
import math
import re

import pytest

from experiments.tables import (
    METRICS,
    Row,
    count,
    duration,
    error_text,
    format_table,
    print_table,
    round_duration,
    share,
    three_digits,
)

FAST = {
    "ttft_p50_s": 0.1081,
    "ttft_p99_s": 0.7936,
    "tpot_p50_s": 0.0255,
    "tpot_p99_s": 0.0341,
    "e2e_p50_s": 3.28,
    "e2e_p99_s": 19.6,
    "slo_attainment": 0.9995,
    "goodput_rps": 16.8,
    "npu_seconds": 357.2,
}
SLOW = {key: 2 * value for key, value in FAST.items()} | {"slo_attainment": 0.5}


def test_a_table_has_a_line_per_run_and_one_unit_per_column() -> None:
    """Times stand in milliseconds or seconds by what the column holds, numbers end where their heading ends."""
    assert format_table([Row("fast", FAST), Row("slow", SLOW)]) == "\n".join(
        [
            "         TTFT s       TPOT ms        E2E s       SLO  goodput  NPU",
            "run     p50    p99    p50    p99   p50    p99  met %    req/s    s",
            "------------------------------------------------------------------",
            "fast  0.108  0.794  25.50  34.10  3.28  19.60  >99.9     16.8  357",
            "slow  0.216  1.587  51.00  68.20  6.56  39.20   50.0     33.6  714",
        ]
    )


def test_errors_stand_only_where_there_is_a_reference() -> None:
    """A row with a reference has nine errors, a row without has none, and without any the columns are away."""
    with_errors = format_table([Row("sim", SLOW, FAST), Row("real", FAST)])
    head, *_, sim, real = with_errors.splitlines()
    assert head.strip("| ") == "sim vs real"
    assert sim.split("|")[1].split() == ["+100%"] * 6 + ["-50%", "+100%", "+100%"]
    assert real.split("|")[1].split() == []
    assert "sim vs real" not in format_table([Row("real", FAST)])


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("referred", [False, True])
def test_no_line_is_longer_than_the_screen(scale: float, referred: bool) -> None:
    """Whatever the numbers, lines are as wide as the terminal at most and numbers are right-aligned."""
    huge = {key: value * scale for key, value in FAST.items()} | {"slo_attainment": 1}
    label = "dispatch=policies.dispatch.least_outstanding,trace=azure2023_conversations,seed=12345"
    reference = FAST if referred else None
    lines = format_table(
        [Row(label, huge, reference), Row("short", {}, reference), Row("x", FAST, reference)]
    ).splitlines()
    assert max(map(len, lines)) <= 150
    ends = [[found.end() for found in re.finditer(r"\S+", line)][1:] for line in lines[-3:]]
    assert ends[0] == ends[1] == ends[2]
    assert len(ends[0]) == (19 if referred else 9)


def test_a_long_label_keeps_both_ends() -> None:
    """Runs of a sweep differ at the beginning or the end of their name, so the middle is cut."""
    cut = format_table([Row("a" * 60 + "z" * 60, FAST)], width=100).splitlines()[-1].split()[0]
    assert cut.startswith("aaaa")
    assert "…" in cut
    assert cut.endswith("zzzz")


def test_what_a_run_does_not_have_is_a_dash() -> None:
    """Absent, NaN and null metrics look alike."""
    for empty in ({}, dict.fromkeys(FAST, math.nan)):
        assert format_table([Row("none", empty)]).splitlines()[-1].split()[1:] == ["–"] * 9
    assert Row("none", {"npu_seconds": None}).error(METRICS[-1]) != 0  # type: ignore[dict-item]
    assert format_table([]) == "no runs to compare"


def test_relative_error() -> None:
    """The error is relative to the reference; equal zeros agree, and nothing can be said against a zero."""
    metric = METRICS[0]

    def error(value: float, reference: float) -> float:
        return Row("", {metric.key: value}, {metric.key: reference}).error(metric)

    assert error(1.5, 1.0) == 0.5
    assert error(0.0, 0.0) == 0.0
    assert math.isnan(error(1.0, 0.0))
    assert math.isnan(error(math.nan, 1.0))
    assert math.isnan(Row("", {metric.key: 1.0}).error(metric))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 s"),
        (9.5e-4, "950 µs"),
        (0.0009996, "1.00 ms"),
        (0.0255, "25.5 ms"),
        (0.9996, "1.00 s"),
        (7.94, "7.94 s"),
        (1240, "1\u202f240 s"),
        (math.nan, "–"),
    ],
)
def test_durations(value: float, text: str) -> None:
    """Three digits and the unit that suits."""
    assert duration(value) == text


def test_numbers_for_people() -> None:
    """Limits have no zeros at the end, all is 100 % only if it is all, and large numbers are grouped."""
    assert [round_duration(each) for each in (2.0, 0.05, 0.25, 20.0, 100.0)] == [
        "2 s",
        "50 ms",
        "250 ms",
        "20 s",
        "100 s",
    ]
    assert [share(each) for each in (1, 0.99999, 0.5, 0.00001, 0)] == ["100 %", ">99.9 %", "50.0 %", "<0.1 %", "0 %"]
    assert [three_digits(each) for each in (0, 0.01234, 9.996, 12345.6)] == ["0", "0.0123", "10.0", "12\u202f346"]
    assert [count(each) for each in (9, 5650.0, math.nan)] == ["9", "5\u202f650", "–"]
    assert [error_text(each) for each in (0.0, 0.012, -0.34, 1.0, 25, -0.0004)] == [
        "+0.0%",
        "+1.2%",
        "-34%",
        "+100%",
        ">10x",
        "+0.0%",
    ]


def test_printing() -> None:
    """The table goes where it is sent, with a line end."""
    out = io.StringIO()
    print_table([Row("fast", FAST)], file=out)
    assert out.getvalue() == format_table([Row("fast", FAST)]) + "\n"
