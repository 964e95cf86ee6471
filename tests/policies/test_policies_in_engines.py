"""Policies inside the engine: what whole runs, simulated and real, show of each."""

import json
from math import inf
from statistics import mean
from typing import Any

import pytest
from msgspec.structs import replace

from cluster.engine_policy import PolicySpec, QueueOrder
from cluster.events import FirstToken, TaskFinished
from cluster.request import Arrival
from cluster.vocabulary import Outcome
from flowserve.core.config import EngineConfig
from flowserve.core.scheduler import EngineCore
from sim.latency import Constant
from sim.node import Failure
from tests.builders import Run, chain, disaggregated, make_arrival, run_sim
from tests.contract.backends import BACKENDS, Driver


def spec(path: str, **arguments: Any) -> PolicySpec:
    return PolicySpec(f"policies.engine.{path}", arguments)


def serve(workload: list[Arrival], **limits: Any) -> Run:
    """One executor whose prompt tokens cost 1 ms each."""
    run = run_sim(workload, engine=EngineConfig(**{"kv_blocks": 1000, **limits}), latency=lambda: Constant(0.01, 0.001))
    assert set(run.recorder.outcomes) == {Outcome.FINISHED}
    return run


def column(run: Run, name: str, requests: range | None = None) -> list[Any]:
    """Values in order of request ids."""
    return [row[name] for number, row in sorted(run.rows.items()) if requests is None or number in requests]


def ttft(run: Run, requests: range | None = None) -> list[float]:
    """Times to first token in seconds, in order of request ids."""
    times = zip(column(run, "first_token_ns", requests), column(run, "arrival_ns", requests), strict=True)
    return [(first - arrival) / 1e9 for first, arrival in times]


# -- queue order ----------------------------------------------------------------------------------------------------


def test_shortest_prompt_lowers_the_mean_time_to_first_token() -> None:
    """At the cost of the long prompt, which an order that ages lets in earlier."""
    workload = [make_arrival(0, prompt=1000, output=2), make_arrival(1, prompt=2000, output=2)]
    workload += [make_arrival(n, at_s=0.1 * n, prompt=100, output=2) for n in range(2, 40)]
    fcfs, shortest, aged = (
        serve(workload, max_sequences=1, order=order)
        for order in (
            spec("order.fcfs.Fcfs"),
            spec("order.shortest_prompt.ShortestPrompt"),
            spec("order.shortest_prompt.ShortestPrompt", tokens_per_arrival=100.0),
        )
    )
    long = range(1, 2)
    assert mean(ttft(shortest)) < 0.8 * mean(ttft(fcfs))
    assert ttft(fcfs, long)[0] < ttft(aged, long)[0] < ttft(shortest, long)[0]
    assert ttft(serve(workload, max_sequences=1)) == ttft(fcfs)  # the default


def test_important_requests_go_first() -> None:
    """Under overload, requests of higher priority wait less, at the cost of the others; nothing else changes."""
    workload = [make_arrival(n, at_s=0.05 * n, prompt=100, output=2, priority=int(n % 4 == 3)) for n in range(60)]
    fcfs, priority = (
        serve(workload, max_sequences=1, order=order) for order in (None, spec("order.priority.Priority"))
    )
    important = [n for n in range(8, 60) if n % 4 == 3]
    waited = [mean(ttft(run)[n] for n in important) for run in (fcfs, priority)]
    assert waited[1] < 0.3 * waited[0]
    assert mean(ttft(priority)) == pytest.approx(mean(ttft(fcfs)), rel=0.02)


def met(run: Run, due_s: dict[int, float]) -> int:
    ends = {n: row["last_token_ns"] - row["arrival_ns"] for n, row in run.rows.items()}
    return sum(ends[n] <= seconds * 1e9 for n, seconds in due_s.items())


def test_earliest_deadline_first_meets_more_deadlines() -> None:
    """Urgent requests among patient ones: in order of arrival many come too late, by deadline none does."""
    due_s = {n: 0.7 if n % 5 == 4 else 30.0 for n in range(50)}
    workload = [make_arrival(n, at_s=0.09 * n, prompt=100, output=2, deadline_s=due_s[n]) for n in range(50)]
    fcfs, edf = (
        serve(workload, max_sequences=1, order=order)
        for order in (None, spec("order.earliest_deadline.EarliestDeadline"))
    )
    assert met(edf, due_s) == 50
    assert met(fcfs, due_s) <= 45


def test_a_deadline_counts_from_the_arrival_of_the_request() -> None:
    """Waiting at a job executor counts, and so does a failed attempt: the task of a retry is due when the first was."""
    run = run_sim([make_arrival(0, at_s=1.0, deadline_s=2.5, output=90)], executors=2, failures=[Failure(1.2, "te-1")])
    tasks = [json.loads(line)["actions"] for line in run.log.splitlines()[1:]]
    due = [action["task"]["deadline_ns"] for actions in tasks for action in actions if action["type"] == "DispatchTask"]
    assert due == [3_500_000_000] * 2


