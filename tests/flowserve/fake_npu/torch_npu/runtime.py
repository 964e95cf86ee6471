"""`torch.npu` of the stand-in: the calls a program makes on the device itself. `plug(n)` sets how many there are."""

import contextlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch

from tests.flowserve.npu_operators import SOC_VERSIONS
from tests.flowserve.npu_tensor import memory

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

    synchronize = wait

    def query(self) -> bool:
        return self.recorded


class Runtime(ModuleType):
    """State: `family` of the chips, how many, and the current stream."""

    Stream = Stream
    Event = Event

    def __init__(self) -> None:
        super().__init__("torch_npu.npu")
        self.family = "A2"
        self.devices = 1
        self._current = 0
        self._streams = [Stream()]
        self.seed: int | None = None

    def plug(self, devices: int, family: str = "A2") -> None:
        self.devices, self.family = devices, family

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
