"""Lower tiers in measured outcomes: what comes back is found again, in the time that the links give."""

import pytest
from msgspec.structs import replace

from cluster.actions import Action, ReleaseKvContext
from cluster.events import Event
from cluster.request import Arrival
from cluster.vocabulary import NS_PER_S
from flowserve.core.config import EngineConfig
from flowserve.core.tiers import TierConfig
from sim.cluster import SimCluster
from sim.latency import Constant
from sim.topology import Wire
from tests.builders import TIERS, Run, chain, make_arrival, run_sim, tier_wires

DOCUMENTS, ROUNDS = 6, 3
DOC_BLOCKS = 16
PROMPT = DOC_BLOCKS * 16 + 10


def documents() -> list[Arrival]:
    """Questions about six documents of 256 tokens, one after the other, three times round."""
    arrivals = []
    for number in range(DOCUMENTS * ROUNDS):
        ids = chain(1 + number % DOCUMENTS, *[0] * (DOC_BLOCKS - 1))
        arrivals.append(make_arrival(number, at_s=number * 1.0, prompt=PROMPT, output=4, ids=ids))
    return arrivals


def serve(tiers: TierConfig, links: tuple[Wire, Wire] = TIERS, kv_blocks: int = 40, **more: object) -> Run:
    """HBM for two documents; computing a token takes a millisecond."""
    engine = EngineConfig(kv_blocks, token_budget=512, max_sequences=8, tiers=tiers)
    return run_sim(
        documents(),
        engine=engine,
        latency=lambda: Constant(0.001, 0.001),
        tiers=links,
        **more,  # type: ignore[arg-type]
    )


def ttft(run: Run, number: int) -> float:
    row = run.rows[number]
    return (row["first_token_ns"] - row["arrival_ns"]) / NS_PER_S


def cached(run: Run, name: str) -> list[int]:
    """A column of the last round."""
    return [run.rows[number][name] for number in range(DOCUMENTS * (ROUNDS - 1), DOCUMENTS * ROUNDS)]


def test_ttft_falls_with_a_dram_tier() -> None:
    """HBM alone has forgotten each document when it is asked about again; with DRAM only the question is computed."""
    without, tiered = serve(TierConfig()), serve(TierConfig(dram_blocks=200, swap_low=0.5, swap_high=0.6))
    assert cached(without, "cached_tokens") == [0] * DOCUMENTS
    assert cached(tiered, "cached_tokens") == [DOC_BLOCKS * 16] * DOCUMENTS
    assert sum(cached(tiered, "dram_tokens")) > 4 * DOC_BLOCKS * 16
    assert cached(tiered, "ssd_tokens") == [0] * DOCUMENTS
    last = range(DOCUMENTS * (ROUNDS - 1), DOCUMENTS * ROUNDS)
    assert all(ttft(without, number) == pytest.approx(0.267) for number in last)
    assert all(ttft(tiered, number) < 0.02 for number in last)


def test_the_disk_takes_what_dram_cannot_hold() -> None:
    """With DRAM for one document the rest comes from SSD, more slowly, and still faster than computing."""
    dram = serve(TierConfig(dram_blocks=200, swap_low=0.5, swap_high=0.6))
    tiers = TierConfig(dram_blocks=20, ssd_blocks=200, swap_low=0.5, swap_high=0.6)
    disk = serve(tiers, tier_wires(1e9, 1e7, 0.001))
    assert cached(disk, "cached_tokens") == [DOC_BLOCKS * 16] * DOCUMENTS
    assert sum(cached(disk, "ssd_tokens")) > sum(cached(disk, "dram_tokens"))
    last = range(DOCUMENTS * (ROUNDS - 1), DOCUMENTS * ROUNDS)
    assert sum(ttft(dram, n) for n in last) < sum(ttft(disk, n) for n in last) < DOCUMENTS * 0.1


def test_moves_take_as_long_as_the_link_says() -> None:
    """TTFT of a fetched prompt: latency, overhead per segment, bytes; then a step for what is left."""
    one = serve(TierConfig(dram_blocks=200, swap_low=1.0, swap_high=1.0, fetch="always"), tier_wires(1e7, 1e8, 0.01))
    for number in range(DOCUMENTS, 2 * DOCUMENTS):
        copied = 0.01 + DOC_BLOCKS * 16 * 1000 / 1e7
        assert ttft(one, number) == pytest.approx(copied + 0.001 + 0.010)
    calls = Wire(1e7, 0.01, 0.002), Wire(1e8)
    tiers = TierConfig(dram_blocks=200, swap_low=1.0, swap_high=1.0, fetch="always")
    assert ttft(serve(tiers, calls), DOCUMENTS) == pytest.approx(ttft(one, DOCUMENTS) + 0.002)


