"""Sampled tokens on the host: where they belong, which ends its request, and what is dropped as too late."""

from collections.abc import Collection
from typing import NamedTuple

import numpy as np

from flowserve.core.plan import Plan
from flowserve.core.sequence import Sequence
from flowserve.runtime.runner import Payload, StepOutput, TokenLogprobs
from flowserve.runtime.wire import Ints, Tokens

NEVER = np.iinfo(np.int64).max
NO_TOKEN = -1


class Taken(NamedTuple):
    """Of one plan: what to send (as in `wire.Output`), the tasks that `stopped` with their last token, and how many
    tokens each of those that speculate got, by task id.
    """

    tokens: Tokens | None
    logprobs: list[tuple[int, int, TokenLogprobs]]
    ended: list[int]
    stopped: list[int]
    accepted: dict[int, int]


NOTHING = Taken(None, [], [], [], {})


class _Task(NamedTuple):
    """When the output ends: behind `length` tokens, or with one of `stops` from output index `least` on."""

    length: int
    stops: tuple[int, ...]
    least: int


class _Batch:
    """Sequences that get tokens from a plan, S of them: `task_ids`, `indices` of the next tokens in their requests'
    outputs, and as arrays what `_Task` says: `lengths`, `least` [S], `stops` [S, most].
    """

    __slots__ = ("indices", "least", "lengths", "sequences", "stops", "task_ids")

    def __init__(self, sequences: tuple[Sequence, ...], tasks: dict[int, _Task]) -> None:
        self.sequences = sequences
        self.task_ids = np.array([sequence.task.task_id for sequence in sequences], dtype=np.int64)
        self.indices = np.array([sequence.generated for sequence in sequences], dtype=np.int64)
        gone = _Task(NEVER, (), 0)
        known = [tasks.get(sequence.task.task_id, gone) for sequence in sequences]
        self.lengths = np.array([task.length for task in known], dtype=np.int64)
        self.least = np.array([task.least for task in known], dtype=np.int64)
        self.stops = np.full((len(known), max((len(task.stops) for task in known), default=0)), NO_TOKEN)
        for place, task in enumerate(known):
            self.stops[place, : len(task.stops)] = task.stops


class Intake:
    """Takes the output of plans in the order of their completion, each before the core completes it.

    While the decode batch stays the same, nothing is done per sequence. `eos`: the model's end-of-sequence tokens.
    """

    def __init__(self, eos: Collection[int]) -> None:
        self._eos = eos
        self._tasks: dict[int, _Task] = {}
        self._decodes = _Batch((), {})
        self._gone: dict[int, int] = {}

    def add(self, task_id: int, payload: Payload) -> None:
        """A task begins."""
        length = NEVER if payload.answer is None else payload.answer.output_tokens
        self._tasks[task_id] = _Task(length, tuple(payload.ends(self._eos)), payload.sampling.min_tokens)

    def forget(self, task_id: int, last_plan: int | None) -> None:
        """A task has ended. Plans up to this number may still have tokens of it, which nobody wants."""
        self._tasks.pop(task_id, None)
        if last_plan is not None:
            self._gone[task_id] = last_plan

    def take(self, plan: Plan, output: StepOutput) -> Taken:
        """The tokens of the oldest plan in flight."""
        if plan.decodes is not self._decodes.sequences:
            self._decodes = _Batch(plan.decodes, self._tasks)
        if not plan.chunks and not plan.verifies:
            taken = self._take(self._decodes, output, 0)
        else:
            taken = self._take(_Batch(tuple(plan.sampling), self._tasks), output, len(plan.verifies))
        self._decodes.indices += output.counts[len(output.counts) - len(plan.decodes) :]
        if self._gone:
            self._gone = {task_id: last for task_id, last in self._gone.items() if last > plan.number}
        return taken

    def _take(self, batch: _Batch, output: StepOutput, verifies: int) -> Taken:
        task_ids, indices = batch.task_ids, batch.indices
        counts = np.minimum(output.counts, batch.lengths - indices)
        if self._gone:
            counts[np.isin(task_ids, list(self._gone))] = 0
        places = np.arange(output.tokens.shape[1])
        ends = indices + counts == batch.lengths
        ended: list[int] = []
        if batch.stops.shape[1]:
            stop = (output.tokens[:, :, None] == batch.stops[:, None]).any(2)
            stop &= (indices[:, None] + places >= batch.least[:, None]) & (places < counts[:, None])
            hit = stop.any(1)
            counts = np.where(hit, stop.argmax(1) + 1, counts)
            ends |= hit
            ended = task_ids[hit].tolist()
        stopped: list[int] = task_ids[ends & (counts > 0)].tolist()
        logprobs = []
        if output.logprobs is not None:
            for place, task_id in enumerate(task_ids.tolist()):
                found = output.logprobs.get(task_id, [])[: counts[place]]
                logprobs += [(task_id, index, each) for index, each in enumerate(found, int(indices[place]))]
        first = len(counts) - verifies
        accepted = dict(zip(task_ids[first:].tolist(), counts[first:].tolist(), strict=True))
        return Taken(_tokens(task_ids, indices, output.tokens, counts), logprobs, ended, stopped, accepted)


def _tokens(task_ids: Ints, indices: Ints, tokens: Ints, counts: Ints) -> Tokens | None:
    """The first `counts` [S] of tokens [S, most], one after the other; `indices` [S]: of the first of each."""
    if not counts.any():
        return None
    places = np.arange(tokens.shape[1])
    wanted = places < counts[:, None]
    return Tokens.of(np.repeat(task_ids, counts), (indices[:, None] + places)[wanted], tokens[wanted])
