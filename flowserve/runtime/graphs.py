"""Decode steps of few batch sizes as graphs of device work, captured once and replayed: a launch for a whole step.

A graph reads and writes the memory it was captured with, so inputs are copied there before each replay. On an NPU the
attention operator takes its lengths from the host: they are baked in, and updated before every replay.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from flowserve.ops import Ops
from flowserve.ops.device import Device, Event
from flowserve.ops.step import Ints, StepContext

Compute = Callable[[Tensor, Tensor, StepContext], Tensor]
"""Tokens and positions [B] int64 and their step to logits [B, V]."""
WARM_UPS = 2
"""Runs before a capture: what operators allocate or choose at their first call must not be part of it."""


class Graph(Protocol):
    """Work that was captured."""

    def replay(self, updates: list[dict[str, Any]]) -> None:
        """Queue it again. `updates`: for operators that take lengths on the host, from `Ops.graph_updates`."""
        ...


class CudaGraphs:
    """torch.cuda.CUDAGraph. All lengths are device tensors: there is nothing to update."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self._pool = module.graph_pool_handle()

    def capture(self, run: Callable[[], Tensor]) -> tuple[Graph, Tensor]:
        graph = self._module.CUDAGraph()
        with self._module.graph(graph, pool=self._pool):
            out = run()
        return _CudaGraph(graph), out


class _CudaGraph:
    def __init__(self, graph: Any) -> None:
        self._graph = graph

    def replay(self, updates: list[dict[str, Any]]) -> None:
        self._graph.replay()


class NpuGraphs:
    """torch.npu.NPUGraph. The dispatcher of the capture wraps each attention call in a task group of its own, which
    `update` rewrites, by keyword, on a stream of its own; so it waits until the last replay is over.
    """

    def __init__(self, module: Any) -> None:
        self._module = module
        self._pool = module.graph_pool_handle()
        self._over: list[Event] = []

    def capture(self, run: Callable[[], Tensor]) -> tuple[Graph, Tensor]:
        graph = self._module.NPUGraph()
        with self._module.graph(graph, pool=self._pool, auto_dispatch_capture=True):
            out = run()
        return _NpuGraph(graph, self._module, self._over), out


class _NpuGraph:
    def __init__(self, graph: Any, module: Any, over: list[Event]) -> None:
        self._graph = graph
        self._module = module
        self._over = over  # of the last replay of any graph: one element at most

    def replay(self, updates: list[dict[str, Any]]) -> None:
        while self._over:
            self._over.pop().synchronize()
        self._graph.update(cpu_update_input=updates)
        self._graph.replay()
        event = self._module.Event()
        event.record()
        self._over.append(event)


class _Captured(NamedTuple):
    """One batch size: its graph, the inputs that it reads, and the logits that it writes."""

    graph: Graph
    tokens: Tensor
    positions: Tensor
    step: StepContext
    logits: Tensor


class DecodeGraphs:
    """Batches are filled up to a captured size with one dummy sequence, decoded at as many places of a block of its
    own: their keys go to different slots, as the operators ask.

    Captures happen at the first decode step, the largest first, so that the others find room in its memory.
    """

    def __init__(
        self,
        device: Device,
        operators: Ops,
        caches: list[Any],
        compute: Compute,
        sizes: Sequence[int],
        num_positions: int,
        block_tokens: int,
        dummy_block: int,
    ) -> None:
        self.sizes = sorted(sizes)
        if not self.sizes or self.sizes[0] < 1 or self.sizes[-1] > block_tokens:
            raise ValueError(
                f"graph sizes are {list(sizes)}: allowed are batches of 1 to {block_tokens}, a block's tokens"
            )
        self._device = device
        self._ops = operators
        self._caches = caches
        self._compute = compute
        self._last_position = num_positions - 1
        self._width = -(-num_positions // block_tokens)
        self._block_tokens = block_tokens
        self._dummy_block = dummy_block
        module = torch.get_device_module(device.device)
        self._backend = NpuGraphs(module) if device.device.type == "npu" else CudaGraphs(module)
        self._captured: dict[int, _Captured] = {}
        operators.graph_updates(self._dummies(1).prepared)  # raises where this device has no graphs

    def run(self, tokens: Tensor, positions: Tensor, step: StepContext, rows: Ints) -> Tensor | None:
        """Logits of a step of decodes for its packed `rows`, to be read before the next call; None where the step has
        chunks, or the batch is larger than any size here.
        """
        count = len(step.starts)
        size = next((size for size in self.sizes if size >= count), None)
        if size is None or step.num_chunks:
            return None
        if not self._captured:
            self._capture()
        captured = self._captured[size]
        padded = self._step(step.starts, step.block_tables, rows, np.arange(size - count))
        captured.tokens[:count].copy_(tokens)
        captured.positions[:count].copy_(positions)
        captured.positions[count:].copy_(torch.from_numpy(padded.positions[count:]))
        captured.step.slot_mapping.copy_(padded.slot_mapping)
        captured.step.sample_rows.copy_(padded.sample_rows)
        copy_tensors(padded.prepared, captured.step.prepared)
        captured.graph.replay(self._ops.graph_updates(padded.prepared))
        return captured.logits[: len(rows)]

    def _capture(self) -> None:
        for size in reversed(self.sizes):
            step = self._dummies(size)
            tokens = torch.zeros(size, dtype=torch.int64, device=self._device.device)
            positions = torch.from_numpy(np.minimum(step.positions, self._last_position)).to(self._device.device)
            run = self._runner(tokens, positions, step)
            for _ in range(WARM_UPS):
                run()
            self._device.synchronize()
            graph, logits = self._backend.capture(run)
            self._captured[size] = _Captured(graph, tokens, positions, step, logits)

    def _dummies(self, size: int) -> StepContext:
        """Dummy sequences alone. One is as long as any will be: what a launch depends on is part of the capture."""
        nothing = np.zeros(0, dtype=np.int64)
        places = np.arange(-1, size - 1)
        places[0] = self._width * self._block_tokens - 1
        return self._step(nothing, np.zeros((0, 1), dtype=np.int32), nothing, places)

    def _runner(self, tokens: Tensor, positions: Tensor, step: StepContext) -> Callable[[], Tensor]:
        return lambda: self._compute(tokens, positions, step)

    def _step(
        self, starts: Ints, tables: "np.ndarray[Any, np.dtype[np.int32]]", rows: Ints, dummies: Ints
    ) -> StepContext:
        """These decodes, and the dummy sequence at the positions `dummies` in the rows behind them."""
        count, size = len(starts), len(starts) + len(dummies)
        wide = np.full((size, self._width), self._dummy_block, dtype=np.int32)
        wide[:count, : tables.shape[1]] = tables
        wide[:count, tables.shape[1] :] = tables[:, :1]
        return StepContext(
            self._ops,
            self._caches,
            np.concatenate((starts, dummies)),
            np.ones(size, dtype=np.int64),
            0,
            wide,
            self._block_tokens,
            np.concatenate((rows, np.arange(count, size))),
            self._device.device,
        )


def copy_tensors(source: object, target: object) -> None:
    """The tensors of one tree of tuples into those of another."""
    if isinstance(target, Tensor):
        assert isinstance(source, Tensor) and source.shape == target.shape
        target.copy_(source)
    elif isinstance(target, tuple):
        assert isinstance(source, tuple)
        for theirs, ours in zip(source, target, strict=True):
            copy_tensors(theirs, ours)
