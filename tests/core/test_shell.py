"""The TE-shell: what it answers to each message in each state, and what it says of tokens and of its load."""

from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import events as ev
from cluster import identity
from cluster.request import KvSource, Task
from cluster.vocabulary import SERVES, FailureReason, Role, TaskKind
from flowserve.core.config import EngineConfig
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
    SwitchRole,
)
from flowserve.core.outbox import Transfer
from flowserve.core.plan import Plan
from flowserve.core.sequence import Status
from flowserve.core.task_executor import TaskExecutor
from flowserve.core.transfer import KvTransfer
from tests.builders import make_request, make_spec, make_task

STEP = 10
KV_TRANSFERS: tuple[KvTransfer, ...] = ("by_request", "by_chunk", "by_layer")


class Bench:
    """A shell on the bench: every step takes 10 ns, everything it says is kept."""

    def __init__(
        self, role: Role = Role.COLOCATED, config: EngineConfig | None = None, name: str = "te", period: int = 10**9
    ) -> None:
        self.shell = TaskExecutor(name, make_spec(role), config or EngineConfig(50, 16, 64, 8), ("je", "cm"), period)
        self.now = 0
        self.events: list[ev.Event] = []
        self.peers: list[tuple[str, Message]] = []
        self.transfers: list[Transfer] = []
        self.forgotten: list[int] = []
        self.stops: dict[int, int] = {}
        self.sampled: dict[int, list[int]] = {}

    def give(self, *messages: Message) -> None:
        """Messages that are looked at now."""
        for message in messages:
            ids: identity.BlockIds = ()
            if isinstance(message, Dispatch):
                request = message.task.request
                ids = identity.of_context(request.request_id, request.max_tokens, request.block_ids)
            self.shell.receive(message, self.now, ids)
        self.look()

    def dispatch(self, *tasks: Task) -> None:
        self.give(*(Dispatch("je", task) for task in tasks))

    def schedule(self) -> Plan | None:
        while self.shell.next_plan() is not None:
            pass
        self.look()
        return self.shell.core.in_flight[0] if self.shell.core.in_flight else None

    def step(self, steps: int = 1) -> None:
        """Turns of the engine loop; each live sequence that samples has its time noted."""
        for _ in range(steps):
            plan = self.schedule()
            if plan is None:
                return
            self.now += STEP
            stopped = []
            for sequence in plan.sampling:
                if sequence.status is not Status.ENDED:
                    times = self.sampled.setdefault(sequence.task_id, [])
                    times.append(self.now)
                    if len(times) == self.stops.get(sequence.task_id):
                        stopped.append(sequence.task_id)
            self.shell.complete(plan, stopped, self.now)
            self.look()

    def look(self) -> None:
        outbox = self.shell.outbox()
        self.events += outbox.events
        self.peers += outbox.peers
        self.transfers += outbox.transfers
        self.forgotten += outbox.forgotten
        self.shell.core.check_integrity()

    def of(self, kind: type) -> list[ev.Event]:
        return [event for event in self.events if isinstance(event, kind)]

    def finished(self) -> list[ev.TaskFinished]:
        return [event for event in self.events if isinstance(event, ev.TaskFinished)]

    def failures(self) -> list[tuple[int, FailureReason, int]]:
        return [(e.task_id, e.reason, e.generated) for e in self.events if isinstance(e, ev.TaskFailed)]


def decode_task(task_id: int, prompt: int = 40, limit: int = 20, source: str = "source") -> Task:
    return Task(task_id, make_request(task_id, prompt, limit), TaskKind.DECODE, 1, KvSource(source, 1000 + task_id))


def prefilled(task_id: int = 0, prompt: int = 40) -> Bench:
    """A prefill executor that holds the KV cache of one task."""
    bench = Bench(Role.PREFILL, name="source")
    bench.dispatch(make_task(task_id, prompt, kind=TaskKind.PREFILL))
    bench.step()
    assert list(bench.shell.core.held) == [task_id]
    return bench


# -- tasks ----------------------------------------------------------------------------------------------------------


