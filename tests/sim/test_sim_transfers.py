"""KV cache on its way between simulated executors: what a transfer costs shows in the gap behind the first token."""

from collections.abc import Callable, Sequence

import pytest

from cluster import events as ev
from cluster.request import Arrival
from cluster.vocabulary import Outcome, to_ns
from flowserve.core.allocator import AllocatorKind
from flowserve.core.config import EngineConfig
from flowserve.core.transfer import contiguous_runs
from sim.latency import Constant
from sim.node import Delays
from sim.topology import Wire
from tests.builders import Run, disaggregated, make_arrival, run_sim

STEP_S = 0.01
BYTES_PER_TOKEN = 1000
LONG = 2
KINDS: tuple[AllocatorKind, ...] = ("segment", "stack")


def moved(run: Run) -> list[tuple[int, int, int, int]]:
    """All hand-overs: asked for at, bytes, calls, done at."""
    return [(span.start_ns, span.num_bytes, span.pieces, span.end_ns) for span in run.cluster.transfers]


def prefill_and_decode(
    workload: Sequence[Arrival],
    link: tuple[float, float, float],
    segments: int = 1,
    peer_s: float = 0.0,
    prefix_cache: bool = False,
    allocator: AllocatorKind = "stack",
    kv_blocks: int = 100,
) -> tuple[Run, list[tuple[int, int, int, int]]]:
    run = run_sim(
        workload,
        groups=disaggregated(),
        engine=EngineConfig(kv_blocks, 16, 512, 8, prefix_cache=prefix_cache, allocator=allocator),
        latency=lambda: Constant(STEP_S),
        wire=Wire(*link),
        kv_bytes_per_token=BYTES_PER_TOKEN,
        kv_segments=segments,
        delays=Delays(peer_s=peer_s),
    )
    assert {row["outcome"] for row in run.rows.values()} == {Outcome.FINISHED}
    return run, moved(run)


def handover(run: Run, request_id: int) -> int:
    """From the first token, on the prefill executor, to the second, on the decode executor."""
    first, second = (event for event in run.of(ev.TaskFinished) if event.request_id == request_id)
    return int(second.last_token_ns - sum(second.token_gaps_ns) - first.last_token_ns)


def alone() -> list[Arrival]:
    return [make_arrival(LONG, prompt=64, output=5)]


def fragmented() -> list[Arrival]:
    """Two short requests come first and leave their blocks in an order in which a stack cuts the long one in two."""
    return [make_arrival(number, prompt=32, output=2 + number) for number in range(2)] + [
        make_arrival(LONG, at_s=1.0, prompt=64, output=5)
    ]


@pytest.mark.parametrize("link", [(1e6, 0.0, 0.0), (1e6, 0.002, 0.003), (3e5, 0.0, 0.5)])
@pytest.mark.parametrize("segments", [1, 56])
def test_a_handover_takes_what_the_link_takes(link: tuple[float, float, float], segments: int) -> None:
    """Latency, one call per segment, and the bytes of the full blocks: to the ns, and the decode step behind them."""
    run, log = prefill_and_decode(alone(), link, segments)
    bytes_per_s, latency_s, call_s = link
    [(_, num_bytes, moved_segments, _)] = log
    assert (num_bytes, moved_segments) == (4 * 16 * BYTES_PER_TOKEN, segments)
    transfer = latency_s + segments * call_s + num_bytes / bytes_per_s
    assert handover(run, LONG) == to_ns(transfer) + to_ns(STEP_S)
    assert run.recorder.gaps[0] == handover(run, LONG)
    row = run.rows[LONG]
    assert row["first_token_ns"] - row["arrival_ns"] == to_ns(STEP_S)


def test_fragments_cost_a_call_each() -> None:
    """The same bytes in two runs of blocks instead of one take exactly one call longer."""
    call_s = 0.007
    one, log_one = prefill_and_decode(alone(), (1e6, 0.002, call_s))
    two, log_two = prefill_and_decode(fragmented(), (1e6, 0.002, call_s))
    assert (log_one[-1][1:3], log_two[-1][1:3]) == ((64_000, 1), (64_000, 2))
    assert handover(two, LONG) - handover(one, LONG) == to_ns(call_s)
    one, _ = prefill_and_decode(alone(), (1e6, 0.002, 0.0))
    two, _ = prefill_and_decode(fragmented(), (1e6, 0.002, 0.0))
    assert handover(two, LONG) == handover(one, LONG)


