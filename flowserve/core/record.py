"""What an engine did, turn by turn: the record that lets a simulator be held against a real engine, plan by plan."""

from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from cluster.latency import StepShape
from flowserve.core.messages import KvFetched, KvOffered, Message
from flowserve.core.plan import Plan
from flowserve.core.tiers import Move


class PlanRecord(msgspec.Struct, frozen=True):
    """A scheduled plan. `chunks`: (task id, start, tokens), so prefix hits show; `decodes`: task ids; `verifies`: (task
    id, start, guesses).
    """

    number: int
    chunks: list[tuple[int, int, int]]
    decodes: list[int]
    shape: StepShape
    verifies: list[tuple[int, int, int]] = []

    @classmethod
    def of(cls, plan: Plan) -> "PlanRecord":
        chunks = [(chunk.sequence.task_id, chunk.start, chunk.tokens) for chunk in plan.chunks]
        verifies = [(verify.sequence.task_id, verify.start, verify.draft) for verify in plan.verifies]
        return cls(plan.number, chunks, [sequence.task_id for sequence in plan.decodes], plan.shape, verifies)


class TurnRecord(msgspec.Struct, frozen=True):
    """One turn of the engine loop: messages in the order taken, what was scheduled, and what was completed.

    Times in ns of the run: `start_ns` when the messages were taken, `end_ns` when the tokens of the completed plan were
    there. `plans`: scheduled and launched, in this order. `done`: number of the plan that was completed then, the
    oldest in flight; None where none was. `stopped`: task ids whose token in it was the last. `preemptions`: so far,
    after scheduling. `transfers`: KV cache the turn asked the data plane for, as (task id, source blocks, blocks).
    `moves`: copies between tiers likewise, asked for with the plans. `accepted`: tokens by task id, of those in it that
    speculate.
    """

    start_ns: int
    end_ns: int
    messages: list[Message]
    plans: list[PlanRecord]
    done: int | None
    stopped: list[int]
    preemptions: int
    transfers: list[tuple[int, list[int], list[int]]]
    moves: list[Move]
    accepted: dict[int, int] = {}


def read_turns(path: Path) -> Iterator[TurnRecord]:
    """The turns that an engine recorded, in order."""
    decode = msgspec.json.Decoder(TurnRecord).decode
    with path.open("rb") as file:
        for line in file:
            yield decode(line)


class StepSpan(NamedTuple):
    """What an engine computed between two times, in ns of the run: `steps` of them on end where only decodes went on,
    the first of `shape`.
    """

    executor: str
    start_ns: int
    end_ns: int
    steps: int
    shape: StepShape


class TransferSpan(NamedTuple):
    """KV cache on its way between two times, in ns of the run: `blocks` of it in so many pieces of memory.

    Between executors it is for task `task_id` at `target`; between tiers of one executor, for none.
    """

    source: str
    target: str
    start_ns: int
    end_ns: int
    blocks: int
    num_bytes: int
    pieces: int
    task_id: int | None = None


def transfers(executor: str, turns: Iterable[TurnRecord]) -> Iterator[TransferSpan]:
    """The transfers that an engine's turns tell of, from being asked for to being heard of; pieces and bytes: 0, as
    they are not recorded.
    """
    sources: dict[int, str] = {}
    asked: dict[int, deque[tuple[int, int]]] = {}
    for turn in turns:
        for message in turn.messages:
            match message:
                case KvOffered():
                    sources[message.for_task] = message.source
                case KvFetched() if asked.get(message.task_id):
                    start, blocks = asked[message.task_id].popleft()
                    source = sources[message.task_id]
                    yield TransferSpan(source, executor, start, turn.start_ns, blocks, 0, 0, message.task_id)
                case _:
                    pass
        for task_id, _, blocks_ in turn.transfers:
            asked.setdefault(task_id, deque()).append((turn.end_ns, len(blocks_)))


def spans(executor: str, turns: Iterable[TurnRecord]) -> Iterator[StepSpan]:
    """The steps that an engine's turns tell of: from launch, or the end of the step before it, to having its tokens."""
    launched: deque[tuple[int, StepShape]] = deque()
    free = 0
    for turn in turns:
        launched.extend((turn.start_ns, plan.shape) for plan in turn.plans)
        if turn.done is not None:
            start, shape = launched.popleft()
            yield StepSpan(executor, max(start, free), turn.end_ns, 1, shape)
            free = turn.end_ns