def test_a_task_from_dispatch_to_end() -> None:
    """One first token, one end with count, gaps and times that fit together, and the tokens may go."""
    bench = Bench()
    bench.stops[0] = 4
    bench.dispatch(make_task(0))
    bench.step(9)
    [first] = bench.of(ev.FirstToken)
    assert (first.to, first.time, first.occurred) == ("je", STEP, STEP)
    [finished] = bench.finished()
    assert (finished.generated, finished.tokens, finished.stopped) == (4, 4, True)
    assert (finished.last_token_ns, finished.token_gaps_ns) == (4 * STEP, (STEP, STEP, STEP))
    assert bench.forgotten == [0]
    assert bench.shell.core.idle


def test_a_retry_goes_on_behind_the_known_tokens() -> None:
    """A task with tokens from an earlier attempt counts on, and says nothing of a first token."""
    bench = Bench()
    bench.dispatch(make_task(0, limit=7, generated=5))
    bench.step(9)
    [finished] = bench.finished()
    assert (finished.generated, finished.tokens, finished.token_gaps_ns) == (7, 2, (STEP,))
    assert bench.of(ev.FirstToken) == []


@pytest.mark.parametrize("role", list(SERVES))
@pytest.mark.parametrize("kind", list(TaskKind))
def test_a_role_takes_its_own_kind_of_task(role: Role, kind: TaskKind) -> None:
    """Any other kind of task is invalid there, and so is a decode task without a source of its KV cache."""
    bench = Bench(role)
    source = "source" if kind is TaskKind.DECODE else None
    bench.dispatch(make_task(0, kind=kind, source=source))
    serves = {Role.COLOCATED: TaskKind.SERVE, Role.PREFILL: TaskKind.PREFILL, Role.DECODE: TaskKind.DECODE}
    assert bench.failures() == ([] if serves[role] is kind else [(0, FailureReason.INVALID, 0)])
    bench.dispatch(make_task(1, kind=kind, source=None if source else "source"))
    assert bench.failures()[-1] == (1, FailureReason.INVALID, 0)
    assert 1 in bench.forgotten


def test_what_does_not_fit_is_refused_with_what_it_had() -> None:
    """A context longer than the KV cache comes back at once, and with the tokens that its frontend holds."""
    bench = Bench(config=EngineConfig(2, 16, 64, 8))
    bench.dispatch(make_task(0, prompt=30, generated=2))
    assert bench.failures() == [(0, FailureReason.TOO_LONG, 2)]


def test_what_outgrows_the_cache_fails_though_no_step_follows() -> None:
    """A lone sequence that cannot get another block is reported, though there is nothing left to compute."""
    bench = Bench(config=EngineConfig(2, 16, 64, 8))
    bench.dispatch(make_task(0, prompt=20, limit=100))
    bench.step(50)
    assert bench.failures() == [(0, FailureReason.TOO_LONG, 13)]
    assert bench.events[-1].time == 13 * STEP
    assert bench.shell.core.idle
    bench.give(Abort(0))
    assert bench.of(ev.TaskAborted) == []
    bench.dispatch(make_task(1, prompt=20, limit=2))
    bench.step(5)
    assert [event.task_id for event in bench.finished()] == [1]


def test_outgrowing_the_cache_can_be_the_end_of_a_drain() -> None:
    """An executor whose last task outgrows the cache while it drains is drained then."""
    bench = Bench(config=EngineConfig(2, 16, 64, 8))
    bench.dispatch(make_task(0, prompt=20, limit=100))
    bench.give(Drain())
    bench.step(50)
    assert [type(event) for event in bench.events[-2:]] == [ev.TaskFailed, ev.ExecutorDrained]


