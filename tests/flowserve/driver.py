"""Drives a runner with the real engine core, as an executor's loop does, and knows what transformers would say."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from cluster import identity
from cluster.request import KvSource, Request, Task
from cluster.vocabulary import TaskKind
from flowserve import ops
from flowserve.core.config import EngineConfig
from flowserve.core.plan import Plan
from flowserve.core.scheduler import NONE, EngineCore
from flowserve.core.sequence import Status
from flowserve.core.tiers import Move
from flowserve.models import Model
from flowserve.ops.step import StepContext
from flowserve.runtime.checkpoint import CheckpointShape
from flowserve.runtime.runner import Payload
from flowserve.runtime.sampling import Sampling
from flowserve.runtime.torch_runner import TorchRunner

TINY = CheckpointShape(
    hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=96, vocab_size=256, max_position=512
)
GREEDY = Sampling()


def make_prompt(seed: int, length: int, vocab: int = TINY.vocab_size) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, vocab, length)]


class Engine:
    """Engine core and torch runner in one process. `output`: task id → tokens sampled here; `failed`: task id → why."""

    def __init__(
        self,
        folder: Path,
        dtype: str = "float32",
        device: str = "cpu",
        graph_sizes: tuple[int, ...] = (),
        draft: Path | None = None,
        **limits: Any,
    ) -> None:
        self.config = EngineConfig(**{"kv_blocks": 128, **limits})
        self.core = EngineCore(self.config)
        self.runner = TorchRunner(folder, self.config, dtype, device, graph_sizes=graph_sizes, draft_dir=draft)
        self.output: dict[int, list[int]] = {}
        self.failed: dict[int, str] = {}
        self.held: list[int] = []
        self.moves: list[Move] = []
        self._tasks = 0

    def add(
        self,
        prompt: list[int],
        limit: int,
        sampling: Sampling = GREEDY,
        generated: Sequence[int] = (),
        forced: list[int] | None = None,
        kind: TaskKind = TaskKind.SERVE,
        kv: KvSource | None = None,
    ) -> int:
        """Queue a request for `limit` output tokens, of which `generated` are there already; returns the task id."""
        self._tasks += 1
        tokens = [*prompt, *generated]
        request = Request(self._tasks, len(prompt), limit, "m", identity.from_tokens(tokens, 0))
        task = Task(self._tasks, request, kind, len(generated), kv)
        self.runner.add(task.task_id, Payload(tokens, sampling, forced=forced, generated=len(generated)))
        assert self.core.add(task, identity.from_tokens(tokens, 0)) is None
        self.output[task.task_id] = []
        return task.task_id

    def step(self, stop: Sequence[int] = ()) -> Plan | None:
        """Launch what may be in flight and complete the oldest plan, which is returned; tasks in `stop` end with it.

        Copies between tiers that were asked for end while the plans asked for after them are computed.
        """
        ending, self.moves = self.moves, []
        while (plan := self.core.schedule()) is not None:
            self.runner.launch(plan)
        self.moves += self.core.rtc.moves
        self.core.rtc.moves.clear()
        for move in ending:
            self.runner.move(move)
            self.core.moved(move.ticket, True)
        if not self.core.in_flight:
            return None
        oldest = self.core.in_flight[0]
        accepted = self.take(oldest)
        self.complete(oldest, stop, accepted)
        return oldest

    def take(self, plan: Plan) -> dict[int, int]:
        """Collect a plan's tokens; tasks that failed are let go of. Returns how many those that speculate got."""
        output = self.runner.collect()
        rows = zip(plan.sampling, output.tokens.tolist(), output.counts.tolist(), strict=True)
        for sequence, tokens, count in rows:
            if sequence.status is not Status.ENDED:  # else it has ended while this plan was in flight
                self.output[sequence.task_id] += tokens[:count]
        for task_id in output.failed:
            self.core.abort(task_id, keep=False)
            self.runner.remove(task_id)
        self.failed |= output.failed
        return output.accepted(plan)

    def complete(self, plan: Plan, stop: Sequence[int] = (), accepted: Mapping[int, int] = NONE) -> None:
        for sequence, held in self.core.complete(plan, stop, accepted).finished:
            if held:
                self.held.append(sequence.task_id)
            else:
                self.runner.remove(sequence.task_id)

    def run(self) -> dict[int, list[int]]:
        """Step until there is nothing left to compute."""
        while self.step() is not None or self.moves:
            self.core.check_integrity()
        return self.output

    def close(self) -> None:
        self.runner.close()


def serve(folder: Path, prompts: Sequence[list[int]], limit: int, **limits: Any) -> list[list[int]]:
    """Outputs of greedy requests that arrive together at a new engine."""
    engine = Engine(folder, **limits)
    tasks = [engine.add(prompt, limit) for prompt in prompts]
    engine.run()
    engine.close()
    return [engine.output[task] for task in tasks]


def packed_logits(model: Model, tokens: list[int], chunks: Sequence[int] = ()) -> torch.Tensor:
    """Logits [len(tokens), vocab] of one sequence, computed in chunks of the given sizes, the rest token by token.

    The blocks of the sequence lie in the cache in reverse order, with strangers' data between and behind them.
    """
    blocks = -(-len(tokens) // 16)
    kv = torch.randn(
        (model.num_layers, 2, 2 * blocks, 16, model.num_kv_heads, model.head_dim),
        generator=torch.Generator().manual_seed(0),
    )
    cpu = ops.load("cpu")
    table = np.arange(2 * blocks - 1, 0, -2, dtype=np.int32)[None]
    caches, logits, start = cpu.layer_caches(kv), [], 0
    sizes = [*chunks, *[1] * (len(tokens) - sum(chunks))]
    with torch.inference_mode():
        for index, count in enumerate(sizes):
            step = StepContext(
                cpu,
                caches,
                np.array([start]),
                np.array([count]),
                int(index < len(chunks)),
                table,
                16,
                np.arange(count),
                torch.device("cpu"),
            )
            ids = torch.tensor(tokens[start : start + count])
            logits.append(model(ids, torch.from_numpy(step.positions), step))
            start += count
    return torch.cat(logits)


class Reference:
    """The reference implementation on the same weights."""

    def __init__(self, folder: Path) -> None:
        self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def logits(self, tokens: list[int]) -> torch.Tensor:
        """[len(tokens), vocab]."""
        with torch.inference_mode():
            logits: torch.Tensor = self.model(torch.tensor([tokens])).logits[0]
        return logits

    def check_greedy(self, prompt: list[int], output: list[int], within: float = 1e-4) -> None:
        """Every output token is the most likely one behind what precedes it, or less than `within` below it."""
        logits = self.logits([*prompt, *output])[len(prompt) - 1 : -1]
        short = logits.amax(-1) - logits.gather(1, torch.tensor(output)[:, None])[:, 0]
        assert short.max() < within, f"tokens {short.nonzero().flatten().tolist()} are not the reference's"
