"""`deepflow doctor`: what is there, every operator against its definition, and what to fix."""

import sys
from typing import Any

import pytest
import torch

from flowserve.ops import selftest
from tests.experiments.conftest import Command
from tests.flowserve.npu import plugged
from tests.flowserve.test_device import Broken

OPERATORS = ["attention", "best", "experts", "linear", "norm_heads", "rms_norm", "rotate", "swiglu"]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")


def verdicts(out: str) -> dict[tuple[str, str, str], set[str]]:
    """(operator, device, dtype) → its verdicts."""
    found: dict[tuple[str, str, str], set[str]] = {}
    for line in out.splitlines():
        cells = [cell.strip() for cell in line.split("│")[1:-1]]
        if len(cells) == 7:
            found.setdefault((cells[0], cells[1], cells[2]), set()).add(cells[6])
    return found


def test_a_healthy_machine(deepflow: Command) -> None:
    """The host is described, every operator of the CPU passes in every dtype, exit code 0."""
    said = deepflow("doctor", "cpu")
    assert said.code == 0
    for word in ("Python", torch.__version__, "cores", "/dev/shm", "OMP_WAIT_POLICY is passive", "cpu attention"):
        assert word in said.out
    expected = {(name, "cpu", dtype): {"ok"} for name in OPERATORS for dtype in ("float32", "bfloat16")}
    assert verdicts(said.out) == expected
    count = said.out.splitlines()[-1].split()[0]
    assert said.out.splitlines()[-1] == f"{count} of {count} operator checks passed"


@pytest.mark.parametrize(("family", "dtypes"), [("A2", ["float16", "bfloat16"]), ("310P", ["float16"])])
def test_an_npu(deepflow: Command, family: str, dtypes: list[str]) -> None:
    """Its operators keep their contracts and pass; the paths of attention are named; so does the CPU beside it."""
    with plugged(family, devices=2):
        said = deepflow("doctor")
    assert said.code == 0
    assert "2 x Ascend910B4" in said.out or "2 x Ascend310P3" in said.out
    assert f"attention on {family}" in said.out
    found = verdicts(said.out)
    assert {key: found[key] for key in found if key[1] != "cpu"} == {
        (name, "npu:0", dtype): {"ok"} for name in OPERATORS for dtype in dtypes
    }
    assert ("swiglu", "cpu", "float32") in found


def test_a_wrong_operator(deepflow: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that computes something else fails, by name and with its error; the others still pass; exit code 1."""
    with plugged() as torch_npu:
        right = torch_npu.npu_swiglu
        monkeypatch.setattr(torch_npu, "npu_swiglu", lambda x: right(x) * 1.1)
        said = deepflow("doctor", "npu")
    assert said.code == 1
    found = verdicts(said.out)
    assert {key for key in found if "FAILED" in found[key]} >= {("swiglu", "npu:0", "float16")}
    assert {key[0] for key in found if "FAILED" in found[key]} <= {"swiglu", "experts"}
    assert "swiglu on npu:0, float16, [1, 128]: its error is" in said.out


def test_an_operator_that_raises(deepflow: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """The vendor's message is in the list of what to fix."""

    def raises(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("EZ9999: inner error, tiling failed")

    with plugged() as torch_npu:
        monkeypatch.setattr(torch_npu, "npu_fused_infer_attention_score", raises)
        said = deepflow("doctor", "npu")
    assert said.code == 1
    assert "RuntimeError: EZ9999: inner error, tiling failed" in said.out
    assert {key[0] for key, said_of in verdicts(said.out).items() if "FAILED" in said_of} == {"attention"}


def test_results_that_are_not_numbers_fail() -> None:
    """NaN is not within any limit, and neither is another shape."""
    ones = torch.ones(2, dtype=torch.float64)
    assert selftest._error(ones * float("nan"), ones) == float("inf")
    assert selftest._error(ones[:1], ones) == float("inf")


def test_a_torch_npu_without_its_libraries(deepflow: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is named with the fix; the rest of the machine is checked, and nothing has failed."""
    with plugged():
        monkeypatch.delitem(sys.modules, "torch_npu")
        monkeypatch.delitem(sys.modules, "flowserve.ops.npu", raising=False)
        monkeypatch.setattr(sys, "meta_path", [Broken(ImportError("libhccl.so: cannot open")), *sys.meta_path])
        monkeypatch.setattr("flowserve.ops.npu_driver.is_installed", lambda: True)
        said = deepflow("doctor")
        refused = deepflow("doctor", "npu")
    assert said.code == 0
    assert "To fix:" in said.out and "libhccl.so" in said.out and "set_env.sh" in said.out
    assert refused.code == 2
    assert "set_env.sh" in refused.err


def test_what_is_wrong_on_the_host(deepflow: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spinning threads slow neighbours down: said with the variable to set."""
    monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1})
    said = deepflow("doctor", "cpu")
    assert said.code == 0
    assert "set OMP_WAIT_POLICY=passive" in said.out


def test_a_device_that_is_not_one(deepflow: Command) -> None:
    """A user's error is one line and exit code 2."""
    said = deepflow("doctor", "tpu")
    assert said.code == 2
    assert "device is 'tpu': allowed are cpu, cuda, npu" in said.err