@pytest.mark.parametrize(("fetch", "fetches"), [("cost", False), ("always", True), ("never", False)])
def test_a_slow_link_is_used_only_by_those_who_insist(fetch: str, fetches: bool) -> None:
    """At a tenth of a megabyte per second a document is computed sooner than fetched, and the cost model knows."""
    tiers = TierConfig(dram_blocks=200, swap_low=0.5, swap_high=0.6, fetch=fetch)  # type: ignore[arg-type]
    run = serve(tiers, tier_wires(1e5, 1e5))
    assert any(cached(run, "dram_tokens")) == fetches
    assert (ttft(run, DOCUMENTS * ROUNDS - 1) > 1) == fetches


def test_a_fetch_delays_no_step_of_others() -> None:
    """A request that decodes has the same gaps between its tokens whether another waits for a slow copy or not."""
    gaps = []
    for slow in (False, True):
        tiers = TierConfig(dram_blocks=100, swap_low=1.0, swap_high=1.0, fetch="always")
        arrivals = [make_arrival(0, prompt=PROMPT, output=1, ids=chain(1, *[0] * (DOC_BLOCKS - 1)))]
        arrivals.append(make_arrival(1, 5.0, prompt=10, output=400))
        if slow:
            arrivals.append(make_arrival(2, 5.1, prompt=PROMPT, output=1, ids=chain(1, *[0] * (DOC_BLOCKS - 1))))
        run = run_sim(
            arrivals,
            engine=EngineConfig(100, token_budget=512, max_sequences=8, tiers=tiers),
            latency=lambda: Constant(0.01),
            tiers=tier_wires(1e5, 1e5),
        )
        rows = run.rows
        assert all(row["outcome"] == "finished" for row in rows.values())
        gaps.append(list(run.recorder.gaps))
        if slow:
            assert rows[2]["dram_tokens"] == DOC_BLOCKS * 16
            assert rows[1]["first_token_ns"] < rows[2]["first_token_ns"] < rows[1]["last_token_ns"]
    assert gaps[0] == gaps[1]


def test_swapping_a_preempted_sequence_saves_computing() -> None:
    """Where the cache is too small for two long answers, the run with swapping ends sooner than with recomputing."""
    ends = {}
    for preemption in ("recompute", "swap"):
        engine = EngineConfig(
            24,
            token_budget=512,
            max_sequences=8,
            tiers=TierConfig(dram_blocks=64, swap_low=0.0, swap_high=0.0),
            preemption=preemption,  # type: ignore[arg-type]
        )
        arrivals = [make_arrival(number, prompt=150, output=160) for number in range(2)]
        run = run_sim(arrivals, engine=engine, latency=lambda: Constant(0.001, 0.01))
        assert sum(row["preemptions"] for row in run.rows.values()) > 0
        ends[preemption] = max(row["last_token_ns"] for row in run.rows.values())
    assert ends["swap"] < 0.8 * ends["recompute"]


def test_an_id_is_released_wherever_it_may_be() -> None:
    """A context with an ID survives what evicts everything else; after its last request all executors let go of it."""
    context = chain(9, *[0] * (DOC_BLOCKS - 1))
    last_id = DOCUMENTS * ROUNDS + 1
    between = [make_arrival(n, 5.0 + n, PROMPT, 4, ids=chain(n % 7 + 1, *[0] * 15)) for n in range(1, last_id)]
    first, last = (make_arrival(n, 100.0 * (n > 0), PROMPT, 4, ids=context) for n in (0, last_id))
    with_id = [
        replace(first, request=replace(first.request, context_id="doc")),
        *between,
        replace(last, request=replace(last.request, context_id="doc", release_context=True)),
    ]
    released: list[str] = []

    def watch(event: Event, actions: list[Action], cluster: SimCluster) -> None:
        released.extend(action.executor for action in actions if isinstance(action, ReleaseKvContext))

    engine = EngineConfig(40, token_budget=512, max_sequences=8)
    for known in (True, False):
        run = run_sim(with_id if known else [first, *between, last], engine=engine, watch=watch)
        assert run.rows[last_id]["cached_tokens"] == (DOC_BLOCKS * 16 if known else 0)
        assert all(each.shell.core.rtc.available == 40 for each in run.executors.values())
    assert released == ["te-0"]