@pytest.mark.parametrize("depth", [1, 2])
def test_an_engine_error_ends_one_task_only(depth: int) -> None:
    """The others go on as if it had never been; of its own, only what was cached before may be found again."""
    bench = Bench(config=EngineConfig(50, 16, 64, 8, depth))
    bench.stops[1] = 5
    bench.dispatch(make_task(0, prompt=32, ids=(71, 72)), make_task(1, prompt=20))
    bench.step(2)
    cached = bench.shell.core.rtc.cached_blocks
    plan = bench.schedule()
    assert plan is not None
    bench.now += STEP
    bench.shell.fail(0, "NaN in layer 3", bench.now)
    bench.shell.fail(0, "NaN in layer 3", bench.now)
    bench.shell.fail(99, "never heard of it", bench.now)
    bench.sampled[1].append(bench.now)
    bench.shell.complete(plan, [], bench.now)
    bench.look()
    [failed] = [event for event in bench.events if isinstance(event, ev.TaskFailed)]
    assert (failed.task_id, failed.reason, failed.detail) == (0, FailureReason.ENGINE_ERROR, "NaN in layer 3")
    assert (failed.generated, failed.time, bench.forgotten) == (2, 3 * STEP, [0])
    bench.step(5)
    [finished] = bench.finished()
    assert (finished.task_id, finished.generated, finished.token_gaps_ns) == (1, 5, (STEP,) * 4)
    assert bench.shell.core.idle
    assert bench.shell.core.rtc.cached_blocks == cached


def test_unsound_blocks_are_not_cached() -> None:
    """A prompt whose prefill failed leaves nothing behind that another prompt could find."""
    bench = Bench()
    bench.dispatch(make_task(0, prompt=100, ids=(71, 72, 73, 74, 75, 76)))
    bench.step()
    assert bench.schedule() is not None
    bench.shell.fail(0, "NaN", bench.now)
    bench.step()
    assert bench.shell.core.rtc.cached_blocks == 0
    assert bench.shell.core.rtc.allocator.free == 50


# -- draining -------------------------------------------------------------------------------------------------------


def test_a_draining_executor_refuses_and_says_once_when_it_is_empty() -> None:
    """It finishes what it has, refuses the rest for another to take, and is drained exactly once."""
    bench = Bench()
    bench.stops[0] = 3
    bench.dispatch(make_task(0))
    bench.step()
    bench.give(Drain())
    bench.dispatch(make_task(1, generated=2))
    assert bench.failures() == [(1, FailureReason.NOT_SERVING, 2)]
    assert FailureReason.NOT_SERVING.retriable
    assert bench.of(ev.ExecutorDrained) == []
    bench.step(5)
    [drained] = bench.of(ev.ExecutorDrained)
    assert (drained.to, drained.time) == ("cm", 3 * STEP)
    bench.give(Drain(), Abort(7), PeerLost("nobody"))
    bench.dispatch(make_task(2))
    assert len(bench.of(ev.ExecutorDrained)) == 1


def test_an_idle_executor_is_drained_at_once() -> None:
    """With nothing at hand, the answer to a drain comes immediately."""
    bench = Bench()
    bench.give(Drain())
    assert len(bench.of(ev.ExecutorDrained)) == 1


def test_held_cache_keeps_an_executor_from_being_drained() -> None:
    """A prefill executor is not empty before the last KV cache that it holds was fetched."""
    bench = prefilled()
    bench.give(Drain())
    bench.give(KvRequested(0, 5, "reader"))
    assert bench.of(ev.ExecutorDrained) == []
    bench.give(KvReleased(0, "reader"))
    assert len(bench.of(ev.ExecutorDrained)) == 1


# -- aborts ---------------------------------------------------------------------------------------------------------


def waiting() -> Bench:
    bench = Bench(config=EngineConfig(50, 16, 64, 1))
    bench.dispatch(make_task(9), make_task(0))
    bench.step()
    return bench


def prefilling() -> Bench:
    bench = Bench()
    bench.dispatch(make_task(0, prompt=100))
    bench.step()
    return bench


def decoding() -> Bench:
    bench = Bench()
    bench.dispatch(make_task(0))
    bench.step(3)
    return bench


def in_flight() -> Bench:
    bench = Bench(config=EngineConfig(50, 16, 64, 8, 2))
    bench.dispatch(make_task(0))
    bench.step(3)
    assert bench.schedule() is not None
    return bench


