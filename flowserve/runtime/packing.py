"""A plan as arrays: what one step needs on the device, packed with as little work as the change since the last step.

A task has a row in the block tables, in the host's table of tokens, and in the device's table of last tokens. While the
decode batch stays the same, a step costs a few array operations and a look at the sequences that start a block.
"""

from collections.abc import Sequence as Ordered
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from flowserve.core.plan import Plan, Verify
from flowserve.core.sequence import Sequence
from flowserve.ops.step import Ints

Bools = npt.NDArray[np.bool_]


class PackedVerifies(NamedTuple):
    """Of the V verifications of a plan, in its order: how many guesses (`drafts`), and where they are.

    `entries`: which of the step's N sequences. `places`: packed token of the sequence's last token, behind which its
    guesses are. `sampled`: first of its 1 + draft samples among the step's S. `rows`, and `indices` of the first.
    """

    drafts: Ints
    entries: Ints
    places: Ints
    sampled: Ints
    rows: Ints
    indices: Ints

    def take(self, packed: Ints, samples: Ints, finite: Bools) -> tuple[Ints, Ints, Bools, Ints]:
        """Samples by sequence, from packed tokens [T], samples [S] and whether they mean something, [S].

        Of each sequence: its tokens, [sequences, most]; how many count, which are those to the first that was not
        guessed; whether all these mean something; its first sample. Other sequences, which have one sample, come first.
        """
        most = 1 + int(self.drafts.max())
        others, ahead = len(samples) - int((1 + self.drafts).sum()), np.arange(most)
        places = np.minimum(self.sampled[:, None] + ahead, len(samples) - 1)
        guesses = packed[np.minimum(self.places[:, None] + ahead[1:], len(packed) - 1)]
        right = (samples[places[:, :-1]] == guesses) & (ahead[1:] <= self.drafts[:, None])
        counts = 1 + np.cumprod(right, axis=1).sum(axis=1)
        sound = (finite[places] | (ahead >= counts[:, None])).all(axis=1)
        above = np.zeros((others, most), dtype=np.int64)
        above[:, 0] = samples[:others]
        return (
            np.concatenate((above, samples[places])),
            np.concatenate((np.ones(others, dtype=np.int64), counts)),
            np.concatenate((finite[:others], sound)),
            np.concatenate((np.arange(others), self.sampled)),
        )


_NONE = np.zeros(0, dtype=np.int64)
NO_VERIFIES = PackedVerifies(_NONE, _NONE, _NONE, _NONE, _NONE, _NONE)


