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
from flowserve.core.config import EngineConfig
from flowserve.core.plan import Plan, Verify
from flowserve.core.scheduler import EngineCore
from flowserve.core.sequence import Sequence
from flowserve.core.tiers import Move, TierConfig
from flowserve.models import load_model
from flowserve.ops.device import open_device
from flowserve.ops.step import Ints, StepContext
from flowserve.runtime.draft import Drafter, DraftModel, PromptLookup
from flowserve.runtime.graphs import DecodeGraphs
from flowserve.runtime.host_tiers import HostTiers
from flowserve.runtime.kv_pool import KvPool, pool_of
from flowserve.runtime.packing import PackedStep, Packer
from flowserve.runtime.runner import KvHandle, Payload, StepOutput, TokenLogprobs
from flowserve.runtime.sampler import Logprobs, Sampled, Sampler
from flowserve.runtime.sampling import Sampling
from flowserve.runtime.sizing import blocks_that_fit

WARM_UP_TOKENS = 8
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class _Launched(NamedTuple):
    """A plan in flight. `result` waits for it, and returns the packed tokens too, guesses among them."""

    sequences: list[Sequence]
    step: PackedStep
    result: Callable[[], tuple[Tensor, Sampled]]


class TorchRunner:
    """The `Runner` on one torch device; `dtype` is that of weights, KV cache and computation. `about`: in a line, how
    attention is computed.

    Other devices compute by themselves; with plans in flight, a CPU does so on a thread of its own. What it works with
    is its own then: the model, the last token of each task, and how tasks are sampled; a plan's inputs are packed
    before and do not change.
    `draft_dir`: the model that guesses, where `engine_config.drafter` is "model".
    Raises ValueError for a model, dtype or device that is not supported, and for models that do not fit each other.
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
        draft_dir: str | Path | None = None,
        memory_share: float | None = None,
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}: allowed are {', '.join(DTYPES)}")
        torch.set_num_threads(num_threads)
        self._ops = ops.load(device.partition(":")[0])
        self._accelerator = open_device(device)
        self._accelerator.set()
        self._device = self._accelerator.device
        self._dtype = DTYPES[dtype]
        self._block_tokens = engine_config.block_tokens
        self._ssd_folder, self._draft_dir = ssd_folder, draft_dir
        self.model = load_model(Path(model_dir), self._dtype, self._device)
        self.model.pack(self._ops)
        self._packer = Packer(engine_config.block_tokens)
        self._last_tokens = torch.zeros(0, dtype=torch.int64, device=self._device)
        self._sampler = Sampler(self.model.vocab_size, self._device, self._ops)
        self.eos = self.model.eos_token_ids
        self._own_pace: set[int] = set()  # tasks whose sampling depends on the tokens so far: nobody guesses for them
        self._changes: list[Callable[[], object]] = []  # in the sampler's rows, made when the next step computes
        self._launched: deque[_Launched] = deque()
        self._leaving: deque[tuple[_Launched, int]] = deque()
        self._thread: ThreadPoolExecutor | None = None
        if engine_config.max_in_flight > 1 and self._device.type == "cpu":
            self._thread = ThreadPoolExecutor(1, "compute", torch.set_num_threads, (num_threads,))
        self.kv_blocks: int | None = None
        if memory_share is not None:
            self.kv_blocks = self._measure_blocks(engine_config, memory_share)
            engine_config = msgspec.structs.replace(engine_config, kv_blocks=self.kv_blocks)
        self._allocate(engine_config, () if self._device.type == "cpu" else graph_sizes)

    def _allocate(self, config: EngineConfig, graph_sizes: tuple[int, ...] = ()) -> None:
        """KV cache, its tiers, and what depends on their size. Graphs take one block more, for padding."""
        self._config = config
        self._positions = min(config.kv_blocks * config.block_tokens, self.model.max_position)
        self.model.set_positions(self._positions)
        blocks = config.kv_blocks + bool(graph_sizes)
        self.pool = pool_of(self.model, config, blocks, self._dtype, self._device, self._ops.KV_ALIGNMENT_BYTES)
        self._caches = self._ops.layer_caches(self.pool.tensor)
        if config.tiers.blocks and not self._ops.shares_memory(self._caches):
            raise ValueError(
                f"engine.tiers has {config.tiers.blocks} blocks, but the KV cache on {self._device} is kept in "
                "a format of its own that is not copied to other tiers: set dram_blocks and ssd_blocks to 0"
            )
        self._drafter = self._make_drafter(config)
        self._tiers = [HostTiers(pool.memory, 1, config.tiers, self._ssd_folder) for pool in self._pools]
        self.about = self._ops.describe(self._caches)
        self._graphs: DecodeGraphs | None = None
        if graph_sizes:
            self._graphs = DecodeGraphs(
                self._accelerator,
                self._ops,
                self._caches,
                self.model,
                graph_sizes,
                self._positions,
                config.block_tokens,
                dummy_block=config.kv_blocks,
            )
            self.about += f"; decodes of up to {self._graphs.sizes[-1]} by graphs of {self._graphs.sizes}"

    def _make_drafter(self, config: EngineConfig) -> Drafter | None:
        if not config.speculative_tokens:
            return None
        if config.drafter == "ngram":
            return PromptLookup()
        if self._draft_dir is None:
            raise ValueError("drafter is 'model', but no draft model is named: give its folder, or take 'ngram'")
        return DraftModel(Path(self._draft_dir), config, self.model.vocab_size, self._dtype, self._device, self._ops)

    def _measure_blocks(self, config: EngineConfig, share: float) -> int:
        """How many blocks fit beside a step of the whole token budget, which is run to see."""
        tokens = min(config.token_budget, self.model.max_position - 1)
        blocks = -(-(tokens + 1) // config.block_tokens)
        self._allocate(msgspec.structs.replace(config, kv_blocks=blocks, tiers=TierConfig(), preemption="recompute"))
        self._serve_one(tokens, 1)
        self._accelerator.synchronize()
        peak = self._accelerator.peak()
        pool_bytes = sum(pool.memory.numel() for pool in self._pools) * self._dtype.itemsize
        self._free()
        self._accelerator.empty_cache()
        memory, allocated = self._accelerator.memory(), self._accelerator.allocated()
        return blocks_that_fit(memory, allocated, peak - pool_bytes, pool_bytes // blocks, share)

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
        prompt, forced = len(payload.tokens) - payload.generated, payload.forced or ()
        ends = [token for token in payload.ends(self.eos) if token < self.model.vocab_size]
        self._changes.append(
            partial(
                self._sampler.add,
                row,
                payload.sampling,
                payload.tokens[:prompt],
                payload.tokens[prompt:],
                forced,
                ends,
            )
        )
        if payload.sampling.penalises:
            self._own_pace.add(task_id)
        if self._drafter is not None:
            self._changes.append(partial(self._drafter.add, row, payload.sampling, forced, ends))

    def remove(self, task_id: int) -> None:
        row = self._packer.remove(task_id)
        self._own_pace.discard(task_id)
        if row is None:
            return
        if self._launched:
            self._leaving.append((self._launched[-1], row))
        else:
            self._release(row)

    def warm_up(self) -> None:
        """A prompt and a few tokens through an engine core of their own; their blocks are overwritten before use."""
        length = min(64, self._positions - WARM_UP_TOKENS, self._config.kv_blocks * self._block_tokens - WARM_UP_TOKENS)
        if length >= 1:
            self._serve_one(length, WARM_UP_TOKENS)

    def _serve_one(self, prompt: int, output: int) -> None:
        """A request of that many tokens, from its prompt to its last token."""
        core = EngineCore(msgspec.structs.replace(self._config, tiers=TierConfig(), preemption="recompute"))
        core.add(Task(-1, Request(-1, prompt, output, ""), TaskKind.SERVE), identity.unique(0))
        self.add(-1, Payload([max(0, self.model.vocab_size - 1)] * prompt, Sampling()))
        while (plan := core.schedule()) is not None:
            self.launch(plan)
            core.complete(plan, (), self.collect().accepted(plan))
        self.remove(-1)

    def launch(self, plan: Plan) -> None:
        guesses = [self._guess(verify) for verify in plan.verifies]
        if guesses:
            plan.narrow([len(each) for each in guesses])
        step = self._packer.pack(plan, guesses)
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
        packed, sampled = result()
        samples, finite = sampled.tokens.numpy(), sampled.finite.numpy()
        self._packer.take(step, samples)
        tokens, counts, usable, positions = samples[:, None], np.ones_like(samples), finite, step.positions
        if len(step.verifies.drafts):
            tokens, counts, usable, first = step.verifies.take(packed.numpy(), samples, finite)
            positions = positions[first]
        failed = {}
        for index in np.flatnonzero(~usable).tolist():
            failed[sequences[index].task_id] = "its logits are not finite numbers"
            self._packer.unclean.update(sequences[index].blocks)
        for index in np.flatnonzero(usable & (positions > self.model.max_position)).tolist():
            usable[index] = False
            failed[sequences[index].task_id] = f"the model has only {self.model.max_position} positions"
        while self._leaving and self._leaving[0][0] is launched:
            self._release(self._leaving.popleft()[1])
        logprobs = None if sampled.logprobs is None else _logprobs_of(step.owners(sequences), sampled.logprobs)
        return StepOutput(tokens, counts * usable, failed, logprobs)

    @property
    def kv_handle(self) -> KvHandle | None:
        if not self._ops.shares_memory(self._caches):
            return None
        draft = None if self._draft_pool is None else self._draft_pool.handle
        return msgspec.structs.replace(self.pool.handle, draft=draft)

    def stage(self, blocks: list[int]) -> None:
        for pool in self._pools:
            pool.stage(blocks)

    def fetch(self, source: KvHandle | None, source_blocks: list[int], blocks: list[int]) -> int:
        """Also raises ValueError where the peer's layout is not ours."""
        if source is None:
            raise FileNotFoundError("the peer offers no KV cache to read")
        if not self._ops.shares_memory(self._caches):
            raise FileNotFoundError(
                "this device keeps its KV cache in a format of its own, which takes no other's blocks"
            )
        self._packer.unclean.difference_update(blocks)  # overwritten as a whole, with what is clean at its source
        if self._draft_pool is not None:
            if source.draft is None:
                raise ValueError("the peer has no KV cache of a draft model, and we do: give both the same drafter")
            self._draft_pool.copy_blocks(self._draft_pool.peer(source.draft), source_blocks, blocks)
        return self.pool.copy_blocks(self.pool.peer(source), source_blocks, blocks)

    def move(self, move: Move) -> None:
        for tiers in self._tiers:
            tiers.move(move)

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown()
        self._free()

    def _free(self) -> None:
        """Give back what `_allocate` took."""
        self._caches = []
        for tiers in self._tiers:
            tiers.close()
        self.pool.close()
        if self._drafter is not None:
            self._drafter.close()

    def _release(self, row: int) -> None:
        self._packer.release(row)
        self._changes.append(partial(self._sampler.remove, row))
        if self._drafter is not None:
            self._changes.append(partial(self._drafter.remove, row))

    @property
    def _draft_pool(self) -> KvPool | None:
        return None if self._drafter is None else self._drafter.pool

    @property
    def _pools(self) -> list[KvPool]:
        """The KV caches with the engine's block numbers: the model's, and the draft model's where there is one."""
        return [self.pool] if self._draft_pool is None else [self.pool, self._draft_pool]

    def _guess(self, verify: Verify) -> Ints:
        """What to verify: nothing where the sampling of a token needs to know all before it, or positions run out."""
        assert self._drafter is not None
        most = min(verify.draft, self.model.max_position - 1 - verify.start)
        if most < 1 or verify.sequence.task_id in self._own_pace:
            return np.zeros(0, dtype=np.int64)
        return self._drafter.guess(self._packer.known_tokens(verify), most)

    # -- what computes --------------------------------------------------------------------------------------------

    def _start(
        self, changes: list[Callable[[], object]], step: PackedStep, context: StepContext
    ) -> Callable[[], tuple[Tensor, Sampled]]:
        """Compute a step behind those started before; returns what waits for its result."""
        if self._thread is not None:
            return self._thread.submit(self._compute, changes, step, context).result
        result = self._compute(changes, step, context)
        if self._device.type == "cpu":
            return lambda: result
        packed, sampled = result
        there = packed.to("cpu", non_blocking=True), sampled.to_host()
        arrived = self._accelerator.event()
        arrived.record()

        def wait() -> tuple[Tensor, Sampled]:
            arrived.synchronize()
            return there

        return wait

    @torch.inference_mode()
    def _compute(
        self, changes: list[Callable[[], object]], step: PackedStep, context: StepContext
    ) -> tuple[Tensor, Sampled]:
        """One step: its packed tokens, and what is sampled. The last of each task stay in a table, where the next
        step's decodes find them.
        """
        for change in changes:
            change()
        if len(self._last_tokens) < step.num_rows:
            more = self._last_tokens.new_zeros(step.num_rows - len(self._last_tokens))
            self._last_tokens = torch.cat((self._last_tokens, more))
        if step.uploads.size:
            rows, values = self._tensor(step.uploads)
            self._last_tokens.index_copy_(0, rows, values)
        if step.unclean:
            for pool in self._pools:
                pool.tensor[:, :, step.unclean] = 0
        tokens = self._tensor(step.tokens)
        if len(step.decode_rows):
            tokens[-len(step.decode_rows) :] = self._last_tokens.index_select(0, self._tensor(step.decode_rows))
        if self._drafter is not None:
            self._drafter.compute(step, tokens)
        positions = np.minimum(context.positions, self._positions - 1)  # beyond: `collect` refuses the token
        there = self._tensor(positions)
        logits = None if self._graphs is None else self._graphs.run(tokens, there, context, step.sample_places)
        if logits is None:
            logits = self.model(tokens, there, context)
        sampled = self._sampler.sample(logits, step.rows.tolist(), step.indices.tolist())
        if not len(step.verifies.drafts):  # verified sequences start from tokens on the host, and nobody decodes else
            self._last_tokens.index_copy_(0, self._tensor(step.rows), sampled.tokens)
        return tokens, sampled

    def _tensor(self, values: Ints) -> Tensor:
        return torch.from_numpy(values).to(self._device)


def _logprobs_of(owners: list[Sequence], logprobs: Logprobs) -> dict[int, list[TokenLogprobs]]:
    """On the host, by task id; `owners`: of the step's samples."""
    chosen, tokens, values = logprobs.chosen.tolist(), logprobs.tokens.tolist(), logprobs.values.tolist()
    found: dict[int, list[TokenLogprobs]] = {}
    for n, (place, top) in enumerate(zip(logprobs.places, logprobs.tops, strict=True)):
        each = TokenLogprobs(chosen[n], list(zip(tokens[n][:top], values[n][:top], strict=True)))
        found.setdefault(owners[place].task_id, []).append(each)
    return found
