"""Runs plans with a torch model: keeps the tokens, packs each step's inputs, samples."""

from collections import deque
from pathlib import Path

import numpy as np
import torch

from cluster import identity
from cluster.request import Request, Task
from cluster.vocabulary import TaskKind
from flowserve import ops
from flowserve.core.plan import Plan
from flowserve.core.scheduler import EngineConfig, EngineCore
from flowserve.core.sequence import Sequence
from flowserve.models import load_model
from flowserve.ops.step import Ints, StepContext
from flowserve.runtime.kv_pool import KvPool
from flowserve.runtime.runner import KvHandle, Payload, StepOutput, TokenLogprobs
from flowserve.runtime.sampler import Logprobs, Sampled, Sampler
from flowserve.runtime.sampling import Sampling, eos_token_ids

WARM_UP_TOKENS = 8
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class _Task:
    """`tokens`: prompt and all generated so far. `row`: its row of the block tables.

    `blocks` is the sequence's own list, of which the first `known` are in the row; another list means that the sequence
    was preempted and admitted again.
    """

    __slots__ = ("blocks", "known", "row", "tokens")

    def __init__(self, payload: Payload, row: int) -> None:
        self.tokens = list(payload.tokens)
        self.row = row
        self.blocks: list[int] = []
        self.known = 0


class _BlockTables:
    """int32 rows of KV cache block numbers. Places beyond a task's blocks repeat its first one: padding that is valid
    to read, and is nobody else's.
    """

    def __init__(self) -> None:
        self.rows = np.zeros((8, 32), dtype=np.int32)
        self._free = list(range(8))

    def take_row(self) -> int:
        if not self._free:
            self._free = list(range(len(self.rows), 2 * len(self.rows)))
            self.rows = np.concatenate((self.rows, np.zeros_like(self.rows)))
        return self._free.pop()

    def release_row(self, row: int) -> None:
        self._free.append(row)

    def update(self, task: _Task, blocks: list[int]) -> None:
        """Bring a task's row up to date."""
        while len(blocks) > self.rows.shape[1]:
            self.rows = np.concatenate((self.rows, np.repeat(self.rows[:, :1], self.rows.shape[1], axis=1)), axis=1)
        row = self.rows[task.row]
        if task.blocks is not blocks:
            task.blocks, task.known = blocks, 0
            row[:] = blocks[0]
        row[task.known : len(blocks)] = blocks[task.known :]
        task.known = len(blocks)


