"""Tokens from logits, on the device and without waiting for it, so that steps can be launched ahead.

S: sampled sequences of a step, V: vocabulary. Rows are numbers that the runner gives to tasks (those of its block
tables); what a row's sampling depends on lies here until the row is removed.
"""

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flowserve.ops import Ops
from flowserve.ops.noise import gumbel, gumbel_on_device, row_keys
from flowserve.runtime.sampling import Sampling

MAX_TOP_K = 1024
"""Up to here the most likely tokens are selected and drawn from; beyond, and for `top_p` alone, all are sorted."""


class Logprobs(NamedTuple):
    """Natural logarithms of probabilities by the model alone, for the R of the S sequences that asked for them.

    `places` [R]: which of the S; `tops` [R]: how many of the N most likely tokens each asked for. On the device:
    `chosen` [R] of the sampled tokens, `values` [R, N] of the most likely tokens `tokens` [R, N], in falling order.
    """

    places: list[int]
    tops: list[int]
    chosen: Tensor
    tokens: Tensor
    values: Tensor


class Sampled(NamedTuple):
    """Of one step, on the device: `tokens` [S] int64, and `finite` [S] bool, False where the logits are not finite
    numbers and the token means nothing.
    """

    tokens: Tensor
    finite: Tensor
    logprobs: Logprobs | None

    def to_host(self) -> "Sampled":
        """Copies on the host, there once the device has done what was asked of it before."""
        logprobs = self.logprobs
        if logprobs is not None:
            parts = [part.to("cpu", non_blocking=True) for part in logprobs[2:]]
            logprobs = Logprobs(logprobs.places, logprobs.tops, *parts)
        return Sampled(self.tokens.to("cpu", non_blocking=True), self.finite.to("cpu", non_blocking=True), logprobs)


class _Row:
    """`slot`: where the counts of its tokens are, if it penalises. `ends`: tokens it must not draw too early."""

    __slots__ = ("ends", "forced", "sampling", "slot")

    def __init__(self, sampling: Sampling, forced: Sequence[int], ends: Collection[int], slot: int | None) -> None:
        self.sampling = sampling
        self.forced = forced
        self.ends = ends
        self.slot = slot

    @property
    def changes_logits(self) -> bool:
        s = self.sampling
        return self.slot is not None or bool(s.logit_bias) or bool(s.min_tokens and self.ends)


