"""KV cache that is offered while it is computed: by chunk and by layer, at both ends."""

from collections.abc import Callable

import pytest

from cluster import events as ev
from cluster import identity
from cluster.request import Task
from cluster.vocabulary import FailureReason, TaskKind
from flowserve.core.config import EngineConfig
from flowserve.core.master import Master
from flowserve.core.messages import (
    Abort,
    Dispatch,
    KvFetched,
    KvOffered,
    KvReleased,
    KvRequested,
    Message,
    PeerLost,
)
from flowserve.core.outbox import Outbox
from flowserve.core.transfer import KvTransfer, pieces_by_layer
from tests.builders import make_task

BOTH: tuple[KvTransfer, ...] = ("by_chunk", "by_layer")
PROMPT, CHUNK = 100, 40


class Engine:
    """One master: steps of 10 ns, and all it has said."""

    def __init__(self, kv_transfer: KvTransfer, blocks: int = 50, in_flight: int = 1, sequences: int = 8) -> None:
        self.outbox = Outbox()
        config = EngineConfig(blocks, 16, CHUNK, sequences, in_flight, 0.0, kv_transfer=kv_transfer)
        self.master = Master("te", config, self.outbox)
        self.now = 0

    def dispatch(self, task: Task) -> None:
        request = task.request
        ids = identity.of_context(request.request_id, request.max_tokens, request.block_ids)
        self.give(Dispatch("je", task), ids)

    def give(self, message: Message, ids: identity.BlockIds = ()) -> None:
        self.master.receive(message, self.now, ids)

    def schedule(self) -> None:
        while self.master.next_plan() is not None:
            pass

    def step(self, stopped: tuple[int, ...] = ()) -> None:
        """The oldest plan ends, and as many as may be in flight are scheduled again."""
        self.now += 10
        self.master.complete(self.master.core.in_flight[0], stopped, self.now)
        self.master.core.check_integrity()
        self.schedule()

    def offers(self) -> list[tuple[int, int, bool, int | None]]:
        """What was offered since the last time: (first block, number of blocks, more, step)."""
        said = [message for _, message in self.outbox.take().peers if isinstance(message, KvOffered)]
        return [(each.first, len(each.blocks or ()), each.more, each.step) for each in said]


def prefilling(kv_transfer: KvTransfer, limit: int = 9, **options: int) -> Engine:
    """The first chunk of a prompt of 100 tokens is under way, and its decode task elsewhere has asked for it."""
    engine = Engine(kv_transfer, **options)
    engine.dispatch(make_task(0, PROMPT, limit, TaskKind.PREFILL))
    engine.schedule()
    [started] = engine.outbox.take().events
    assert started == ev.PrefillStarted(
        to="je", time=0, occurred=0, request_id=0, task_id=0, executor="te", kv_runs=(7,)
    )
    engine.give(KvRequested(0, 100, "d"))
    return engine


def test_full_blocks_are_offered_when_their_chunk_is_computed() -> None:
    """Of 40 tokens two blocks of 16, of 80 five, and with the end of the prompt the rest, the seventh half full."""
    engine = prefilling("by_chunk")
    assert engine.offers() == []
    engine.step()
    assert engine.offers() == [(0, 2, True, None)]
    engine.step()
    assert engine.offers() == [(2, 3, True, None)]
    engine.step()
    assert engine.offers() == [(5, 2, False, None)]
    assert list(engine.master.core.held) == [0]
    engine.give(KvReleased(0, "d"))
    assert engine.master.idle


def test_the_last_chunk_is_offered_when_it_begins() -> None:
    """By layer: with the number of the plan that computes it; its end is said as well."""
    engine = prefilling("by_layer")
    engine.step()
    assert engine.offers() == [(0, 2, True, None)]
    engine.step()
    assert engine.offers() == [(2, 3, True, None), (5, 2, True, 3)]
    engine.step()
    assert engine.offers() == [(7, 0, False, None)]


def test_plans_in_flight_are_not_offered_as_computed() -> None:
    """The last chunk is offered when it is on the device, not when it is planned."""
    engine = prefilling("by_layer", in_flight=3)
    assert engine.offers() == []
    engine.step()
    assert engine.offers() == [(0, 2, True, None)]
    engine.step()
    assert engine.offers() == [(2, 3, True, None), (5, 2, True, 3)]


@pytest.mark.parametrize("kv_transfer", BOTH)
def test_who_asks_late_gets_what_there_is(kv_transfer: KvTransfer) -> None:
    """In the middle of the prompt what is computed, and of a prefill that is done everything at once."""
    engine = Engine(kv_transfer)
    engine.dispatch(make_task(0, PROMPT, 9, TaskKind.PREFILL))
    engine.schedule()
    engine.step()
    engine.step()
    engine.give(KvRequested(0, 100, "d"))
    last = [(5, 2, True, 3)] if kv_transfer == "by_layer" else []
    assert engine.offers() == [(0, 5, True, None), *last]
    engine = Engine(kv_transfer)
    engine.dispatch(make_task(0, PROMPT, 9, TaskKind.PREFILL))
    engine.schedule()
    for _ in range(3):
        engine.step()
    engine.give(KvRequested(0, 100, "d"))
    assert engine.offers() == [(0, 7, False, None)]


