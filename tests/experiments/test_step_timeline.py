"""Engine steps in timeline.json, on both backends: recorded on request, one after the other, adding up to the run."""

import json
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pandas as pd
import pytest

from cluster.latency import StepShape
from experiments.outputs import read_summary
from flowserve.core.record import PlanRecord, StepSpan, TurnRecord, spans
from tests.experiments.conftest import Said
from tests.experiments.small import NULL, SIM


def steps_of(said: Said) -> dict[int, list[dict[str, Any]]]:
    trace = json.loads((said.folder / "timeline.json").read_text())["traceEvents"]
    found: dict[int, list[dict[str, Any]]] = {}
    for event in trace:
        if event.get("cat") == "step":
            found.setdefault(event["pid"], []).append(event)
    return found


@pytest.mark.parametrize("options", [SIM, NULL], ids=["sim", "real"])
def test_steps_are_drawn_where_they_were_recorded(deepflow: Callable[..., Said], options: tuple[str, ...]) -> None:
    """No two steps of an engine overlap, and together they computed every prompt token and every other token."""
    said = deepflow("run", *options, "backend.record=true")
    assert said.code == 0, said
    steps = steps_of(said)
    metrics = read_summary(said.folder).metrics
    assert steps and metrics["cached_token_share"] == 0
    for each in steps.values():
        assert all(first["ts"] + first["dur"] <= second["ts"] + 1e-3 for first, second in pairwise(each))
    every = [event["args"] for each in steps.values() for event in each]
    prompts = sum(args["prefill_tokens"] for args in every)
    decodes = sum(args["decode_sequences"] * args["steps"] for args in every)
    plain = deepflow("run", *options)
    assert steps_of(plain) == {}
    table = pd.read_parquet(said.folder / "requests.parquet")
    assert prompts == table.prompt_tokens.sum()
    assert decodes >= (table.output_tokens - 1).sum()  # plans ahead of a stop compute a token more
    assert decodes <= (table.output_tokens - 1).sum() + len(table)


def test_simulated_steps_do_not_depend_on_coalescing(deepflow: Callable[..., Said]) -> None:
    """Spans of many decode steps are cut where single steps would tell the same."""
    fast = steps_of(deepflow("run", *SIM, "backend.record=true"))
    slow = steps_of(deepflow("run", *SIM, "backend.record=true", "backend.coalesce=false"))
    assert fast.keys() == slow.keys()
    for pid, spans_ in fast.items():
        assert sum(event["args"]["steps"] for event in spans_) == len(slow[pid]) > len(spans_)
        assert spans_[-1]["ts"] + spans_[-1]["dur"] == pytest.approx(slow[pid][-1]["ts"] + slow[pid][-1]["dur"])


def test_spans_of_turns_in_flight_together() -> None:
    """A plan launched while another computes begins when that one ends."""
    shapes = [StepShape(number, 0, 1, 0, 0) for number in range(2)]
    plans = [PlanRecord(number + 1, [], [], shape) for number, shape in enumerate(shapes)]
    turns = [
        TurnRecord(0, 100, [], plans, 1, [], 0, [], []),
        TurnRecord(110, 180, [], [], 2, [], 0, [], []),
        TurnRecord(500, 500, [], [], None, [], 0, [], []),
    ]
    assert list(spans("te-0", turns)) == [
        StepSpan("te-0", 0, 100, 1, shapes[0]),
        StepSpan("te-0", 100, 180, 1, shapes[1]),
    ]