def preempted() -> Bench:
    bench = Bench(config=EngineConfig(4, 16, 64, 8))
    bench.dispatch(make_task(9, prompt=30), make_task(0, prompt=31))
    bench.step(3)
    sequence = bench.shell.core.sequence(0)
    assert sequence is not None
    assert (sequence.status, sequence.preemptions) == (Status.WAITING, 1)
    return bench


def fetching() -> Bench:
    bench = Bench(Role.DECODE)
    bench.dispatch(decode_task(0))
    bench.schedule()
    assert bench.peers == [("source", KvRequested(1000, 0, "te"))]
    return bench


@pytest.mark.parametrize("state", [waiting, prefilling, decoding, in_flight, preempted, fetching])
def test_an_abort_is_answered_once_in_every_state(state: Callable[[], Bench]) -> None:
    """Wherever a task is, letting go of it gives one TaskAborted with its tokens so far, and a second one nothing."""
    bench = state()
    generated = len(bench.sampled.get(0, [])) + (state is fetching)
    bench.give(Abort(0))
    [aborted] = bench.of(ev.TaskAborted)
    assert (aborted.task_id, aborted.generated, aborted.to) == (0, generated, "je")
    bench.give(Abort(0))
    bench.give(Abort(0))
    assert len(bench.of(ev.TaskAborted)) == 1
    assert bench.forgotten == [0]
    bench.step(100)
    if state is fetching:
        bench.give(KvOffered(1000, 0, "source", list(range(3))))
    bench.give(Abort(9))
    bench.step()
    assert bench.shell.core.idle
    assert bench.shell.core.rtc.available == bench.shell.core.config.kv_blocks
    assert bench.finished() == [] or state in (waiting, preempted)
    assert not any(event.task_id == 0 for event in bench.finished())


def test_an_abort_of_nothing_is_not_answered() -> None:
    """A task that has ended, or that was never here, gives no event."""
    bench = decoding()
    bench.stops[0] = 4
    bench.step(2)
    assert len(bench.finished()) == 1
    bench.give(Abort(0), Abort(77))
    assert bench.of(ev.TaskAborted) == []


# -- KV cache between executors -------------------------------------------------------------------------------------


def test_held_cache_is_let_go_without_an_event() -> None:
    """Aborting a finished prefill task frees what it holds; its end was reported before."""
    bench = prefilled()
    assert bench.finished()[0].stopped is False
    bench.give(Abort(0))
    assert bench.of(ev.TaskAborted) == []
    assert bench.shell.core.idle
    bench.give(KvRequested(0, 5, "reader"))
    assert bench.peers == [("reader", KvOffered(0, 5, "source", None))]


def test_an_abort_does_not_free_leased_blocks() -> None:
    """Somebody reads the blocks: they stay until the lease ends, though the task is not wanted any more."""
    bench = prefilled()
    blocks = list(bench.shell.core.held[0].blocks)
    bench.give(KvRequested(0, 5, "reader"))
    assert bench.peers == [("reader", KvOffered(0, 5, "source", blocks))]
    bench.give(Abort(0))
    assert list(bench.shell.core.held) == [0]
    bench.give(KvReleased(0, "reader"))
    assert bench.shell.core.idle


def test_a_dead_reader_ends_its_leases_only() -> None:
    """Leases of the executor that died end; those of others, and what nobody asked for yet, stay."""
    bench = prefilled()
    bench.dispatch(make_task(1, kind=TaskKind.PREFILL), make_task(2, kind=TaskKind.PREFILL))
    bench.step()
    bench.give(KvRequested(0, 5, "dead"), KvRequested(1, 6, "alive"))
    bench.give(PeerLost("dead"))
    assert list(bench.shell.core.held) == [1, 2]


def test_a_late_request_of_the_dead_gets_no_lease() -> None:
    """A request that was on its way when its sender died leases nothing, or the blocks would be held for ever."""
    bench = prefilled()
    bench.give(PeerLost("dead"), KvRequested(0, 5, "dead"))
    assert bench.peers == []
    bench.give(Abort(0))
    assert bench.shell.core.idle


