"""The device itself behind one seam: streams, events, memory, seeds; its operators are behind another (`Ops`).

cuda and npu name these calls alike, so one class serves both over their modules. On the cpu they say what is true
there: one stream whose work is done when the call returns, and the memory of the host and of this process.
"""

import importlib
import os
import resource
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

OPENERS: dict[str, Callable[[], Any]] = {
    "cuda": lambda: torch.cuda,
    "npu": lambda: importlib.import_module("flowserve.ops.npu_driver").open_runtime(),
}
"""Per device type, what must be loaded before its module can be asked. Raises ValueError where that fails."""


class Memory(NamedTuple):
    """Bytes of a device that nobody uses, and all it has."""

    free: int
    total: int


class Event(Protocol):
    """A point in a stream's work. `record()` and `wait()` take the current stream where none is given."""

    def record(self, stream: Any = None) -> None: ...
    def wait(self, stream: Any = None) -> None: ...
    def query(self) -> bool: ...
    def synchronize(self) -> None: ...


class Device(Protocol):
    """One device of this machine. Work on it is queued: `synchronize` and events say when it is done."""

    device: torch.device

    def name(self) -> str:
        """The product's name."""
        ...

    def count(self) -> int:
        """Devices of this type that the process sees."""
        ...

    def set(self) -> None:
        """Make it the calling thread's current device."""
        ...

    def synchronize(self) -> None:
        """Wait for all work queued on it."""
        ...

    def current_stream(self) -> Any:
        """The stream that operators called now are queued on."""
        ...

    def new_stream(self) -> Any:
        """A further stream."""
        ...

    def use_stream(self, stream: Any) -> AbstractContextManager[object]:
        """Queue what is called inside on `stream`."""
        ...

    def event(self) -> Event:
        """A new event, not recorded."""
        ...

    def memory(self) -> Memory:
        """Free and total, other processes counted in."""
        ...

    def allocated(self) -> int:
        """Bytes this process holds in tensors (on the cpu: its resident memory)."""
        ...

    def peak(self) -> int:
        """The most that `allocated` has been."""
        ...

    def empty_cache(self) -> None:
        """Give memory that the allocator keeps in reserve back to the device."""
        ...

    def pin(self, tensor: Tensor) -> Tensor:
        """A copy of a host tensor in page-locked memory, from which copies to the device can run on their own."""
        ...

    def manual_seed(self, seed: int) -> None:
        """Seed the device's random generator."""
        ...


def open_device(name: str) -> Device:
    """The device of that name, as in "cpu", "npu", "cuda:1"; the first of its type where no number is given.

    Raises ValueError, naming what to do, where the machine has no such device or its software does not load.
    """
    kind, _, number = name.partition(":")
    if kind != "cpu" and kind not in OPENERS:
        raise ValueError(f"device is {name!r}: allowed are cpu, {', '.join(OPENERS)}, also with a number as in npu:1")
    if number and not number.isdecimal():
        raise ValueError(f"device is {name!r}: behind the colon goes the device's number, as in {kind}:0")
    if kind == "cpu":
        return _Cpu()
    module = OPENERS[kind]()
    index = int(number or 0)
    count = module.device_count()
    if index >= count:
        seen = f"{count} of that type: allowed are numbers below that" if count else "none of that type"
        raise ValueError(f"device is {name!r}, this process sees {seen} (are drivers and *_VISIBLE_DEVICES right?)")
    return _Accelerator(torch.device(kind, index), module)


class _Accelerator:
    def __init__(self, device: torch.device, module: Any) -> None:
        self.device = device
        self._module = module

    def name(self) -> str:
        return str(self._module.get_device_name(self.device))

    def count(self) -> int:
        return int(self._module.device_count())

    def set(self) -> None:
        self._module.set_device(self.device)

    def synchronize(self) -> None:
        self._module.synchronize(self.device)

    def current_stream(self) -> Any:
        return self._module.current_stream(self.device)

    def new_stream(self) -> Any:
        return self._module.Stream(device=self.device)

    def use_stream(self, stream: Any) -> AbstractContextManager[object]:
        context: AbstractContextManager[object] = self._module.stream(stream)
        return context

    def event(self) -> Event:
        event: Event = self._module.Event()
        return event

    def memory(self) -> Memory:
        return Memory(*self._module.mem_get_info(self.device))

    def allocated(self) -> int:
        return int(self._module.memory_allocated(self.device))

    def peak(self) -> int:
        return int(self._module.max_memory_allocated(self.device))

    def empty_cache(self) -> None:
        self._module.empty_cache()

    def pin(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory()

    def manual_seed(self, seed: int) -> None:
        self._module.manual_seed(seed)


class _HostEvent:
    """On the cpu all work before it is done when it is recorded."""

    def record(self, stream: Any = None) -> None:
        pass

    def wait(self, stream: Any = None) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


class _Cpu:
    device = torch.device("cpu")

    def name(self) -> str:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            fields = dict(line.split(":", 1) for line in lines if ":" in line)
        names = {key.strip(): value.strip() for key, value in fields.items()}
        return names.get("model name") or names.get("CPU part") or os.uname().machine

    def count(self) -> int:
        return 1

    def set(self) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def current_stream(self) -> Any:
        return None

    def new_stream(self) -> Any:
        return None

    def use_stream(self, stream: Any) -> AbstractContextManager[object]:
        return nullcontext()

    def event(self) -> Event:
        return _HostEvent()

    def memory(self) -> Memory:
        with open("/proc/meminfo", encoding="utf-8") as lines:
            kib = {name: int(rest.split()[0]) for name, rest in (line.split(":", 1) for line in lines)}
        return Memory(kib["MemAvailable"] * 1024, kib["MemTotal"] * 1024)

    def allocated(self) -> int:
        with open("/proc/self/statm", encoding="utf-8") as sizes:
            return int(sizes.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def peak(self) -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def empty_cache(self) -> None:
        pass

    def pin(self, tensor: Tensor) -> Tensor:
        return tensor

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)
