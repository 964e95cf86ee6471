"""The engine core by example: what a step contains, and what becomes of a sequence."""

import copy

import pytest

from cluster import identity
from cluster.engine_policy import PolicySpec
from cluster.vocabulary import FailureReason, Role, TaskKind
from flowserve.core.config import EngineConfig
from flowserve.core.plan import Plan, StepResult
from flowserve.core.scheduler import EngineCore
from flowserve.core.sequence import Sequence, Status
from tests.builders import chain, make_task


def engine(
    kv_blocks: int = 20, budget: int = 64, sequences: int = 4, depth: int = 1, block: int = 16, watermark: float = 0.0
) -> EngineCore:
    return EngineCore(EngineConfig(kv_blocks, block, budget, sequences, depth, watermark))


def add(
    core: EngineCore,
    task_id: int,
    prompt: int,
    limit: int = 64,
    ids: tuple[int, ...] | None = None,
    kind: TaskKind = TaskKind.SERVE,
    generated: int = 0,
) -> FailureReason | None:
    source = "elsewhere" if kind is TaskKind.DECODE else None
    task = make_task(task_id, prompt, limit, kind, generated, ids, source)
    return core.add(task, identity.of_context(task_id, limit, ids))


def step(core: EngineCore, *stopped: int) -> StepResult:
    """Schedule all that may be in flight, then complete the oldest plan."""
    while core.schedule() is not None:
        pass
    return core.complete(core.in_flight[0], stopped)


def get(core: EngineCore, task_id: int) -> Sequence:
    sequence = core.sequence(task_id)
    assert sequence is not None
    return sequence


def chunks(plan: Plan | None) -> list[tuple[int, int, int, bool]]:
    assert plan is not None
    return [(chunk.sequence.task_id, chunk.start, chunk.tokens, chunk.samples) for chunk in plan.chunks]