@pytest.mark.parametrize("kv_transfer", BOTH)
@pytest.mark.parametrize(
    "end",
    [
        lambda engine: engine.give(Abort(0)),
        lambda engine: engine.master.fail(0, "broken", engine.now),
        lambda engine: [engine.step(stopped) for stopped in ((), (), (0,))],
    ],
    ids=["aborted", "failed", "ended with its first token"],
)
def test_a_prefill_that_comes_to_nothing_is_not_held(kv_transfer: KvTransfer, end: Callable[[Engine], None]) -> None:
    """Its reader hears of it from the job executor, and its release ends nothing that is another's."""
    engine = prefilling(kv_transfer)
    end(engine)
    engine.outbox.take()
    while engine.master.core.in_flight:
        engine.step()
    assert engine.offers() == []
    assert engine.master.idle
    assert not engine.master.core.followed
    engine.give(KvReleased(0, "d"))
    engine.give(KvRequested(0, 101, "d"))
    assert engine.outbox.take().peers == [("d", KvOffered(0, 101, "te", None, 16))]


def test_a_prefill_of_one_token_is_not_announced() -> None:
    """There is nothing to decode behind it; nor is anything announced that is not a prefill."""
    for task in (make_task(0, 20, 1, TaskKind.PREFILL), make_task(0, 20, 9)):
        engine = Engine("by_chunk")
        engine.dispatch(task)
        engine.schedule()
        assert engine.outbox.take().events == []


def crowded() -> Engine:
    """A decoding sequence that soon needs a block, beside a prefill that came later and holds the last ones."""
    engine = Engine("by_chunk", blocks=9)
    engine.dispatch(make_task(1, 31, 30))
    engine.schedule()
    engine.dispatch(make_task(0, PROMPT, 9, TaskKind.PREFILL))
    engine.step()
    assert engine.master.core.rtc.available == 0
    return engine


def test_a_prefill_that_others_follow_is_not_preempted() -> None:
    """Who needs a block gives way itself, though the prefill came later."""
    engine = crowded()
    engine.give(KvRequested(0, 100, "d"))
    while not engine.master.core.preemptions:
        engine.step()
    assert engine.master.core.held or engine.master.core.followed
    sequence = engine.master.core.sequence(0)
    assert sequence is not None
    assert sequence.preemptions == 0


def test_what_is_asked_of_a_preempted_prefill_is_refused() -> None:
    """It waits without blocks: a reservation for it elsewhere could wait for ever. It says when it begins again."""
    engine = crowded()
    while not engine.master.core.preemptions:
        engine.step()
    engine.outbox.take()
    engine.give(KvRequested(0, 100, "d"))
    assert engine.outbox.take().peers == [("d", KvOffered(0, 100, "te", None, 16))]
    said: list[ev.Event] = []
    while engine.master.core.in_flight:
        engine.step()
        said += engine.outbox.take().events
    assert [event.task_id for event in said if isinstance(event, ev.PrefillStarted)] == [0]


def test_a_reader_that_died_frees_a_prefill() -> None:
    """It may be preempted again, and is held for the next reader when it is done."""
    engine = prefilling("by_chunk")
    engine.give(PeerLost("d"))
    assert not engine.master.core.followed
    for _ in range(3):
        engine.step()
    assert engine.offers() == []
    engine.give(KvRequested(0, 101, "other"))
    engine.give(KvReleased(0, "d"))  # sent before it died: not its lease
    assert list(engine.master.core.held) == [0]


# -- where it is fetched to -----------------------------------------------------------------------------------------


def fetching(blocks: tuple[int, ...] | None = None) -> Engine:
    """A decode task that has asked for the KV cache of its prefill."""
    engine = Engine("by_layer")
    engine.dispatch(make_task(0, PROMPT, 9, TaskKind.DECODE, 1, ids=blocks, source="p"))
    engine.schedule()
    assert engine.outbox.take().peers == [("p", KvRequested(1000, 0, "te"))]
    return engine


def offer(first: int, count: int, more: bool = True, step: int | None = None) -> KvOffered:
    return KvOffered(1000, 0, "p", list(range(20 + first, 20 + first + count)), 16, first, more, step)


