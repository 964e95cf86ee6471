"""Runs plans with a torch model: keeps the tokens, packs each step's inputs, samples."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import torch
from torch import Tensor

from cluster import identity
from cluster.request import Request, Task
from cluster.vocabulary import TaskKind
from flowserve import ops
from flowserve.core.plan import Plan
from flowserve.core.scheduler import EngineConfig, EngineCore
from flowserve.core.sequence import Sequence
from flowserve.core.tiers import Move, TierConfig
from flowserve.models import load_model
from flowserve.ops.device import open_device
from flowserve.ops.step import Ints, StepContext
from flowserve.runtime.graphs import DecodeGraphs
from flowserve.runtime.host_tiers import HostTiers
from flowserve.runtime.kv_pool import KvPool
from flowserve.runtime.packing import PackedStep, Packer
from flowserve.runtime.runner import KvHandle, Payload, StepOutput, TokenLogprobs
from flowserve.runtime.sampler import Logprobs, Sampled, Sampler
from flowserve.runtime.sampling import Sampling

WARM_UP_TOKENS = 8
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class _Launched(NamedTuple):
    """A plan in flight. `result` waits for it."""

    sequences: list[Sequence]
    step: PackedStep
    result: Callable[[], Sampled]


class TorchRunner:
    """The `Runner` on one torch device; `dtype` is that of weights, KV cache and computation. `about`: in a line, how
    attention is computed.

    Other devices compute by themselves; with plans in flight, a CPU does so on a thread of its own. What it works with
    is its own then: the model, the last token of each task, and how tasks are sampled; a plan's inputs are packed
    before and do not change.
    Raises ValueError for a model, dtype or device that is not supported.
    """

    def __init__(
        self,
        model_dir: str | Path,
        engine_config: EngineConfig,
        dtype: str = "float32",
        device: str = "cpu",
        num_threads: int = 1,
        ssd_folder: str | None = None,
        graph_sizes: tuple[int, ...] = (),
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}: allowed are {', '.join(DTYPES)}")
        torch.set_num_threads(num_threads)
        self._ops = ops.load(device.partition(":")[0])
        self._accelerator = open_device(device)
        self._accelerator.set()
        self._device = self._accelerator.device
        self._config = engine_config
        self._block_tokens = engine_config.block_tokens
        self.model = load_model(Path(model_dir), DTYPES[dtype], self._device)
        self.model.pack(self._ops)
        self._positions = min(engine_config.kv_blocks * engine_config.block_tokens, self.model.max_position)
        self.model.set_positions(self._positions)
        graphs = bool(graph_sizes) and self._device.type != "cpu"
        self.pool = KvPool(
            self.model.num_layers,
            engine_config.kv_blocks + graphs,
            engine_config.block_tokens,
            self.model.num_kv_heads,
            self.model.head_dim,
            DTYPES[dtype],
            engine_config.kv_layout,
            self._device,
            self._ops.KV_ALIGNMENT_BYTES,
        )
        self._caches = self._ops.layer_caches(self.pool.tensor)
        if engine_config.tiers.blocks and not self._ops.shares_memory(self._caches):
            raise ValueError(
                f"engine.tiers has {engine_config.tiers.blocks} blocks, but the KV cache on {self._device} is kept in "
                "a format of its own that is not copied to other tiers: set dram_blocks and ssd_blocks to 0"
            )
        self._tiers = HostTiers(self.pool.memory, 1, engine_config.tiers, ssd_folder)
        self.about = self._ops.describe(self._caches)
        self._graphs = None
        if graphs:
            self._graphs = DecodeGraphs(
                self._accelerator,
                self._ops,
                self._caches,
                self.model,
                graph_sizes,
                self._positions,
                engine_config.block_tokens,
                dummy_block=engine_config.kv_blocks,
            )
            self.about += f"; decodes of up to {self._graphs.sizes[-1]} by graphs of {self._graphs.sizes}"
        self._packer = Packer(engine_config.block_tokens)
        self._last_tokens = torch.zeros(0, dtype=torch.int64, device=self._device)
        self._sampler = Sampler(self.model.vocab_size, self._device, self._ops)
        self.eos = self.model.eos_token_ids
        self._changes: list[Callable[[], object]] = []  # in the sampler's rows, made when the next step computes
        self._launched: deque[_Launched] = deque()
        self._leaving: deque[tuple[_Launched, int]] = deque()
        self._thread: ThreadPoolExecutor | None = None
        if engine_config.max_in_flight > 1 and self._device.type == "cpu":
            self._thread = ThreadPoolExecutor(1, "compute", torch.set_num_threads, (num_threads,))

    def add(self, task_id: int, payload: Payload) -> None:
        """Raises ValueError for tokens that are not in the model's vocabulary, and for more than it has positions."""
        tokens = [*payload.tokens, *(payload.forced or ())]
        if tokens and not 0 <= min(tokens) <= max(tokens) < self.model.vocab_size:
            raise ValueError(
                f"task {task_id} has tokens from {min(tokens)} to {max(tokens)}: "
                f"the model's vocabulary is 0 to {self.model.vocab_size - 1}"
            )
        payload.sampling.check(self.model.vocab_size)
        if len(payload.tokens) > self.model.max_position:
            raise ValueError(
                f"task {task_id} has {len(payload.tokens)} tokens: the model has {self.model.max_position} positions"
            )
        row = self._packer.add(task_id, payload.tokens)
        prompt = len(payload.tokens) - payload.generated
        self._changes.append(
            partial(
                self._sampler.add,
                row,
                payload.sampling,
                payload.tokens[:prompt],
                payload.tokens[prompt:],
                payload.forced or (),
                [token for token in payload.ends(self.eos) if token < self.model.vocab_size],
            )
        )

    def remove(self, task_id: int) -> None:
        row = self._packer.remove(task_id)
        if row is None:
            return
        if self._launched:
            self._leaving.append((self._launched[-1], row))
        else:
            self._release(row)

    def warm_up(self) -> None:
        """A prompt and a few tokens through an engine core of their own; their blocks are overwritten before use."""
        core = EngineCore(msgspec.structs.replace(self._config, tiers=TierConfig(), preemption="recompute"))
        token = max(0, self.model.vocab_size - 1)
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
        step = self._packer.pack(plan)
        with torch.inference_mode():
            context = StepContext(
                self._ops,
                self._caches,
                step.starts,
                step.counts,
                step.num_chunks,
                step.block_tables,
                self._block_tokens,
                step.sample_places,
                self._device,
            )
        changes, self._changes = self._changes, []
        self._launched.append(_Launched(plan.sampling, step, self._start(changes, step, context)))

    def collect(self) -> StepOutput:
        """Tasks whose logits are not finite or whose positions ran out have failed."""
        launched = self._launched.popleft()
        sequences, step, result = launched
        sampled = result()
        tokens, usable = sampled.tokens.numpy(), sampled.finite.numpy()
        self._packer.take(step, tokens)
        failed = {}
        for index in np.flatnonzero(~usable).tolist():
            failed[sequences[index].task_id] = "its logits are not finite numbers"
            self._packer.unclean.update(sequences[index].blocks)
        for index in np.flatnonzero(usable & (step.positions > self.model.max_position)).tolist():
            usable[index] = False
            failed[sequences[index].task_id] = f"the model has only {self.model.max_position} positions"
        while self._leaving and self._leaving[0][0] is launched:
            self._release(self._leaving.popleft()[1])
        return StepOutput(tokens[:, None], usable.astype(np.int64), failed, _logprobs_of(sequences, sampled.logprobs))

    @property
    def kv_handle(self) -> KvHandle | None:
        return self.pool.handle if self._ops.shares_memory(self._caches) else None

    def stage(self, blocks: list[int]) -> None:
        self.pool.stage(blocks)

    def fetch(self, source: KvHandle | None, source_blocks: list[int], blocks: list[int]) -> int:
        """Also raises ValueError where the peer's layout is not ours."""
        if source is None:
            raise FileNotFoundError("the peer offers no KV cache to read")
        if not self._ops.shares_memory(self._caches):
            raise FileNotFoundError(
                "this device keeps its KV cache in a format of its own, which takes no other's blocks"
            )
        self._packer.unclean.difference_update(blocks)  # overwritten as a whole, with what is clean at its source
        return self.pool.copy_blocks(self.pool.peer(source), source_blocks, blocks)

    def move(self, move: Move) -> None:
        self._tiers.move(move)

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown()
        self._caches = []
        self._tiers.close()
        self.pool.close()

    def _release(self, row: int) -> None:
        self._packer.release(row)
        self._changes.append(partial(self._sampler.remove, row))

    # -- what computes --------------------------------------------------------------------------------------------

    def _start(
        self, changes: list[Callable[[], object]], step: PackedStep, context: StepContext
    ) -> Callable[[], Sampled]:
        """Compute a step behind those started before; returns what waits for its result."""
        if self._thread is not None:
            return self._thread.submit(self._compute, changes, step, context).result
        result = self._compute(changes, step, context)
        if self._device.type == "cpu":
            return lambda: result
        result = result.to_host()
        arrived = self._accelerator.event()
        arrived.record()

        def wait() -> Sampled:
            arrived.synchronize()
            return result

        return wait

    @torch.inference_mode()
    def _compute(self, changes: list[Callable[[], object]], step: PackedStep, context: StepContext) -> Sampled:
        """One step. Sampled tokens stay in the table of last tokens, where the next step's decodes find them."""
        for change in changes:
            change()
        if len(self._last_tokens) < step.num_rows:
            more = self._last_tokens.new_zeros(step.num_rows - len(self._last_tokens))
            self._last_tokens = torch.cat((self._last_tokens, more))
        if step.uploads.size:
            rows, values = self._tensor(step.uploads)
            self._last_tokens.index_copy_(0, rows, values)
        if step.unclean:
            self.pool.tensor[:, :, step.unclean] = 0
        tokens = self._tensor(step.tokens)
        if len(step.decode_rows):
            tokens[-len(step.decode_rows) :] = self._last_tokens.index_select(0, self._tensor(step.decode_rows))
        positions = np.minimum(context.positions, self._positions - 1)  # beyond: `collect` refuses the token
        there = self._tensor(positions)
        logits = None if self._graphs is None else self._graphs.run(tokens, there, context, step.sample_places)
        if logits is None:
            logits = self.model(tokens, there, context)
        sampled = self._sampler.sample(logits, step.rows.tolist(), step.indices.tolist())
        self._last_tokens.index_copy_(0, self._tensor(step.rows), sampled.tokens)
        return sampled

    def _tensor(self, values: Ints) -> Tensor:
        return torch.from_numpy(values).to(self._device)


def _logprobs_of(sequences: list[Sequence], logprobs: Logprobs | None) -> dict[int, list[TokenLogprobs]] | None:
    """On the host, by task id."""
    if logprobs is None:
        return None
    chosen, tokens, values = logprobs.chosen.tolist(), logprobs.tokens.tolist(), logprobs.values.tolist()
    return {
        sequences[place].task_id: [TokenLogprobs(chosen[n], list(zip(tokens[n][:top], values[n][:top], strict=True)))]
        for n, (place, top) in enumerate(zip(logprobs.places, logprobs.tops, strict=True))
    }
