"""What this machine has for FlowServe, as `deepflow doctor` prints it. Nothing here is computed on a device."""

import os
import platform
import shutil
from typing import NamedTuple

import numpy
import torch

from flowserve.ops import npu_driver, selftest
from flowserve.ops.device import Device, open_device


class Fact(NamedTuple):
    """`fix`: what to do about it, where something is wrong."""

    name: str
    value: str
    fix: str = ""


def facts() -> list[Fact]:
    """The host and its software; devices are asked by `devices`."""
    cpu = open_device("cpu")
    memory, shared = cpu.memory(), shutil.disk_usage("/dev/shm")
    cores, usable = os.cpu_count() or 1, len(os.sched_getaffinity(0))
    policy = os.environ.get("OMP_WAIT_POLICY", "")
    return [
        Fact("Python", platform.python_version()),
        Fact("torch", f"{torch.__version__}, numpy {numpy.__version__}"),
        Fact("CPU", f"{cpu.name()}, {usable} of {cores} cores for this process"),
        Fact("memory", f"{_gib(memory.free)} of {_gib(memory.total)} free"),
        Fact(
            "shared memory",
            f"{_gib(shared.free)} of {_gib(shared.total)} free in /dev/shm",
            ""
            if shared.total >= 1 << 30
            else "engines exchange KV cache in shared memory: in a container raise --shm-size",
        ),
        Fact(
            "threads",
            f"torch would use {torch.get_num_threads()}, OMP_WAIT_POLICY is {policy or 'not set'}",
            ""
            if policy.lower() == "passive" or usable == 1
            else "several engines on one CPU slow each other down by spinning: set OMP_WAIT_POLICY=passive",
        ),
        Fact("CANN", _cann()),
    ]


def devices() -> tuple[list[Device], list[Fact]]:
    """The first device of each type that is there, and what is to be said about each type."""
    found, said = [open_device("cpu")], []
    if torch.cuda.is_available():
        found.append(open_device("cuda"))
    else:
        said.append(Fact("cuda", "torch sees no device"))
    if not npu_driver.is_installed():
        said.append(Fact("npu", "torch_npu is not installed"))
    else:
        try:
            found.append(open_device("npu"))
        except ValueError as error:
            said.append(Fact("npu", "torch_npu is installed, but there is no device to use", str(error)))
    for device in found[1:]:
        memory = device.memory()
        what = f"{device.count()} x {device.name()}, {_gib(memory.free)} of {_gib(memory.total)} free on the first"
        said.append(Fact(device.device.type, what))
    return found, said


def attention_facts(device: Device) -> list[Fact]:
    """The paths of attention that this device takes."""
    try:
        return [Fact(f"{device.device.type} attention", line) for line in selftest.attention_paths(device)]
    except ValueError as error:
        return [Fact(f"{device.device.type} attention", "none", str(error))]


def _cann() -> str:
    home = os.environ.get("ASCEND_HOME_PATH")
    return f"set_env.sh was sourced, ASCEND_HOME_PATH is {home}" if home else "set_env.sh was not sourced in this shell"


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
