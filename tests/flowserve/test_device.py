"""The device seam: host values on the cpu, a device's own calls elsewhere, and what to do where there is none."""

import re
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any

import pytest
import torch

from flowserve import ops
from flowserve.ops.device import open_device
from tests.flowserve.npu import plugged


def test_the_cpu_tells_host_values() -> None:
    """Memory is the host's and the process's own; work is done when its call returns."""
    cpu = open_device("cpu")
    assert cpu.device == torch.device("cpu") and cpu.count() == 1 and cpu.name()
    free, total = cpu.memory()
    assert 0 < free < total
    before = cpu.allocated()
    kept = torch.ones(64 << 20, dtype=torch.uint8)
    assert cpu.allocated() - before > (48 << 20)
    assert before < cpu.peak() <= total
    del kept
    event = cpu.event()
    event.record(cpu.current_stream())
    with cpu.use_stream(cpu.new_stream()):
        event.wait()
    event.synchronize()
    assert event.query()
    cpu.set()
    cpu.synchronize()
    cpu.empty_cache()
    pinned = torch.ones(2)
    assert cpu.pin(pinned) is pinned


def test_seeds_repeat() -> None:
    """The same seed, the same numbers."""
    cpu = open_device("cpu")
    cpu.manual_seed(5)
    first = torch.rand(3)
    cpu.manual_seed(5)
    assert torch.equal(torch.rand(3), first)


def test_an_npu_answers_through_its_module() -> None:
    """Every call of the seam reaches torch.npu, with the device of that number."""
    with plugged("A3", devices=2) as torch_npu:
        npu = open_device("npu:1")
        assert npu.device == torch.device("npu", 1) and npu.count() == 2 and npu.name() == "Ascend910_9391"
        npu.set()
        assert torch_npu.npu.current_device() == 1
        assert npu.memory().total == npu.memory().free == 8 << 30
        before = npu.allocated()
        kept = torch.zeros(1 << 20, device="npu")
        assert npu.allocated() - before == 4 << 20
        del kept
        assert npu.allocated() == before and npu.peak() >= before + (4 << 20)
        stream = npu.new_stream()
        assert npu.current_stream() is not stream
        event = npu.event()
        with npu.use_stream(stream):
            assert npu.current_stream() is stream
            with pytest.raises(RuntimeError, match="never recorded"):
                event.wait()
            event.record()
        event.synchronize()
        npu.synchronize()
        npu.empty_cache()
        npu.manual_seed(7)
        assert torch_npu.npu.seed == 7


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tpu", "device is 'tpu': allowed are cpu, cuda, npu"),
        ("npu:x", "device is 'npu:x': behind the colon goes the device's number, as in npu:0"),
        ("npu:2", "device is 'npu:2', this process sees 2 of that type"),
    ],
)
def test_devices_that_are_not_there(name: str, message: str) -> None:
    """Named with what there is."""
    with plugged(devices=2), pytest.raises(ValueError, match=message):
        open_device(name)


def test_no_device_of_a_type() -> None:
    """torch_npu loads without a chip; the error says that it sees none."""
    with plugged(devices=0), pytest.raises(ValueError, match="sees none of that type"):
        open_device("npu")


# -- torch_npu that does not load -----------------------------------------------------------------------------------


class Broken(MetaPathFinder):
    """Makes `import torch_npu` raise."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        if name == "torch_npu":
            raise self._error
        return None


@pytest.fixture
def breaks(monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception], None]:
    """`breaks(error)`: importing torch_npu raises it, during the test."""

    def install(error: Exception) -> None:
        for name in [name for name in sys.modules if f"{name}.".startswith(("torch_npu.", "flowserve.ops.npu."))]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setattr(sys, "meta_path", [Broken(error), *sys.meta_path])

    return install


@pytest.mark.parametrize("load", [ops.load, open_device], ids=["operators", "device"])
@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ModuleNotFoundError("no", name="torch_npu"), ["not installed", "pip install '.[npu]'"]),
        (ModuleNotFoundError("no", name="yaml"), ["Python module yaml is missing"]),
        (ImportError("libhccl.so: cannot open shared object file"), ["libhccl.so", "set_env.sh", "AUTOLOAD=0"]),
        (OSError("libatb.so"), ["libatb.so", "set_env.sh", "TORCH_DEVICE_BACKEND_AUTOLOAD=0"]),
        (RuntimeError("two accelerators"), ["two accelerators", "set_env.sh"]),
    ],
)
def test_a_torch_npu_that_does_not_load_names_the_fix(
    breaks: Callable[[Exception], None], load: Callable[[str], Any], error: Exception, words: list[str]
) -> None:
    """Missing package, missing CANN libraries, or a refusal of torch_npu's own: one error with the fix."""
    breaks(error)
    with pytest.raises(ValueError, match=".*".join(map(re.escape, words))):
        load("npu")
