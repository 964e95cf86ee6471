"""TE-shell: what makes an engine a task executor. Takes messages, hands out plans, and says in events what came of it.

Sans I/O, like the core: the simulator and the process of a real executor run the same object. Whoever drives it calls
`receive`, `next_plan`, `complete` (or `advance`), passes the time, and delivers what it finds in the outbox.
"""

from array import array
from collections.abc import Collection
from itertools import pairwise
from typing import NamedTuple

from cluster.events import (
    Event,
    ExecutorDrained,
    FirstToken,
    LoadReport,
    TaskAborted,
    TaskFailed,
    TaskFinished,
    TaskProgress,
)
from cluster.identity import BlockIds
from cluster.request import KvSource, Task
from cluster.vocabulary import SERVES, ExecutorSpec, FailureReason, TaskKind
from flowserve.core.messages import (
    Abort,
    Dispatch,
    Drain,
    KvFetched,
    KvOffered,
    KvReleased,
    KvRequested,
    Message,
    PeerLost,
)
from flowserve.core.plan import Fetch, Plan
from flowserve.core.scheduler import EngineConfig, EngineCore
from flowserve.core.sequence import Sequence
from flowserve.core.transfer import run_lengths


class Transfer(NamedTuple):
    """KV cache for the data plane to copy, block for block, from executor `source`; answer it with `KvFetched`."""

    task_id: int
    source: str
    source_blocks: list[int]
    blocks: list[int]


class Outbox(NamedTuple):
    """What came of the calls since the last look: to actors, to other executors, to this executor's data plane."""

    events: list[Event]
    peers: list[tuple[str, Message]]
    transfers: list[Transfer]
    forgotten: list[int]
    """Tasks that no later plan names: their tokens may go."""


class _Entry(NamedTuple):
    job_executor: str
    task: Task
    sample_times: list[int]


