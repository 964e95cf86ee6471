"""The engine core: continuous batching under one token budget, on paged KV cache blocks.

`schedule()` decides a step, `complete()` applies its outcome, and nothing else moves a sequence forward. Several plans
may be in flight: a stop is learned when the plan that sampled it completes, so a later plan may hold the sequence once
more; that token is dropped and the blocks are freed when the last plan that uses them is complete.
"""

from collections import deque
from collections.abc import Collection, Iterator, Mapping
from itertools import chain
from types import MappingProxyType
from typing import Final, TypeVar

from cluster.engine_policy import ChunkPolicy, EvictionPolicy, PolicySpec, QueueOrder, VictimPolicy
from cluster.identity import BlockIds
from cluster.latency import StepShape
from cluster.request import Task
from cluster.vocabulary import BLOCK_TOKENS, FailureReason, TaskKind
from flowserve.core.config import EngineConfig
from flowserve.core.decodes import DecodeBatch
from flowserve.core.fetch_cost import FetchCost, fetch_rule
from flowserve.core.plan import Chunk, Fetch, Plan, StepResult, Verify
from flowserve.core.rtc import Match, Rtc
from flowserve.core.sequence import (
    DECODE,
    ENDED,
    FETCHING,
    HELD,
    LAST,
    POPULATING,
    PREFILL,
    SPECULATE,
    WAITING,
    Sequence,
    Status,
)
from flowserve.core.tiers import Tier, Transit
from flowserve.core.transfer import run_lengths, runs_from
from flowserve.core.waiting import Waiting

T = TypeVar("T")
_new_tuple: Final = tuple.__new__
# Of most plans; nobody changes a list of a plan in place.
NO_CHUNKS: Final[list[Chunk]] = []
NO_VERIFIES: Final[list[Verify]] = []
NONE: Mapping[int, int] = MappingProxyType({})
"""What is accepted where nothing speculates."""