def test_a_dead_source_fails_what_waits_for_it() -> None:
    """A fetch from the executor that died comes back as lost KV cache; a fetch from another goes on."""
    bench = Bench(Role.DECODE)
    bench.dispatch(decode_task(0, source="dead"), decode_task(1, source="alive"))
    bench.schedule()
    bench.give(PeerLost("dead"))
    assert bench.failures() == [(0, FailureReason.KV_LOST, 1)]
    bench.give(KvOffered(1000, 0, "dead", [1, 2, 3]))  # it was on its way
    assert bench.transfers == []
    bench.give(KvOffered(1001, 1, "alive", [1, 2, 3]))
    assert [transfer.task_id for transfer in bench.transfers] == [1]


def test_a_copy_under_way_ends_by_itself() -> None:
    """When the source dies in the middle of a copy, the data plane says how it went; blocks stay until then."""
    for success in (True, False):
        bench = fetching()
        bench.give(KvOffered(1000, 0, "source", [7, 8, 9]))
        [transfer] = bench.transfers
        sequence = bench.shell.core.sequence(0)
        assert sequence is not None
        assert (transfer.source, transfer.source_blocks, transfer.blocks) == ("source", [7, 8, 9], sequence.blocks)
        bench.give(PeerLost("source"))
        assert bench.failures() == []
        bench.give(KvFetched(0, success))
        assert bench.failures() == ([] if success else [(0, FailureReason.KV_LOST, 1)])
        assert bench.peers[-1] == ("source", KvReleased(1000, "te"))


def test_a_fetch_from_request_to_decode() -> None:
    """Ask, copy, release, decode: one message each, and no first token, which the prefill executor reported."""
    bench = fetching()
    bench.give(KvOffered(1000, 0, "source", [7, 8, 9]))
    assert bench.schedule() is None
    bench.give(KvFetched(0, True))
    assert bench.peers == [("source", KvRequested(1000, 0, "te")), ("source", KvReleased(1000, "te"))]
    bench.stops[0] = 3
    bench.step(5)
    [finished] = bench.finished()
    assert (finished.generated, finished.tokens, finished.token_gaps_ns) == (4, 3, (STEP, STEP))
    assert finished.last_token_ns == 3 * STEP
    assert bench.of(ev.FirstToken) == []


def test_only_what_is_not_cached_here_is_copied() -> None:
    """A cached prefix is skipped on both sides; where all is cached, the source is released without being asked."""
    bench = Bench(Role.DECODE)
    ids = (71, 72, 73)
    for task_id in (0, 1):
        request = make_request(task_id, 40, 20, ids[:2])
        bench.dispatch(Task(task_id, request, TaskKind.DECODE, 1, KvSource("source", 1000 + task_id)))
        bench.schedule()
        bench.give(KvOffered(1000 + task_id, task_id, "source", [7, 8, 9]))
        bench.give(KvFetched(task_id, True))
    first, second = bench.transfers
    assert (len(first.source_blocks), second.source_blocks) == (3, [9])
    bench.step()
    bench.peers.clear()
    bench.dispatch(Task(2, make_request(2, 32, 20, ids[:2]), TaskKind.DECODE, 1, KvSource("source", 1002)))
    assert bench.schedule() is not None
    assert bench.peers == [("source", KvReleased(1002, "te"))]
    bench.step(30)
    assert {event.task_id: event.generated for event in bench.finished()} == {0: 20, 1: 20, 2: 20}


def test_a_refused_offer_is_lost_cache() -> None:
    """When the source holds nothing any more, the task comes back to be prefilled again, and its blocks are free."""
    bench = fetching()
    bench.give(KvOffered(1000, 0, "source", None))
    assert bench.failures() == [(0, FailureReason.KV_LOST, 1)]
    assert FailureReason.KV_LOST.retriable
    assert bench.shell.core.idle
    bench.give(KvFetched(0, True))  # unknown by now
    assert len(bench.failures()) == 1