def test_prompts_are_cut_to_the_budget_in_order_of_arrival() -> None:
    """One budget for all: the first prompt takes it, the second gets the rest, decodes come before both."""
    core = engine(budget=64)
    add(core, 0, 100)
    add(core, 1, 50)
    plan = core.schedule()
    assert chunks(plan) == [(0, 0, 64, False)]
    assert plan is not None
    core.complete(plan, ())
    plan = core.schedule()
    assert chunks(plan) == [(0, 64, 36, True), (1, 0, 28, False)]
    assert plan is not None
    core.complete(plan, ())
    plan = core.schedule()
    assert plan is not None
    assert [sequence.task_id for sequence in plan.decodes] == [0]
    assert chunks(plan) == [(1, 28, 22, True)]
    assert plan.shape == (22, 28 * 22 + 22 * 23 // 2, 1, 1, 101, 0)


def test_a_cached_prompt_still_computes_one_token() -> None:
    """A prompt that is cached to its last full block computes at least its last token, which is sampled from."""
    core = engine()
    add(core, 0, 48, ids=chain(1, 2, 3))
    step(core, 0)
    add(core, 1, 48, ids=chain(1, 2, 3))
    add(core, 2, 49, ids=chain(1, 2, 3))
    assert chunks(core.schedule()) == [(1, 32, 16, True), (2, 48, 1, True)]
    assert [get(core, task_id).cached_tokens for task_id in (1, 2)] == [32, 48]


def test_large_blocks_use_every_nth_id() -> None:
    """With blocks of 32 tokens two prompts share what is common in whole blocks of 32, by every second id."""
    core = engine(block=32)
    add(core, 0, 100, ids=chain(1, 1, 1, 1, 1, 1))
    step(core)
    step(core, 0)
    add(core, 1, 100, ids=chain(1, 1, 1, 1, 1, 2))
    core.schedule()
    assert get(core, 1).cached_tokens == 64


def test_generated_blocks_are_cached_for_the_next_turn() -> None:
    """The answer of one turn, whose block ids are known, is found in the cache by the prompt of the next."""
    core = engine()
    task = make_task(0, 20, 40, ids=chain(1))
    core.add(task, identity.of_context(0, 40, chain(1, 2, 3)))
    for _ in range(20):
        step(core)
    step(core, 0)  # 21 tokens: 20 + 20 positions are computed, two full blocks
    add(core, 1, 60, ids=chain(1, 2, 3))
    core.schedule()
    assert get(core, 1).cached_tokens == 32


def test_the_client_limit_ends_a_sequence_exactly() -> None:
    """A sequence ends with its max_tokens-th token, however many plans are in flight."""
    for depth in (1, 2, 3):
        for limit in (1, 2, 7):
            core = engine(depth=depth)
            add(core, 0, 10, limit)
            finished = [step(core).finished for _ in range(limit)]
            assert finished[:-1] == [[]] * (limit - 1)
            assert [(sequence.generated, held) for sequence, held in finished[-1]] == [(limit, False)]
            while core.in_flight:
                assert not core.complete(core.in_flight[0], ())
            assert core.idle
            assert core.rtc.available == 20


def test_a_stop_learned_late_drops_the_extra_token() -> None:
    """With two plans in flight one more token is under way at the stop: it does not count, its block returns."""
    core = engine(depth=2)
    add(core, 0, 15, 40)
    step(core)
    assert [plan.number for plan in core.in_flight] == [2]
    result = step(core, 0)  # the second token is the last; plan 3 computes position 16, in a block of its own
    assert [(sequence.generated, held) for sequence, held in result.finished] == [(2, False)]
    assert len(core.in_flight) == 1
    assert core.rtc.allocator.free == 18
    core.check_integrity()
    extra = core.in_flight[0]
    assert not core.complete(extra, ())
    assert core.idle
    assert core.rtc.allocator.free + core.rtc.cached_blocks == 20
    assert core.rtc.cached_blocks == 1  # 15 prompt tokens and the first generated one; no more is valid
    core.check_integrity()


def test_the_newest_is_preempted_and_recomputed() -> None:
    """Without a free block the newest sequence gives its blocks up, waits at the head, and loses no token."""
    core = engine(kv_blocks=4)
    add(core, 0, 30)
    add(core, 1, 31)
    add(core, 2, 10)
    for _ in range(2):
        step(core)
    tokens = get(core, 1).generated
    plan = core.schedule()
    assert plan is not None
    victim = get(core, 1)
    assert (victim.status, victim.preemptions, core.preemptions) == (Status.WAITING, 1, 1)
    assert [sequence.task_id for sequence in plan.decodes] == [0]
    assert (victim.generated, victim.target) == (tokens, 31 + tokens)
    core.complete(plan, (0,))
    plan = core.schedule()
    # It comes before task 2, finds its own full blocks in the cache, and computes the rest again.
    assert chunks(plan)[0] == (1, 32, 31 + tokens - 32, True)
    assert plan is not None
    core.complete(plan, ())
    assert victim.generated == tokens + 1


def test_what_outgrows_the_whole_cache_fails() -> None:
    """A sequence alone that needs one more block than there is can never go on: it is given up, and said so."""
    core = engine(kv_blocks=2)
    assert add(core, 0, 20, 100) is None
    for _ in range(13):
        step(core)
    assert core.schedule() is None
    assert [(sequence.generated, reason) for sequence, reason in core.failed] == [(13, FailureReason.TOO_LONG)]
    assert core.idle


def test_what_can_never_fit_is_refused_at_once() -> None:
    """A prompt that leaves no room for its second token is refused, unless there is none here; else it is taken."""
    core = engine(kv_blocks=2)
    assert add(core, 0, 32) is FailureReason.TOO_LONG
    assert add(core, 1, 30, generated=2) is FailureReason.TOO_LONG
    assert core.idle
    assert add(core, 2, 31) is None
    assert add(core, 3, 33, limit=1) is FailureReason.TOO_LONG
    assert add(core, 4, 32, limit=1) is None
    assert add(core, 5, 32, kind=TaskKind.PREFILL) is None
    assert add(core, 6, 30, limit=3, generated=2) is None
    for task_id in (2, 5):
        core.abort(task_id)
    for _ in range(2):
        step(core)
    assert core.idle


def test_no_token_is_computed_behind_the_limit() -> None:
    """With several plans in flight, a sequence is in no plan behind the one that reaches its limit."""
    for depth in (1, 2, 3):
        core = engine(depth=depth)
        add(core, 0, 10, 4)
        add(core, 1, 10, 9)
        decoded: list[int] = []
        while not core.idle:
            while (plan := core.schedule()) is not None:
                decoded += [sequence.task_id for sequence in plan.decodes]
            core.complete(core.in_flight[0], ())
        assert (decoded.count(0), decoded.count(1)) == (3, 8)


def test_the_budget_may_differ_by_role() -> None:
    """An executor that only prefills may take more tokens per step than one that decodes beside."""
    config = EngineConfig(20, 16, 64, 4, prefill_token_budget=128, decode_token_budget=32)
    assert [config.budget(role) for role in (Role.COLOCATED, Role.PREFILL, Role.DECODE)] == [64, 128, 32]
    assert EngineConfig(20, 16, 64, 4).budget(Role.PREFILL) == 64


def test_a_prefill_task_holds_its_cache_until_released() -> None:
    """After its one token a prefill task leaves the batch, and its blocks stay until somebody has fetched them."""
    core = engine(sequences=1)
    add(core, 0, 40, kind=TaskKind.PREFILL)
    assert [held for _, held in step(core).finished] == [True]
    assert core.num_running == 0
    assert list(core.held) == [0]
    add(core, 1, 40, kind=TaskKind.PREFILL)
    step(core)  # the place in the batch is free again
    assert core.rtc.available == 20 - 6
    assert core.release_held(0)
    assert not core.release_held(0)
    assert core.abort(1) is not None
    assert core.idle
    assert core.rtc.available == 20


def test_a_prefill_task_that_is_complete_holds_nothing() -> None:
    """One token asked for, or a stop with the first token: nothing is left to decode, so nothing is held."""
    core = engine()
    add(core, 0, 40, limit=1, kind=TaskKind.PREFILL)
    add(core, 1, 10, limit=9, kind=TaskKind.PREFILL)
    assert [held for _, held in step(core, 1).finished] == [False, False]
    assert core.idle


def test_a_fetch_skips_what_is_cached_here() -> None:
    """A decode task asks only for the positions behind its cached prefix, then decodes from the second token on."""
    core = engine()
    add(core, 0, 32, ids=chain(1, 2))
    step(core, 0)
    add(core, 1, 40, ids=chain(1, 2), kind=TaskKind.DECODE, generated=1)
    assert core.schedule() is None
    [fetch] = core.fetches
    assert (fetch.skip, fetch.tokens) == (32, 40)
    assert core.fetched(1, True) is None
    plan = core.schedule()
    assert plan is not None
    assert plan.shape.decode_context == 41
    core.complete(plan, ())
    assert get(core, 1).generated == 2


def test_a_failed_fetch_gives_the_task_back() -> None:
    """What cannot be fetched is returned to the caller, and its blocks are free."""
    core = engine()
    add(core, 1, 40, kind=TaskKind.DECODE, generated=1)
    core.schedule()
    sequence = core.fetched(1, False)
    assert sequence is not None
    assert (sequence.task_id, sequence.generated) == (1, 1)
    assert core.idle
    assert core.rtc.allocator.free == 20


def test_blocks_stay_while_a_transfer_writes_into_them() -> None:
    """A task aborted in the middle of its transfer is gone at once, its blocks only when the transfer is over."""
    for success in (True, False):
        core = engine()
        add(core, 1, 40, kind=TaskKind.DECODE, generated=1)
        core.schedule()
        assert core.abort(1) is not None
        assert core.abort(1) is None
        assert core.task_ids() == []
        assert core.rtc.allocator.free == 17
        assert core.fetched(1, success) is None
        assert core.rtc.allocator.free == 20
        assert core.idle


def test_an_abort_waits_for_the_plans_in_flight() -> None:
    """Blocks of an aborted sequence return with the last plan that may still use them, and its token is dropped."""
    core = engine(depth=2)
    add(core, 0, 40)
    plan = core.schedule()
    assert plan is not None
    assert core.abort(0) is not None
    assert core.rtc.allocator.free == 17
    assert not core.complete(plan, (0,))
    assert core.idle
    assert core.rtc.available == 20


def test_admission_keeps_a_reserve_beside_running_sequences() -> None:
    """With a watermark a second sequence waits although its prompt would just fit; alone it may have all."""
    core = engine(kv_blocks=10, watermark=0.3)
    add(core, 0, 40)
    add(core, 1, 80)  # needs 5 blocks: 7 are left, 3 of them reserved
    plan = core.schedule()
    assert chunks(plan) == [(0, 0, 40, True)]
    assert plan is not None
    core.complete(plan, (0,))
    assert chunks(core.schedule())[0][0] == 1


def test_the_reserve_falls_when_the_last_other_sequence_is_held() -> None:
    """A prefill that is done and held leaves the batch without freeing a block; what waits alone then gets in."""
    core = EngineCore(EngineConfig(10, 16, 64, 4, watermark=0.5, prefix_cache=False))
    add(core, 0, 10, kind=TaskKind.PREFILL)
    add(core, 1, 80, kind=TaskKind.PREFILL)
    assert [held for _, held in step(core).finished] == [True]
    assert chunks(core.schedule()) == [(1, 0, 64, False)]


def test_the_head_of_the_queue_is_never_overtaken() -> None:
    """A short prompt behind one that finds no room waits too: no starvation."""
    core = engine(kv_blocks=6)
    add(core, 0, 60)
    add(core, 1, 60)
    add(core, 2, 5)
    assert chunks(core.schedule()) == [(0, 0, 60, True)]
    assert core.waiting.count == 2
    assert core.waiting.tokens == 65


def waiting_behind_what_is_held(order: PolicySpec | None = None) -> EngineCore:
    """Of six blocks three are held. A prompt of four waits for them, and behind it two decode tasks of two each."""
    core = EngineCore(EngineConfig(6, 16, 64, 4, watermark=0.0, order=order))
    add(core, 9, 40, kind=TaskKind.PREFILL)
    step(core)
    add(core, 10, 60)
    add(core, 2, 17, limit=9, kind=TaskKind.DECODE, generated=1)
    add(core, 1, 17, limit=9, kind=TaskKind.DECODE, generated=1)
    return core


@pytest.mark.parametrize("order", [None, PolicySpec("policies.engine.order.fair.Fair")])
def test_decode_tasks_go_ahead_of_what_waits_for_held_blocks(order: PolicySpec | None) -> None:
    """First that of the oldest request, as far as there is room; then the prompt, as soon as nothing is held."""
    core = waiting_behind_what_is_held(order)
    assert core.schedule() is None
    assert [(fetch.sequence.task_id, fetch.tokens) for fetch in core.fetches] == [(1, 17)]
    assert (core.waiting.count, core.waiting.tokens) == (2, 78)
    core.fetched(1, True)
    while core.sequence(1) is not None:
        assert [sequence.task_id for sequence in step_plan(core).decodes] == [1]
    assert core.schedule() is None
    assert core.fetches[-1].sequence.task_id == 2
    core.fetched(2, False)
    core.release_held(9)
    assert chunks(core.schedule())[0][0] == 10
    core.check_integrity()


def step_plan(core: EngineCore) -> Plan:
    """One step; its plan."""
    plan = core.schedule()
    assert plan is not None
    core.complete(plan, ())
    return plan


def test_without_held_blocks_decode_tasks_wait_their_turn() -> None:
    """What computes here ends without anybody else, so the head is not overtaken."""
    core = engine(kv_blocks=6)
    add(core, 0, 40)
    add(core, 10, 60)
    add(core, 1, 17, kind=TaskKind.DECODE, generated=1)
    core.schedule()
    assert not core.fetches
    assert core.waiting.count == 2


def test_who_went_ahead_and_is_preempted_has_its_place_in_the_queue() -> None:
    """The queue has it still, so it is not pushed again, and runs once."""
    core = EngineCore(EngineConfig(6, 16, 64, 4, watermark=0.0, prefix_cache=False))
    add(core, 9, 40, kind=TaskKind.PREFILL)
    step(core)
    add(core, 10, 60, limit=2)
    for task_id in (1, 2):
        add(core, task_id, 10, limit=30, kind=TaskKind.DECODE, generated=1)
    core.schedule()
    core.fetched(1, True)
    core.fetched(2, True)
    while not core.preemptions:
        step(core)
    assert get(core, 2).status is Status.WAITING
    core.release_held(9)
    finished: list[int] = []
    while not core.idle:
        finished += [sequence.task_id for sequence, _ in step(core).finished]
        core.check_integrity()
    assert sorted(finished) == [1, 2, 10]
    assert core.rtc.available == 6


def test_no_steps_are_skipped_while_blocks_return() -> None:
    """Blocks that return with a plan in flight may let in what waits, so decode steps are not taken at once before."""
    core = engine(depth=2)
    add(core, 0, 16)
    core.schedule()
    core.schedule()
    add(core, 1, 16, limit=1)
    for _ in range(2):
        core.complete(core.in_flight[0], ())
        core.schedule()
    assert core.in_flight[0].last
    core.complete(core.in_flight[0], ())  # task 1 ended; a plan issued before its end is in flight
    core.schedule()
    assert core.steady_steps(10) == 0
    core.complete(core.in_flight[0], ())
    core.schedule()
    assert core.steady_steps(10) == 10


@pytest.mark.pure
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("block", [16, 32])
def test_many_steps_at_once_equal_single_steps(depth: int, block: int) -> None:
    """Up to the limit of a sequence, across block boundaries and evictions, advance(n) is n completes."""
    core = engine(kv_blocks=8, depth=depth, block=block)
    add(core, 9, 3 * block)
    step(core, 9)  # leaves cached blocks to be evicted
    for task_id, (prompt, limit) in enumerate(((5, 30), (block - 1, 70), (block, 90))):
        add(core, task_id, prompt, limit)
    for _ in range(depth + 1):
        step(core)
    while core.schedule() is not None:
        pass
    steps = core.steady_steps(1000)
    assert steps > 0
    twin = copy.deepcopy(core)
    core.advance(steps)
    for _ in range(steps):
        assert not twin.complete(twin.in_flight[0], ())
        assert twin.schedule() is not None
    for task_id in range(3):
        assert get(core, task_id).blocks == get(twin, task_id).blocks
        assert get(core, task_id).generated == get(twin, task_id).generated
    assert list(core.rtc.allocator.free_blocks()) == list(twin.rtc.allocator.free_blocks())
    assert [plan.shape for plan in core.in_flight] == [plan.shape for plan in twin.in_flight]
    core.check_integrity()


@pytest.mark.parametrize(("limit", "others", "steps"), [(5, 0, 9), (1, 0, 9), (5, 1, 8)])
def test_the_last_of_many_steps_ends_the_prompt(limit: int, others: int, steps: int) -> None:
    """Unless somebody waits for what the end of the prompt leaves of the budget."""
    core = EngineCore(EngineConfig(50, 16, 10, 4))
    for task_id in range(1 + others):
        add(core, task_id, 95, limit)
    core.schedule()
    assert core.steady_steps(1000) == steps
    core.advance(steps)
    (plan,) = core.in_flight
    assert plan.number == 1 + steps
    assert plan.shape.prefill_attention == sum(range(10 * steps + 1, min(95, 10 * steps + 10) + 1))
    assert chunks(plan) == [(0, 10 * steps, min(10, 95 - 10 * steps), not others)]
    assert [sequence.task_id for sequence in plan.last] == ([0] if limit == 1 else [])
    assert core.steady_steps(1000) == 0
    core.check_integrity()


def test_the_last_of_many_steps_reaches_the_limit_of_a_sequence() -> None:
    core = engine()
    add(core, 0, 16, limit=5)
    add(core, 1, 16, limit=9)
    step(core)
    core.schedule()
    assert core.steady_steps(1000) == 3
    core.advance(3)
    (plan,) = core.in_flight
    assert [sequence.task_id for sequence in plan.last] == [0]
    assert [sequence.task_id for sequence, _ in core.complete(plan, ()).finished] == [0]
    core.check_integrity()


# -- speculation ----------------------------------------------------------------------------------------------------


def speculating(kv_blocks: int = 20, depth: int = 1, guesses: int = 3) -> EngineCore:
    return EngineCore(EngineConfig(kv_blocks, 16, 64, 4, depth, 0.0, speculative_tokens=guesses))


def verify_step(core: EngineCore, *stopped: int, **accepted: int) -> StepResult:
    """One plan, complete; `t0=3`: task 0 gets three tokens."""
    plan = core.schedule()
    assert plan is not None
    return core.complete(plan, stopped, {int(name[1:]): tokens for name, tokens in accepted.items()})


def test_a_verification_moves_a_sequence_by_what_was_right() -> None:
    """It starts at the last known token, and what wrong guesses left behind is computed again."""
    core = speculating()
    add(core, 0, 10, 40)
    step(core)
    plan = core.schedule()
    assert plan is not None
    assert [(v.sequence.task_id, v.start, v.draft) for v in plan.verifies] == [(0, 10, 3)]
    assert plan.decodes == ()
    assert plan.shape == (0, 0, 0, 1, 14, 3)
    assert core.schedule() is None
    result = core.complete(plan, (), {0: 2})
    assert [(sequence.task_id, tokens) for sequence, tokens in result.verified] == [(0, 2)]
    plan = core.schedule()
    assert plan is not None
    assert [(v.start, v.draft) for v in plan.verifies] == [(12, 3)]
    assert len(get(core, 0).blocks) == 1
    core.complete(plan, (), {0: 4})
    plan = core.schedule()
    assert plan is not None
    assert [(v.start, v.draft) for v in plan.verifies] == [(16, 3)]
    assert len(get(core, 0).blocks) == 2
    assert get(core, 0).generated == 7


def test_guesses_end_where_the_client_does() -> None:
    """No more is guessed than the limit allows, and the sequence ends with exactly its last token."""
    core = speculating()
    add(core, 0, 10, 4)
    step(core)
    plan = core.schedule()
    assert plan is not None
    assert plan.verifies[0].draft == 2
    assert core.complete(plan, (), {0: 2}).finished == []
    plan = core.schedule()
    assert plan is not None
    assert plan.verifies[0].draft == 0
    [(sequence, held)] = core.complete(plan, (), {0: 1}).finished
    assert (sequence.generated, held, core.idle) == (4, False, True)


def test_a_stop_among_the_guesses_ends_a_sequence() -> None:
    """The tokens up to the stop count; the cache holds what is sound and nothing of the guesses."""
    core = speculating()
    add(core, 0, 14, 40, ids=chain(1))
    task = make_task(1, 14, 40)
    core.add(task, identity.of_context(1, 40, chain(7, 8, 9)))
    step(core)
    result = verify_step(core, 1, t0=1, t1=2)
    assert [(sequence.task_id, sequence.generated) for sequence, _ in result.finished] == [(1, 3)]
    assert core.rtc.cached_blocks == 1  # 16 positions: 14 of the prompt and two of the three tokens
    core.check_integrity()


def test_nobody_is_preempted_for_a_guess() -> None:
    """Short of blocks, sequences guess less; for the next token itself a sequence may lose its place."""
    core = speculating(kv_blocks=2)
    for task_id in (0, 1):
        add(core, task_id, 13, 30)
    step(core)
    plan = core.schedule()
    assert plan is not None
    assert [verify.draft for verify in plan.verifies] == [2, 2]
    core.complete(plan, (), {0: 3, 1: 1})
    plan = core.schedule()
    assert plan is not None
    assert core.preemptions == 1
    assert [(verify.sequence.task_id, verify.start) for verify in plan.verifies] == [(0, 16)]


def test_a_sequence_has_one_verification_in_flight() -> None:
    """With several plans in flight others go on meanwhile, each waiting for what its own guesses came to."""
    core = speculating(depth=2)
    add(core, 0, 10)
    first = core.schedule()
    add(core, 1, 10)
    second = core.schedule()
    assert first is not None
    assert second is not None
    core.complete(first, ())
    third = core.schedule()
    assert third is not None
    assert [verify.sequence.task_id for verify in third.verifies] == [0]
    core.complete(second, ())
    fourth = core.schedule()
    assert fourth is not None
    assert [verify.sequence.task_id for verify in fourth.verifies] == [1]
    assert core.abort(0) is not None
    assert core.complete(third, (), {0: 4}).verified == []
    assert core.rtc.allocator.free == 18  # in the fourth plan it might be used yet
    assert [tokens for _, tokens in core.complete(fourth, (), {1: 4}).verified] == [4]
    assert core.rtc.allocator.free == 19


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"kv_blocks": 0}, "kv_blocks is 0"),
        ({"kv_blocks": 1, "block_tokens": 8}, "block_tokens is 8"),
        ({"kv_blocks": 1, "block_tokens": 24}, "multiples of 16"),
        ({"kv_blocks": 1, "token_budget": 8, "max_sequences": 9}, "raise token_budget or lower max_sequences"),
        ({"kv_blocks": 1, "decode_token_budget": 8}, "raise decode_token_budget or lower max_sequences"),
        ({"kv_blocks": 1, "speculative_tokens": -1}, "speculative_tokens is -1"),
        ({"kv_blocks": 1, "speculative_tokens": 3}, r"max_sequences 256 x \(1 \+ 3 speculative_tokens\)"),
        ({"kv_blocks": 1, "max_in_flight": 0}, "max_in_flight is 0"),
        ({"kv_blocks": 1, "watermark": 1.0}, "watermark is 1.0"),
        ({"kv_blocks": 1, "evict_share": 1.0}, "evict_share is 1.0"),
    ],
)
def test_bad_limits_are_named(arguments: dict[str, float], named: str) -> None:
    """A configuration that cannot work is refused with the value and what is allowed."""
    with pytest.raises(ValueError, match=named):
        EngineConfig(**arguments)  # type: ignore[arg-type]


def test_plans_complete_in_order() -> None:
    """Completing a later plan before an earlier one breaks an invariant of the caller."""
    core = engine(depth=2)
    add(core, 0, 10)
    core.schedule()
    second = core.schedule()
    assert second is not None
    with pytest.raises(AssertionError, match="plan 2 completed before plan 1"):
        core.complete(second, ())