class TorchRunner:
    """The `Runner` on one torch device; `dtype` is that of weights, KV cache and computation.

    Raises ValueError for a model, dtype or device that is not supported.
    """

    def __init__(
        self,
        model_dir: str | Path,
        engine_config: EngineConfig,
        dtype: str = "float32",
        device: str = "cpu",
        num_threads: int = 1,
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}: allowed are {', '.join(DTYPES)}")
        torch.set_num_threads(num_threads)
        self._device = torch.device(device)
        self._ops = ops.load(self._device.type)
        self._config = engine_config
        self._block_tokens = engine_config.block_tokens
        self.model = load_model(Path(model_dir), DTYPES[dtype], self._device)
        self.model.pack(self._ops)
        # Plans issued before a stop is known may pass the model's last position; their tokens are dropped.
        self._positions = min(
            engine_config.kv_blocks * engine_config.block_tokens,
            self.model.max_position + engine_config.max_in_flight,
        )
        self.model.set_positions(self._positions)
        self.pool = KvPool(
            self.model.num_layers,
            engine_config.kv_blocks,
            engine_config.block_tokens,
            self.model.num_kv_heads,
            self.model.head_dim,
            DTYPES[dtype],
        )
        self._caches = self._ops.layer_caches(self.pool.tensor)
        self._tasks: dict[int, _Task] = {}
        self._tables = _BlockTables()
        self._sampler = Sampler(self.model.vocab_size, self._device, self._ops)
        self.eos = eos_token_ids(Path(model_dir))
        self._unclean: set[int] = set()
        self._launched: deque[StepOutput] = deque()

    def add(self, task_id: int, payload: Payload) -> None:
        """Raises ValueError for tokens that are not in the model's vocabulary."""
        tokens = [*payload.tokens, *(payload.forced or ())]
        if tokens and not 0 <= min(tokens) <= max(tokens) < self.model.vocab_size:
            raise ValueError(
                f"task {task_id} has tokens from {min(tokens)} to {max(tokens)}: "
                f"the model's vocabulary is 0 to {self.model.vocab_size - 1}"
            )
        payload.sampling.check(self.model.vocab_size)
        task = self._tasks[task_id] = _Task(payload, self._tables.take_row())
        prompt, ends = len(payload.tokens) - payload.generated, payload.ends(self.eos)
        self._sampler.add(
            task.row,
            payload.sampling,
            payload.tokens[:prompt],
            payload.tokens[prompt:],
            payload.forced or (),
            [token for token in ends if token < self.model.vocab_size],
        )

    def remove(self, task_id: int) -> None:
        task = self._tasks.pop(task_id, None)
        if task is not None:
            self._tables.release_row(task.row)
            self._sampler.remove(task.row)

    def warm_up(self) -> None:
        """A prompt and a few tokens through an engine core of their own; their blocks are overwritten before use."""
        core, token = EngineCore(self._config), max(0, self.model.vocab_size - 1)
        length = min(64, self._positions - WARM_UP_TOKENS, self._config.kv_blocks * self._block_tokens - WARM_UP_TOKENS)
        if length < 1:
            return
        task = Task(-1, Request(-1, length, WARM_UP_TOKENS, ""), TaskKind.SERVE)
        core.add(task, identity.unique(0))
        self.add(-1, Payload([token] * length, Sampling()))
        while (plan := core.schedule()) is not None:
            self.launch(plan)
            self.collect()
            core.complete(plan, ())
        self.remove(-1)

    def launch(self, plan: Plan) -> None:
        with torch.inference_mode():
            tokens, step = self._pack(plan)
            positions = np.minimum(step.positions, self._positions - 1)  # beyond: `_take` refuses the token
            logits = self.model(self._tensor(tokens), self._tensor(positions), step)
            sequences = plan.sampling
            tasks = [self._tasks[sequence.task_id] for sequence in sequences]
            indices = [len(t.tokens) - s.task.request.prompt_tokens for t, s in zip(tasks, sequences, strict=True)]
            sampled = self._sampler.sample(logits, [task.row for task in tasks], indices)
            self._launched.append(self._take(sequences, tasks, sampled))

    def collect(self) -> StepOutput:
        """Tasks whose logits are not finite or whose positions ran out have failed."""
        return self._launched.popleft()

    @property
    def kv_handle(self) -> KvHandle | None:
        return self.pool.handle

    def fetch(self, source: KvHandle | None, source_blocks: list[int], blocks: list[int]) -> int:
        """Also raises ValueError where the peer's layout is not ours."""
        if source is None:
            raise FileNotFoundError("the peer offers no KV cache to read")
        return self.pool.copy_blocks(self.pool.peer(source), source_blocks, blocks)

    def close(self) -> None:
        self._caches = []
        self.pool.close()

    # -- inputs ---------------------------------------------------------------------------------------------------

    def _pack(self, plan: Plan) -> tuple[Ints, StepContext]:
        """Tokens [T] and context of a step: chunks, then decodes by ascending length."""
        tokens: list[int] = []
        rows: list[int] = []
        starts = [chunk.start for chunk in plan.chunks]
        sample_rows: list[int] = []
        for sequence, start, count, samples in plan.chunks:
            task = self._task(sequence, start)
            tokens += task.tokens[start : start + count]
            rows.append(task.row)
            if samples:
                sample_rows.append(len(tokens) - 1)
        counts = [chunk.tokens for chunk in plan.chunks] + [1] * len(plan.decodes)
        places = [sequence.position - 1 for sequence in plan.decodes]
        order = sorted(range(len(places)), key=places.__getitem__)
        sample_rows += (len(tokens) + np.argsort(order)).tolist()  # tokens are wanted in the plan's order again
        for index in order:
            task = self._task(plan.decodes[index], places[index])
            tokens.append(task.tokens[places[index]])
            starts.append(places[index])
            rows.append(task.row)
        assert len(tokens) == sum(counts), "a chunk reaches beyond its task's tokens"
        width = -(-max(start + count for start, count in zip(starts, counts, strict=True)) // self._block_tokens)
        step = StepContext(
            self._ops,
            self._caches,
            np.array(starts),
            np.array(counts),
            len(plan.chunks),
            self._tables.rows[rows, :width],
            self._block_tokens,
            np.array(sample_rows, dtype=np.int64),
            self._device,
        )
        return np.array(tokens), step

    def _task(self, sequence: Sequence, cached: int) -> _Task:
        """The task of a sequence that has KV cache for `cached` positions, with its block table up to date."""
        task = self._tasks[sequence.task.task_id]
        if task.blocks is sequence.blocks and task.known == len(sequence.blocks):
            return task
        self._tables.update(task, sequence.blocks)
        if self._unclean:
            # Attention reads whole blocks and masks the rest, which NaN would survive.
            unclean = self._unclean.intersection(sequence.blocks[-(-cached // self._block_tokens) :])
            self.pool.tensor[:, :, sorted(unclean)] = 0
            self._unclean -= unclean
        return task

    def _tensor(self, values: Ints) -> torch.Tensor:
        return torch.from_numpy(values).to(self._device)

    # -- outputs --------------------------------------------------------------------------------------------------

    def _take(self, sequences: list[Sequence], tasks: list[_Task], sampled: Sampled) -> StepOutput:
        """Sampled tokens reach the host."""
        failed: dict[int, str] = {}
        taken: list[list[int]] = []
        for sequence, task, token, finite in zip(
            sequences, tasks, sampled.tokens.tolist(), sampled.finite.tolist(), strict=True
        ):
            if not finite:
                failed[sequence.task_id] = "its logits are not finite numbers"
                self._unclean.update(sequence.blocks)
            elif len(task.tokens) > self._positions:
                failed[sequence.task_id] = f"the model has only {self.model.max_position} positions"
            taken.append([] if sequence.task_id in failed else [token])
            task.tokens.append(token)
        return StepOutput(taken, failed, _logprobs_of(sequences, sampled.logprobs))


def _logprobs_of(sequences: list[Sequence], logprobs: Logprobs | None) -> dict[int, list[TokenLogprobs]] | None:
    """On the host, by task id."""
    if logprobs is None:
        return None
    chosen, tokens, values = logprobs.chosen.tolist(), logprobs.tokens.tolist(), logprobs.values.tolist()
    return {
        sequences[place].task_id: [TokenLogprobs(chosen[n], list(zip(tokens[n][:top], values[n][:top], strict=True)))]
        for n, (place, top) in enumerate(zip(logprobs.places, logprobs.tops, strict=True))
    }