def test_an_abort_in_the_middle_of_a_copy_keeps_the_blocks() -> None:
    """The task is gone at once; blocks that the copy writes into, and the lease at the source, end with the copy."""
    bench = fetching()
    bench.give(KvOffered(1000, 0, "source", [7, 8, 9]))
    bench.give(Abort(0))
    assert len(bench.of(ev.TaskAborted)) == 1
    assert bench.shell.core.rtc.allocator.free == 47
    assert len(bench.peers) == 1
    bench.give(KvFetched(0, True))
    assert bench.shell.core.rtc.allocator.free == 50
    assert bench.peers[-1] == ("source", KvReleased(1000, "te"))
    assert bench.failures() == []


# -- token times ----------------------------------------------------------------------------------------------------


@given(
    lengths=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=6),
    blocks=st.integers(5, 9),
    depth=st.integers(1, 2),
    role=st.sampled_from([Role.COLOCATED, Role.DECODE]),
    apart=st.integers(0, 6),
)
@settings(max_examples=150)
def test_token_times_are_those_of_the_tokens(
    lengths: list[tuple[int, int, int]], blocks: int, depth: int, role: Role, apart: int
) -> None:
    """Preempted or fetched or both: gaps and counts are exactly those of the times at which tokens were sampled."""
    bench = Bench(role, EngineConfig(blocks, 16, 64, 8, depth))
    tasks = []
    for task_id, (prompt, output, limit) in enumerate(lengths):
        bench.stops[task_id] = output
        fetched = role is Role.DECODE
        tasks.append(decode_task(task_id, prompt, limit + 1) if fetched else make_task(task_id, prompt, limit))
    while tasks or not bench.shell.core.idle:
        if tasks:
            bench.dispatch(tasks.pop(0))
        for _ in range(max(apart, 1)):
            bench.step()
            for _, message in bench.peers:
                if isinstance(message, KvRequested):
                    bench.give(KvOffered(message.task_id, message.for_task, "source", list(range(9))))
                    bench.give(KvFetched(message.for_task, True))
            bench.peers.clear()
    finished = {event.task_id: event for event in bench.finished()}
    failed = {task_id for task_id, _, _ in bench.failures()}
    assert set(finished) | failed == set(range(len(lengths)))
    assert not set(finished) & failed
    for task_id, event in finished.items():
        times = bench.sampled[task_id]
        _, output, limit = lengths[task_id]
        assert event.tokens == len(times) == min(output, limit)
        assert event.token_gaps_ns == tuple(later - earlier for earlier, later in pairwise(times))
        assert event.last_token_ns == times[-1]
        assert event.last_token_ns - sum(event.token_gaps_ns) == times[0]
    assert len(bench.of(ev.FirstToken)) == (0 if role is Role.DECODE else len(bench.sampled))


def test_a_fetched_task_that_ends_with_a_recomputed_prompt_keeps_its_times_in_order() -> None:
    """Fetched, preempted, and complete with the one token of its second prefill: still one time after the other."""
    bench = Bench(Role.DECODE, EngineConfig(4, 16, 64, 8))
    bench.dispatch(decode_task(0, prompt=17, limit=40), decode_task(1, prompt=26, limit=8))
    bench.schedule()
    for task_id in (0, 1):
        bench.give(KvOffered(1000 + task_id, task_id, "source", [7, 8]), KvFetched(task_id, True))
    bench.stops[0] = 20
    bench.step(60)
    finished = {event.task_id: event for event in bench.finished()}
    assert finished[1].preemptions == 1
    assert finished[1].tokens == 7
    assert all(gap > 0 for gap in finished[1].token_gaps_ns)