class TaskExecutor:
    """One executor: role, engine core, tasks at hand, load reports.

    Reports go to `report_to` when something changed, at most every `report_period_ns`.
    """

    def __init__(
        self, name: str, spec: ExecutorSpec, config: EngineConfig, report_to: tuple[str, ...], report_period_ns: int
    ) -> None:
        self.name = name
        self.spec = spec
        self.core = EngineCore(config)
        self.draining = False
        self._report_to = report_to
        self._report_period_ns = report_period_ns
        self._next_report = 0
        self._changed = True
        self._drained = False
        self._entries: dict[int, _Entry] = {}
        self._fetches: dict[int, tuple[Fetch, KvSource]] = {}
        self._copying: set[int] = set()
        self._leases: dict[int, str] = {}
        self._lost: set[str] = set()
        self._step_ends = array("q")
        self._first_clock = 0
        self._now = 0
        self._tokens_out = 0
        self._outbox = Outbox([], [], [], [])

    # -- what is driven -------------------------------------------------------------------------------------------

    def receive(self, message: Message, now: int, ids: BlockIds = ()) -> None:
        """Take one message. `ids`: block identities of the context, with a `Dispatch`."""
        self._changed = True
        self._now = now
        match message:
            case Dispatch():
                self._dispatch(message, ids, now)
            case Abort():
                self._abort(message.task_id, now)
            case Drain():
                self.draining = True
            case KvRequested():
                self._lease(message)
            case KvOffered():
                self._start_transfer(message, now)
            case KvReleased():
                self._end_lease(message.task_id)
            case KvFetched():
                self._fetched(message.task_id, message.success, now)
            case PeerLost():
                self._peer_lost(message.executor, now)
        self._after(now)

    def next_plan(self) -> Plan | None:
        """Decide the next step; also starts the transfers that the engine has made room for."""
        plan = self.core.schedule()
        if self._request_fetches() and plan is None:
            plan = self.core.schedule()
        if self.core.failed:
            self._give_up(self._now)
        return plan

    def _give_up(self, now: int) -> None:
        """Sequences that outgrew the KV cache while a step was decided: there may be no step after it to say so."""
        for sequence, reason in self.core.failed:
            self._fail(self._entries.pop(sequence.task_id), reason, sequence.generated, now)
        self.core.failed.clear()
        self._changed = True
        self._after(now)

    def _request_fetches(self) -> bool:
        """Ask for the KV cache of newly admitted sequences. True where one needs nothing and can decode at once."""
        complete = False
        for fetch in self.core.fetches:
            source = fetch.sequence.task.kv
            assert source is not None
            task_id = fetch.sequence.task_id
            self._fetches[task_id] = (fetch, source)
            if fetch.skip >= fetch.tokens:  # all of it is cached here
                self._outbox.peers.append((source.executor, KvReleased(source.task_id, self.name)))
                del self._fetches[task_id]
                self.core.fetched(task_id, True)
                complete = True
            else:
                self._outbox.peers.append((source.executor, KvRequested(source.task_id, task_id, self.name)))
        self.core.fetches.clear()
        return complete

    def complete(self, plan: Plan, stopped: Collection[int], now: int) -> None:
        """A plan's tokens are there. `stopped`: task ids whose token ends the request."""
        self._now = now
        if plan.decodes:
            self._step_ends.append(now)
        self._tokens_out += len(plan.decodes)
        result = self.core.complete(plan, stopped)
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
        for sequence, held in result.finished:
            self._finished(sequence, held, now)
        self._changed = True
        self._after(now)

    def fail(self, task_id: int, detail: str, now: int) -> None:
        """The engine cannot go on with this task; the others are unharmed, and nothing of it is cached from here on.

        Where a plan has failed for it: before that plan is completed.
        """
        entry = self._entries.pop(task_id, None)
        sequence = self.core.abort(task_id, keep=False)
        if entry is not None and sequence is not None:
            self._fail(entry, FailureReason.ENGINE_ERROR, sequence.generated, now, detail)
        self._changed = True
        self._after(now)

    def advance(self, ends: list[int]) -> None:
        """Steps that only decoded the same batch, with no stop, ended at these times."""
        self._step_ends.extend(ends)
        self._tokens_out += len(ends) * len(self.core.in_flight[0].decodes)
        self.core.advance(len(ends))
        self._changed = True

    def outbox(self) -> Outbox:
        """Everything since the last call; the caller delivers it."""
        outbox, self._outbox = self._outbox, Outbox([], [], [], [])
        return outbox

    # -- load reports ---------------------------------------------------------------------------------------------

    @property
    def next_report(self) -> int:
        """The earliest time of the next load report."""
        return self._next_report

    @property
    def report_due(self) -> int | None:
        """When the next load report is due, if anything changed since the last."""
        return self._next_report if self._changed else None

    def report(self, now: int) -> None:
        """Send a load report, and the progress of what decodes, if one is due."""
        self._now = now
        if not self._changed or now < self._next_report:
            return
        self._changed = False
        self._next_report = now + self._report_period_ns
        core = self.core
        for actor in self._report_to:
            self._emit(
                LoadReport(
                    to=actor,
                    time=now,
                    occurred=now,
                    executor=self.name,
                    waiting=core.num_waiting,
                    running=core.num_running,
                    waiting_tokens=core.waiting_tokens,
                    free_blocks=core.rtc.available,
                    cached_blocks=core.rtc.cached_blocks,
                    total_blocks=core.rtc.total_blocks,
                    generated_tokens=self._tokens_out,
                    preemptions=core.preemptions,
                )
            )
        progress: dict[str, list[tuple[int, int]]] = {}
        for sequence in core.decoding():
            job_executor = self._entries[sequence.task_id].job_executor
            progress.setdefault(job_executor, []).append((sequence.task_id, sequence.generated))
        for actor, pairs in progress.items():
            self._emit(TaskProgress(to=actor, time=now, occurred=now, executor=self.name, generated=tuple(pairs)))

    # -- messages -------------------------------------------------------------------------------------------------

    def _dispatch(self, message: Dispatch, ids: BlockIds, now: int) -> None:
        task, entry = message.task, _Entry(message.job_executor, message.task, [])
        reason: FailureReason | None
        if self.draining:
            reason = FailureReason.NOT_SERVING
        elif task.kind is not SERVES[self.spec.role] or (task.kind is TaskKind.DECODE) != (task.kv is not None):
            reason = FailureReason.INVALID
        else:
            reason = self.core.add(task, ids)
        if reason is None:
            self._entries[task.task_id] = entry
        else:
            self._fail(entry, reason, task.generated, now)

    def _abort(self, task_id: int, now: int) -> None:
        if task_id in self._leases:
            return  # somebody reads these blocks: they go when the lease ends
        entry = self._entries.pop(task_id, None)
        sequence = self.core.abort(task_id)
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

    def _finished(self, sequence: Sequence, held: bool, now: int) -> None:
        entry = self._entries.pop(sequence.task_id)
        self._outbox.forgotten.append(sequence.task_id)
        times: list[int] = []
        samples = entry.sample_times
        # A fetched sequence decodes first without a token from a prefill here: its samples start one run later.
        late = int(entry.task.kv is not None)
        for index in range(max(len(samples) + late, len(sequence.runs))):
            if index >= late and index - late < len(samples):
                times.append(samples[index - late])
            if index < len(sequence.runs):
                first, last = sequence.runs[index]
                times += self._step_ends[first - self._first_clock : last - self._first_clock]
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
                tokens=len(times),
                last_token_ns=now,
                token_gaps_ns=tuple([later - earlier for earlier, later in pairwise(times)]),
                cached_tokens=sequence.cached_tokens,
                preemptions=sequence.preemptions,
                kv_runs=tuple(run_lengths(sequence.blocks)) if held else (),
            )
        )

    def _fail(self, entry: _Entry, reason: FailureReason, generated: int, now: int, detail: str = "") -> None:
        self._outbox.forgotten.append(entry.task.task_id)
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

    # -- KV cache between executors -------------------------------------------------------------------------------

    def _lease(self, message: KvRequested) -> None:
        if message.by in self._lost:
            return  # sent before it died: nobody would end this lease
        held = self.core.held.get(message.task_id)
        if held is not None:
            self._leases[message.task_id] = message.by
        blocks = None if held is None else list(held.blocks)
        self._outbox.peers.append((message.by, KvOffered(message.task_id, message.for_task, self.name, blocks)))

    def _end_lease(self, task_id: int) -> None:
        self._leases.pop(task_id, None)
        self.core.release_held(task_id)

    def _start_transfer(self, message: KvOffered, now: int) -> None:
        task_id = message.for_task
        if task_id not in self._fetches:
            return
        fetch, _ = self._fetches[task_id]
        if message.blocks is None or task_id not in self._entries:
            self._fetched(task_id, False, now)
            return
        size = self.core.config.block_tokens
        span = slice(fetch.skip // size, -(-fetch.tokens // size))
        blocks = fetch.sequence.blocks
        self._copying.add(task_id)
        self._outbox.transfers.append(Transfer(task_id, message.source, message.blocks[span], blocks[span]))

    def _fetched(self, task_id: int, success: bool, now: int) -> None:
        if task_id not in self._fetches:
            return
        _, source = self._fetches.pop(task_id)
        self._copying.discard(task_id)
        self._outbox.peers.append((source.executor, KvReleased(source.task_id, self.name)))
        lost = self.core.fetched(task_id, success)
        if lost is not None:
            self._fail(self._entries.pop(task_id), FailureReason.KV_LOST, lost.generated, now)

    def _peer_lost(self, executor: str, now: int) -> None:
        self._lost.add(executor)
        for task_id, reader in list(self._leases.items()):
            if reader == executor:
                self._end_lease(task_id)
        for task_id, (_, source) in list(self._fetches.items()):
            if source.executor == executor and task_id not in self._copying:  # a copy under way ends by itself
                self._fetched(task_id, False, now)

    # -- after every call -----------------------------------------------------------------------------------------

    def _after(self, now: int) -> None:
        if not (self.core.num_running or self.core.num_waiting or self.core.in_flight):
            del self._step_ends[:]
            self._first_clock = self.core.clock.done
        if self.draining and not self._drained and self.core.idle:
            self._drained = True
            self._emit(ExecutorDrained(to="cm", time=now, occurred=now, executor=self.name))
        self.report(now)

    def _emit(self, event: Event) -> None:
        self._outbox.events.append(event)
