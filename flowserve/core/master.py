"""The master of one engine: tasks at hand, scheduler and RTC, and KV cache that comes from other engines.

Sans I/O, like the core. It takes messages, hands out plans, and says in its outbox what came of them. It knows neither
role nor load reports: those are the TE-shell's, and an engine runs without one.
"""

from array import array
from collections.abc import Collection, Mapping
from typing import NamedTuple

from cluster.events import TIME_BYTES, Event, FirstToken, PrefillStarted, TaskAborted, TaskFailed, TaskFinished
from cluster.identity import BlockIds
from cluster.request import KvSource, Task
from cluster.vocabulary import FailureReason, Role, TaskKind
from flowserve.core.config import EngineConfig
from flowserve.core.fetch_cost import FetchCost
from flowserve.core.leases import Leases
from flowserve.core.messages import (
    Abort,
    Dispatch,
    KvFetched,
    KvMoved,
    KvOffered,
    KvReleased,
    KvRequested,
    Message,
    PeerLost,
    ReleaseContext,
)
from flowserve.core.outbox import Load, Outbox, Transfer
from flowserve.core.plan import Fetch, Plan
from flowserve.core.scheduler import NONE, EngineCore
from flowserve.core.sequence import HELD, PREFILL
from flowserve.core.sequence import Sequence as EngineSequence
from flowserve.core.transfer import run_lengths

FEWEST_ENDS = 512
"""Step times that are kept before it is worth while to look for those that are not needed."""


class _Entry(NamedTuple):
    job_executor: str
    task: Task
    sample_times: list[int]


class _Fetching:
    """KV cache on its way here. `copying`: transfers under way; `whole`: the source has computed all of it; `failed`:
    why it will not come. It is over when nothing is under way and one of the two is so.
    """

    __slots__ = ("copying", "failed", "fetch", "source", "whole")

    def __init__(self, fetch: Fetch, source: KvSource) -> None:
        self.fetch = fetch
        self.source = source
        self.copying = 0
        self.whole = False
        self.failed: tuple[FailureReason, str] | None = None

    def lose(self) -> None:
        """It will not come, if that was not known for another reason."""
        if self.failed is None:
            self.failed = (FailureReason.KV_LOST, "")


