"""A plan as arrays: what one step needs on the device, packed with as little work as the change since the last step.

A task has a row in the block tables, in the host's table of tokens, and in the device's table of last tokens. While the
decode batch stays the same, a step costs a few array operations and a look at the sequences that start a block.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from flowserve.core.plan import Plan
from flowserve.core.sequence import Sequence
from flowserve.ops.step import Ints


class PackedStep(NamedTuple):
    """Host arrays of one step, nobody else's: they stay as they are while later steps are packed.

    For the N sequences, chunks first, then decodes by ascending length: `starts`, `counts` [N], `block_tables` [N,
    width]. `tokens` [T]: 0 for decodes, whose tokens are in rows `decode_rows` [B] of the device's table.
    `uploads`: [2, U], rows of that table and the tokens to put there first. `unclean`: blocks to be zeroed first.
    For the S sequences of `plan.sampling`, in that order: `sample_places` [S] packed tokens whose logits are wanted,
    `rows` [S], `indices` [S] of the tokens in their requests' outputs, `positions` [S] that the tokens will have.
    `num_rows`: how many rows there are so far.
    """

    tokens: Ints
    starts: Ints
    counts: Ints
    num_chunks: int
    block_tables: npt.NDArray[np.int32]
    decode_rows: Ints
    uploads: Ints
    unclean: list[int]
    sample_places: Ints
    rows: Ints
    indices: Ints
    positions: Ints
    num_rows: int


class _Task:
    """`blocks` is the sequence's own list, of which the first `known` are in the row of the block tables; another list
    means that the sequence was preempted and admitted again.
    """

    __slots__ = ("blocks", "known", "row")

    def __init__(self, row: int) -> None:
        self.row = row
        self.blocks: list[int] = []
        self.known = 0


class _Decodes:
    """A decode batch by ascending length: `sequences`, `rows`, `places` of the tokens to compute, and what is derived.

    `back`: for each sequence in the plan's order its place here. `prompts`: lengths of the prompts.
    """

    __slots__ = ("back", "decodes", "places", "prompts", "rows", "sequences")

    def __init__(self, decodes: tuple[Sequence, ...], rows: Ints, places: Ints) -> None:
        order = np.argsort(places, kind="stable")
        self.decodes = decodes
        self.sequences = [decodes[index] for index in order.tolist()]
        self.rows = rows[order]
        self.places = places[order]
        self.back = np.empty_like(order)
        self.back[order] = np.arange(len(order))
        self.prompts = np.array([s.task.request.prompt_tokens for s in decodes], dtype=np.int64)


class Packer:
    """Rows of tasks and what they hold. `unclean`: blocks that may hold NaN, to be zeroed when they are used next."""

    def __init__(self, block_tokens: int) -> None:
        self.unclean: set[int] = set()
        self._block_tokens = block_tokens
        self._tasks: dict[int, _Task] = {}
        # Places beyond a task's blocks repeat its first one: padding that is valid to read, and is nobody else's.
        self._blocks = np.zeros((8, 32), dtype=np.int32)
        self._tokens = np.zeros((8, 256), dtype=np.int32)
        self._on_device = np.zeros(8, dtype=np.bool_)
        self._place = np.full(8, -1, dtype=np.int64)  # of the next decode, for rows of the last decode batch; else -1
        self._free = list(range(8))
        self._decodes = _Decodes((), np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))

    @property
    def num_rows(self) -> int:
        return len(self._blocks)

    def add(self, task_id: int, tokens: list[int]) -> int:
        """A task begins with these tokens; returns its row."""
        if not self._free:
            self._free = list(range(self.num_rows, 2 * self.num_rows))
            self._blocks = np.concatenate((self._blocks, np.zeros_like(self._blocks)))
            self._tokens = np.concatenate((self._tokens, np.zeros_like(self._tokens)))
            self._on_device = np.concatenate((self._on_device, np.zeros_like(self._on_device)))
            self._place = np.concatenate((self._place, np.full_like(self._place, -1)))
        row = self._free.pop()
        self._tasks[task_id] = _Task(row)
        self._fit_tokens(len(tokens))
        self._tokens[row, : len(tokens)] = tokens
        self._on_device[row] = False
        self._place[row] = -1
        return row

    def remove(self, task_id: int) -> int | None:
        """No later plan names this task. Returns its row, to be given back with `release`; None where it has none."""
        task = self._tasks.pop(task_id, None)
        return None if task is None else task.row

    def release(self, row: int) -> None:
        """No plan in flight uses this row any more."""
        self._free.append(row)

    def take(self, step: PackedStep, tokens: Ints) -> None:
        """The tokens [S] of a step have reached the host."""
        if len(tokens):
            self._fit_tokens(int(step.positions.max()) + 1)
            self._tokens[step.rows, step.positions] = tokens

    def pack(self, plan: Plan) -> PackedStep:
        """The arrays of a plan; called once for each plan, in the order in which they were scheduled."""
        unclean: list[int] = []
        chunks = [(self._known(chunk.sequence, chunk.start, unclean), chunk) for chunk in plan.chunks]
        decodes = self._next_decodes(plan, unclean)
        starts, rows, places = decodes.places, decodes.rows, decodes.back
        fresh = ~self._on_device[rows]
        uploads = np.stack((rows[fresh], self._tokens[rows[fresh], starts[fresh]].astype(np.int64)))
        indices, positions = starts[places] + 1 - decodes.prompts, starts[places] + 1
        counts, tokens, sampled = np.ones_like(starts), np.zeros_like(starts), rows[places]
        if chunks:
            lengths = np.array([chunk.tokens for _, chunk in chunks])
            ends = np.cumsum(lengths)
            yields = np.array([chunk.samples for _, chunk in chunks])
            chunk_rows = np.array([row for row, _ in chunks])
            contexts = np.array([chunk.start + chunk.tokens for _, chunk in chunks])
            prompts = np.array([chunk.sequence.task.request.prompt_tokens for _, chunk in chunks])
            starts = np.concatenate((contexts - lengths, starts))
            counts = np.concatenate((lengths, counts))
            rows = np.concatenate((chunk_rows, rows))
            parts = [self._tokens[row, chunk.start : chunk.start + chunk.tokens] for row, chunk in chunks]
            tokens = np.concatenate((*parts, tokens), dtype=np.int64)
            places = np.concatenate((ends[yields] - 1, ends[-1] + places))
            sampled = np.concatenate((chunk_rows[yields], sampled))
            positions = np.concatenate((contexts[yields], positions))
            indices = np.concatenate(((contexts - prompts)[yields], indices))
        self._on_device[sampled] = True
        width = -(-int((starts + counts).max()) // self._block_tokens)
        return PackedStep(
            tokens,
            starts.copy(),
            counts,
            len(chunks),
            self._blocks[rows, :width],
            decodes.rows,
            uploads,
            unclean,
            places,
            sampled,
            indices,
            positions,
            self.num_rows,
        )

    # -- decodes --------------------------------------------------------------------------------------------------

    def _next_decodes(self, plan: Plan, unclean: list[int]) -> _Decodes:
        """The decode batch of a plan, one position further than at the last plan."""
        last = self._decodes
        last.places += 1
        if plan.decodes is last.decodes:
            for index in np.flatnonzero(last.places % self._block_tokens == 0).tolist():
                self._known(last.sequences[index], int(last.places[index]), unclean)
            return last
        there = self._place[last.rows] >= 0  # another task may have such a row by now
        self._place[last.rows[there]] = last.places[there]
        rows = np.array([self._tasks[s.task.task_id].row for s in plan.decodes], dtype=np.int64)
        places = self._place[rows]
        self._place[last.rows[there]] = -1
        for index in np.flatnonzero((places < 0) | (places % self._block_tokens == 0)).tolist():
            sequence = plan.decodes[index]
            places[index] = sequence.position - 1
            self._known(sequence, int(places[index]), unclean)
        self._place[rows] = places
        self._decodes = _Decodes(plan.decodes, rows, places)
        return self._decodes

    # -- tables ---------------------------------------------------------------------------------------------------

    def _known(self, sequence: Sequence, cached: int, unclean: list[int]) -> int:
        """The row of a sequence that has KV cache for `cached` positions, with its block table up to date."""
        task, blocks = self._tasks[sequence.task.task_id], sequence.blocks
        while len(blocks) > self._blocks.shape[1]:
            self._blocks = np.concatenate(
                (self._blocks, np.repeat(self._blocks[:, :1], self._blocks.shape[1], axis=1)), axis=1
            )
        if task.blocks is not blocks:
            task.blocks, task.known = blocks, 0
            self._blocks[task.row] = blocks[0]
        if task.known < len(blocks):
            self._blocks[task.row, task.known : len(blocks)] = blocks[task.known :]
            task.known = len(blocks)
            if self.unclean:
                # Attention reads whole blocks and masks the rest, which NaN would survive.
                found = self.unclean.intersection(blocks[-(-cached // self._block_tokens) :])
                unclean += sorted(found)
                self.unclean -= found
        return task.row

    def _fit_tokens(self, length: int) -> None:
        while length > self._tokens.shape[1]:
            self._tokens = np.concatenate((self._tokens, np.zeros_like(self._tokens)), axis=1)
