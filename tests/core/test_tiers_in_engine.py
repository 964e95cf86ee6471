"""What an engine does with lower tiers: fetches beside the steps of others, swaps, keeps what has an ID."""

from typing import Any

import pytest
from msgspec.structs import replace

from cluster.identity import BlockIds
from cluster.request import Task
from flowserve.core.config import EngineConfig
from flowserve.core.fetch_cost import CostModel
from flowserve.core.plan import Plan
from flowserve.core.scheduler import EngineCore
from flowserve.core.sequence import Sequence, Status
from flowserve.core.tiers import Move, Tier, TierConfig
from tests.builders import chain, make_task

DOC = chain(1, 1, 1, 1)
PROMPT = 4 * 16 + 4


def make_core(kv_blocks: int = 12, fetch: Any = "always", cost: CostModel | None = None, **more: Any) -> EngineCore:
    tiers = TierConfig(dram_blocks=16, ssd_blocks=0, swap_low=0.0, swap_high=0.0, fetch=fetch)
    return EngineCore(EngineConfig(kv_blocks, token_budget=100, max_sequences=8, tiers=tiers, **more), cost)


def add(core: EngineCore, task_id: int, ids: BlockIds = DOC, limit: int = 1, prompt: int = PROMPT, **more: Any) -> Task:
    task = make_task(task_id, prompt, limit, ids=tuple(ids))
    task = replace(task, request=replace(task.request, **more))
    assert core.add(task, ids) is None
    return task


def step(core: EngineCore) -> Plan | None:
    plan = core.schedule()
    if plan is not None:
        core.complete(plan, ())
    return plan


def run(core: EngineCore) -> None:
    """Until nothing is to be computed; no move ends meanwhile."""
    while step(core) is not None:
        pass


def take_moves(core: EngineCore) -> list[Move]:
    moves = list(core.rtc.moves)
    core.rtc.moves.clear()
    return moves


def end_moves(core: EngineCore, success: bool = True) -> list[Move]:
    moves = take_moves(core)
    for move in moves:
        core.moved(move.ticket, success)
    return moves


def sequence_of(core: EngineCore, task_id: int) -> Sequence:
    sequence = core.sequence(task_id)
    assert sequence is not None
    return sequence


def preserved_in_dram(core: EngineCore) -> None:
    """A first request computes the document; then it is swapped out."""
    add(core, 0)
    run(core)
    core.rtc.copy(next(core.rtc.nodes()))
    end_moves(core)
    core.check_integrity()


def test_what_lies_below_is_fetched_and_the_rest_computed() -> None:
    """The sequence waits for the copy, then computes only what was not preserved."""
    core = make_core()
    preserved_in_dram(core)
    add(core, 1)
    assert step(core) is None
    sequence = sequence_of(core, 1)
    assert sequence.status is Status.POPULATING
    (move,) = end_moves(core)
    assert (move.source, move.target, len(move.source_blocks)) == (Tier.DRAM, Tier.HBM, 4)
    plan = step(core)
    assert plan is not None
    assert [(chunk.start, chunk.tokens) for chunk in plan.chunks] == [(64, 4)]
    assert (sequence.cached_tokens, sequence.fetched_tokens) == (64, (64, 0))
    core.check_integrity()


def test_a_fetch_delays_nobody_else() -> None:
    """While the copy is under way, others are admitted, computed and decode in every step."""
    core = make_core(24)
    preserved_in_dram(core)
    add(core, 1, chain(2), limit=40, prompt=10)
    step(core)
    add(core, 2)
    add(core, 3, chain(3), prompt=10)
    for number in range(20):
        plan = step(core)
        assert plan is not None
        assert [sequence.task_id for sequence in plan.decodes] == [1]
        assert [chunk.sequence.task_id for chunk in plan.chunks] == ([3] if number == 0 else [])
    assert sequence_of(core, 2).status is Status.POPULATING
    end_moves(core)
    plan = step(core)
    assert plan is not None
    assert [chunk.sequence.task_id for chunk in plan.chunks] == [2]


@pytest.mark.parametrize(("fetch", "ns_per_block", "fetched"), [("never", 1, 0), ("cost", 1, 64), ("cost", 17, 0)])
def test_the_cost_decides(fetch: str, ns_per_block: int, fetched: int) -> None:
    """A block of 16 tokens takes 16 ns to compute here: it is fetched if that takes no longer."""
    cost = CostModel(lambda context, cached: context - cached, lambda parts: ns_per_block * parts[0][1])
    core = make_core(fetch=fetch, cost=cost)
    preserved_in_dram(core)
    add(core, 1)
    core.schedule()
    assert sequence_of(core, 1).fetched_tokens == (fetched, 0)
    assert sequence_of(core, 1).cached_tokens == fetched


def test_without_costs_there_is_no_deciding_by_cost() -> None:
    """The engine says so at once, not when a prompt comes."""
    with pytest.raises(ValueError, match="set it to always or never"):
        make_core(fetch="cost")