def test_decoding_waits_for_every_part_and_for_the_end_of_the_prefill() -> None:
    """Copies alone do not begin it, though all blocks are there: the first token is not yet known."""
    engine = fetching()
    engine.give(offer(0, 5))
    engine.give(offer(5, 2, step=3))
    blocks = engine.master.core.sequence(0).blocks  # type: ignore[union-attr]
    assert [(each.source_blocks, each.blocks, each.step) for each in engine.outbox.take().transfers] == [
        (list(range(20, 25)), blocks[:5], None),
        ([25, 26], blocks[5:], 3),
    ]
    engine.give(KvFetched(0, True))
    engine.give(KvFetched(0, True))
    engine.schedule()
    assert not engine.master.core.in_flight
    assert engine.outbox.take().peers == []
    engine.give(offer(7, 0, more=False))
    assert engine.outbox.take().peers == [("p", KvReleased(1000, "te"))]
    engine.schedule()
    assert [sequence.task_id for sequence in engine.master.core.in_flight[0].decodes] == [0]


def test_the_end_of_the_prefill_waits_for_copies() -> None:
    """The other way round it waits, too."""
    engine = fetching()
    engine.give(offer(0, 7))
    engine.give(offer(7, 0, more=False))
    engine.schedule()
    assert not engine.master.core.in_flight
    engine.give(KvFetched(0, True))
    engine.schedule()
    assert engine.master.core.in_flight


def with_cached(ids: tuple[int, ...]) -> Engine:
    """One that has computed the first three blocks of a context before."""
    engine = Engine("by_layer")
    engine.dispatch(make_task(5, 16 * 3, 1, ids=ids))
    engine.schedule()
    engine.step()
    engine.step()
    engine.outbox.take()
    return engine


def test_what_is_cached_here_is_not_copied() -> None:
    """Parts in front of, across and behind the end of a cached prefix; where all is cached, the end is waited for."""
    ids = (11, 22, 33, 44, 55, 66, 77)
    engine = with_cached(ids)
    engine.dispatch(make_task(0, PROMPT, 9, TaskKind.DECODE, 1, ids=ids, source="p"))
    engine.schedule()
    for part in (offer(0, 2), offer(2, 2), offer(4, 3)):
        engine.give(part)
    assert [each.source_blocks for each in engine.outbox.take().transfers] == [[23], [24, 25, 26]]
    engine = with_cached(ids)
    engine.dispatch(make_task(0, 16 * 3, 9, TaskKind.DECODE, 1, ids=ids, source="p"))
    engine.schedule()
    assert engine.outbox.take().peers == [("p", KvRequested(1000, 0, "te"))]
    engine.give(offer(0, 3, more=False))
    engine.schedule()
    assert engine.outbox.take().transfers == []
    assert engine.master.core.in_flight


@pytest.mark.parametrize("lost", [KvOffered(1000, 0, "p", None), PeerLost("p")], ids=["told", "dead"])
def test_a_source_that_comes_to_nothing_fails_the_task(lost: Message) -> None:
    """At once, or when what is being copied has ended: no block is written into after it is free."""
    engine = fetching()
    engine.give(lost)
    [failed] = engine.outbox.take().events
    assert isinstance(failed, ev.TaskFailed)
    assert (failed.reason, failed.generated) == (FailureReason.KV_LOST, 1)
    assert engine.master.idle
    engine = fetching()
    engine.give(offer(0, 5))
    engine.give(lost)
    assert engine.outbox.take().events == []
    engine.give(KvFetched(0, True))
    assert isinstance(engine.outbox.take().events[0], ev.TaskFailed)
    assert engine.master.idle
    engine.give(offer(5, 2))
    assert engine.outbox.take().transfers == []


def test_an_aborted_fetch_is_over_with_its_copies() -> None:
    """Where nothing is being copied, at once; what the source says later is ignored."""
    engine = fetching()
    engine.give(Abort(0))
    said = engine.outbox.take()
    assert [type(event) for event in said.events] == [ev.TaskAborted]
    assert said.peers == [("p", KvReleased(1000, "te"))]
    assert engine.master.idle
    engine = fetching()
    engine.give(offer(0, 5))
    engine.give(Abort(0))
    engine.give(offer(5, 2, more=False))
    assert len(engine.outbox.take().transfers) == 1
    assert not engine.master.idle
    engine.give(KvFetched(0, True))
    said = engine.outbox.take()
    assert (said.events, said.peers) == ([], [("p", KvReleased(1000, "te"))])
    assert engine.master.idle


def test_pieces_by_layer() -> None:
    """Layers lie apart: two pieces each per run, as by request. Blocks lie apart: a piece per block and layer."""
    assert pieces_by_layer("layer_major", 4, [7]) == 8
    assert pieces_by_layer("layer_major", 4, [3, 1]) == 16
    assert pieces_by_layer("block_major", 4, [3, 1]) == 16
    assert pieces_by_layer("block_major", 4, [7]) == 28