class PackedStep(NamedTuple):
    """Host arrays of one step, nobody else's: they stay as they are while later steps are packed.

    For the N sequences: `starts`, `counts` [N], `block_tables` [N, width]. First chunks, of prompts and of tokens with
    their guesses, then by ascending length those with one token: decodes, or verifications without a guess.
    `tokens` [T]: 0 for decodes, whose tokens are in rows `decode_rows` [B] of the device's table.
    `uploads`: [2, U], rows of that table and the tokens to put there first. `unclean`: blocks to be zeroed first.
    For the S samples, one for each sequence of `plan.sampling` in that order, or one behind each token of a
    verification: `sample_places` [S] packed tokens whose logits are wanted, `rows` [S], `indices` [S] of the tokens in
    their requests' outputs, `positions` [S] that the tokens will have. `num_rows`: how many rows there are so far.
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
    verifies: PackedVerifies

    def owners(self, sequences: list[Sequence]) -> list[Sequence]:
        """Of each sample, the one of the plan's sampling sequences that it belongs to."""
        others = len(sequences) - len(self.verifies.drafts)
        repeated = zip(sequences[others:], self.verifies.drafts.tolist(), strict=True)
        return [*sequences[:others], *(sequence for sequence, draft in repeated for _ in range(1 + draft))]


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
        """The tokens [S] of a step have reached the host. Those behind a wrong guess are overwritten before they are
        read.
        """
        if len(tokens):
            self._fit_tokens(int(step.positions.max()) + 1)
            self._tokens[step.rows, step.positions] = tokens

    def known_tokens(self, verify: Verify) -> npt.NDArray[np.int32]:
        """All tokens of a sequence that is about to be verified, to its last one."""
        return self._tokens[self._tasks[verify.sequence.task.task_id].row, : verify.start + 1]

    def pack(self, plan: Plan, guesses: Ordered[Ints] = ()) -> PackedStep:
        """The arrays of a plan; called once for each plan, in the order in which they were scheduled.

        `guesses`: for each of its verifications, as many as it has.
        """
        unclean: list[int] = []
        chunks = [(self._known(chunk.sequence, chunk.start, unclean), chunk) for chunk in plan.chunks]
        decodes = self._next_decodes(plan, unclean)
        starts, rows, places = decodes.places, decodes.rows, decodes.back
        fresh = ~self._on_device[rows]
        uploads = np.stack((rows[fresh], self._tokens[rows[fresh], starts[fresh]].astype(np.int64)))
        indices, positions = starts[places] + 1 - decodes.prompts, starts[places] + 1
        counts, tokens, sampled = np.ones_like(starts), np.zeros_like(starts), rows[places]
        verifies = NO_VERIFIES
        if plan.verifies:
            assert not plan.decodes, "a plan decodes or verifies"
            tokens, starts, counts, rows, verifies = self._pack_verifies(plan.verifies, guesses, unclean)
            samples = 1 + verifies.drafts
            within = np.arange(samples.sum()) - np.repeat(verifies.sampled, samples)
            places, indices, positions = (
                np.repeat(first, samples) + within
                for first in (verifies.places, verifies.indices, starts[verifies.entries] + 1)
            )
            sampled = np.repeat(verifies.rows, samples)
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
            verifies = verifies._replace(
                entries=verifies.entries + len(chunks),
                places=verifies.places + ends[-1],
                sampled=verifies.sampled + yields.sum(),
            )
        self._on_device[sampled] = True
        self._on_device[verifies.rows] = False
        width = -(-int((starts + counts).max()) // self._block_tokens)
        return PackedStep(
            tokens,
            starts.copy(),
            counts,
            len(chunks) + int(np.count_nonzero(verifies.drafts)),
            self._blocks[rows, :width],
            decodes.rows,
            uploads,
            unclean,
            places,
            sampled,
            indices,
            positions,
            self.num_rows,
            verifies,
        )

    def _pack_verifies(
        self, verifies: list[Verify], guesses: Ordered[Ints], unclean: list[int]
    ) -> tuple[Ints, Ints, Ints, Ints, PackedVerifies]:
        """Tokens, starts, counts and rows of sequences that are verified, those with guesses first, and where they are
        as if the step had no others.
        """
        drafts = np.array([len(each) for each in guesses])
        rows = np.array([self._known(verify.sequence, verify.start, unclean) for verify in verifies])
        starts = np.array([verify.start for verify in verifies])
        prompts = np.array([verify.sequence.task.request.prompt_tokens for verify in verifies])
        order = np.lexsort((starts, drafts == 0))
        entries = np.empty_like(order)
        entries[order] = np.arange(len(order))
        counts = 1 + drafts[order]
        places = (np.cumsum(counts) - counts)[entries]
        tokens = np.empty(counts.sum(), dtype=np.int64)
        tokens[places] = self._tokens[rows, starts]
        for place, guessed in zip(places.tolist(), guesses, strict=True):
            tokens[place + 1 : place + 1 + len(guessed)] = guessed
        sampled = np.cumsum(1 + drafts) - 1 - drafts
        packed = PackedVerifies(drafts, entries, places, sampled, rows, starts + 1 - prompts)
        return tokens, starts[order], counts, rows[order], packed

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
