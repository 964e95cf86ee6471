"""The engine core under random use: whatever is added, aborted, fetched, stopped or preempted, in whichever order.

Beside the engine runs a model of what the KV cache contains: every computed position is written into its block, and
before a position is computed the whole context in front of it must be in the blocks of the sequence. So a block that is
shared, freed, evicted or handed out wrongly shows as a wrong context.
"""

import copy
from typing import Any, Literal

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from msgspec.structs import replace

from cluster import identity
from cluster.request import KvSource, Task
from cluster.vocabulary import BLOCK_TOKENS, FailureReason, TaskKind
from experiments import compiled
from flowserve.core.config import EngineConfig
from flowserve.core.fetch_cost import Parts
from flowserve.core.plan import Fetch, Plan, Verify
from flowserve.core.scheduler import EngineCore
from flowserve.core.sequence import Sequence, Status
from flowserve.core.tiers import Move, Tier, TierConfig
from tests.builders import chain, make_task

KINDS = (TaskKind.SERVE, TaskKind.SERVE, TaskKind.SERVE, TaskKind.PREFILL, TaskKind.DECODE)


class SomeParts:
    """Fetches all that is preserved, or the first part of it, or nothing."""

    def worthwhile(self, context: int, cached: int, block_tokens: int, parts: Parts) -> int:
        return (0, parts[0][1], sum(count for _, count in parts))[context % 3]


def state_of(core: EngineCore) -> Any:
    """Everything that two engines in the same state have in common, block tables and free blocks included."""

    def sequence_state(sequence: Sequence) -> tuple[Any, ...]:
        return (
            sequence.task_id,
            sequence.status,
            sequence.position,
            sequence.generated,
            tuple(sequence.blocks),
            tuple(sequence.duplicates),
            sequence.tree_blocks,
            sequence.limit,
            tuple(sequence.runs),
            sequence.preemptions,
            sequence.pending,
        )

    return {
        "sequences": [sequence_state(core.sequence(task_id)) for task_id in core._sequences],  # type: ignore[arg-type]
        "plans": [(p.number, p.clock, p.shape, [s.task_id for s in p.sampling], len(p.last)) for p in core.in_flight],
        "chunks": [(c.sequence.task_id, c.start, c.tokens, c.samples) for p in core.in_flight for c in p.chunks],
        "free": list(core.rtc.allocator.free_blocks()),
        "cache": sorted(
            (tuple(node.ids[node.start :][: len(node.blocks)]), tuple(node.blocks), node.locks)
            for node in core.rtc.nodes()
        ),
        "counts": (
            core.waiting.count,
            core.num_running,
            core.waiting.tokens,
            core.preemptions,
            core.rtc.evicted_blocks,
        ),
        "clock": (core.clock.issued, core.clock.done),
        "held": list(core.held),
        "room": (core.rtc.available, core.rtc.cached_blocks),
        "lower": [sorted(pool.allocator.free_blocks()) for pool in list(core.rtc.pools.values())[1:]],
        "moves": (core.rtc.moving, list(core.rtc.moves)),
    }