class EngineCore:
    """Queues, batch and KV cache of one engine. Plain host logic: no clock, no threads, no tensors.

    `fetch_cost`: what `tiers.fetch: cost` asks; not needed without lower tiers.
    """

    def __init__(self, config: EngineConfig, fetch_cost: FetchCost | None = None) -> None:
        self.config = config
        self.token_budget = config.token_budget
        self.order = _policy(config.order, QueueOrder)
        self.victim = _policy(config.victim, VictimPolicy)
        self.chunking = _policy(config.chunking, ChunkPolicy)
        self.rtc = Rtc(
            config.kv_blocks,
            config.tiers,
            eviction_key=_policy(config.eviction, EvictionPolicy).key,
            allocator=config.allocator,
            # What is dropped is lost; with lower tiers it moves there ahead of need.
            evict_at_least=0 if config.tiers.blocks else int(config.evict_share * config.kv_blocks),
        )
        self.fetch_cost = fetch_rule(config.tiers, fetch_cost)
        self._takes_all = type(self.chunking).prompt_tokens is ChunkPolicy.prompt_tokens
        self._size = config.block_tokens
        self._tiered = config.tiers.blocks > 0
        self._sends_early = config.kv_transfer != "by_request"
        self.decodes = DecodeBatch(config.block_tokens, self.order)
        self.clock = self.decodes.clock
        self.in_flight: deque[Plan] = deque()
        self.held: dict[int, Sequence] = {}
        # Prefills whose KV cache is being fetched, or will be as soon as they are done.
        self.leased: set[int] = set()
        self.failed: list[tuple[Sequence, FailureReason]] = []
        self.fetches: list[Fetch] = []
        # Prefills that have begun, where that is to be said; and those whose KV cache another engine fetches meanwhile.
        self.begun: list[Sequence] = []
        self.followed: set[int] = set()
        self.preemptions = 0
        self.waiting = Waiting(self.order)
        self._sequences: dict[int, Sequence] = {}
        self._running: dict[int, Sequence] = {}
        self._populating: dict[Transit, Sequence] = {}
        self._prefilling: dict[int, Sequence] = {}
        self._speculating: dict[int, Sequence] = {}
        self._ending: dict[int, tuple[int, Sequence, int]] = {}
        # Who found no room, and the state of the cache then: asked again when that changes.
        self._blocked: tuple[int, int | None, int, bool] | None = None
        self._plans = 0
        self._arrivals = 0
        self._watermark = int(config.watermark * config.kv_blocks)

    # -- what goes in ---------------------------------------------------------------------------------------------

    def add(self, task: Task, ids: BlockIds, in_place: bool = False) -> FailureReason | None:
        """Queue a task whose context has the block identities `ids`. Returns why it cannot ever run, else None.

        `in_place`: a decode task whose prefill is of this engine. It goes on in the blocks that this one holds, so it
        waits in no queue for room, see `admit_in_place`.
        """
        if self._outgrows(task, task.generated):
            return FailureReason.TOO_LONG
        stride = self._size // BLOCK_TOKENS
        own_ids = ids if stride == 1 else ids[stride - 1 :: stride]
        sequence = self._sequences[task.task_id] = Sequence(task, own_ids, self._arrivals, self.clock)
        self._arrivals += 1
        if in_place:
            self.waiting.add_in_place(sequence)
        else:
            self.waiting.add(sequence, self.clock.issued)
        return None

    def admit_in_place(self) -> None:
        """Take decode tasks whose KV cache is here into the batch, as far as there are places. Each is a fetch that has
        nothing to copy, over when its prefill is.
        """
        while self.waiting.in_place and len(self._running) < self.config.max_sequences:
            sequence = self.waiting.take_in_place()
            self._running[sequence.task_id] = sequence
            sequence.node, sequence.status = self.rtc.root, FETCHING
            sequence.target -= 1
            self.order.admitted(sequence, 0)
            self.fetches.append(Fetch(sequence, self._blocks_for(sequence.target) * self._size, sequence.target))

    def abort(self, task_id: int, keep: bool = True) -> Sequence | None:
        """Let go of a sequence in any state. Its blocks follow as soon as no plan and no transfer uses them.

        `keep`: what it has computed may stay in the cache (not if it is unsound).
        """
        sequence = self._sequences.get(task_id)
        if sequence is None or sequence.status is ENDED:
            return None
        match sequence.status:
            case Status.WAITING:
                self.waiting.drop(sequence)
                self._forget(sequence)
            case Status.FETCHING:
                sequence.status = ENDED  # the transfer still writes into its blocks: freed by `fetched`
            case Status.HELD if task_id in self.held:
                self.release_held(task_id)
            case Status.POPULATING:  # the copy goes on, into blocks that the cache owns
                self._populating = {handle: each for handle, each in self._populating.items() if each is not sequence}
                self._leave_batch(sequence)
                self._end(sequence, keep)
            case _:
                self._leave_batch(sequence)
                self._end(sequence, keep)
        return sequence

    def fetched(self, task_id: int, success: bool) -> Sequence | None:
        """A transfer ended. On success the sequence decodes from the next plan on; else it is given up and returned."""
        sequence = self._sequences[task_id]
        if success and not sequence.blocks and sequence.status is not ENDED:
            success = self._take_over(sequence)
        if sequence.status is ENDED or not success:
            self._running.pop(task_id)
            aborted = sequence.status is ENDED
            sequence.status = ENDED
            self._free(sequence, 0)
            return None if aborted else sequence
        sequence.computed = sequence.target
        self._cache(sequence, sequence.computed)
        self._begin_decoding(sequence)
        return None

    def _take_over(self, sequence: Sequence) -> bool:
        """Give a decode task the blocks that its prefill holds here. False where that holds none (any more)."""
        assert sequence.task.kv is not None
        held = self.held.pop(sequence.task.kv.task_id, None)
        if held is None:
            return False
        sequence.blocks, sequence.duplicates = held.blocks, held.duplicates
        sequence.node, sequence.tree_blocks = held.node, held.tree_blocks
        sequence.ids = held.ids  # the very ones that the tree has
        self._forget(held)
        return True

    def moved(self, ticket: int, success: bool) -> None:
        """A copy between tiers ended. A sequence that waited for it goes on; after a failure it computes everything."""
        transit = self.rtc.moved(ticket, success)
        sequence = None if transit is None else self._populating.pop(transit, None)
        if transit is None or sequence is None:
            return
        if self.rtc.query_populate(transit):
            assert sequence.node is not None
            sequence.blocks = self.rtc.path_blocks(sequence.node) + sequence.blocks[sequence.tree_blocks :]
            self._begin(sequence)
        else:
            self._leave_batch(sequence)
            self._drop_blocks(sequence)
            sequence.computed, sequence.may_fetch = 0, False
            self.waiting.add(sequence, self.clock.issued)

    def release_context(self, context: str) -> bool:
        """Let go of an explicitly cached context; False where it is not known here."""
        return self.rtc.release(context)

    def release_held(self, task_id: int) -> bool:
        """Drop the KV cache that a finished prefill task holds. False where it is not held (any more)."""
        sequence = self.held.pop(task_id, None)
        if sequence is None:
            return False
        self._end(sequence)
        return True

    # -- schedule and complete ------------------------------------------------------------------------------------

    def schedule(self) -> Plan | None:
        """The next step: every decoding sequence one token, the rest of the budget to prompts in order of arrival.

        None where there is nothing to compute, or where plans in flight must complete first.
        """
        if len(self.in_flight) >= self.config.max_in_flight:
            return None
        if self._tiered:
            self.rtc.swap_out()
        starting = self.decodes.starting()
        if starting is not None and not self._grow(starting.copy()):
            return None
        if self._speculating and not self._grow_speculating():
            return None
        last: list[Sequence] = []
        decodes = self.decodes.in_order()
        sequences = len(decodes)
        context = self.decodes.context + sequences
        if decodes:
            self.decodes.issue(1, last)
        verifies, draft = NO_VERIFIES, 0
        if self._speculating:
            verifies = self._schedule_verifies()
            draft = sum([verify.draft for verify in verifies])
            context += sum([verify.start for verify in verifies]) + len(verifies) + draft
            sequences += len(verifies)
        chunks = NO_CHUNKS
        if self._prefilling or self.waiting.count:
            chunks = self._schedule_prefills(sequences, draft, context, last)
        if not chunks and not sequences:
            return None
        self._plans += 1
        shape = _shape(chunks, sequences, context, draft)
        plan = Plan(self._plans, chunks, decodes, verifies, last, self.clock.issued, shape)
        self.in_flight.append(plan)
        return plan

    def complete(self, plan: Plan, stopped: Collection[int], accepted: Mapping[int, int] = NONE) -> StepResult:
        """Apply the oldest plan in flight: each sampling sequence got a token; those in `stopped` (task ids) end.

        `accepted`: by task id, how many tokens each sequence that speculates got, behind a stop none.
        """
        oldest = self.in_flight.popleft()
        assert oldest is plan, f"plan {plan.number} completed before plan {oldest.number}"
        if plan.decodes:
            self.clock.done = plan.clock
        first_tokens: list[Sequence] = []
        for chunk in plan.chunks:
            sequence = chunk.sequence
            if chunk.samples and sequence.status is not ENDED:
                sequence.sampled += 1
                sequence.pending = False
                self._cache(sequence, sequence.target)
                if sequence.task.request.context_id is not None:
                    self._keep(sequence)
                first_tokens.append(sequence)
        verified: list[tuple[Sequence, int]] = []
        finished: list[tuple[Sequence, bool]] = []
        if plan.last or stopped or plan.verifies:
            ending = set(plan.last)
            for task_id in stopped:
                stopping = self._sequences.get(task_id)
                if stopping is not None:
                    ending.add(stopping)
            if plan.verifies:
                verified = self._apply_verifies(plan.verifies, accepted, ending)
            # In order of arrival, so that blocks are freed in one order whoever lists the stops.
            for sequence in ending if len(ending) == 1 else sorted(ending, key=_arrival):
                if sequence.status is not ENDED:
                    self._leave_batch(sequence)
                    self._end(sequence)
                    finished.append((sequence, False))
        for sequence in first_tokens:
            if sequence.status is HELD:
                del self._running[sequence.task_id]
                self.held[sequence.task_id] = sequence
                finished.append((sequence, True))
        if self._ending:
            self._free_ended(plan.number)
        return StepResult(first_tokens, verified, finished)

    def steady_steps(self, most: int) -> int:
        """How many times `advance` may step on now, up to `most`: plans that decode the batch in flight, and go on with
        one prompt if it takes all that the budget leaves, or do nothing else. The last of them may end the prompt, or
        sequences by the client's limit.

        Asked right after `schedule()`, which has looked at what waits. What may still cut it short is a stop, which
        only the sampler's side knows.
        """
        batch = self.decodes.latest
        if batch is None or not self.in_flight or self._ending or self._speculating:
            return 0  # for one, blocks about to be freed may let in what waits
        plan = self.in_flight[-1]
        if plan.chunks:
            most = min(most, self._steady_chunks(plan))
        elif not batch or (
            self.order.moves_with_service and self.waiting.count and len(self._running) < self.config.max_sequences
        ):
            return 0
        for each in self.in_flight:
            if each.decodes is not batch or each.last or (each.chunks and each is not plan):
                return 0
        room = self.rtc.steady_blocks
        if most <= 0 or room <= 0 or not batch:
            return max(0, most) if room > 0 else 0
        rounds = room // len(batch)
        return max(0, min(self.decodes.plans_left(most), rounds * self._size))

    def _steady_chunks(self, plan: Plan) -> int:
        """How many plans behind this one only go on with its one prompt, the one that ends it among them if nobody else
        can use what that leaves of the budget.
        """
        chunk = plan.chunks[0]
        sequence = chunk.sequence
        if chunk.samples or len(plan.chunks) > 1 or len(self.in_flight) > 1 or not self._takes_all:
            return 0
        if sequence.task_id in self.followed:  # each chunk is sent when it is there
            return 0
        if next(iter(self._prefilling.values())) is not sequence:
            return 0
        alone = not self.waiting.count and len(self._prefilling) == 1
        return (sequence.target - sequence.computed - 1) // chunk.tokens + alone

    def advance(self, steps: int) -> None:
        """By definition `steps` times: complete the oldest plan in flight with no stop, and schedule the next one.

        Only for up to `steady_steps` steps.
        """
        assert self.decodes.latest is not None and self.in_flight
        if self.decodes.latest:
            self.decodes.advance(steps, self.rtc, self.in_flight[-1].last)
        self._plans += steps
        for plan in self.in_flight:
            plan.advance(steps)
        self._advance_prompt(self.in_flight[-1], steps)

    def _advance_prompt(self, plan: Plan, steps: int) -> None:
        """The chunk of its prompt, if it has one, that many steps on."""
        if not plan.chunks:
            return
        before = plan.chunks[0]
        before.sequence.computed += (steps - 1) * before.tokens
        plan.chunks = []
        self._issue_chunk(before.sequence, before.tokens, plan.chunks, plan.last)

    # -- what can be read -----------------------------------------------------------------------------------------

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def idle(self) -> bool:
        """Nothing queued, running, held or in flight."""
        return not self._sequences and not self.in_flight

    def sequence(self, task_id: int) -> Sequence | None:
        return self._sequences.get(task_id)

    def computed_here(self, sequence: Sequence) -> int:
        """Positions of a prompt whose KV cache is there, by completed plans."""
        for plan in self.in_flight:
            for chunk in plan.chunks:
                if chunk.sequence is sequence:
                    return chunk.start
        return sequence.computed

    def decoding(self) -> Iterator[Sequence]:
        """Sequences that decode, in order of joining."""
        return chain(self.decodes.members.values(), self._speculating.values())

    def earliest_clock(self) -> int:
        """The value of the decode clock from which on a sequence here has decoded, or will."""
        return min((self._first_decode(sequence) for sequence in self._sequences.values()), default=self.clock.done)

    def _first_decode(self, sequence: Sequence) -> int:
        if sequence.runs:
            return sequence.runs[0][0]
        return sequence.joined if sequence.status in (DECODE, LAST) else self.clock.done

    def task_ids(self) -> list[int]:
        """Every task that still counts here, held ones included."""
        return [task_id for task_id, sequence in self._sequences.items() if sequence.status is not ENDED]

    def check_integrity(self) -> None:
        """Conserved quantities: free + cached + private blocks == total; counters agree with the queues."""
        self.rtc.check_integrity([block for sequence in self._sequences.values() for block in sequence.private_blocks])
        waiting = [sequence for sequence in self._sequences.values() if sequence.status is WAITING]
        assert len(waiting) == self.waiting.count
        assert sum(sequence.target for sequence in waiting) == self.waiting.tokens
        self.decodes.check_integrity()
        for sequence in self._speculating.values():
            assert sequence.pending or sequence.computed == sequence.task.request.prompt_tokens + sequence.sampled - 1
        for sequence in self.decoding():
            assert len(sequence.blocks) * self._size >= sequence.position
            assert sequence.task_id in self._running

    # -- batch ----------------------------------------------------------------------------------------------------

    def _schedule_prefills(self, decodes: int, draft: int, context: int, last: list[Sequence]) -> list[Chunk]:
        chunks: list[Chunk] = []
        budget = self.token_budget - decodes - draft
        if not budget:
            return chunks
        budget = min(budget, max(1, self.chunking.prompt_tokens(budget, decodes, context)))
        if self._prefilling:
            for sequence in list(self._prefilling.values()):
                if budget == 0:
                    return chunks
                budget -= self._issue_chunk(sequence, budget, chunks, last)
        while budget and self.waiting.count and (admitted := self._admit()):
            if admitted.status is PREFILL:
                budget -= self._issue_chunk(admitted, budget, chunks, last)
        return chunks

    def _issue_chunk(self, sequence: Sequence, budget: int, chunks: list[Chunk], last: list[Sequence]) -> int:
        count = min(budget, sequence.target - sequence.computed)
        samples = sequence.computed + count == sequence.target
        chunks.append(Chunk(sequence, sequence.computed, count, samples))
        sequence.computed += count
        if samples:
            del self._prefilling[sequence.task_id]
            if self._remaining(sequence) <= 1:
                last.append(sequence)
            elif sequence.task.kind is TaskKind.PREFILL:
                sequence.status = HELD
            else:
                self._begin_decoding(sequence, pending=1)
        return count

    def _remaining(self, sequence: Sequence) -> int:
        """Tokens the client's limit still allows, by what completed plans have sampled."""
        return sequence.task.request.max_tokens - sequence.sampled

    def _admit(self) -> Sequence | None:
        """Take the head of the queue into the batch if a place and the blocks for its whole context are there.

        Where there is no room for it and KV cache is held here, for decode tasks elsewhere, the decode task of the
        oldest request goes ahead: others may wait for what is held for that one, while here the head waits for them.
        """
        waiting = self.waiting
        if len(self._running) >= self.config.max_sequences or waiting.count == len(waiting.in_place):
            return None
        head, alone = waiting.head(self.clock.issued), not self._running
        oldest = waiting.oldest_decode_task() if self.held else None
        number = None if oldest is None else oldest.task_id
        if self._blocked == (head.task_id, number, self.rtc.changes, alone):
            return None
        if self._find_room(head, alone):
            return head
        if oldest is not None and oldest is not head and self._find_room(oldest, alone, ahead=True):
            return oldest
        self._blocked = (head.task_id, number, self.rtc.changes, alone)
        return None

    def _find_room(self, sequence: Sequence, alone: bool, ahead: bool = False) -> bool:
        """Take it into the batch if the blocks for its whole context are there. `ahead`: of the head of the queue."""
        fetching = sequence.task.kv is not None and not sequence.preemptions
        target = sequence.target - 1 if fetching else sequence.target
        ids, limit = sequence.ids, (target if fetching else target - 1) // self._size
        match = self._match(sequence, ids, min(limit, len(ids)))
        node, cached = match.node, match.blocks
        need = self._blocks_for(target) - len(cached)
        reserve = 0 if alone else self._watermark
        if alone and need > self.rtc.available and not self.rtc.moving:
            self._release_contexts(need)
            if fetching and self.held:
                self._give_way(sequence, need)
        blocks = None
        if need + reserve <= self.rtc.available:
            if fetching and sequence.task.kv:
                runs = runs_from(sequence.task.kv.runs, len(cached))
            else:
                runs = run_lengths([block for lower in match.lower for block in lower.blocks]) if match.lower else ()
            blocks = self.rtc.alloc_blocks(need, cached[-1] if cached else None, runs)
        if blocks is None:
            self.rtc.unlock(node)
            return False
        if ahead:
            self.waiting.take_ahead(sequence)
        else:
            self.waiting.take_head(sequence)
        self._running[sequence.task_id] = sequence
        sequence.node, sequence.tree_blocks, sequence.blocks = node, len(cached), cached + blocks
        transit = None if fetching or not match.lower else self._populate(sequence, target, match)
        sequence.computed = sequence.tree_blocks * self._size
        if not sequence.preemptions:
            sequence.cached_tokens = sequence.computed
            sequence.fetched_tokens = self._fetched_tokens(transit)
        self.order.admitted(sequence, 0 if fetching else target - sequence.computed)
        if transit is not None:
            sequence.status = POPULATING
            self._populating[transit] = sequence
        elif fetching:
            sequence.status, sequence.target = FETCHING, target
            self.fetches.append(Fetch(sequence, sequence.computed, target))
        else:
            self._begin(sequence)
        return True

    def _begin(self, sequence: Sequence) -> None:
        """All that its prompt needs is there."""
        sequence.status = PREFILL
        self._prefilling[sequence.task_id] = sequence
        if self._sends_early and sequence.task.kind is TaskKind.PREFILL and self._remaining(sequence) > 1:
            self.begun.append(sequence)

    def _match(self, sequence: Sequence, ids: BlockIds, limit: int) -> Match:
        """What of a context is preserved: by its tokens, or, where only contexts with an ID are, by that."""
        if self.config.prefix_cache:
            return self.rtc.match_by_prefix_token(ids, limit)
        context = sequence.task.request.context
        kept = None if context is None else self.rtc.kept(context)
        if context is None or not kept or len(kept) > len(ids) or kept[-1] != ids[len(kept) - 1]:
            return self.rtc.match_by_prefix_token(ids, 0)
        return self.rtc.match_by_id(context, limit)

    def _populate(self, sequence: Sequence, target: int, match: Match) -> Transit | None:
        """Fetch what follows in lower tiers, as far as that is faster than computing it."""
        if not sequence.may_fetch:
            return None
        at, size = len(match.blocks), self._size
        lower = match.parts[1:] if at else match.parts
        count = self.fetch_cost.worthwhile(target, at * size, size, lower)
        if not count:
            return None
        transit = self.rtc.populate(match, sequence.blocks[at : at + count])
        sequence.node, sequence.tree_blocks = transit.nodes[-1], at + count
        return transit

    def _fetched_tokens(self, transit: Transit | None) -> tuple[int, int]:
        """Tokens that come from DRAM and from SSD."""
        if transit is None:
            return 0, 0
        nodes = transit.nodes
        dram, ssd = (sum(len(node.blocks) for node in nodes if node.tier is tier) for tier in (Tier.DRAM, Tier.SSD))
        return dram * self._size, ssd * self._size

    def _keep(self, sequence: Sequence) -> None:
        """Preserve the prompt under the ID that the request gives, unless that names a beginning of it already."""
        context = sequence.task.request.context
        if context is None or not sequence.tree_blocks or sequence.node is None:
            return
        ids = sequence.ids[: sequence.tree_blocks]
        kept = self.rtc.kept(context)
        if not kept or len(kept) > len(ids) or kept[-1] != ids[len(kept) - 1]:
            self.rtc.keep(context, sequence.node, ids)

    def _release_contexts(self, need: int) -> None:
        """Contexts with an ID give way, oldest first, where otherwise nothing could ever run again."""
        while need > self.rtc.available and self.rtc.release_oldest():
            pass

    def _give_way(self, sequence: Sequence, need: int) -> None:
        """Drop what is held for younger requests, the youngest first, so that a decode task finds room (wound-wait,
        Rosenkrantz et al., 1978). Only where nothing else can make any: nothing computes, and nobody fetches.

        A request keeps its age through all retries, so two engines never drop each other's, and what is held for the
        oldest request of all is never dropped.
        """
        if self.leased or self._ending or min(held.age for held in self.held.values()) < sequence.age:
            return
        for held in sorted(self.held.values(), key=lambda held: held.age, reverse=True):
            if need <= self.rtc.available:
                return
            del self.held[held.task_id]
            self._free(held, held.computed)

    def _begin_decoding(self, sequence: Sequence, pending: int = 0) -> None:
        """`pending`: tokens sampled by issued plans that are not complete."""
        if self.config.speculative_tokens:
            sequence.status, sequence.pending = SPECULATE, pending > 0
            self._speculating[sequence.task_id] = sequence
        else:
            self.decodes.join(sequence, self._remaining(sequence) - pending)

    def _leave_batch(self, sequence: Sequence) -> None:
        """Out of the batch, with what was derived from the clock written down."""
        del self._running[sequence.task_id]
        self._prefilling.pop(sequence.task_id, None)
        self._speculating.pop(sequence.task_id, None)
        if sequence.status is DECODE:
            self.decodes.leave(sequence)
        if sequence.status is LAST:
            sequence.runs.append((sequence.joined, max(sequence.joined, self.clock.done)))
            sequence.sampled = sequence.generated
        sequence.status = ENDED

    def _grow(self, starting: list[Sequence]) -> bool:
        """A block for each of these that needs one, preempting another sequence where none is left.

        False where that needs a preemption while plans are in flight.
        """
        size, rtc = self._size, self.rtc
        for sequence in starting:
            while (
                sequence.status is DECODE
                and len(sequence.blocks) * size <= sequence.position
                and not rtc.append_block(sequence.blocks)
            ):
                if self.in_flight:
                    return False
                self._preempt(self._victim())
        return True

    def _grow_speculating(self) -> bool:
        """A block for the next token of every sequence that speculates and can go on; like `_grow`."""
        size = self._size
        for sequence in list(self._speculating.values()):
            if sequence.pending:
                continue
            while len(sequence.blocks) * size <= sequence.computed and sequence.status is SPECULATE:
                if self.rtc.append_block(sequence.blocks):
                    continue
                if self.in_flight:
                    return False
                self._preempt(self._victim())
        return True

    def _schedule_verifies(self) -> list[Verify]:
        """A verification for each sequence whose last tokens are known, of as many guesses as its limit and the free
        blocks allow: for a guess, nobody is preempted.
        """
        verifies, size, most = [], self._size, self.config.speculative_tokens
        for sequence in self._speculating.values():
            if sequence.pending:
                continue
            blocks, start = sequence.blocks, sequence.computed
            draft = min(most, sequence.task.request.max_tokens - sequence.sampled - 1)
            while len(blocks) * size <= start + draft:
                if not self.rtc.append_block(blocks):
                    draft = len(blocks) * size - start - 1
            sequence.pending = True
            verifies.append(Verify(sequence, start, draft))
        return verifies

    def _apply_verifies(
        self, verifies: list[Verify], accepted: Mapping[int, int], ending: set[Sequence]
    ) -> list[tuple[Sequence, int]]:
        """Move sequences on by what was right; those that reach the client's limit join `ending`."""
        verified = []
        for sequence, _, draft in verifies:
            if sequence.status is ENDED:
                continue
            tokens = accepted[sequence.task.task_id]
            assert 1 <= tokens <= 1 + draft, f"{tokens} tokens from {draft} guesses"
            sequence.sampled += tokens
            sequence.computed += tokens
            sequence.pending = False
            sequence.drafted += draft
            sequence.accepted += tokens - 1
            if tokens <= self.config.speculative_tokens and sequence not in ending:
                sequence.rejected += 1
            self.order.verified(sequence, tokens)
            verified.append((sequence, tokens))
            if sequence.sampled == sequence.task.request.max_tokens:
                ending.add(sequence)
        return verified

    def _victim(self) -> Sequence:
        """One that computes here: a transfer in progress cannot be taken back, neither from here nor to here."""
        computing, followed = (DECODE, PREFILL, SPECULATE), self.followed
        victim = self.victim.choose(
            s for s in reversed(self._running.values()) if s.status in computing and s.task_id not in followed
        )
        assert isinstance(victim, Sequence)
        return victim

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the queue; what is computed stays cached as long as there is room, or moves down at once."""
        self._leave_batch(sequence)
        self._cache(sequence, min(sequence.computed, sequence.task.request.prompt_tokens + sequence.sampled))
        cached = sequence.tree_blocks
        self._drop_blocks(sequence)
        if self.config.preemption == "swap":
            self._swap(sequence, cached)
        self.preemptions += 1
        sequence.preemptions += 1
        sequence.computed = 0
        sequence.target = sequence.task.request.prompt_tokens + sequence.sampled
        if self._outgrows(sequence.task, sequence.sampled):
            sequence.status = ENDED
            self.failed.append((sequence, FailureReason.TOO_LONG))
            self._forget(sequence)
        else:
            self.waiting.add(sequence, self.clock.issued)

    def _swap(self, sequence: Sequence, cached: int) -> None:
        """Copy what a sequence had to the next tier. Blocks are free when that has ended, but the others decode on: for
        a block each, the end of it is dropped.
        """
        others = len(self.decodes.members) + len(self._speculating)
        room = self.rtc.alloc_blocks(min(others, self.rtc.available))
        assert room is not None
        self.rtc.free(room)
        left = self.rtc.match_by_prefix_token(sequence.ids, cached)
        self.rtc.unlock(left.node)
        self.rtc.copy(left.node)

    # -- ends -----------------------------------------------------------------------------------------------------

    def _end(self, sequence: Sequence, keep: bool = True) -> None:
        """Free the blocks: now, or with the last plan in flight, which may still use them."""
        sequence.status = ENDED
        sound = sequence.task.request.prompt_tokens + max(sequence.sampled, 1) - 1
        valid = min(sequence.computed, sound) if keep else 0
        if self.in_flight:
            self._ending[sequence.task_id] = (self.in_flight[-1].number, sequence, valid)
        else:
            self._free(sequence, valid)

    def _free_ended(self, completed: int) -> None:
        while self._ending:
            task_id, (number, sequence, valid) = next(iter(self._ending.items()))
            if number > completed:
                return
            del self._ending[task_id]
            self._free(sequence, valid)

    def _free(self, sequence: Sequence, valid_tokens: int) -> None:
        self._cache(sequence, valid_tokens)
        self._drop_blocks(sequence)
        self._forget(sequence)

    def _cache(self, sequence: Sequence, valid_tokens: int) -> None:
        """Put the full blocks of the first `valid_tokens` positions into the tree, for others to find."""
        ids = sequence.ids
        full = min(valid_tokens // self._size, len(ids))
        if full > sequence.tree_blocks and (self.config.prefix_cache or sequence.task.request.context_id is not None):
            assert sequence.node is not None
            sequence.node, duplicates = self.rtc.insert(sequence.node, sequence.tree_blocks, full, ids, sequence.blocks)
            sequence.tree_blocks = full
            sequence.duplicates += duplicates

    def _drop_blocks(self, sequence: Sequence) -> None:
        assert sequence.node is not None
        self.rtc.free(sequence.private_blocks)
        self.rtc.unlock(sequence.node)
        sequence.blocks, sequence.duplicates, sequence.tree_blocks, sequence.node = [], [], 0, None

    def _forget(self, sequence: Sequence) -> None:
        sequence.status = ENDED
        del self._sequences[sequence.task_id]

    def _outgrows(self, task: Task, generated: int) -> bool:
        """Whether a task has more context than the whole KV cache holds, or will have with its next token.

        Of the last token it samples, the KV cache is not computed any more.
        """
        ends = task.kind is TaskKind.PREFILL or task.request.max_tokens - generated <= 1
        return self._blocks_for(task.request.prompt_tokens + generated + (not ends)) > self.rtc.total_blocks

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self._size)


def _policy(spec: PolicySpec | None, kind: type[T]) -> T:
    return kind() if spec is None else spec.build(kind)


def _arrival(sequence: Sequence) -> int:
    return sequence.arrival


def _shape(chunks: list[Chunk], decodes: int, decode_context: int, draft: int) -> StepShape:
    tokens = attention = 0
    for chunk in chunks:
        start, count = chunk.start, chunk.tokens
        tokens += count
        attention += start * count + count * (count + 1) // 2
    return _new_tuple(StepShape, (tokens, attention, len(chunks), decodes, decode_context, draft))