@pytest.mark.parametrize(("prefix_cache", "kv_blocks", "times"), [(False, 120, 5), (True, 600, 2)])
def test_segments_take_fewer_calls_than_a_stack(prefix_cache: bool, kv_blocks: int, times: int) -> None:
    """In engines that serve on and on, a request moves in a fraction of the calls, and waits less for its KV cache.

    With a prefix cache too, where the free blocks are those just evicted.
    """
    workload = [make_arrival(n, at_s=0.06 * n, prompt=33 + n * 37 % 200, output=3 + n * 11 % 60) for n in range(200)]
    calls, waits, call_s = {}, {}, 0.004
    for allocator in KINDS:
        run, log = prefill_and_decode(workload, (1e8, 0.0, call_s), 1, 0.0, prefix_cache, allocator, kv_blocks)
        calls[allocator] = sum(segments for _, _, segments, _ in log[100:]) / len(log[100:])
        waits[allocator] = sum(handover(run, n) for n in range(100, 200)) / 100
    assert calls["stack"] > times * calls["segment"]
    assert waits["stack"] - waits["segment"] > 2 * to_ns(call_s)


def test_layers_multiply_the_calls() -> None:
    """Where each layer keeps its own K and V, every run of blocks is as many pieces of memory."""
    for workload, runs in ((alone, 1), (fragmented, 2)):
        _, log = prefill_and_decode(workload(), (1e6, 0.0, 0.0), segments=64)
        assert log[-1][2] == runs * 64


def test_transfers_from_one_executor_share_the_way_out() -> None:
    """Two at once get half of the wire each, so that each uses the gaps between the calls of the other."""
    _, log = prefill_and_decode([make_arrival(n, prompt=32, output=3) for n in range(2)], (1e6, 0.004, 0.001))
    (first, *_, first_done), (second, *_, second_done) = log
    assert first == second
    assert first_done == second_done == first + to_ns(2 * 32 * BYTES_PER_TOKEN / 1e6 + 0.004)


def test_messages_between_executors_take_their_time() -> None:
    """Request and offer are on their way once each before the copy begins; the release costs nobody anything."""
    slow, _ = prefill_and_decode(alone(), (1e6, 0.0, 0.0), peer_s=0.003)
    fast, _ = prefill_and_decode(alone(), (1e6, 0.0, 0.0))
    assert handover(slow, LONG) - handover(fast, LONG) == 2 * to_ns(0.003)


def test_a_prefix_cached_at_the_receiver_is_not_moved() -> None:
    """The second turn of a session moves only the blocks that its decode executor does not have."""
    ids = (11, 22, 33, 44)
    first = make_arrival(0, prompt=64, output=3, ids=ids)
    second = make_arrival(1, at_s=1.0, prompt=80, output=3, ids=(*ids, 55))
    _, log = prefill_and_decode([first, second], (1e6, 0.0, 0.0), prefix_cache=True)
    assert [entry[1] // (16 * BYTES_PER_TOKEN) for entry in log] == [4, 1]


@pytest.mark.parametrize("workload", [alone, fragmented])
def test_the_simulated_runs_are_those_of_the_block_tables(workload: Callable[[], list[Arrival]]) -> None:
    """What the link is charged for is what both engines' block tables really are."""
    tables: dict[int, tuple[list[int], list[int]]] = {}

    def watch(event: ev.Event, actions: object, cluster: object) -> None:
        for executor in cluster.executors.values():  # type: ignore[attr-defined]
            for held in executor.shell.core.held.values():
                tables.setdefault(held.task.request.request_id, (list(held.blocks), []))
            for sequence in executor.shell.core.decoding():
                source, target = tables[sequence.task.request.request_id]
                target[:] = sequence.blocks[: len(source)]

    run = run_sim(
        workload(),
        groups=disaggregated(),
        engine=EngineConfig(100, 16, 512, 8, prefix_cache=False, allocator="stack"),
        wire=Wire(1e6),
        report_period_s=0.001,
        watch=watch,
    )
    assert moved(run)[-1][2] == len(contiguous_runs(*tables[LONG]))


def test_an_engine_that_copies_by_itself_computes_later() -> None:
    """Each fetch puts off what its request waits for, or the step that is scheduled already, and no other."""
    workload = [make_arrival(0, prompt=20, output=40), make_arrival(1, at_s=0.055, prompt=20, output=5)]
    gaps, first = {}, {}
    for kv_host_s in (0.0, 0.003):
        run = run_sim(
            workload, groups=disaggregated(), latency=lambda: Constant(STEP_S), kv_host_s=kv_host_s, coalesce=True
        )
        decoded = next(event for event in run.of(ev.TaskFinished) if event.request_id == 0 and event.tokens > 1)
        gaps[kv_host_s], first[kv_host_s] = decoded.token_gaps_ns, handover(run, 0)
    assert first[0.003] == to_ns(STEP_S + 0.003) > first[0.0] > to_ns(STEP_S)
    longer = [after - before for before, after in zip(gaps[0.0], gaps[0.003], strict=True)]
    assert longer.count(to_ns(0.003)) == 1  # for the other request
    assert longer.count(0) == len(longer) - 1
