"""timeline.json against the Trace Event Format: slices that nest, arrows that touch slices, limits that are kept."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from cluster.recorder import Recorder
from cluster.vocabulary import Stage, TaskKind, to_ns
from cluster.work import FIRST_CALL
from experiments import timeline
from experiments.task_log import TaskLog
from experiments.timeline import Spans, write_timeline
from flowserve.core.config import EngineConfig
from flowserve.core.messages import KvFetched, KvOffered
from flowserve.core.record import TransferSpan, TurnRecord, transfers
from flowserve.core.tiers import TierConfig
from policies.scaling.target_utilisation import TargetUtilisation
from sim.node import Failure
from sim.topology import Wire
from tests.builders import Run, disaggregated, make_agent, make_arrival, make_tuning, run_sim, workers
from tests.experiments.test_outputs import recorded

Event = dict[str, Any]


def drawn(path: Path, workload: list[Any], most: int = 1000, **arguments: Any) -> tuple[Run, list[Event], Event]:
    """A simulated run, the events of its timeline, and what that says of itself."""
    tasks = TaskLog(most)
    run = run_sim(workload, watch=lambda event, actions, _: tasks.record(event, actions), record=True, **arguments)
    write_timeline(path, run.recorder, Spans(tasks, run.cluster.steps, run.cluster.transfers))
    content = json.loads(path.read_text())
    return run, content["traceEvents"], content["otherData"]


def slices(events: list[Event]) -> dict[tuple[int, int], list[Event]]:
    """The slices of each thread, in order of their begin, the outer one first."""
    found: dict[tuple[int, int], list[Event]] = {}
    for event in events:
        if event["ph"] == "X":
            found.setdefault((event["pid"], event["tid"]), []).append(event)
    return {thread: sorted(each, key=lambda event: (event["ts"], -event["dur"])) for thread, each in found.items()}


def names(events: list[Event]) -> dict[int, str]:
    return {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}


def check_format(events: list[Event]) -> None:
    """What viewers rely on. Slices of a thread are apart or one within the other; arrows begin once, end once, go on in
    time, and touch a slice each time; processes have names.
    """
    assert {event["ph"] for event in events} <= {"M", "X", "i", "C", "s", "t", "f"}
    assert {event["pid"] for event in events} == set(names(events))
    assert all(event["ts"] >= 0 for event in events if event["ph"] != "M")
    threads = slices(events)
    for each in threads.values():
        open_ends: list[float] = []
        for event in each:
            end = event["ts"] + event["dur"]
            while open_ends and open_ends[-1] <= event["ts"] + 1e-4:
                open_ends.pop()
            assert not open_ends or end <= open_ends[-1] + 1e-4, event
            open_ends.append(end)
    flows: dict[int, list[Event]] = {}
    for event in events:
        if event["ph"] in "stf":
            flows.setdefault(event["id"], []).append(event)
            around = threads[event["pid"], event["tid"]]
            assert any(each["ts"] <= event["ts"] < each["ts"] + each["dur"] for each in around), event
    for flow in flows.values():
        assert [event["ph"] for event in flow] == ["s", *"t" * (len(flow) - 2), "f"]
        assert all(first["ts"] <= second["ts"] for first, second in pairwise(flow))
        assert all(event["bp"] == "e" for event in flow[1:])
        assert len({(event["cat"], event["name"]) for event in flow}) == 1


def test_arrows_lead_from_arrival_over_prefill_and_transfer_to_decode(tmp_path: Path) -> None:
    """A request of two executors has four stops: where it arrives, its prefill, the link, its decode."""
    workload = [make_arrival(number, at_s=0.01 * number, prompt=100 + number) for number in range(20)]
    run, events, other = drawn(tmp_path / "t.json", workload, groups=disaggregated(2, 1), wire=Wire(1e6, 0.001))
    check_format(events)
    assert other["requests"] == "20 of 20, the first to arrive"
    processes, threads = names(events), slices(events)
    assert list(processes.values()) == ["requests", "te-0", "te-1", "te-2", "links"]
    for number in range(20):
        flow = [event for event in events if event["ph"] in "stf" and event["id"] == number + 1]
        stops = [
            [
                each["name"]
                for each in threads[event["pid"], event["tid"]]
                if each["ts"] <= event["ts"] < each["ts"] + each["dur"]
            ]
            for event in flow
        ]
        sender = processes[flow[1]["pid"]]
        assert stops == [
            [f"r{number} arrives"],
            [f"r{number} prefill", "prefill"],
            [f"r{number} {sender} → te-2"],
            [f"r{number} decode", "decode"],
        ]
    sent = [event for event in events if event.get("cat") == "transfer"]
    assert sum(event["args"]["bytes"] for event in sent) == sum(span.num_bytes for span in run.cluster.transfers) > 0


def test_every_run_keeps_to_the_format(tmp_path: Path) -> None:
    """Failures, retries, cancellations, requests refused or not yet over, scaling, and tiers below HBM."""
    workload = [
        make_arrival(
            number, at_s=0.02 * number, prompt=60 + 7 * number, output=30, cancel_after_s=0.3 if number % 5 else 0.1
        )
        for number in range(40)
    ]
    workload.append(make_arrival(40, at_s=0.9, prompt=100_000))
    _, events, _ = drawn(
        tmp_path / "t.json",
        workload,
        groups=disaggregated(2, 2, 1),
        failures=[Failure(0.25, "te-0"), Failure(0.4, "te-2")],
        scaling=TargetUtilisation(target=0.5, period_s=0.1, down_delay_s=0.2),
        stages=[(Stage.TE_LOAD, 50_000_000)],
        engine=EngineConfig(kv_blocks=60, max_sequences=4, tiers=TierConfig(dram_blocks=40)),
        report_period_s=0.05,
    )
    check_format(events)
    shown = {event["args"].get("failed") for event in events if event.get("cat") == "task"}
    assert {None, "aborted", "executor lost"} <= shown
    assert any("HBM → " in event["name"] for event in events if event.get("cat") == "transfer")
    (refused,) = (event["args"] for event in events if event["name"] == "r40 arrives")
    assert refused["outcome"] == "failed" and refused["reason"]
    assert {event["name"] for event in events if event["ph"] == "i"} >= {"failed"}


def test_jobs_are_in_it_too(tmp_path: Path) -> None:
    """A tool lies on its worker, an agent's calls are requests, and an arrow leads from preprocessing to training."""
    workload: list[Any] = [make_agent(0, [(10, 5)], [0.5]), make_tuning(1, steps=2), make_agent(2, [0.2])]
    groups = [*disaggregated(0, 0, 1), *workers(1, 1)]
    _, events, _ = drawn(tmp_path / "t.json", workload, groups=groups, failures=[Failure(0.6, "te-2")])
    check_format(events)
    tasks = [event for event in events if event.get("cat") == "task"]
    assert [event["name"] for event in tasks if event["pid"] == 3] == ["r1 preprocess", "r2 tool", "r0 tool"]
    assert f"r{FIRST_CALL} serve" in {event["name"] for event in tasks}
    trains = [event for event in tasks if event["name"] == "r1 train"]
    assert [event["args"].get("failed") for event in trains] == ["executor lost", None]
    flows = [event for event in events if event["ph"] in "stf"]
    assert {event["pid"] for event in flows if event["ph"] == "f"} >= {trains[-1]["pid"]}


