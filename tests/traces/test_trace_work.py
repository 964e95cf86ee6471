"""Workloads of agents and fine-tuning: our own format, merging, the generator, and Claude Code sessions."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.request import Trigger
from cluster.vocabulary import BLOCK_TOKENS, to_ns
from cluster.work import Agent, AnyArrival, Call, FineTuning, Tool, WorkArrival
from tests.builders import make_agent, make_arrival, make_tuning
from traces.agents import SYSTEM_TOKENS, AgentSessions
from traces.convert import convert
from traces.errors import TraceError
from traces.merge import Merge
from traces.readers.claude_code import ClaudeCodeTrace
from traces.readers.deepflow import DeepFlowTrace
from traces.stats import stats_of
from traces.transforms import ClipLengths, LengthScale, RateScale
from traces.tuning import TuningJobs


def workload() -> list[AnyArrival]:
    return [
        make_arrival(0, 0.5, model="m"),
        make_agent(1, [(64, 9), 0.25], [(160, 4)], at_s=1.0, ids=tuple(range(10)), cancel_after_s=9.0, priority=2),
        make_agent(2, [(20, 3)], after=Trigger("ended", 1, delay_ns=to_ns(2.5))),
        make_tuning(3, steps=5, at_s=2.0, checkpoint_steps=2, shards=3, evaluation=[(9, 2)]),
    ]


def test_work_reads_back_from_our_format(tmp_path: Path) -> None:
    """Written and read again, every row is what it was; CSV cannot hold work, and says so."""
    assert convert(workload(), tmp_path / "w.jsonl") == 4
    assert list(DeepFlowTrace(tmp_path / "w.jsonl", "m")) == workload()
    with pytest.raises(ValueError, match=r"given \(request 1\).: allowed is none in CSV"):
        convert(workload(), tmp_path / "w.csv")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"work": {"type": "Agent", "rounds": []}}, "field work"),
        ({"work": {"type": "Chat"}}, "field work"),
        ({"work": {"type": "FineTuning", "tokens": 0}}, "tokens is 0: allowed are 1 and more"),
        (
            {"work": {"type": "FineTuning", "tokens": 5}, "prompt_tokens": 3},
            "field prompt_tokens is 3: allowed is none",
        ),
        (
            {"work": {"type": "Agent", "rounds": [[{"type": "Tool"}]]}},
            "field lengths is missing: allowed is a list of 1",
        ),
        ({"work": {"type": "Agent", "rounds": [[{"type": "Tool"}]]}, "lengths": [-1]}, "field lengths is -1"),
    ],
)
def test_rows_of_work_are_checked(row: dict[str, object], message: str, tmp_path: Path) -> None:
    """A row that cannot be used is named with file, line, field and what is allowed."""
    (tmp_path / "w.jsonl").write_text(json.dumps({"arrival_s": 0, **row}) + "\n")
    with pytest.raises(TraceError, match=message):
        list(DeepFlowTrace(tmp_path / "w.jsonl", "m"))


def test_merged_workloads_keep_order_and_cues() -> None:
    """By time, numbered anew; what waits for a request waits for the same one under its new number."""
    first = [make_arrival(5, 1.0), make_arrival(7, 3.0), make_arrival(8, after=Trigger("ended", 5))]
    second = [make_agent(0, [0.1], at_s=2.0), make_agent(1, [0.2], after=Trigger("ended", 0, delay_ns=4))]
    merged = list(Merge([first, second]))
    assert [arrival.request.request_id for arrival in merged] == list(range(5))
    assert [(arrival.at_ns, arrival.after) for arrival in merged] == [
        (to_ns(1.0), None),
        (to_ns(2.0), None),
        (0, Trigger("ended", 1, delay_ns=4)),
        (to_ns(3.0), None),
        (0, Trigger("ended", 0)),
    ]


def test_transforms_leave_work_as_it_is() -> None:
    """Lengths of serving are scaled and cut; a rate scales when work comes, too."""
    rows = workload()
    assert list(LengthScale(rows, 2.0, 2.0))[1:] == rows[1:]
    assert list(ClipLengths(rows, 5, 5))[1:] == rows[1:]
    assert [arrival.at_ns for arrival in RateScale(rows, factor=2)] == [arrival.at_ns // 2 for arrival in rows]
    assert stats_of(rows).requests == 1 + 3 + 1


def test_generated_sessions_are_like_those_they_are_fitted_to() -> None:
    """Turns of a session wait for each other; contexts begin alike, only grow, and cover prompts and answers."""
    rows = list(AgentSessions("m", sessions=30, max_context=100_000, seed=3))
    assert rows == list(AgentSessions("m", sessions=30, max_context=100_000, seed=3))
    assert rows != list(AgentSessions("m", sessions=30, max_context=100_000, seed=4))
    assert sum(row.after is None for row in rows) == 30
    end = 0
    for number, row in enumerate(rows):
        work = row.request.work
        assert isinstance(work, Agent)
        assert row.after is None or row.after.request_id == number - 1
        (ids,) = work.contexts
        shared = SYSTEM_TOKENS // BLOCK_TOKENS
        assert ids[:shared] == rows[0].request.work.contexts[0][:shared]  # type: ignore[union-attr]
        end = SYSTEM_TOKENS if row.after is None else end
        for step, length in zip(work.steps, row.answer.lengths, strict=True):
            if isinstance(step, Call):
                assert step.prompt_tokens > end and step.max_tokens == length
                end = step.prompt_tokens + length
        assert len(ids) == end // BLOCK_TOKENS
    tools = [length for row in rows for length in lengths_of(row, Tool)]
    assert to_ns(6.0) < sorted(tools)[len(tools) // 2] < to_ns(13.0)  # the trace's median is 9 s
    with pytest.raises(ValueError, match="max_context is 5"):
        AgentSessions("m", max_context=5)


def lengths_of(row: WorkArrival, kind: type) -> list[int]:
    assert isinstance(row.request.work, Agent)
    pairs = zip(row.request.work.steps, row.answer.lengths, strict=True)
    return [length for step, length in pairs if isinstance(step, kind)]


def test_fine_tuning_jobs_are_given_one_by_one() -> None:
    """In order of time, with calls that evaluate; a misspelt one is an error."""
    jobs = [{"at_s": 5.0, "tokens": 9}, {"at_s": 1.0, "tokens": 70_000, "evaluations": 2, "trainable": 0.01}]
    late, early = TuningJobs("m", jobs), list(TuningJobs("m", jobs))
    assert [row.at_ns for row in late] == [to_ns(1.0), to_ns(5.0)]
    work = early[0].request.work
    assert isinstance(work, FineTuning)
    assert (work.num_steps, len(work.evaluation), early[0].answer.lengths) == (2, 2, (200, 200))
    with pytest.raises(ValueError, match=r"fine-tuning jobs: .*tokens"):
        list(TuningJobs("m", [{"at_s": 1.0}]))


SESSION = {
    "id": "s",
    "block_size": 64,
    "requests": [
        {"type": "n", "in": 130, "out": 20, "hash_ids": [1, 2], "input_types": ["text"]},
        {"type": "n", "in": 200, "out": 5, "hash_ids": [1, 2, 3], "input_types": ["tool_result"], "think_time": 2.5},
        {
            "type": "subagent",
            "requests": [{"type": "n", "in": 64, "out": 7, "hash_ids": [9], "input_types": ["tool_result"]}],
        },
        {"type": "n", "in": 0, "out": 0, "hash_ids": [], "input_types": ["text"]},
        {"type": "s", "in": 260, "out": 6, "hash_ids": [1, 2, 3, 4], "input_types": ["text"], "think_time": 60.0},
    ],
}


def test_a_session_of_claude_code(tmp_path: Path) -> None:
    """Tools last from a call to the next, users think between turns, a subagent's calls have a context of their own."""
    (tmp_path / "s.json").write_text(json.dumps(SESSION))
    first, second = ClaudeCodeTrace(tmp_path / "s.json", "m", min_output=1)
    assert isinstance(first, WorkArrival) and isinstance(second, WorkArrival)
    work, later = first.request.work, second.request.work
    assert isinstance(work, Agent) and isinstance(later, Agent)
    assert first.answer.lengths == (20, to_ns(2.5), 5, 0, 7)
    assert [type(step) for step in work.steps] == [Call, Tool, Call, Tool, Call]
    assert [step.context for step in work.steps if isinstance(step, Call)] == [0, 0, 1]
    assert [len(context) for context in work.contexts] == [12, 4]
    assert second.after == Trigger("ended", first.request.request_id, delay_ns=to_ns(60.0))
    assert later.contexts[0][:12] == work.contexts[0]
    assert first.at_ns > 0


def test_the_real_sessions(trace_file: Callable[[str], Path]) -> None:
    """The public file reads; its contexts are reused as published, 95 % of blocks and more."""
    path = trace_file("claude-code-weka/traces_first60.tar.xz")
    stats = stats_of(ClaudeCodeTrace(path, "m", sessions=12, max_context=1_000_000))
    assert stats.reuse_blocks is not None and 0.9 < stats.reuse_blocks < 0.99
    with pytest.raises(TraceError, match="is no archive"):
        list(ClaudeCodeTrace(__file__, "m"))