class Master:
    """Runs the tasks of one engine, of any kind. `name`: the executor that its events speak for."""

    def __init__(self, name: str, config: EngineConfig, outbox: Outbox, fetch_cost: FetchCost | None = None) -> None:
        self.name = name
        self.core = EngineCore(config, fetch_cost)
        self._outbox = outbox
        self._entries: dict[int, _Entry] = {}
        self._fetches: dict[int, _Fetching] = {}
        self._leases = Leases(name, self.core, outbox)
        # When each step of decodes ended that somebody may ask for.
        self._step_ends = array("q")
        self._first_clock = 0
        self._most_ends = FEWEST_ENDS
        self._now = 0
        self._tokens_out = 0
        self._busy_ns = 0
        self._busy_since: int | None = None

    # -- what is driven -------------------------------------------------------------------------------------------

    def receive(self, message: Message, now: int, ids: BlockIds = ()) -> None:
        """Take one message. `ids`: block identities of the context, with a `Dispatch`."""
        self._now = now
        match message:
            case Dispatch():
                self._dispatch(message, ids, now)
            case Abort():
                self._abort(message.task_id, now)
            case KvRequested():
                self._leases.request(message)
            case KvOffered():
                self._offered(message, now)
            case KvReleased():
                self._leases.released(message.task_id, message.by)
            case KvFetched():
                self._copied(message.task_id, message.success, now)
            case KvMoved():
                self.core.moved(message.ticket, message.success)
            case ReleaseContext():
                self.core.release_context(message.context)
            case PeerLost():
                self._peer_lost(message.executor, now)
        self._forget_times()

    def next_plan(self) -> Plan | None:
        """Decide the next step; also starts the transfers that there is room for, and copies between tiers."""
        if self.core.waiting.in_place:
            self._begin_in_place()
        plan = self.core.schedule()
        if plan is None and self.core.waiting.in_place:  # somebody may have been preempted and left a place
            self._begin_in_place()
            plan = self.core.schedule()
        if self.core.fetches and self._request_fetches() and plan is None:
            plan = self.core.schedule()
        if self.core.begun:
            self._announce()
        if self.core.followed:
            self._leases.offer_computing()
        if self.core.rtc.moves:
            self._outbox.moves += self.core.rtc.moves
            self.core.rtc.moves.clear()
        if self.core.failed:
            self._give_up(self._now)
        if plan is not None and self._busy_since is None:
            self._busy_since = self._now
        return plan

    def _give_up(self, now: int) -> None:
        """Sequences that outgrew the KV cache while a step was decided: there may be no step after it to say so."""
        for sequence, reason in self.core.failed:
            self._fail(self._entries.pop(sequence.task_id), reason, sequence.generated, now)
        self.core.failed.clear()
        self._forget_times()

    def _begin_in_place(self) -> None:
        """Decode tasks whose KV cache is here come first, and are in the very next plan."""
        self.core.admit_in_place()
        self._request_fetches()

    def _request_fetches(self) -> bool:
        """Ask for the KV cache of newly admitted sequences. True where one needs nothing and can decode at once."""
        complete = False
        for fetch in self.core.fetches:
            source = fetch.sequence.task.kv
            assert source is not None
            task_id = fetch.sequence.task_id
            fetching = self._fetches[task_id] = _Fetching(fetch, source)
            # Where all of it is here; but of a source that sends early it is not known whether it is done.
            if fetch.skip >= fetch.tokens and self.core.config.kv_transfer == "by_request":
                fetching.whole = complete = True
                self._go_on(task_id, self._now)
            elif source.executor == self.name:
                self._leases.request(KvRequested(source.task_id, task_id, self.name))
            else:
                self._outbox.peers.append((source.executor, KvRequested(source.task_id, task_id, self.name)))
        self.core.fetches.clear()
        return complete

    def complete(self, plan: Plan, stopped: Collection[int], now: int, accepted: Mapping[int, int] = NONE) -> None:
        """A plan's tokens are there. `stopped`: task ids whose last token ends the request. `accepted`: tokens by task
        id, of those that speculate.
        """
        self._now = now
        if plan.decodes:
            self._step_ends.append(now)
            self._drop_ends()
        self._tokens_out += len(plan.decodes)
        result = self.core.complete(plan, stopped, accepted)
        for sequence in result.first_tokens:
            self._tokens_out += 1
            entry = self._entries[sequence.task_id]
            if sequence.generated == 1:
                self._emit(
                    FirstToken(
                        to=entry.job_executor,
                        time=now,
                        occurred=now,
                        request_id=entry.task.request.request_id,
                        task_id=sequence.task_id,
                        executor=self.name,
                    )
                )
            entry.sample_times.append(now)
        for sequence, tokens in result.verified:
            self._tokens_out += tokens
            self._entries[sequence.task_id].sample_times.extend([now] * tokens)
        if self.core.followed:
            self._leases.offer_computed(plan)
        if result.finished:
            for sequence, held in result.finished:
                self._finished(sequence, held, now)
            self._forget_times()
        if self.core.followed:
            self._leases.offer_computing()
        if not self.core.in_flight and self._busy_since is not None:
            self._busy_ns += now - self._busy_since
            self._busy_since = None

    def fail(self, task_id: int, detail: str, now: int) -> None:
        """The engine cannot go on with this task; the others are unharmed, and nothing of it is cached from here on.

        Where a plan has failed for it: before that plan is completed.
        """
        entry = self._entries.pop(task_id, None)
        sequence = self.core.abort(task_id, keep=False)
        self._stop_fetching(task_id, now)
        if entry is not None and sequence is not None:
            self._fail(entry, FailureReason.ENGINE_ERROR, sequence.generated, now, detail)
        self._forget_times()

    def advance(self, ends: list[int]) -> None:
        """Steps after which the same went on, see `EngineCore.advance`, ended at these times."""
        if decodes := self.core.in_flight[0].decodes:
            self._step_ends.fromlist(ends)
            self._drop_ends()
            self._tokens_out += len(ends) * len(decodes)
        self.core.advance(len(ends))

    def serve(self, role: Role) -> None:
        """Work within the limits that hold for this role from here on; tasks of any kind at hand are finished."""
        self.core.token_budget = self.core.config.budget(role)

    # -- what can be read -----------------------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """No task, and no KV cache held for anyone."""
        return self.core.idle

    def load(self) -> Load:
        """How much there is, by count."""
        core = self.core
        return Load(
            waiting=core.waiting.count,
            running=core.num_running,
            waiting_tokens=core.waiting.tokens,
            free_blocks=core.rtc.available,
            cached_blocks=core.rtc.cached_blocks,
            total_blocks=core.rtc.total_blocks,
            generated_tokens=self._tokens_out,
            preemptions=core.preemptions,
            busy_ns=self._busy_ns + (0 if self._busy_since is None else self._now - self._busy_since),
        )

    def progress(self) -> dict[str, list[tuple[int, int]]]:
        """(task id, tokens) of what decodes, by the job executor it belongs to."""
        progress: dict[str, list[tuple[int, int]]] = {}
        for sequence in self.core.decoding():
            job_executor = self._entries[sequence.task_id].job_executor
            progress.setdefault(job_executor, []).append((sequence.task_id, sequence.generated))
        return progress

    # -- messages -------------------------------------------------------------------------------------------------

    def _dispatch(self, message: Dispatch, ids: BlockIds, now: int) -> None:
        task, entry = message.task, _Entry(message.job_executor, message.task, [])
        if (task.kind is TaskKind.DECODE) != (task.kv is not None):
            reason: FailureReason | None = FailureReason.INVALID
        else:
            reason = self.core.add(task, ids, in_place=task.kv is not None and task.kv.executor == self.name)
        if reason is None:
            self._entries[task.task_id] = entry
        else:
            self._fail(entry, reason, task.generated, now)

    def _abort(self, task_id: int, now: int) -> None:
        if self._leases.reads_held(task_id):
            return  # somebody reads these blocks: they go when the lease ends
        self._leases.end(task_id)
        entry = self._entries.pop(task_id, None)
        sequence = self.core.abort(task_id)
        self._stop_fetching(task_id, now)
        if entry is not None and sequence is not None:
            self._outbox.forgotten.append(task_id)
            self._emit(
                TaskAborted(
                    to=entry.job_executor,
                    time=now,
                    occurred=now,
                    request_id=entry.task.request.request_id,
                    task_id=task_id,
                    executor=self.name,
                    generated=sequence.generated,
                )
            )

    def _finished(self, sequence: EngineSequence, held: bool, now: int) -> None:
        entry = self._entries.pop(sequence.task_id)
        self._outbox.forgotten.append(sequence.task_id)
        self._leases.finished(sequence, held)
        times = self._token_times(sequence, entry)
        self._emit(
            TaskFinished(
                to=entry.job_executor,
                time=now,
                occurred=now,
                request_id=entry.task.request.request_id,
                task_id=sequence.task_id,
                executor=self.name,
                generated=sequence.generated,
                stopped=not held,
                tokens=len(times) // TIME_BYTES,
                last_token_ns=now,
                token_times=times,
                cached_tokens=sequence.cached_tokens,
                dram_tokens=sequence.fetched_tokens[0],
                ssd_tokens=sequence.fetched_tokens[1],
                preemptions=sequence.preemptions,
                draft_tokens=sequence.drafted,
                accepted_tokens=sequence.accepted,
                draft_rejections=sequence.rejected,
                kv_runs=tuple(run_lengths(sequence.blocks)) if held else (),
            )
        )

    def _token_times(self, sequence: EngineSequence, entry: _Entry) -> bytes:
        """When the tokens of a sequence that is done came, see `pack_times`."""
        samples, runs, base = memoryview(array("q", entry.sample_times)), sequence.runs, self._first_clock
        ends, parts = memoryview(self._step_ends), list[memoryview]()
        # A fetched sequence decodes first without a token from a prefill here: its samples start one run later.
        late = int(entry.task.kv is not None)
        if late and runs:
            parts.append(ends[runs[0][0] - base : runs[0][1] - base])
        for index in range(len(samples)):
            parts.append(samples[index : index + 1])
            if index + late < len(runs):
                first, last = runs[index + late]
                parts.append(ends[first - base : last - base])
        return b"".join(parts)

    def _fail(self, entry: _Entry, reason: FailureReason, generated: int, now: int, detail: str = "") -> None:
        self._outbox.forgotten.append(entry.task.task_id)
        self._leases.end(entry.task.task_id)
        self._emit(
            TaskFailed(
                to=entry.job_executor,
                time=now,
                occurred=now,
                request_id=entry.task.request.request_id,
                task_id=entry.task.task_id,
                executor=self.name,
                reason=reason,
                generated=generated,
                detail=detail,
            )
        )

    def _announce(self) -> None:
        """Prefills have begun: say so where their KV cache can be fetched from now on."""
        for sequence in self.core.begun:
            if sequence.status is PREFILL or sequence.status is HELD:
                entry = self._entries[sequence.task_id]
                self._emit(
                    PrefillStarted(
                        to=entry.job_executor,
                        time=self._now,
                        occurred=self._now,
                        request_id=entry.task.request.request_id,
                        task_id=sequence.task_id,
                        executor=self.name,
                        kv_runs=tuple(run_lengths(sequence.blocks)),
                    )
                )
        self.core.begun.clear()

    # -- KV cache from other executors ----------------------------------------------------------------------------

    def _offered(self, message: KvOffered, now: int) -> None:
        """Start copying what is new of it."""
        task_id, size = message.for_task, self.core.config.block_tokens
        fetching = self._fetches.get(task_id)
        if fetching is None:
            return
        if message.blocks is None:
            fetching.lose()
        elif message.block_tokens != size:
            said = (
                f"{message.source} keeps {message.block_tokens} tokens per KV cache block and {self.name} {size}: give "
                "prefill and decode executors the same block_tokens"
            )
            fetching.failed = (FailureReason.INVALID, said)
        elif fetching.failed is None:
            fetching.whole = not message.more
            fetch = fetching.fetch
            first = max(message.first, fetch.skip // size)
            end = min(message.first + len(message.blocks), -(-fetch.tokens // size))
            if first < end:
                fetching.copying += 1
                source_blocks = message.blocks[first - message.first : end - message.first]
                blocks = fetch.sequence.blocks[first:end]
                self._outbox.transfers.append(Transfer(task_id, message.source, source_blocks, blocks, message.step))
        self._go_on(task_id, now)

    def _copied(self, task_id: int, success: bool, now: int) -> None:
        fetching = self._fetches.get(task_id)
        if fetching is None:
            return
        fetching.copying -= 1
        if not success:
            fetching.lose()
        self._go_on(task_id, now)

    def _stop_fetching(self, task_id: int, now: int) -> None:
        """A task is over that may be waiting for its KV cache: a copy under way goes on, and nothing else."""
        fetching = self._fetches.get(task_id)
        if fetching is not None:
            fetching.lose()
            self._go_on(task_id, now)

    def _go_on(self, task_id: int, now: int) -> None:
        """A fetch that is over: its sequence decodes, or its task has failed. No block is written any more."""
        fetching = self._fetches[task_id]
        if fetching.copying or not (fetching.whole or fetching.failed):
            return
        del self._fetches[task_id]
        source = fetching.source
        lost = self.core.fetched(task_id, fetching.failed is None)
        if source.executor == self.name:
            self._leases.released(source.task_id, self.name)
        else:
            self._outbox.peers.append((source.executor, KvReleased(source.task_id, self.name)))
        if lost is not None:
            reason, detail = fetching.failed or (FailureReason.KV_LOST, "")
            self._fail(self._entries.pop(task_id), reason, lost.generated, now, detail)

    def _peer_lost(self, executor: str, now: int) -> None:
        self._leases.lost(executor)
        for task_id, fetching in list(self._fetches.items()):
            if fetching.source.executor == executor and not fetching.whole:  # else a copy under way ends by itself
                fetching.lose()
                self._go_on(task_id, now)

    def _drop_ends(self) -> None:
        """Forget times that no sequence will ask for any more, where there are many."""
        if len(self._step_ends) <= self._most_ends:
            return
        first = self.core.earliest_clock()
        del self._step_ends[: first - self._first_clock]
        self._first_clock = first
        self._most_ends = max(FEWEST_ENDS, 2 * len(self._step_ends))

    def _forget_times(self) -> None:
        """With nothing under way, nobody asks for the times of earlier steps any more."""
        if not (self.core.num_running or self.core.waiting.count or self.core.in_flight):
            del self._step_ends[:]
            self._first_clock = self.core.clock.done

    def _emit(self, event: Event) -> None:
        self._outbox.events.append(event)