def test_a_task_is_a_slice_with_its_phases(tmp_path: Path) -> None:
    """Colocated: prefill to the first token, decode to the last; tasks that overlap lie on threads apart."""
    workload = [make_arrival(0, prompt=10, output=5), make_arrival(1, at_s=0.01, prompt=10, output=5)]
    _, events, _ = drawn(tmp_path / "t.json", workload)
    check_format(events)
    first, second = (each for (_, tid), each in slices(events).items() if tid >= 10 and each[0]["cat"] == "task")
    assert [(event["name"], event["ts"], event["dur"]) for event in first] == [
        ("r0 serve", 0.0, 50_000.0),
        ("prefill", 0.0, 10_000.0),
        ("decode", 10_000.0, 40_000.0),
    ]
    assert [event["name"] for event in second] == ["r1 serve", "prefill", "decode"]


def test_a_long_run_is_cut_by_the_rule_it_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first requests with their tasks and transfers, the first steps, and every n-th report of each executor."""
    monkeypatch.setattr(timeline, "TIMELINE_STEPS", 3)
    monkeypatch.setattr(timeline, "TIMELINE_COUNTERS", 20)
    workload = [make_arrival(number, at_s=0.05 * number) for number in range(50)]
    _, events, other = drawn(tmp_path / "t.json", workload, most=4, groups=disaggregated(1, 1), report_period_s=0.02)
    check_format(events)
    assert other["requests"] == "4 of 50, the first to arrive"
    assert other["steps"] == "the first 3, where backend.record is true"
    assert sum(event["name"] == "waiting" for event in events) <= 22
    kinds = [event["cat"] for event in events if event["ph"] == "X"]
    counts = {kind: kinds.count(kind) for kind in ("request", "task", "transfer", "step")}
    assert counts == {"request": 4, "task": 8, "transfer": 4, "step": 3}


def test_life_and_load_of_executors(tmp_path: Path) -> None:
    """Spans from launch to ready with the stages in them, then serving; ends as instants; reports as counters."""
    write_timeline(tmp_path / "t.json", recorded(), Spans(TaskLog(0)))
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    check_format(events)
    lives = [(event["name"], event["pid"], event["ts"], event["dur"]) for event in events if event["ph"] == "X"]
    assert lives == [
        ("launching", 3, 0, 500_000),
        ("launching", 2, 0, 250_000),
        ("te_load", 2, 50_000, 200_000),
        ("serving", 2, 250_000, 4_250_000),
        ("te_load", 3, 300_000, 200_000),
        ("serving", 3, 500_000, 4_000_000),
    ]
    (failed,) = (event for event in events if event["ph"] == "i")
    assert (failed["name"], failed["pid"], failed["ts"]) == ("failed", 3, 4_500_000)
    waiting = [event["args"]["requests"] for event in events if event["ph"] == "C" and event["name"] == "waiting"]
    assert waiting == [0, 1, 2, 3]


def test_nothing_recorded_is_a_timeline_too(tmp_path: Path) -> None:
    """An empty run gives a valid file."""
    write_timeline(tmp_path / "t.json", Recorder(), Spans(TaskLog(0)))
    check_format(json.loads((tmp_path / "t.json").read_text())["traceEvents"])


def test_the_task_log_forgets_nobody_it_has_begun(tmp_path: Path) -> None:
    """Later tasks of the first requests are kept, whatever comes between; of later requests none are."""
    tasks = TaskLog(1)
    run_sim(
        [make_arrival(number, output=20) for number in range(5)],
        executors=2,
        failures=[Failure(0.05, "te-1")],
        watch=lambda event, actions, _: tasks.record(event, actions),
    )
    assert list(tasks.requests) == [0]
    assert [(task.request_id, task.kind, task.failed) for task in tasks.tasks] == [
        (0, TaskKind.SERVE, "executor lost"),
        (0, TaskKind.SERVE, ""),
    ]
    lost, again = tasks.tasks
    assert lost.end_ns == again.start_ns == to_ns(0.05)
    assert lost.executor != again.executor


def test_transfers_of_a_real_engine_come_from_its_turns() -> None:
    """From the turn that asked for the KV cache to the one that heard it is there; the offer says whose it was."""
    turns = [
        TurnRecord(0, 5, [KvOffered(3, 9, "te-0", [1, 2])], [], None, [], 0, [(9, [1, 2], [4, 5])], []),
        TurnRecord(8, 8, [KvFetched(9, True)], [], None, [], 0, [], []),
    ]
    assert list(transfers("te-1", turns)) == [TransferSpan("te-0", "te-1", 5, 8, 2, 0, 0, 9)]
