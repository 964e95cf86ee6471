"""`torch.npu` of the stand-in: the calls a program makes on the device itself. `plug(n)` sets how many there are."""

import contextlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from tests.flowserve.npu_operators import SOC_VERSIONS
from tests.flowserve.npu_tensor import NpuTensor, memory

NAMES = {"A2": "Ascend910B4", "A3": "Ascend910_9391", "310P": "Ascend310P3", "A5": "Ascend950PR"}
HBM_BYTES = 8 << 30


class Stream:
    def __init__(self, device: Any = None, priority: int = 0) -> None:
        self.device = device

    def synchronize(self) -> None:
        pass

    def wait_stream(self, other: "Stream") -> None:
        pass

    def wait_event(self, event: "Event") -> None:
        event.wait(self)


class Event:
    """Raises where it is waited for before it was recorded: on a device that would not wait."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.recorded = False

    def record(self, stream: Stream | None = None) -> None:
        self.recorded = True

    def wait(self, stream: Stream | None = None) -> None:
        if not self.recorded:
            raise RuntimeError("an event is waited for that was never recorded")

    def synchronize(self) -> None:
        self.wait()
        NPUGraph.running = False


class NPUGraph:
    """Records the work of a capture with the very tensors it is done on, and does it again on them.

    `update` rewrites the lengths of the attention calls by keyword, as the wheel's handler does: it ignores keys that
    it does not know. A replay with lengths that were not rewritten since the last one is refused, and so is an update
    while a replay may still be running.
    """

    UPDATES = ("actual_seq_lengths", "actual_seq_lengths_kv")
    running = False

    def __init__(self) -> None:
        self.work: list[tuple[Any, Any, Any, Any]] = []
        self.fresh = False
        self.replays = 0
        self.auto_dispatch_capture = False

    def record(self, function: Any, args: Any, kwargs: Any, result: Any) -> None:
        self.work.append((function, args, kwargs, result))

    @property
    def attention(self) -> list[dict[str, Any]]:
        return [kwargs for function, _, kwargs, _ in self.work if "fused_infer" in getattr(function, "__name__", "")]

    def update(self, cpu_update_input: list[dict[str, Any]]) -> None:
        if not self.auto_dispatch_capture:
            raise RuntimeError("captured without auto_dispatch_capture")
        if NPUGraph.running:
            raise RuntimeError("lengths are updated while a replay may be running")
        calls = self.attention
        if len(cpu_update_input) == 1:
            cpu_update_input = cpu_update_input * len(calls)
        if len(cpu_update_input) != len(calls):
            raise RuntimeError(f"{len(cpu_update_input)} updates for {len(calls)} operators")
        for arguments, changes in zip(calls, cpu_update_input, strict=True):
            known = {key: value for key, value in changes.items() if key in self.UPDATES}
            arguments.update(known)
            self.fresh = bool(known)

    def replay(self) -> None:
        if self.attention and not self.fresh:
            raise RuntimeError("a replay with stale lengths")
        self.fresh, NPUGraph.running = False, True
        self.replays += 1
        for function, args, kwargs, result in self.work:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, NpuTensor) and old.raw.data_ptr() != new.raw.data_ptr():
                    old.raw.copy_(new.raw)

    def query(self) -> bool:
        return self.recorded


class Runtime(ModuleType):
    """State: `family` of the chips, how many, and the current stream."""

    Stream = Stream
    Event = Event
    NPUGraph = NPUGraph

    def __init__(self) -> None:
        super().__init__("torch_npu.npu")
        self.family = "A2"
        self.devices = 1
        self._current = 0
        self._streams = [Stream()]
        self.seed: int | None = None
        self.capturing: NPUGraph | None = None
        self.captures: list[tuple[NPUGraph, object]] = []

    def graph_pool_handle(self) -> object:
        return object()

    @contextlib.contextmanager
    def graph(self, npu_graph: NPUGraph, pool: object = None, auto_dispatch_capture: bool = False) -> Iterator[None]:
        """Captures are noted with their pool, in order."""
        npu_graph.auto_dispatch_capture = auto_dispatch_capture
        self.captures.append((npu_graph, pool))
        self.capturing = npu_graph
        try:
            yield
        finally:
            self.capturing = None

    def plug(self, devices: int, family: str = "A2") -> None:
        self.devices, self.family = devices, family
        self.captures.clear()
        NPUGraph.running = False

    # What torch asks of a backend's module.

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        self.seed = seed

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    # What programs ask.

    def is_available(self) -> bool:
        return self.devices > 0

    def device_count(self) -> int:
        return self.devices

    def current_device(self) -> int:
        return self._current

    def set_device(self, device: Any) -> None:
        self._current = torch.device(device).index or 0

    def get_device_name(self, device: Any = None) -> str:
        return NAMES[self.family]

    def get_soc_version(self) -> int:
        return SOC_VERSIONS[self.family]

    def synchronize(self, device: Any = None) -> None:
        pass

    def current_stream(self, device: Any = None) -> Stream:
        return self._streams[-1]

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        self._streams.append(stream)
        try:
            yield
        finally:
            self._streams.pop()

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        return HBM_BYTES, HBM_BYTES

    def memory_allocated(self, device: Any = None) -> int:
        return memory.held

    def max_memory_allocated(self, device: Any = None) -> int:
        return memory.peak

    def empty_cache(self) -> None:
        pass

    def manual_seed(self, seed: int) -> None:
        self.seed = seed