class EngineMachine(RuleBasedStateMachine):
    """One engine, its driver, and what the driver must see."""

    @initialize(
        kv_blocks=st.integers(2, 12),
        block_tokens=st.sampled_from([16, 32]),
        max_sequences=st.integers(1, 4),
        spare_budget=st.integers(0, 60),
        depth=st.integers(1, 3),
        watermark=st.sampled_from([0.0, 0.0, 0.2]),
        prefix_cache=st.sampled_from([True, True, True, False]),
        guesses=st.sampled_from([0, 0, 1, 3]),
        dram_blocks=st.sampled_from([0, 4, 12]),
        ssd_blocks=st.sampled_from([0, 8]),
        swap_low=st.sampled_from([0.0, 0.3, 0.8]),
        preemption=st.sampled_from(["recompute", "swap"]),
    )
    def start(
        self,
        kv_blocks: int,
        block_tokens: int,
        max_sequences: int,
        spare_budget: int,
        depth: int,
        watermark: float,
        prefix_cache: bool,
        guesses: int,
        dram_blocks: int,
        ssd_blocks: int,
        swap_low: float,
        preemption: Literal["recompute", "swap"],
    ) -> None:
        self.config = EngineConfig(
            kv_blocks=kv_blocks,
            block_tokens=block_tokens,
            token_budget=max_sequences * (1 + guesses) + spare_budget,
            max_sequences=max_sequences,
            max_in_flight=depth,
            watermark=watermark,
            prefix_cache=prefix_cache,
            speculative_tokens=guesses,
            tiers=TierConfig(dram_blocks, ssd_blocks, swap_low, max(swap_low, 0.5), 4),
            preemption=preemption if dram_blocks + ssd_blocks and prefix_cache else "recompute",
        )
        self.core = EngineCore(self.config, SomeParts())
        self.moves: dict[int, Move] = {}
        self.lower: dict[tuple[Tier, int, int], Any] = {}
        self.tasks: dict[int, Task] = {}
        self.ids: dict[int, identity.BlockIds] = {}
        self.state: dict[int, str] = {}
        self.tokens: dict[int, int] = {}
        self.next_position: dict[int, int | None] = {}
        self.preempted: dict[int, int] = {}
        self.fetches: dict[int, Fetch] = {}
        self.prefill_of: dict[int, int] = {}
        self.kv: dict[tuple[int, int], Any] = {}
        self.written: dict[int, set[int]] = {}
        self.plans = 0

    # -- the model ------------------------------------------------------------------------------------------------

    def ends(self, task_id: int, how: str) -> None:
        """Every task ends once."""
        assert self.state[task_id] in ("live", "held"), f"{task_id} ended as {self.state[task_id]}, then as {how}"
        self.state[task_id] = how

    def content(self, sequence: Sequence, position: int) -> Any:
        ids, block = self.ids[sequence.task_id], position // BLOCK_TOKENS
        owner = self.prefill_of.get(sequence.task_id, sequence.task_id)
        return (ids[block] if block < len(ids) else ("own", owner, block), position % BLOCK_TOKENS)

    def place(self, sequence: Sequence, position: int) -> tuple[int, int]:
        return sequence.blocks[position // self.config.block_tokens], position % self.config.block_tokens

    def context_is_there(self, sequence: Sequence, tokens: int) -> None:
        for position in range(tokens):
            assert self.kv.get(self.place(sequence, position)) == self.content(sequence, position)

    def compute(self, plan: Plan, sequence: Sequence, start: int, count: int) -> None:
        """The device computes positions, in order, once each, on top of the right context, in blocks of its own."""
        expected = self.next_position[sequence.task_id]
        if expected is None:  # just admitted: what is cached here is skipped, the last token never
            assert start % self.config.block_tokens == 0
            assert start < sequence.target
            expected = start
        assert start == expected
        assert count >= 1
        self.context_is_there(sequence, start)
        for position in range(start, start + count):
            assert position // self.config.block_tokens >= sequence.tree_blocks, "writes into a shared block"
            self.kv[self.place(sequence, position)] = self.content(sequence, position)
            self.written[plan.number].add(sequence.blocks[position // self.config.block_tokens])
        self.next_position[sequence.task_id] = start + count

    @property
    def room(self) -> int:
        return self.config.kv_blocks * self.config.block_tokens

    def needs(self, task_id: int, generated: int) -> int:
        """Positions that the next token needs: its own, too, unless it is the last that this engine samples."""
        return self.needs_of(self.tasks[task_id], generated)

    def needs_of(self, task: Task, generated: int) -> int:
        last = task.kind is TaskKind.PREFILL or task.request.max_tokens - generated <= 1
        return task.request.prompt_tokens + generated + (0 if last else 1)

    # -- what the driver does -------------------------------------------------------------------------------------

    @rule(
        prompt=st.integers(1, 100),
        limit=st.integers(1, 40),
        earlier=st.integers(0, 3),
        path=st.none() | st.lists(st.integers(0, 1), min_size=8, max_size=10),
        kind=st.sampled_from(KINDS),
        context=st.sampled_from([None, None, None, "a", "b"]),
        old=st.booleans(),
    )
    def add(
        self,
        prompt: int,
        limit: int,
        earlier: int,
        path: list[int] | None,
        kind: TaskKind,
        context: str | None,
        old: bool,
    ) -> None:
        """A new task: fresh, a retry with earlier tokens, or a decode task whose first token came from elsewhere."""
        task_id = len(self.tasks)
        generated = max(1, earlier) if kind is TaskKind.DECODE else earlier
        source = "elsewhere" if kind is TaskKind.DECODE else None
        task = make_task(task_id, prompt, generated + limit, kind, generated, source=source)
        age = task_id if old else 1000 - task_id
        task = replace(task, request=replace(task.request, context_id=context, request_id=age))
        known = None if path is None else chain(*path)
        ids = identity.of_context(task_id, task.request.max_tokens, known)
        refusal = self.core.add(task, ids)
        self.tasks[task_id] = task
        assert refusal == (FailureReason.TOO_LONG if self.needs(task_id, generated) > self.room else None)
        self.state[task_id] = "live" if refusal is None else "refused"
        self.ids[task_id], self.tokens[task_id] = ids, generated
        self.next_position[task_id], self.preempted[task_id] = None, 0

    @precondition(lambda self: self.followable())
    @rule(which=st.integers(0, 99))
    def decode_in_place(self, which: int) -> None:
        """A decode task of a prefill that is held here, or will be."""
        prefills, task_id = self.followable(), len(self.tasks)
        prefill = prefills[which % len(prefills)]
        generated = self.tokens[prefill] + (self.state[prefill] == "live")
        task = Task(task_id, self.tasks[prefill].request, TaskKind.DECODE, generated, KvSource("here", prefill))
        if self.core.add(task, self.ids[prefill], in_place=True) is not None:
            assert self.needs_of(task, generated) > self.room
            return
        self.tasks[task_id], self.state[task_id] = task, "live"
        self.ids[task_id], self.tokens[task_id] = self.ids[prefill], generated
        self.next_position[task_id], self.preempted[task_id] = None, 0
        self.prefill_of[task_id] = prefill

    def followable(self) -> list[int]:
        """Prefills that are here, and that nobody waits for yet."""
        taken = set(self.prefill_of.values())
        here = [task_id for task_id, state in self.state.items() if state in ("live", "held") and task_id not in taken]
        return [n for n in here if self.tasks[n].kind is TaskKind.PREFILL and self.allows_more(n)]

    def allows_more(self, prefill: int) -> bool:
        """Whether there is anything to decode behind it."""
        more = self.tasks[prefill].request.max_tokens - self.tokens[prefill]
        return more > (self.state[prefill] == "live")

    @precondition(lambda self: self.tasks)
    @rule(which=st.integers(0, 99))
    def abort(self, which: int) -> None:
        """The driver lets go of a task, whatever became of it."""
        task_id = which % len(self.tasks)
        sequence = self.core.abort(task_id)
        assert (sequence is not None) == (self.state[task_id] in ("live", "held"))
        if sequence is not None:
            assert sequence.generated == self.tokens[task_id]
            self.ends(task_id, "aborted")

    @rule()
    def schedule(self) -> None:
        """The next step is decided, within every limit."""
        full = len(self.core.in_flight) == self.config.max_in_flight
        self.core.admit_in_place()
        assert not self.core.waiting.in_place or self.core.num_running == self.config.max_sequences
        plan = self.core.schedule()
        for sequence, reason in self.core.failed:
            assert reason is FailureReason.TOO_LONG
            assert self.needs(sequence.task_id, self.tokens[sequence.task_id]) > self.room
            assert sequence.generated == self.tokens[sequence.task_id]
            self.ends(sequence.task_id, "failed")
        self.core.failed.clear()
        self.give_way()
        for fetch in self.core.fetches:
            assert fetch.tokens == fetch.sequence.task.context_tokens - 1
            if fetch.sequence.task_id in self.prefill_of:
                assert fetch.skip >= fetch.tokens, "it is copied to where it is"
                assert not fetch.sequence.blocks
            else:
                assert fetch.skip <= fetch.tokens
                self.context_is_there(fetch.sequence, fetch.skip)
            self.fetches[fetch.sequence.task_id] = fetch
        self.core.fetches.clear()
        self.moves |= {move.ticket: move for move in self.core.rtc.moves}
        self.core.rtc.moves.clear()
        for task_id in self.core.task_ids():
            sequence = self.core.sequence(task_id)
            assert sequence is not None
            if sequence.preemptions > self.preempted[task_id]:
                self.preempted[task_id] = sequence.preemptions
                self.next_position[task_id] = None
        if plan is None:
            if not self.core.in_flight:
                computing = (Status.PREFILL, Status.DECODE, Status.SPECULATE)
                assert not any(s.status in computing for s in self.core._sequences.values()), "nothing is scheduled"
            return
        assert not full
        self.plans += 1
        assert plan.number == self.plans
        self.written[plan.number] = set()
        tokens = sum(chunk.tokens for chunk in plan.chunks) + sum(1 + verify.draft for verify in plan.verifies)
        assert 1 <= tokens + len(plan.decodes) <= self.config.token_budget
        assert self.core.num_running <= self.config.max_sequences
        named = [*plan.decodes, *(c.sequence for c in plan.chunks), *(v.sequence for v in plan.verifies)]
        assert len({sequence.task_id for sequence in named}) == len(named)
        assert not (plan.verifies if not self.config.speculative_tokens else plan.decodes)
        assert all(self.state[sequence.task_id] == "live" for sequence in plan.sampling)
        context = attention = 0
        for sequence in plan.decodes:
            assert sequence.status in (Status.DECODE, Status.LAST)
            request = sequence.task.request
            assert sequence.position <= request.prompt_tokens + request.max_tokens - 1, "a token too many"
            context += sequence.position
            self.compute(plan, sequence, sequence.position - 1, 1)
        for chunk in plan.chunks:
            sequence, start, count = chunk.sequence, chunk.start, chunk.tokens
            assert chunk.samples == (start + count == sequence.target)
            attention += sum(range(start + 1, start + count + 1))
            self.compute(plan, sequence, start, count)
        for verify in plan.verifies:
            context += verify.start + 1 + verify.draft
            self.compute(plan, verify.sequence, verify.start, 1)
            self.guess(verify)
        prefill = sum(chunk.tokens for chunk in plan.chunks)
        draft = sum(verify.draft for verify in plan.verifies)
        sequences = len(plan.decodes) + len(plan.verifies)
        assert plan.shape == (prefill, attention, len(plan.chunks), sequences, context, draft)

    def give_way(self) -> None:
        """What was held for younger requests may be dropped for a decode task, the first of an idle engine."""
        held = {task_id for task_id, state in self.state.items() if state == "held"}
        for task_id in held - set(self.core.held):
            taker = next(iter(self.core._running.values()))
            assert self.core.fetches[0].sequence is taker
            oldest = min(self.tasks[each].request.request_id for each in held)
            assert taker.task.request.request_id <= oldest
            self.ends(task_id, "gave way")

    def guess(self, verify: Verify) -> None:
        """Behind the last known token, guesses are computed; whether they are right is seen later."""
        sequence = verify.sequence
        task = self.tasks[sequence.task_id]
        assert 0 <= verify.draft <= self.config.speculative_tokens
        assert self.tokens[sequence.task_id] + 1 + verify.draft <= task.request.max_tokens
        for position in range(verify.start + 1, verify.start + 1 + verify.draft):
            assert position // self.config.block_tokens >= sequence.tree_blocks
            self.kv[self.place(sequence, position)] = "guess"

    def verified(self, verify: Verify, tokens: int) -> None:
        """The first of the guesses were right."""
        sequence = verify.sequence
        for position in range(verify.start + 1, verify.start + tokens):
            self.kv[self.place(sequence, position)] = self.content(sequence, position)
        self.next_position[sequence.task_id] = verify.start + tokens

    @precondition(lambda self: self.core.in_flight)
    @rule(stop_bits=st.integers(0, 15), stops=st.booleans(), right=st.integers(0, 3))
    def complete(self, stop_bits: int, stops: bool, right: int = 1) -> None:
        """The oldest step is done; some of its tokens end their requests."""
        plan = self.core.in_flight[0]
        accepted = {verify.sequence.task_id: 1 + min(right, verify.draft) for verify in plan.verifies}
        for verify in plan.verifies:
            if self.state[verify.sequence.task_id] == "live":
                self.verified(verify, accepted[verify.sequence.task_id])
        sampling = plan.sampling
        stopped = [s.task_id for bit, s in enumerate(sampling) if stops and stop_bits >> bit & 1]
        got = [sequence for sequence in sampling if self.state[sequence.task_id] == "live"]
        for sequence in got:
            self.tokens[sequence.task_id] += accepted.get(sequence.task_id, 1)
        result = self.core.complete(plan, stopped, accepted)
        live = {verify.sequence.task_id for verify in plan.verifies if verify.sequence in got}
        assert {s.task_id: tokens for s, tokens in result.verified} == {n: t for n, t in accepted.items() if n in live}
        chunked = [chunk.sequence for chunk in plan.chunks if chunk.samples]
        assert result.first_tokens == [sequence for sequence in chunked if sequence in got]
        expected = {}
        for sequence in got:
            task = self.tasks[sequence.task_id]
            assert sequence.generated == self.tokens[sequence.task_id] <= task.request.max_tokens
            if sequence.task_id in stopped or self.tokens[sequence.task_id] == task.request.max_tokens:
                expected[sequence.task_id] = False
            elif task.kind is TaskKind.PREFILL:
                expected[sequence.task_id] = True
        assert {sequence.task_id: held for sequence, held in result.finished} == expected
        assert len(result.finished) == len(expected)
        for task_id, held in expected.items():
            if held:
                self.state[task_id] = "held"
            else:
                self.ends(task_id, "finished")
        del self.written[plan.number]

    def fill(self) -> None:
        """As many plans in flight as there may be."""
        plans = -1
        while len(self.core.in_flight) > plans:
            plans = len(self.core.in_flight)
            self.schedule()

    @rule(steps=st.integers(1, 12))
    def run(self, steps: int) -> None:
        """An engine loop turns: as many plans in flight as allowed, then the oldest completes, with no stop."""
        for _ in range(steps):
            self.fill()
            if self.core.in_flight:
                self.complete(0, False)

    @precondition(lambda self: self.fetches)
    @rule(which=st.integers(0, 99), success=st.sampled_from([True, True, False]))
    def fetched(self, which: int, success: bool) -> None:
        """A transfer ends, well or not, perhaps after its task was aborted."""
        task_id = list(self.fetches)[which % len(self.fetches)]
        sequence, skip, tokens = self.fetches.pop(task_id)
        prefill = self.prefill_of.get(task_id)
        if prefill is not None:
            success = success and self.state[prefill] == "held"
        if success:  # also of an aborted task: the transfer wrote into its blocks all the same
            for position in range(skip, tokens):
                self.kv[self.place(sequence, position)] = self.content(sequence, position)
        lost = self.core.fetched(task_id, success)
        if self.state[task_id] == "aborted":
            assert lost is None
        elif success:
            assert lost is None
            self.next_position[task_id] = tokens
            if prefill is not None:
                self.ends(prefill, "taken over")
                self.context_is_there(sequence, tokens)
        else:
            assert lost is sequence
            self.ends(task_id, "lost")

    @precondition(lambda self: self.moves)
    @rule(which=st.integers(0, 99), success=st.sampled_from([True, True, True, False]))
    def moved(self, which: int, success: bool) -> None:
        """A copy between tiers ends, well or not, whatever has become of those who wanted it."""
        move = self.moves.pop(list(self.moves)[which % len(self.moves)])
        for source, target in zip(move.source_blocks, move.target_blocks, strict=True):
            for offset in range(self.config.block_tokens if success else 0):
                self.write(move.target, target, offset, self.read(move.source, source, offset))
        self.core.moved(move.ticket, success)

    def read(self, tier: Tier, block: int, offset: int) -> Any:
        return self.kv.get((block, offset)) if tier is Tier.HBM else self.lower.get((tier, block, offset))

    def write(self, tier: Tier, block: int, offset: int, content: Any) -> None:
        if tier is Tier.HBM:
            self.kv[block, offset] = content
        else:
            self.lower[tier, block, offset] = content

    @rule(context=st.sampled_from(["a", "b"]))
    def release_context(self, context: str) -> None:
        """An explicitly cached context is let go, whether it is known or not."""
        key = make_task().request
        name = replace(key, context_id=context).context
        assert name is not None
        known = self.core.rtc.kept(name) is not None
        assert self.core.release_context(name) == known

    @precondition(lambda self: self.core.held)
    @rule(which=st.integers(0, 99))
    def release(self, which: int) -> None:
        """Somebody has fetched what a prefill task holds."""
        task_id = list(self.core.held)[which % len(self.core.held)]
        sequence = self.core.held[task_id]
        self.context_is_there(sequence, self.tasks[task_id].context_tokens)
        assert self.core.release_held(task_id)
        assert not self.core.release_held(task_id)
        self.ends(task_id, "fetched")

    @precondition(lambda self: self.core.in_flight and not compiled.is_active())  # whose objects cannot be copied
    @rule(most=st.integers(1, 50))
    def advance(self, most: int) -> None:
        """Steps taken at once leave the engine exactly as the same steps taken one by one, as a loop would now."""
        self.complete(0, False)
        self.fill()
        steps = self.core.steady_steps(most)
        assert 0 <= steps <= most
        if not steps:
            return
        twin = copy.deepcopy(self.core)
        first, last = self.core.in_flight[0].number, self.core.in_flight[-1].number
        self.core.advance(steps)
        for _ in range(steps):
            result = twin.complete(twin.in_flight[0], ())
            assert not result.finished
            assert twin.schedule() is not None
        assert state_of(twin) == state_of(self.core)
        batch = self.core.in_flight[0].decodes
        for sequence in batch:
            self.tokens[sequence.task_id] += steps
            for position in range(sequence.position - steps, sequence.position):
                assert position // self.config.block_tokens >= sequence.tree_blocks
                self.kv[self.place(sequence, position)] = self.content(sequence, position)
            self.next_position[sequence.task_id] = sequence.position
        self.plans += steps
        written = self.written
        self.written = {number + steps: written[number] for number in range(first, last + 1)}
        for blocks in self.written.values():
            blocks.update(sequence.blocks[-1] for sequence in batch)
        for chunk in self.core.in_flight[0].chunks:
            done = self.next_position[chunk.sequence.task_id]
            assert done is not None
            self.compute(self.core.in_flight[0], chunk.sequence, done, chunk.start + chunk.tokens - done)

    # -- what always holds ----------------------------------------------------------------------------------------

    @invariant()
    def conserved(self) -> None:
        """No block is lost, counters agree, tasks that count here are those that have not ended."""
        if not hasattr(self, "core"):
            return
        self.core.check_integrity()
        live = {task_id for task_id, state in self.state.items() if state in ("live", "held")}
        assert set(self.core.task_ids()) == live
        assert set(self.core.held) == {task_id for task_id, state in self.state.items() if state == "held"}
        free = set(self.core.rtc.allocator.free_blocks())
        assert not any(free & blocks for blocks in self.written.values()), "a plan in flight writes into a free block"
        assert not any(free & set(fetch.sequence.blocks) for fetch in self.fetches.values())
        assert len(self.moves) == self.core.rtc.moving
        for move in self.moves.values():
            for tier, blocks in ((move.source, move.source_blocks), (move.target, move.target_blocks)):
                assert not set(self.core.rtc.pools[tier].allocator.free_blocks()) & set(blocks), "copied while free"
        for sequence in self.core.decoding():
            assert sequence.generated == self.tokens[sequence.task_id]

    def teardown(self) -> None:
        """Left alone, everything comes to its end, and the engine is empty: nothing is stuck, nothing is kept."""
        if not hasattr(self, "core"):
            return
        while not self.core.idle:
            self.schedule()
            if self.core.in_flight:
                self.complete(0, False)
            elif self.fetches:
                self.fetched(0, True)
            elif self.moves:
                self.moved(0, True)
            elif not self.core.idle:
                assert self.core.held, f"stuck: {state_of(self.core)}"
                self.release(0)
            self.conserved()
        assert "live" not in self.state.values()
        assert self.core.num_running == self.core.waiting.count == self.core.waiting.tokens == 0
        while self.moves:
            self.moved(0, True)
        while self.core.rtc.release_oldest():
            pass
        assert self.core.rtc.available == self.config.kv_blocks


TestEngineMachine = EngineMachine.TestCase
TestEngineMachine.settings = settings(max_examples=150, stateful_step_count=50)