def stream_of(tenant: str, count: int, start_s: float, every_s: float) -> list[Arrival]:
    return [make_arrival(n, at_s=start_s + every_s * n, prompt=50, output=20, tenant=tenant) for n in range(count)]


def merged(*streams: list[Arrival]) -> list[Arrival]:
    """All arrivals in order of time, numbered anew."""
    arrivals = sorted((arrival for stream in streams for arrival in stream), key=lambda arrival: arrival.at_ns)
    return [
        replace(arrival, request=replace(arrival.request, request_id=number)) for number, arrival in enumerate(arrivals)
    ]


def started(run: Run, workload: list[Arrival], tenant: str, from_s: float = 0.0, to_s: float = inf) -> int:
    """How many requests of a tenant had their first token in a span of time."""
    own = [arrival.request.request_id for arrival in workload if arrival.request.tenant == tenant]
    return sum(from_s * 1e9 < run.rows[number]["first_token_ns"] <= to_s * 1e9 for number in own)


def test_a_heavy_tenant_does_not_starve_a_light_one() -> None:
    """One tenant sends ten times as much as another: by virtual token counters the light one hardly waits."""
    workload = merged(stream_of("heavy", 200, 0.0, 0.005), stream_of("light", 20, 0.5, 0.05))
    fcfs, fair = (serve(workload, max_sequences=4, order=order) for order in (None, spec("order.fair.Fair")))
    assert started(fair, workload, "light", to_s=4.0) > 3 * started(fcfs, workload, "light", to_s=4.0)
    assert started(fair, workload, "heavy", to_s=4.0) >= 10
    assert column(fair, "output_tokens") == column(fcfs, "output_tokens")


def test_fair_order_is_the_same_in_coalesced_steps() -> None:
    """The head of the queue moves as others are served; steps taken at once do not pass over that."""
    workload = [
        make_arrival(n, at_s=0.02 * n, prompt=30 + 7 * n % 90, output=10 + 13 * n % 60, limit=200, tenant="abc"[n % 3])
        for n in range(60)
    ]
    logs = [
        run_sim(
            workload,
            engine=EngineConfig(40, max_sequences=6, watermark=0.0, order=spec("order.fair.Fair")),
            coalesce=coalesce,
        ).log
        for coalesce in (True, False)
    ]
    assert logs[0] == logs[1]


def test_idle_time_earns_no_credit() -> None:
    """A tenant that comes after the other was served for long shares from then on; it is not served alone first."""
    workload = merged(stream_of("a", 120, 0.0, 0.01), stream_of("b", 60, 2.0, 0.01))
    run = serve(workload, max_sequences=4, order=spec("order.fair.Fair"))
    assert started(run, workload, "b", 2.5, 5.0) >= 10
    assert abs(started(run, workload, "a", 2.5, 5.0) - started(run, workload, "b", 2.5, 5.0)) <= 2


# -- preemption victim ----------------------------------------------------------------------------------------------


def test_the_smallest_victim_costs_least() -> None:
    """Preempting the shortest context recomputes fewer tokens than preempting the newest one, which here is long."""
    workload = [make_arrival(0, prompt=16, output=150), make_arrival(1, at_s=0.1, prompt=400, output=60)]
    limits: dict[str, Any] = {"kv_blocks": 31, "watermark": 0.0, "prefix_cache": False}
    newest, fewest = (
        serve(workload, victim=victim, **limits)
        for victim in (spec("victim.newest.Newest"), spec("victim.fewest_computed.FewestComputed"))
    )
    assert column(newest, "preemptions") == [0, 1]
    assert column(fewest, "preemptions") == [1, 0]
    assert fewest.recorder.end_ns < newest.recorder.end_ns - 0.2e9


def test_the_least_important_is_preempted() -> None:
    """With a victim policy the important request keeps its blocks though it is the newest."""
    workload = [make_arrival(0, prompt=100, output=150), make_arrival(1, at_s=0.2, prompt=100, output=150, priority=1)]
    limits: dict[str, Any] = {"kv_blocks": 20, "watermark": 0.0}
    newest = serve(workload, **limits)
    lowest = serve(workload, victim=spec("victim.lowest_priority.LowestPriority"), **limits)
    assert column(newest, "preemptions")[0] == 0 < column(newest, "preemptions")[1]
    assert column(lowest, "preemptions")[1] == 0 < column(lowest, "preemptions")[0]
    assert lowest.rows[1]["last_token_ns"] < newest.rows[1]["last_token_ns"]


# -- cache eviction -------------------------------------------------------------------------------------------------