@given(
    events=st.lists(
        st.tuples(st.integers(0, 9), st.integers(1, 80), st.integers(1, 12), st.integers(1, 12)), max_size=12
    ),
    aborts=st.dictionaries(st.integers(0, 11), st.integers(0, 60), max_size=12),
    depth=st.integers(1, 3),
    blocks=st.integers(6, 20),
    delay=st.integers(0, 3),
    switch=st.none() | st.integers(0, 40),
    kv_transfer=st.sampled_from(KV_TRANSFERS),
)
@settings(max_examples=250)
def test_aborts_at_any_moment_leave_nothing_behind(
    events: list[tuple[int, int, int, int]],
    aborts: dict[int, int],
    depth: int,
    blocks: int,
    delay: int,
    switch: int | None,
    kv_transfer: KvTransfer,
) -> None:
    """Prefill here and decode there, with messages that take their time, and every task may be let go of at any turn,
    perhaps while the prefill executor has switched sides: each ends once, and all blocks are free in the end.
    """
    config = EngineConfig(blocks, 16, 32, 4, depth, kv_transfer=kv_transfer)
    benches = {"p": Bench(Role.PREFILL, config, "p"), "d": Bench(Role.DECODE, config, "d")}
    post: list[tuple[int, str, Message]] = []
    seen = {"p": 0, "d": 0}
    ended: dict[int, str] = {}
    started: set[int] = set()
    requests = {number: (prompt, limit) for number, (_, prompt, _, limit) in enumerate(events)}
    for number, (at, prompt, output, limit) in enumerate(events):
        benches["p"].stops[number], benches["d"].stops[number + 100] = output, output - 1
        post.append((at, "p", Dispatch("je", make_task(number, prompt, limit, TaskKind.PREFILL))))
    if switch is not None:
        post.append((switch, "p", SwitchRole(Role.COLOCATED)))
    for turn in range(2000):
        for number, at in aborts.items():
            if at == turn and number in requests:
                # To where a decode task may be on its way, an abort is on its way behind it.
                late = 0 if kv_transfer == "by_request" else delay + 1
                post += [(turn, "p", Abort(number)), (turn + late, "d", Abort(number + 100))]
        due, post = [each for each in post if each[0] <= turn], [each for each in post if each[0] > turn]
        for _, name, message in due:
            benches[name].give(message)
        for name, bench in benches.items():
            bench.step()
            for event in bench.events[seen[name] :]:
                placed = isinstance(event, ev.TaskFinished) and not event.stopped
                if kv_transfer != "by_request":
                    if isinstance(event, ev.TaskFailed | ev.TaskAborted) or (
                        isinstance(event, ev.TaskFinished) and event.stopped
                    ):
                        post.append((turn + delay + 1, "d", Abort(event.task_id + 100)))
                    placed = isinstance(event, ev.PrefillStarted) and event.task_id not in started
                if placed:
                    started.add(event.task_id)
                    number, (prompt, limit) = event.task_id, requests[event.task_id]
                    task = Task(
                        number + 100, make_request(number, prompt, limit), TaskKind.DECODE, 1, KvSource("p", number)
                    )
                    post.append((turn + delay, "d", Dispatch("je", task)))
                    if aborts.get(number, turn) < turn:  # aborted in vain: the job executor lets go of what is held
                        post.append((turn + delay + 1, "d", Abort(number + 100)))
                if isinstance(event, ev.TaskFinished | ev.TaskFailed | ev.TaskAborted):
                    assert event.task_id not in ended
                    ended[event.task_id] = type(event).__name__
                    if isinstance(event, ev.TaskFailed | ev.TaskAborted) and event.task_id >= 100:
                        post.append((turn + delay, "p", Abort(event.task_id - 100)))
            seen[name] = len(bench.events)
            for other, message in bench.peers:
                post.append((turn + delay, other, message))
            for transfer in bench.transfers:
                post.append((turn + 2 * delay, name, KvFetched(transfer.task_id, True)))
            bench.peers.clear()
            bench.transfers.clear()
        if not post and all(bench.shell.core.idle for bench in benches.values()) and turn > 60:
            break
    for name, bench in benches.items():
        assert bench.shell.core.idle, f"{name} keeps {bench.shell.core.task_ids()}, held {list(bench.shell.core.held)}"
        assert bench.shell.core.rtc.available == blocks
    assert {number for number in ended if number < 100} == set(requests)