class Sampler:
    """Rows and the counts of their tokens. Calls come from one thread; nothing here waits for the device.

    A row whose request ends while a further token of it is in flight needs no undoing: the counts go with the row.
    """

    def __init__(self, vocab_size: int, device: torch.device, ops: Ops) -> None:
        self._vocab = vocab_size
        self._device = device
        self._ops = ops
        self._rows: dict[int, _Row] = {}
        self._counts = torch.zeros((0, vocab_size), dtype=torch.int32, device=device)  # occurrences in the output
        self._prompt = torch.zeros((0, vocab_size), dtype=torch.bool, device=device)  # occurs in the prompt
        self._free: list[int] = []
        self._batch: _Batch | None = None

    def add(
        self,
        row: int,
        sampling: Sampling,
        prompt: Sequence[int],
        generated: Sequence[int] = (),
        forced: Sequence[int] = (),
        ends: Collection[int] = (),
    ) -> None:
        """A row begins, `generated` tokens into its output. `forced`: tokens by output index that are not drawn.
        `ends`: tokens that end the output, and are not drawn before `min_tokens`.
        """
        slot = self._take_slot(prompt, generated) if sampling.penalises else None
        self._rows[row] = _Row(sampling, forced, ends, slot)
        self._batch = None

    def remove(self, row: int) -> None:
        """The row ends."""
        slot = self._rows.pop(row).slot
        if slot is not None:
            self._free.append(slot)
        self._batch = None

    def sample(self, logits: Tensor, rows: list[int], indices: Sequence[int]) -> Sampled:
        """One token for each of `rows` [S] from logits [S, V], number `indices[i]` of its request's output."""
        batch = self._batch
        if batch is None or batch.rows != rows:
            batch = self._batch = _Batch(rows, [self._rows[row] for row in rows], self._vocab, self._device)
        highest, tokens = self._ops.best(logits)
        if batch.special:
            scores = logits.index_select(0, batch.places).float()
            self._change(scores, batch, indices)
            tokens.index_copy_(0, batch.places, self._choose(scores, batch, indices))
        forced = [
            (place, row.forced[indices[place]]) for place, row in batch.forced if indices[place] < len(row.forced)
        ]
        if forced:
            places, values = self._upload(forced).unbind(1)
            tokens.index_copy_(0, places, values)
        if batch.penalties is not None:
            chosen = batch.penalties.slots * self._vocab + tokens.index_select(0, batch.penalties.among_all)
            self._counts.view(-1).index_add_(0, chosen, torch.ones_like(chosen, dtype=torch.int32))
        return Sampled(tokens, highest.isfinite(), self._logprobs(logits, tokens, batch))

    # -- what changes logits --------------------------------------------------------------------------------------

    def _take_slot(self, prompt: Sequence[int], generated: Sequence[int]) -> int:
        if not self._free:
            size = len(self._counts)
            self._free = list(range(size, max(4, 2 * size)))
            self._counts = torch.cat((self._counts, self._counts.new_zeros((len(self._free), self._vocab))))
            self._prompt = torch.cat((self._prompt, self._prompt.new_zeros((len(self._free), self._vocab))))
        slot = self._free.pop()
        counts = np.bincount(np.array(generated, dtype=np.int64), minlength=self._vocab).astype(np.int32)
        seen = np.zeros(self._vocab, dtype=np.bool_)
        seen[np.array(prompt, dtype=np.int64)] = True
        self._counts[slot] = torch.from_numpy(counts).to(self._device)
        self._prompt[slot] = torch.from_numpy(seen).to(self._device)
        return slot

    def _change(self, scores: Tensor, batch: "_Batch", indices: Sequence[int]) -> None:
        """Penalties, bias, and no early end, in place."""
        if batch.penalties is not None:
            _, among, slots, repetition, presence, frequency = batch.penalties
            part, counts = scores.index_select(0, among), self._counts.index_select(0, slots)
            occurs = counts > 0
            repeated = torch.where(part > 0, part / repetition, part * repetition)
            part = torch.where(occurs | self._prompt.index_select(0, slots), repeated, part)
            part -= presence * occurs
            part -= frequency * counts
            scores.index_copy_(0, among, part)
        if batch.bias is not None:
            where, values = batch.bias
            scores.view(-1).index_add_(0, where, values)
        early = [
            place * self._vocab + token
            for place, row in batch.lower_limits
            if indices[batch.special[place]] < row.sampling.min_tokens
            for token in row.ends
        ]
        if early:
            scores.view(-1).index_fill_(0, self._upload(early), -math.inf)

    # -- choices --------------------------------------------------------------------------------------------------

    def _choose(self, scores: Tensor, batch: "_Batch", indices: Sequence[int]) -> Tensor:
        """Tokens of the batch's special rows: in groups, because each kind of limit has a cost of its own."""
        keys = row_keys(batch.seeds, [indices[place] for place in batch.special[: len(batch.seeds)]])
        chosen = []
        for group in batch.groups:
            part = scores[group.start : group.end]
            if group.temperature is None:
                chosen.append(self._ops.best(part)[1])
                continue
            ids = None
            if group.candidates:
                part, ids = _most_likely(part, group.candidates)
            part = part / group.temperature
            if ids is not None:
                part = _limit(part, group)
            elif group.top_k is not None:
                part = _limit_unordered(part, group)
            if group.min_p is not None:
                part = torch.where(part < part.amax(-1, keepdim=True) + group.min_p, -math.inf, part)
            part += self._noise(keys[group.start : group.end], ids)
            best = self._ops.best(part)[1]
            chosen.append(best if ids is None else ids.gather(1, best[:, None])[:, 0])
        return chosen[0] if len(chosen) == 1 else torch.cat(chosen)

    def _noise(self, keys: "np.ndarray[tuple[int], np.dtype[np.uint64]]", ids: Tensor | None) -> Tensor:
        """Gumbel noise of these rows for token ids [R, K], or for the whole vocabulary."""
        if self._device.type == "cpu":
            return torch.from_numpy(gumbel(keys, np.arange(self._vocab) if ids is None else ids.numpy()))
        tokens = torch.arange(self._vocab, device=self._device) if ids is None else ids
        return gumbel_on_device(torch.from_numpy(keys.view(np.int64)).to(self._device, non_blocking=True), tokens)

    def _logprobs(self, logits: Tensor, tokens: Tensor, batch: "_Batch") -> Logprobs | None:
        if not batch.logprobs:
            return None
        among = self._upload(batch.logprobs)
        values = logits.index_select(0, among).float().log_softmax(-1)
        chosen = values.gather(1, tokens.index_select(0, among)[:, None])[:, 0]
        top, ids = _most_likely(values, min(max(batch.tops), self._vocab))
        return Logprobs(batch.logprobs, batch.tops, chosen, ids, top)

    def _upload(self, values: Sequence[object]) -> Tensor:
        """int64."""
        return torch.from_numpy(np.array(values, dtype=np.int64)).to(self._device, non_blocking=True)


class _Penalties(NamedTuple):
    """Of the P rows that penalise: places among all S and among the special ones, slots [P], strengths [P, 1]."""

    among_all: Tensor
    among_special: Tensor
    slots: Tensor
    repetition: Tensor
    presence: Tensor
    frequency: Tensor


class _Group(NamedTuple):
    """Special rows `start` to `end` that are chosen in the same way. `temperature` [R, 1]; None: greedy.

    `candidates`: how many of the most likely tokens are looked at; 0: all, in no order. Limits are [R, 1]; None: no row
    has it, and with `top_k` none has `top_p` either.
    """

    start: int
    end: int
    temperature: Tensor | None
    candidates: int = 0
    top_k: Tensor | None = None
    top_p: Tensor | None = None
    min_p: Tensor | None = None


