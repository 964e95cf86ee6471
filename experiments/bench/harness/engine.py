"""FlowServe in this process: engine core and torch runner in the loop of an executor, without the messages."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from cluster import identity
from cluster.latency import StepShape
from cluster.request import Request, Task
from cluster.vocabulary import TaskKind
from experiments.bench.harness.workload import Load
from flowserve.core.config import EngineConfig
from flowserve.core.scheduler import EngineCore
from flowserve.runtime.runner import Payload
from flowserve.runtime.sampling import Sampling
from flowserve.runtime.torch_runner import TorchRunner


class Served(NamedTuple):
    """One request's tokens and when each was there, in seconds of the process clock."""

    tokens: list[int]
    times_s: list[float]


class FlowServe:
    """Keeps its KV cache, and with it the prefix cache, from one `serve` to the next. `steps`: shape and ns of each."""

    def __init__(
        self,
        folder: Path,
        config: EngineConfig,
        dtype: str = "float32",
        device: str = "cpu",
        threads: int = 1,
        graph_sizes: tuple[int, ...] = (),
    ) -> None:
        self.core = EngineCore(config)
        self.runner = TorchRunner(folder, config, dtype, device, threads, graph_sizes=graph_sizes)
        self.runner.warm_up()
        self.steps: list[tuple[StepShape, int]] = []
        self._tasks = 0

    def serve(self, loads: Sequence[Load]) -> list[Served]:
        """All at once, greedily, to the end."""
        served: dict[int, Served] = {}
        for load in loads:
            self._tasks += 1
            ids = identity.from_tokens(load.prompt, 0)
            request = Request(self._tasks, len(load.prompt), load.output, "bench", ids)
            self.runner.add(self._tasks, Payload(load.prompt, Sampling(ignore_eos=True)))
            refused = self.core.add(Task(self._tasks, request, TaskKind.SERVE), ids)
            if refused is not None:
                raise ValueError(f"a prompt of {len(load.prompt)} tokens is refused: {refused}")
            served[self._tasks] = Served([], [])
        while (plan := self.core.schedule()) is not None:
            start = time.perf_counter()
            self.runner.launch(plan)
            output = self.runner.collect()
            assert not output.failed, f"the model gave no token: {output.failed}"
            now = time.perf_counter()
            self.steps.append((plan.shape, round((now - start) * 1e9)))
            for sequence, tokens in zip(plan.sampling, output.tokens, strict=True):
                served[sequence.task_id].tokens.extend(tokens)
                served[sequence.task_id].times_s.extend([now] * len(tokens))
            for sequence, _ in self.core.complete(plan, ()).finished:
                self.runner.remove(sequence.task_id)
        return list(served.values())

    def close(self) -> None:
        self.runner.close()
