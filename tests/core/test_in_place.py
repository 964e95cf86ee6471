"""Decode tasks of prefills of the same engine, after a role switch: they go on in the blocks that are held for them."""

import pytest
from msgspec.structs import replace

from cluster import events as ev
from cluster import identity
from cluster.request import KvSource, Task
from cluster.vocabulary import FailureReason, TaskKind
from flowserve.core.config import EngineConfig
from flowserve.core.master import Master
from flowserve.core.messages import Abort, Dispatch, KvOffered, Message
from flowserve.core.outbox import Outbox
from flowserve.core.transfer import KvTransfer
from tests.builders import make_task

ALL: tuple[KvTransfer, ...] = ("by_request", "by_chunk", "by_layer")
PROMPT, LIMIT, BLOCKS = 40, 6, 3


class Engine:
    """One master, steps of 10 ns, to which comes back what it says to itself."""

    def __init__(self, kv_transfer: KvTransfer = "by_request", prefix_cache: bool = True, **limits: int) -> None:
        config = EngineConfig(BLOCKS, 16, 32, 2, watermark=0.0, prefix_cache=prefix_cache, kv_transfer=kv_transfer)
        self.outbox = Outbox()
        self.master = Master("te", replace(config, **limits), self.outbox)
        self.core = self.master.core
        self.now = 0
        self.events: list[ev.Event] = []

    def give(self, message: Message) -> None:
        ids: identity.BlockIds = ()
        if isinstance(message, Dispatch):
            request = message.task.request
            ids = identity.of_context(request.request_id, request.max_tokens, None)
        self.master.receive(message, self.now, ids)

    def prefill(self, number: int) -> None:
        """Task `number` computes the prompt of request `number`."""
        self.give(Dispatch("je", make_task(number, PROMPT, LIMIT, TaskKind.PREFILL)))

    def decode(self, number: int) -> Task:
        """Task 100 + `number` decodes behind it."""
        task = Task(100 + number, make_task(number, PROMPT, LIMIT).request, TaskKind.DECODE, 1, KvSource("te", number))
        self.give(Dispatch("je", task))
        return task

    def step(self) -> bool:
        """A turn of the engine's loop; False where there was nothing to compute."""
        while self.master.next_plan() is not None:
            pass
        computes = bool(self.core.in_flight)
        if computes:
            self.now += 10
            self.master.complete(self.core.in_flight[0], (), self.now)
        self.core.check_integrity()
        said = self.outbox.take()
        assert not said.transfers
        self.events += said.events
        for executor, message in said.peers:
            assert executor == "te"
            assert isinstance(message, KvOffered)
            assert not message.blocks, "there is nothing to copy"
            self.give(message)
        return computes

    def run(self) -> None:
        for _ in range(100):
            self.step()

    def ended(self) -> dict[int, str]:
        """What became of each task that decodes."""
        kinds = (ev.TaskFinished, ev.TaskFailed, ev.TaskAborted)
        return {event.task_id: type(event).__name__ for event in self.events if isinstance(event, kinds)}


def held(**options: bool) -> Engine:
    """The whole KV cache is held for request 0."""
    engine = Engine(**options)
    engine.prefill(0)
    engine.step()
    engine.step()
    assert list(engine.core.held) == [0]
    assert engine.core.rtc.available == 0
    return engine


def held_beside(prompt: int, limit: int) -> Engine:
    """KV cache is held for request 0, and task 7 has the only place, in two blocks of its own."""
    engine = Engine(max_sequences=1, kv_blocks=BLOCKS + 2)
    engine.prefill(0)
    engine.step()
    engine.step()
    engine.give(Dispatch("je", make_task(7, prompt, limit)))
    engine.step()
    return engine


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_a_decode_task_goes_on_in_the_blocks_that_are_held_for_it(prefix_cache: bool) -> None:
    """The next step decodes it, there is no transfer, and there was no room for a second copy."""
    engine = held(prefix_cache=prefix_cache)
    blocks = engine.core.held[0].blocks
    engine.decode(0)
    assert (engine.core.waiting.count, engine.core.waiting.tokens) == (1, PROMPT + 1)
    plan = engine.master.next_plan()
    assert plan is not None
    [sequence] = plan.decodes
    assert (sequence.task_id, sequence.position, sequence.blocks) == (100, PROMPT + 1, blocks)
    assert (engine.core.held, engine.core.waiting.count, engine.core.waiting.tokens) == ({}, 0, 0)
    assert engine.core.sequence(0) is None
    engine.run()
    [finished] = [event for event in engine.events if isinstance(event, ev.TaskFinished) and event.task_id == 100]
    assert (finished.generated, finished.tokens, finished.cached_tokens) == (LIMIT, LIMIT - 1, 0)
    assert finished.token_gaps_ns == (10,) * (LIMIT - 2)
    assert engine.master.idle
    assert engine.core.rtc.available == BLOCKS
    cached = (PROMPT + LIMIT - 1) // 16
    assert engine.core.rtc.cached_blocks == (cached if prefix_cache else 0)


