"""What an engine did, turn by turn: the record that lets a simulator be held against a real engine, plan by plan."""

from collections.abc import Iterator
from pathlib import Path

import msgspec

from cluster.latency import StepShape
from flowserve.core.messages import Message
from flowserve.core.plan import Plan


class PlanRecord(msgspec.Struct, frozen=True):
    """A scheduled plan. `chunks`: (task id, start, tokens), so prefix hits show; `decodes`: task ids."""

    number: int
    chunks: list[tuple[int, int, int]]
    decodes: list[int]
    shape: StepShape

    @classmethod
    def of(cls, plan: Plan) -> "PlanRecord":
        chunks = [(chunk.sequence.task_id, chunk.start, chunk.tokens) for chunk in plan.chunks]
        return cls(plan.number, chunks, [sequence.task_id for sequence in plan.decodes], plan.shape)


class TurnRecord(msgspec.Struct, frozen=True):
    """One turn of the engine loop: messages in the order taken, what was scheduled, and what was completed.

    Times in ns of the run: `start_ns` when the messages were taken, `end_ns` when the tokens of the completed plan were
    there. `plans`: scheduled and launched, in this order. `done`: number of the plan that was completed then, the
    oldest in flight; None where none was. `stopped`: task ids whose token in it was the last. `preemptions`: so far,
    after scheduling. `transfers`: KV cache the turn asked the data plane for, as (task id, source blocks, blocks).
    """

    start_ns: int
    end_ns: int
    messages: list[Message]
    plans: list[PlanRecord]
    done: int | None
    stopped: list[int]
    preemptions: int
    transfers: list[tuple[int, list[int], list[int]]]


def read_turns(path: Path) -> Iterator[TurnRecord]:
    """The turns that an engine recorded, in order."""
    decode = msgspec.json.Decoder(TurnRecord).decode
    with path.open("rb") as file:
        for line in file:
            yield decode(line)