def test_what_cannot_be_fetched_is_computed() -> None:
    """A copy fails: the sequence goes back to the queue, and computes everything without asking again."""
    core = make_core()
    preserved_in_dram(core)
    add(core, 1)
    assert core.schedule() is None
    end_moves(core, success=False)
    core.check_integrity()
    plan = step(core)
    assert plan is not None
    assert [(chunk.start, chunk.tokens) for chunk in plan.chunks] == [(0, PROMPT)]
    assert core.idle
    assert core.rtc.match_by_prefix_token(DOC, 4).parts == [(Tier.HBM, 4)]


def test_an_abort_does_not_wait_for_the_copy() -> None:
    """Its own blocks are free at once; what is being fetched stays in the cache."""
    core = make_core()
    preserved_in_dram(core)
    add(core, 1)
    core.schedule()
    assert core.abort(1) is not None
    assert core.idle
    core.check_integrity()
    end_moves(core)
    core.check_integrity()
    assert core.rtc.match_by_prefix_token(DOC, 4).parts == [(Tier.HBM, 4)]


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_a_preempted_sequence_is_swapped_or_computed_again(preemption: str) -> None:
    """Two sequences outgrow the cache; swapped, the second computes only its last block again."""
    core = make_core(8, preemption=preemption)
    add(core, 0, chain(1, 1, 1, 1, 1, 1), limit=60, prompt=40)
    add(core, 1, chain(2, 2, 2, 2, 2, 2), limit=60, prompt=40)
    while not core.preemptions:
        step(core)
    assert sequence_of(core, 1).status is Status.WAITING
    assert bool(end_moves(core)) == (preemption == "swap")
    while core.sequence(0) is not None:
        plan = step(core)
        assert plan is not None
        assert [sequence.task_id for sequence in plan.decodes] == [0]
    plan = step(core)
    if preemption == "swap":
        assert plan is None
        assert sequence_of(core, 1).status is Status.POPULATING
        end_moves(core)
        plan = step(core)
    assert plan is not None
    (chunk,) = plan.chunks
    assert (chunk.start, chunk.start + chunk.tokens) == (48 if preemption == "swap" else 16, 65)
    core.check_integrity()


def test_swapping_needs_a_tier() -> None:
    """Contradictory limits are refused."""
    with pytest.raises(ValueError, match="needs room in a tier"):
        EngineConfig(10, preemption="swap")


def test_a_context_with_an_id_outlives_pressure() -> None:
    """What has an ID is still there when all else was evicted, until it is released."""
    core = EngineCore(EngineConfig(8, token_budget=100, max_sequences=8))
    request = add(core, 0, context_id="doc", tenant="t").request
    run(core)
    assert request.context is not None
    for task_id in range(1, 5):
        add(core, task_id, chain(task_id + 1, 1, 1, 1), prompt=60)
        run(core)
    add(core, 9, (*DOC, 7), context_id="doc", tenant="t")
    core.schedule()
    assert sequence_of(core, 9).cached_tokens == 64
    assert core.release_context(request.context)
    assert not core.release_context(request.context)


def test_ids_of_others_are_other_ids() -> None:
    """The same name of another tenant or adapter is another context."""
    core = EngineCore(EngineConfig(20, token_budget=100, max_sequences=8))
    names = set()
    for task_id, more in enumerate([{"tenant": "a"}, {"tenant": "b"}, {"tenant": "a", "adapter": "x"}]):
        names.add(add(core, task_id, chain(task_id + 1, 1, 1, 1), context_id="doc", **more).request.context)
        run(core)
    assert len(names) == 3
    for number, name in enumerate(sorted(name for name in names if name is not None)):
        assert core.rtc.kept(name) is not None, number


def test_explicit_contexts_alone() -> None:
    """With the prefix cache off, prompts find nothing but the context whose ID they give."""
    core = EngineCore(EngineConfig(20, token_budget=200, max_sequences=8, prefix_cache=False))
    add(core, 0, context_id="doc")
    add(core, 1, chain(2, 2, 2, 2))
    run(core)
    expected = {2: (DOC, "doc", 64), 3: (DOC, None, 0), 4: (DOC, "other", 0), 5: (chain(2, 2, 2, 2), None, 0)}
    for task_id, (ids, context, cached) in expected.items():
        add(core, task_id, ids, context_id=context)
        core.schedule()
        assert sequence_of(core, task_id).cached_tokens == cached
        core.complete(core.in_flight[0], ())


def test_contexts_give_way_where_nothing_else_can_run() -> None:
    """A prompt that needs their blocks is served: the oldest ID is released, as far as needed."""
    core = EngineCore(EngineConfig(12, token_budget=200, max_sequences=8))
    first = add(core, 0, chain(1, 1, 1, 1), context_id="first").request.context
    second = add(core, 1, chain(2, 2, 2, 2), context_id="second").request.context
    run(core)
    assert core.rtc.available == 4
    add(core, 2, chain(3, 3, 3, 3, 3, 3, 3), prompt=120)
    assert step(core) is not None
    assert first is not None
    assert second is not None
    assert core.rtc.kept(first) is None
    assert core.rtc.kept(second) is not None
