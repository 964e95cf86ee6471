"""Guesses for speculative decoding (Leviathan et al., arXiv 2211.17192), to be verified by the model that serves.

A drafter only saves steps: what is sampled never depends on it.
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from flowserve.core.config import EngineConfig
from flowserve.models import load_model
from flowserve.ops import Ops
from flowserve.ops.step import Ints, StepContext
from flowserve.runtime.kv_pool import KvPool, pool_of
from flowserve.runtime.packing import PackedStep
from flowserve.runtime.sampler import Sampler
from flowserve.runtime.sampling import Sampling

Tokens = npt.NDArray[np.int32]
FEWEST, MOST = 2, 5
"""Tokens at the end of a context that prompt lookup wants to find again: one alone says little of what follows, and
the last five say about all that more would (chosen, in the range that other engines use)."""


class Drafter(Protocol):
    """Who guesses. `add`, `remove` and `compute` are called where steps are computed, `guess` where they are launched.

    `pool`: KV cache of its own, for the same blocks as the engine's; None where it has none.
    """

    pool: KvPool | None

    def add(self, row: int, sampling: Sampling, forced: Sequence[int], ends: Collection[int]) -> None:
        """A row begins, as in `Sampler.add`. Nobody guesses where sampling depends on the tokens so far."""
        ...

    def remove(self, row: int) -> None:
        """The row ends."""
        ...

    def guess(self, tokens: Tokens, most: int) -> Ints:
        """Up to `most` guesses of what follows the tokens [n] of a sequence; any numbers where `compute` will say."""
        ...

    def compute(self, step: PackedStep, tokens: Tensor) -> None:
        """Right before the step is computed: put guesses where they belong in its packed tokens [T] on the device."""
        ...

    def close(self) -> None:
        """Let go of the KV cache."""
        ...


class PromptLookup:
    """What followed the last time that the context ended alike (prompt lookup, Saxena 2023): nothing is computed.

    Of the longest of such ends, FEWEST to MOST tokens, the latest occurrence is taken. Where it runs into the end of
    the context the output goes round in a circle, and is guessed to go on so.
    """

    pool: KvPool | None = None

    def add(self, row: int, sampling: Sampling, forced: Sequence[int], ends: Collection[int]) -> None:
        return

    def remove(self, row: int) -> None:
        return

    def guess(self, tokens: Tokens, most: int) -> Ints:
        last = len(tokens) - 1
        found = np.flatnonzero(tokens[:last] == tokens[last])
        size = 1
        while len(found) and size < MOST and size <= last:
            longer = found[found >= size]
            longer = longer[tokens[longer - size] == tokens[last - size]]
            if not len(longer):
                break
            found, size = longer, size + 1
        if not len(found) or size < FEWEST:
            return np.zeros(0, dtype=np.int64)
        first = int(found[-1]) + 1
        return tokens[first + np.arange(most) % (last + 1 - first)].astype(np.int64)

    def compute(self, step: PackedStep, tokens: Tensor) -> None:
        return

    def close(self) -> None:
        return


class DraftModel:
    """A smaller model of the same vocabulary, which decodes ahead.

    Its KV cache has the engine's blocks and is written wherever the engine's is: it computes the same prompt chunks,
    and of a verification of k guesses the same k + 1 tokens, the last for its KV cache alone. So whatever block table
    is good for the engine's model is good for this one, prefixes found in the cache included. Guesses are sampled with
    the request's settings and noise, so they are right as often as the two models agree on the token, not on its
    distribution.
    """

    def __init__(
        self, folder: Path, config: EngineConfig, vocab_size: int, dtype: torch.dtype, device: torch.device, ops: Ops
    ) -> None:
        self.model = load_model(folder, dtype, device)
        if self.model.vocab_size != vocab_size:
            raise ValueError(
                f"the draft model in {folder} has a vocabulary of {self.model.vocab_size} tokens and the model it "
                f"guesses for {vocab_size}: take one of the same family, with the same tokenizer"
            )
        self.model.pack(ops)
        self._positions = min(config.kv_blocks * config.block_tokens, self.model.max_position)
        self.model.set_positions(self._positions)
        self.pool: KvPool | None = pool_of(self.model, config, config.kv_blocks, dtype, device, ops.KV_ALIGNMENT_BYTES)
        self._caches = ops.layer_caches(self.pool.tensor)
        self._ops, self._device, self._block_tokens = ops, device, config.block_tokens
        self._sampler = Sampler(vocab_size, device, ops)

    def add(self, row: int, sampling: Sampling, forced: Sequence[int], ends: Collection[int]) -> None:
        plain = Sampling() if sampling.penalises else msgspec.structs.replace(sampling, logprobs=None)
        self._sampler.add(row, plain, (), (), forced, ends)

    def remove(self, row: int) -> None:
        self._sampler.remove(row)

    def close(self) -> None:
        self._caches = []
        if self.pool is not None:
            self.pool.close()

    def guess(self, tokens: Tokens, most: int) -> Ints:
        # It has a context in its own positions only.
        return np.zeros(max(0, min(most, self._positions - len(tokens))), dtype=np.int64)

    def compute(self, step: PackedStep, tokens: Tensor) -> None:
        chunks, verify = len(step.starts) - len(step.verifies.entries), step.verifies
        order = np.argsort(step.starts[verify.entries], kind="stable")
        starts, tables = step.starts[verify.entries[order]], step.block_tables[verify.entries[order]]
        _, _, places, _, rows, indices = (values[order] for values in verify)
        drafts = verify.drafts[order]
        prompt_tokens = int(step.counts[:chunks].sum())
        inputs = torch.cat((tokens[:prompt_tokens], tokens.index_select(0, self._tensor(places))))
        # First the prompt chunks, and the last token of every sequence; then guesses, of those that have more.
        context = self._context(
            np.concatenate((step.starts[:chunks], starts)),
            np.concatenate((step.counts[:chunks], np.ones_like(starts))),
            chunks,
            np.concatenate((step.block_tables[:chunks], tables)),
            prompt_tokens + np.flatnonzero(drafts > 0),
        )
        for number in range(int(drafts.max(initial=0)) + 1):
            logits = self._run(inputs, context)
            going = np.flatnonzero(drafts > number)
            if not len(going):
                return
            sampled = self._sampler.sample(logits, rows[going].tolist(), (indices[going] + number).tolist()).tokens
            tokens.index_copy_(0, self._tensor(places[going] + 1 + number), sampled)
            starts, drafts, tables, rows, indices, places, inputs = (
                starts[going],
                drafts[going],
                tables[going],
                rows[going],
                indices[going],
                places[going],
                sampled,
            )
            context = self._context(
                starts + number + 1, np.ones_like(starts), 0, tables, np.flatnonzero(drafts > number + 1)
            )

    def _run(self, tokens: Tensor, context: StepContext) -> Tensor:
        positions = np.minimum(context.positions, self._positions - 1)  # beyond, nothing is guessed
        return self.model(tokens, self._tensor(positions), context)

    def _context(
        self,
        starts: Ints,
        counts: Ints,
        chunks: int,
        tables: npt.NDArray[np.int32],
        samples: Ints,
    ) -> StepContext:
        return StepContext(
            self._ops, self._caches, starts, counts, chunks, tables, self._block_tokens, samples, self._device
        )

    def _tensor(self, values: Ints) -> Tensor:
        return torch.from_numpy(values).to(self._device)