def test_step_times_are_forgotten_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """An executor that is never idle keeps the times that sequences on it still need, and no others."""
    monkeypatch.setattr("flowserve.core.master.FEWEST_ENDS", 8)
    bench = Bench()
    for number in range(60):
        bench.stops[number] = 10 + number % 3
        bench.dispatch(make_task(number))
        bench.step(5)
    assert len(bench.shell.master._step_ends) <= 2 * 12 + 5
    bench.step(20)
    for event in bench.finished():
        assert event.token_gaps_ns == tuple(b - a for a, b in pairwise(bench.sampled[event.task_id]))
    assert len(bench.finished()) == 60


def test_blocks_of_another_size_are_not_fetched() -> None:
    """A decode task whose cache lies in blocks of another size fails with what to do, and lets go of the lease."""
    bench = fetching()
    bench.give(KvOffered(1000, 0, "source", [7], 128))
    [failed] = [event for event in bench.events if isinstance(event, ev.TaskFailed)]
    assert failed.reason is FailureReason.INVALID
    assert "source keeps 128 tokens per KV cache block and te 16" in failed.detail
    assert bench.peers[-1] == ("source", KvReleased(1000, "te"))
    assert bench.shell.core.idle


# -- load reports ---------------------------------------------------------------------------------------------------


def reports(bench: Bench) -> list[int]:
    return [event.time for event in bench.events if isinstance(event, ev.LoadReport) and event.to == "cm"]


def test_load_is_reported_on_change_and_at_most_once_a_period() -> None:
    """Reports keep their distance, follow a change, and stop when nothing changes."""
    bench = Bench(period=25)
    bench.shell.report(0)
    bench.look()
    assert reports(bench) == [0]
    bench.now = 7
    bench.stops[0] = 8
    bench.dispatch(make_task(0))
    assert reports(bench) == [0]
    assert bench.shell.report_due == 25
    bench.step(9)
    assert reports(bench) == [0, 27, 57, 87]
    assert bench.shell.report_due is None
    bench.now = 500
    bench.shell.report(500)
    bench.look()
    assert reports(bench) == [0, 27, 57, 87]
    bench.dispatch(make_task(1))
    assert reports(bench)[-1] == 500


def test_a_last_change_is_reported_when_the_period_is_over() -> None:
    """What changed shortly after a report is not forgotten: a report is due, and sent then."""
    bench = Bench(period=1000)
    bench.stops[0] = 2
    bench.dispatch(make_task(0))
    bench.step(5)
    assert reports(bench) == [0]
    assert bench.shell.report_due == bench.shell.next_report == 1000
    bench.shell.report(999)
    bench.shell.report(1000)
    bench.look()
    assert reports(bench) == [0, 1000]
    last = bench.events[-1]
    assert isinstance(last, ev.LoadReport)
    assert (last.running, last.waiting, last.generated_tokens, last.free_blocks) == (0, 0, 2, 50)


def test_a_report_says_what_there_is() -> None:
    """Queue, batch and cache are counted as they are, for each actor that listens; progress goes to one of them."""
    bench = Bench(period=25, config=EngineConfig(50, 16, 64, 2))
    bench.dispatch(make_task(0, prompt=40), make_task(1, prompt=20), make_task(2, prompt=33))
    bench.step(3)
    to_je, to_cm, progress = bench.events[-3:]
    assert isinstance(to_je, ev.LoadReport)
    assert isinstance(to_cm, ev.LoadReport)
    assert isinstance(progress, ev.TaskProgress)
    assert (to_je.to, to_cm.to, progress.to) == ("je", "cm", "je")
    assert (to_cm.waiting, to_cm.running, to_cm.waiting_tokens) == (1, 2, 33)
    assert (to_cm.total_blocks, to_cm.cached_blocks, to_cm.free_blocks) == (50, 3, 45)
    assert to_cm.generated_tokens == 6
    assert progress.generated == ((0, 3), (1, 3))
