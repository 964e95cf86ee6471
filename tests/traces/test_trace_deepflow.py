"""Our own format: what it says, what it refuses, and that writing and reading give the same arrivals."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.request import Answer, Arrival, Request, Trigger
from traces.convert import convert
from traces.errors import TraceError
from traces.readers.deepflow import DeepFlowTrace

ANY_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
TIMES = st.integers(0, 10**16)
EVENTS: st.SearchStrategy[Literal["first_token", "ended"]] = st.sampled_from(("first_token", "ended"))
TENANTS = st.text(st.characters(exclude_categories=["C"]), max_size=5)


@st.composite
def workloads(draw: st.DrawFn, with_ids: bool) -> list[Arrival]:
    """Workloads as the format allows them: ids and times ascend, closed-loop rows wait for earlier ones."""
    arrivals: list[Arrival] = []
    at_ns, number = 0, -1
    for _ in range(draw(st.integers(1, 8))):
        number += draw(st.integers(1, 5))
        prompt, output = draw(st.integers(1, 80)), draw(st.integers(1, 80))
        after = None
        if draw(st.booleans()) and arrivals:
            awaited = draw(st.none() | st.sampled_from([arrival.request.request_id for arrival in arrivals]))
            count = draw(st.integers(1, 99)) if awaited is None else None
            after = Trigger(draw(EVENTS), awaited, count, draw(TIMES))
        else:
            at_ns += draw(TIMES)
        ids = answer_ids = None
        if with_ids and draw(st.booleans()):
            block_id = st.integers(-(1 << 63), (1 << 64) - 1)
            total = (prompt + output) // 16
            answer_ids = tuple(draw(st.lists(block_id, min_size=total, max_size=total)))
            ids = answer_ids[: prompt // 16]
            answer_ids = draw(st.sampled_from([None, answer_ids]))
        request = Request(number, prompt, output + draw(st.integers(0, 9)), "m", ids, draw(TENANTS))
        if draw(st.booleans()):
            request = msgspec.structs.replace(
                request, priority=draw(st.integers(-3, 3)), deadline_ns=draw(st.none() | st.integers(1, 10**15))
            )
        answer, cancel = Answer(output, answer_ids), draw(st.none() | TIMES)
        arrivals.append(Arrival(request, answer, at_ns if after is None else 0, after, cancel))
    return arrivals


@ANY_FOLDER
@given(arrivals=workloads(with_ids=True))
def test_jsonl_round_trip(tmp_path: Path, arrivals: list[Arrival]) -> None:
    """JSONL gives back every arrival exactly, times to the nanosecond."""
    file = tmp_path / "t.jsonl"
    assert convert(arrivals, file) == len(arrivals)
    assert list(DeepFlowTrace(file, "m")) == arrivals


@ANY_FOLDER
@given(arrivals=workloads(with_ids=False))
def test_csv_round_trip(tmp_path: Path, arrivals: list[Arrival]) -> None:
    """CSV gives back every arrival exactly where no block ids are known."""
    file = tmp_path / "t.csv"
    assert convert(iter(arrivals), file) == len(arrivals)
    assert list(DeepFlowTrace(file, "m")) == arrivals


def read(folder: Path, text: str, ending: str, **options: int) -> list[Arrival]:
    file = folder / f"t{ending}"
    file.write_text(text)
    return list(DeepFlowTrace(file, "m", **options))


def test_short_csv(tmp_path: Path) -> None:
    """Three columns are enough: ids are row indexes, the limit is the reader's."""
    text = "arrival_s,prompt_tokens,output_tokens\n0,1000,100\n0.25,1200,80\n"
    assert read(tmp_path, text, ".csv", max_tokens=90) == [
        Arrival(Request(0, 1000, 100, "m"), Answer(100), 0),
        Arrival(Request(1, 1200, 90, "m"), Answer(80), 250_000_000),
    ]


def test_documented_session(tmp_path: Path) -> None:
    """The documented example: a second turn that presents the first one's answer."""
    text = """{"arrival_s":0,"prompt_tokens":20,"output_tokens":14,"block_ids":[71],"answer_block_ids":[71,83]}
{"after_event":"ended","after_request":0,"delay_s":4.5,"prompt_tokens":50,"output_tokens":9,"block_ids":[71,83,90]}
"""
    assert read(tmp_path, text, ".jsonl") == [
        Arrival(Request(0, 20, 2048, "m", (71,)), Answer(14, (71, 83))),
        Arrival(Request(1, 50, 2048, "m", (71, 83, 90)), Answer(9), 0, Trigger("ended", 0, None, 4_500_000_000)),
    ]