def test_segmented_lru_keeps_what_is_shared_through_a_scan() -> None:
    """A system prompt used again and again survives a burst of prompts seen once, which push it out of plain LRU."""
    workload = []
    for number in range(40):
        own = tuple(range(1000 * number + 1000, 1000 * number + 1004))
        ids = own if number % 10 >= 2 else (*chain(1, 1, 1, 1), *own)
        workload.append(make_arrival(number, at_s=float(number), prompt=16 * len(ids) + 5, output=2, ids=ids))
    lru, segmented = (
        serve(workload, kv_blocks=24, eviction=spec(f"eviction.{name}"))
        for name in ("lru.Lru", "segmented_lru.SegmentedLru")
    )
    assert sum(column(segmented, "cached_tokens")) > 1.5 * sum(column(lru, "cached_tokens"))


# -- chunk size -----------------------------------------------------------------------------------------------------


def longest_gap(run: Run) -> float:
    return max(gap for event in run.of(TaskFinished) if event.request_id == 0 for gap in event.token_gaps_ns) / 1e9


def test_small_chunks_protect_what_decodes() -> None:
    """While a long prompt is computed, no gap between tokens exceeds what the chunk allows; the prompt waits longer."""
    workload = [make_arrival(0, prompt=20, output=200), make_arrival(1, at_s=0.5, prompt=2000, output=2)]
    protect = spec("chunking.protect_tpot.ProtectTpot", tpot_s=0.05, prompt_token_s=0.001, step_s=0.01)
    greedy, fixed, protected = (
        serve(workload, token_budget=512, chunking=chunking)
        for chunking in (spec("chunking.greedy.Greedy"), spec("chunking.fixed.Fixed", tokens=100), protect)
    )
    assert longest_gap(greedy) == pytest.approx(0.01 + 0.511)
    assert longest_gap(fixed) == pytest.approx(0.01 + 0.1)
    assert longest_gap(protected) == pytest.approx(0.05)
    second = range(1, 2)
    assert ttft(greedy, second)[0] < ttft(fixed, second)[0] < ttft(protected, second)[0]


def test_prompts_have_the_step_to_themselves_where_nothing_decodes() -> None:
    """A chunk size is a matter between prompts and decodes: a lone prompt takes the budget, and always something."""
    workload = [make_arrival(0, prompt=1000, output=1)]
    alone = [
        serve(workload, chunking=spec("chunking.fixed.Fixed", tokens=1)),
        serve(workload, chunking=spec("chunking.protect_tpot.ProtectTpot", tpot_s=0.001, prompt_token_s=1.0)),
        serve(workload),
    ]
    assert len({run.recorder.end_ns for run in alone}) == 1


def test_prefill_executors_may_have_a_budget_of_their_own() -> None:
    """Nothing decodes there, so larger steps cost nobody's time per token: first tokens come sooner, at equal TPOT."""
    workload = [make_arrival(n, at_s=0.05 * n, prompt=400, output=10) for n in range(20)]
    shared, own = (
        run_sim(
            workload,
            groups=disaggregated(),
            engine=EngineConfig(1000, token_budget=64, max_sequences=32, prefill_token_budget=budget),
        )
        for budget in (None, 512)
    )
    assert mean(ttft(own)) < 0.5 * mean(ttft(shared))
    assert longest_gap(own) == pytest.approx(longest_gap(shared), rel=0.2)


# -- how an engine gets its policies --------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_policy_decides_on_both_backends(backend: str) -> None:
    """Named by import path, it reaches simulated engines and engine processes: short prompts overtake there alike."""
    engine = EngineConfig(500, max_sequences=1, order=spec("order.shortest_prompt.ShortestPrompt"))
    with BACKENDS[backend](engine=engine, step_s=0.01) as cluster:
        driver = Driver(cluster)
        driver.launch("te-0")
        for number, prompt in enumerate((60, 50, 40, 30)):
            driver.dispatch("te-0", driver.open(number, prompt=prompt, output=30), number)
            if number == 0:
                driver.wait(FirstToken)  # the first runs, the others queue up behind it
        for number in range(4):
            driver.wait(TaskFinished, task_id=number)
        assert [event.task_id for event in driver.of(TaskFinished)] == [0, 3, 2, 1]


@pytest.mark.parametrize(
    ("path", "arguments", "said"),
    [
        ("policies.engine.order.nothing.Nothing", {}, "cannot be imported"),
        ("Nothing", {}, "not a cluster.engine_policy.QueueOrder"),
        ("policies.engine.victim.newest.Newest", {}, "not a cluster.engine_policy.QueueOrder"),
        ("policies.engine.order.fcfs.Fcfs", {"speed": 3}, "speed"),
        ("policies.engine.order.shortest_prompt.ShortestPrompt", {"tokens_per_arrival": -1.0}, "is -1.0"),
    ],
)
def test_a_policy_that_cannot_be_made_is_named(path: str, arguments: dict[str, float], said: str) -> None:
    """No such class, another kind of class, or arguments that it refuses."""
    with pytest.raises(ValueError, match=said):
        PolicySpec(path, arguments).build(QueueOrder)
    with pytest.raises(ValueError, match=said):
        EngineCore(EngineConfig(10, order=PolicySpec(path, arguments)))