def test_it_waits_for_a_place_alone() -> None:
    """Not behind a prompt that waits for the very blocks it has, but until another one has ended."""
    engine = held_beside(prompt=20, limit=3)
    engine.prefill(2)
    engine.decode(0)
    assert engine.core.waiting.count == 2
    engine.step()
    assert [sequence.task_id for sequence in engine.core.decoding()] == [7]
    engine.step()
    engine.step()
    assert [sequence.task_id for sequence in engine.core.decoding()] == [100]
    engine.run()
    assert engine.ended() == dict.fromkeys((0, 7, 100, 2), "TaskFinished")
    assert list(engine.core.held) == [2]


@pytest.mark.parametrize("kv_transfer", ["by_chunk", "by_layer"])
@pytest.mark.parametrize("depth", [1, 3])
def test_a_decode_task_may_come_ahead_of_the_end_of_its_prefill(kv_transfer: KvTransfer, depth: int) -> None:
    """It has no blocks of its own, hears when the prompt is computed, and decodes then."""
    engine = Engine(kv_transfer, max_in_flight=depth)
    engine.prefill(0)
    engine.master.next_plan()
    engine.decode(0)
    while not engine.ended():
        assert not any(engine.core.decoding())
        assert engine.step()
    assert [(sequence.task_id, len(sequence.blocks)) for sequence in engine.core.decoding()] == [(100, BLOCKS)]
    engine.run()
    assert engine.ended() == {0: "TaskFinished", 100: "TaskFinished"}
    assert engine.master.idle
    assert (engine.core.followed, engine.core.rtc.available) == (set(), BLOCKS)


@pytest.mark.parametrize("kv_transfer", ALL)
def test_what_is_not_held_any_more_is_lost(kv_transfer: KvTransfer) -> None:
    """Its decode task hears so, as from any other executor."""
    engine = Engine(kv_transfer)
    engine.prefill(0)
    engine.step()
    engine.step()
    engine.give(Abort(0))
    engine.decode(0)
    engine.run()
    [failed] = [event for event in engine.events if isinstance(event, ev.TaskFailed)]
    assert (failed.task_id, failed.reason, failed.generated) == (100, FailureReason.KV_LOST, 1)
    assert engine.master.idle


@pytest.mark.parametrize("kv_transfer", ALL)
@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_an_aborted_decode_task_leaves_nothing(kv_transfer: KvTransfer, steps: int) -> None:
    """Whether it waits for a place, for the end of its prefill, or decodes."""
    engine = Engine(kv_transfer, kv_blocks=2 * BLOCKS, max_sequences=2)
    engine.prefill(0)
    if kv_transfer == "by_request":
        engine.step()
        engine.step()
    engine.give(Dispatch("je", make_task(7, 20, 30)))
    engine.step()
    engine.decode(0)
    for _ in range(steps):
        engine.step()
    engine.give(Abort(100))
    engine.give(Abort(0))
    engine.run()
    assert engine.ended()[100] == "TaskAborted"
    assert engine.master.idle
    assert engine.core.rtc.available == 2 * BLOCKS


def test_a_place_that_nobody_takes_is_noticed() -> None:
    """The only other sequence finds no block and gives way, in a step in which nothing else is computed."""
    engine = held_beside(prompt=30, limit=70)
    engine.decode(0)
    engine.run()
    assert engine.ended() == {0: "TaskFinished", 100: "TaskFinished", 7: "TaskFailed"}
    assert engine.master.idle