ROW = '{"arrival_s":1,"prompt_tokens":20,"output_tokens":14}\n'
FOLLOW = '{"prompt_tokens":20,"output_tokens":14,'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (ROW.replace("1,", "0.5,", 1), "t.jsonl:2: field arrival_s is 0.5: allowed is a time not before"),
        (ROW.replace("1,", "-1,", 1), "field arrival_s is -1: allowed is a number from 0"),
        (ROW.replace("1,", "1e99999999,", 1), r"field arrival_s is 1E\+99999999"),
        (ROW.replace("1,", '"NaN",', 1), "field arrival_s is 'NaN'"),
        (ROW.replace("1,", "true,", 1), "field arrival_s is True"),
        (ROW.replace("1,", "null,", 1), "field arrival_s is None"),
        (ROW.replace("arrival_s", "arrival"), "field arrival is 1: allowed is none but request_id, arrival_s"),
        (ROW.replace("20", "0"), "field prompt_tokens is 0: allowed is a whole number from 1"),
        (ROW.replace("14", "0"), "field output_tokens is 0: allowed is at least 1 token"),
        (ROW.replace("14}", '14,"max_tokens":9}'), "field max_tokens is 9: allowed is at least output_tokens, 14"),
        (ROW.replace("14}", '14,"request_id":0}'), "field request_id is 0: allowed is more than 0"),
        (ROW.replace("14}", '14,"tenant":7}'), "field tenant is 7: allowed is a text"),
        (ROW.replace("14}", '14,"cancel_after_s":-7}'), "field cancel_after_s is -7"),
        (ROW.replace("14}", '14,"priority":0.5}'), "field priority is 0.5: allowed is a whole number"),
        (ROW.replace("14}", '14,"deadline_s":0}'), "field deadline_s is 0: allowed is more than 0"),
        (ROW.replace("14}", '14,"block_ids":[]}'), r"field block_ids is \[\]: allowed is a list of 1 whole numbers"),
        (ROW.replace("14}", '14,"block_ids":[99999999999999999999]}'), "field block_ids"),
        (ROW.replace("14}", '14,"answer_block_ids":[1,2]}'), "field answer_block_ids is .* begins with block_ids"),
        (ROW.replace("14}", '14,"block_ids":[1],"answer_block_ids":[3,2]}'), "begins with block_ids"),
        (ROW.replace("14}", '14,"delay_s":1}'), "field delay_s is 1: allowed is none beside arrival_s"),
        (FOLLOW + '"after_event":"ended"}\n', "field after_request is missing: allowed is exactly one of"),
        (FOLLOW + '"after_event":"ended","after_request":0,"after_count":2}\n', "exactly one of"),
        (FOLLOW + '"after_event":"ended","after_request":1}\n', "after_request is 1: .* an earlier row, below 1"),
        (FOLLOW + '"after_event":"ended","after_count":0}\n', "field after_count is 0"),
        (FOLLOW + '"after_event":"begun","after_request":0}\n', "field after_event is 'begun': allowed is first_token"),
        (FOLLOW + '"after_request":0}\n', "field after_event is missing"),
        (ROW[:30], "t.jsonl:2: the line is .* allowed is one whole JSON object; fetch the file again"),
    ],
)
def test_bad_rows(tmp_path: Path, line: str, message: str) -> None:
    """A row that breaks a rule of the format is named by file, line and field."""
    with pytest.raises(TraceError, match=message):
        read(tmp_path, ROW + line, ".jsonl")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("arrival_s,prompt_tokens", "t.csv:1: field output_tokens is missing"),
        (
            "arrival_s,prompt_tokens,output_tokens,max_token",
            "t.csv:1: field max_token is unknown: allowed is request_id",
        ),
        ("arrival_s,prompt_tokens,output_tokens,block_ids", "t.csv:1: field block_ids is unknown"),
    ],
)
def test_bad_header(tmp_path: Path, header: str, message: str) -> None:
    """A missing column and a misspelt one are errors; block ids need JSONL."""
    with pytest.raises(TraceError, match=message):
        read(tmp_path, header + "\n", ".csv")


def test_unknown_ending(tmp_path: Path) -> None:
    """Only the two endings are read and written."""
    with pytest.raises(TraceError, match=r"the ending is '.txt': allowed is .csv or .jsonl; "):
        read(tmp_path, ROW, ".txt")
    with pytest.raises(ValueError, match=r"path is .*t.txt': allowed is a file ending in .csv or .jsonl; "):
        convert([], tmp_path / "t.txt")


ONE = Arrival(Request(3, 16, 9, "m"), Answer(9))


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (Arrival(Request(3, 16, 9, "m"), Answer(9)), "request_id is 3: allowed is more than 3"),
        (
            Arrival(Request(4, 16, 9, "m", (1,)), Answer(9)),
            r"block_ids is 'given \(request 4\)': allowed is none in CSV",
        ),
    ],
)
def test_what_cannot_be_written(tmp_path: Path, second: Arrival, message: str) -> None:
    """An arrival that the format would lose is refused, and no file is left."""
    with pytest.raises(ValueError, match=message):
        convert([ONE, second], tmp_path / "t.csv")
    assert not list(tmp_path.iterdir())


def test_failure_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    """A workload that breaks off does not replace what was there with a shorter one."""

    def broken() -> Iterator[Arrival]:
        yield ONE
        raise TraceError("cut")

    file = tmp_path / "t.jsonl"
    convert([ONE, msgspec.structs.replace(ONE, request=Request(4, 1, 9, "m"))], file)
    with pytest.raises(TraceError, match="cut"):
        convert(broken(), file)
    assert len(list(DeepFlowTrace(file, "m"))) == 2
    with pytest.raises(ValueError, match="the workload is 'empty'"):
        convert([], file)


def test_rows_may_name_a_model(tmp_path: Path) -> None:
    """Each row asks for the model it names, else for the reader's; written and read again, they are the same."""
    workload = [Arrival(Request(number, 16, 9, model), Answer(9), 0) for number, model in enumerate("mnm")]
    for ending in ("csv", "jsonl"):
        file = tmp_path / f"trace.{ending}"
        convert(workload, file)
        assert list(DeepFlowTrace(file, "m")) == workload
        assert [arrival.request.model for arrival in DeepFlowTrace(file, "z")] == ["z", "n", "z"]