class _Batch:
    """What the steps of one composition of rows have in common.

    Special rows are those that a plain argmax does not serve. They come in the order of their groups: drawn from the
    whole vocabulary, from the most likely tokens, from all tokens sorted, and greedy ones with changed logits.
    `special`: their places among the S rows; the places in `lower_limits` are among the special ones.
    """

    def __init__(self, numbers: list[int], rows: list[_Row], vocab: int, device: torch.device) -> None:
        self.rows = list(numbers)
        kinds: list[list[int]] = [[], [], [], []]
        for place, row in enumerate(rows):
            s, top_k = row.sampling, 0 if row.sampling.top_k >= vocab else row.sampling.top_k
            if s.temperature == 0:
                if row.changes_logits:
                    kinds[3].append(place)
            elif 0 < top_k <= MAX_TOP_K:
                kinds[1].append(place)
            else:
                kinds[2 if top_k or s.top_p < 1 else 0].append(place)
        self.special = [place for kind in kinds for place in kind]
        special = [rows[place] for place in self.special]
        self.seeds = [rows[place].sampling.seed for kind in kinds[:3] for place in kind]
        self.forced = [(place, row) for place, row in enumerate(rows) if row.forced]
        self.lower_limits = [(n, row) for n, row in enumerate(special) if row.ends and row.sampling.min_tokens]
        self.logprobs = [place for place, row in enumerate(rows) if row.sampling.logprobs is not None]
        self.tops = [rows[place].sampling.logprobs or 0 for place in self.logprobs]

        def column(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device)[:, None]

        def integers(values: Sequence[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        self.places = integers(self.special)
        self.groups: list[_Group] = []
        start = 0
        for number, kind in enumerate(kinds):
            if not kind:
                continue
            end, wanted = start + len(kind), [rows[place].sampling for place in kind]
            if number == 3:
                self.groups.append(_Group(start, end, None))
                break
            self.groups.append(
                _Group(
                    start,
                    end,
                    column([s.temperature for s in wanted]),
                    max(s.top_k for s in wanted) if number == 1 else 0,
                    integers([s.top_k or vocab for s in wanted])[:, None] if number else None,
                    # 2 for all: a sum of probabilities may come out above 1.
                    column([s.top_p if s.top_p < 1 else 2 for s in wanted])
                    if any(s.top_p < 1 for s in wanted)
                    else None,
                    column([math.log(s.min_p) if s.min_p else -math.inf for s in wanted])
                    if any(s.min_p for s in wanted)
                    else None,
                )
            )
            start = end
        self.penalties = None
        penalised = [n for n, row in enumerate(special) if row.slot is not None]
        if penalised:
            wanted = [special[n].sampling for n in penalised]
            self.penalties = _Penalties(
                integers([self.special[n] for n in penalised]),
                integers(penalised),
                integers([slot for row in special if (slot := row.slot) is not None]),
                column([s.repetition_penalty for s in wanted]),
                column([s.presence_penalty for s in wanted]),
                column([s.frequency_penalty for s in wanted]),
            )
        bias = [(n * vocab + t, b) for n, row in enumerate(special) for t, b in row.sampling.logit_bias.items()]
        self.bias = None
        if bias:
            self.bias = integers([where for where, _ in bias]), column([value for _, value in bias])[:, 0]


def _most_likely(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of scores [R, V] in falling order and their columns, both [R, count].

    Of equal scores the lower column comes first: in bfloat16 many are equal, and what a row gets must not depend on
    how many its neighbours ask for.
    """
    vocab = scores.shape[1]
    bits = scores.view(torch.int32)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the floats
    columns = torch.arange(vocab - 1, -1, -1, device=scores.device)
    ids = vocab - 1 - (((bits.long() << 32) | columns).topk(count, -1).values & 0xFFFFFFFF)
    return scores.gather(1, ids), ids


def _limit(ordered: Tensor, group: _Group) -> Tensor:
    """Scaled logits [R, K] in falling order, with what top_k and top_p leave out at -inf."""
    if group.top_k is not None:
        places = torch.arange(ordered.shape[1], device=ordered.device)
        ordered = torch.where(places < group.top_k, ordered, -math.inf)
    if group.top_p is not None:
        probabilities = ordered.softmax(-1)
        # A token stays while those before it do not make up top_p: the one that passes the mark is in.
        ordered = torch.where(probabilities.cumsum(-1) - probabilities < group.top_p, ordered, -math.inf)
    return ordered


def _limit_unordered(scaled: Tensor, group: _Group) -> Tensor:
    """The same for scaled logits [R, V] in any order: by the least one that stays, and how many are equal to it."""
    if scaled.device.type == "cpu":  # numpy sorts twenty times as fast as torch there (measured)
        ordered = torch.from_numpy(np.sort(scaled.numpy())).flip(-1)
    else:
        ordered = scaled.sort(-1, descending=True).values
    stay = (_limit(ordered, group) > -math.inf).sum(-1, keepdim=True).clamp_(min=1)
    least = ordered.gather(1, stay - 1)
    more, equal = scaled > least, scaled == least
    room = stay - more.sum(-1, keepdim=True)
    return torch.where(more | (equal & (equal.cumsum(-1) <= room)), scaled, -math.inf)
