"""The real torch_npu wheel, on stand-ins for the CANN libraries: its schemas, meta kernels, tensors and streams.

Kernels compute nothing there, so nothing is shown about hardware. The wheel is installed in an environment of its own,
in the user's cache, because an installed torch_npu changes `import torch` for everything else.
"""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from flowserve.runtime.checkpoint import make_checkpoint
from tests.flowserve.driver import Engine, make_prompt
from tests.flowserve.npu import plugged, recorded
from tests.flowserve.test_npu_engine import EXPERTS, FUSED, MODELS

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]


class Wheel:
    """`run(...)` runs tests/flowserve/npu_wheel.py under the wheel, and reads the JSON that it prints last."""

    def __init__(self, python: Path, libraries: Path) -> None:
        self._python = python
        self._environment = os.environ | {
            "LD_LIBRARY_PATH": str(libraries),
            "FAKE_NPU_COUNT": "1",
            "PYTHONPATH": str(ROOT),
            "TORCH_DEVICE_BACKEND_AUTOLOAD": "1",
        }

    def run(self, *arguments: str) -> Any:
        command = [str(self._python), "-m", "tests.flowserve.npu_wheel", *arguments]
        done = subprocess.run(command, env=self._environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Wheel:
    """Skips, saying why, where the stand-ins, a C compiler or the wheel are not to be had."""
    builder = Path(os.environ.get("DEEPFLOW_FAKE_CANN") or ROOT.parent / "shared" / "tools" / "fake_cann") / "build.py"
    if not builder.exists():
        pytest.skip(f"no stand-ins for CANN: {builder} does not exist (DEEPFLOW_FAKE_CANN names their folder)")
    for tool in ("gcc", "nm"):
        if shutil.which(tool) is None:
            pytest.skip(f"building the stand-ins for CANN needs {tool}")
    environment = install()
    libraries = tmp_path_factory.mktemp("cann")
    subprocess.run([sys.executable, str(builder), str(libraries)], check=True)
    build_atb(environment, libraries)
    return Wheel(environment / "bin" / "python", libraries)


def install() -> Path:
    """The environment: this one's packages, and the wheel that pyproject.toml names, without what it depends on."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    [wanted] = settings["project"]["optional-dependencies"]["npu"]
    release = wanted.partition("==")[2]
    if importlib.metadata.version("torch").partition("+")[0] != release:
        pytest.skip(f"{wanted} goes with torch {release}, installed is {importlib.metadata.version('torch')}")
    folder = Path.home() / ".cache" / "deepflow" / "venvs" / f"torch-npu-{release}"
    if not list(folder.glob("lib/python*/site-packages/torch_npu-*")):
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(dir=folder.parent))
        subprocess.run([sys.executable, "-m", "venv", str(draft)], check=True)
        pip = [str(draft / "bin" / "python"), "-m", "pip", "install", "--quiet", "--no-deps", wanted]
        done = subprocess.run(pip, capture_output=True, text=True)
        if done.returncode:
            shutil.rmtree(draft)
            pytest.skip(f"{wanted} cannot be installed: {done.stderr.strip()[-300:]}")
        shutil.rmtree(folder, ignore_errors=True)
        draft.rename(folder)
    [site] = folder.glob("lib/python*/site-packages")
    (site / "base.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


def build_atb(environment: Path, libraries: Path) -> None:
    """libatb.so, C++ functions that return 0: with it the wheel offers the schemas of the transformer library."""
    [wheels] = environment.glob("lib/python*/site-packages/torch_npu/lib/libop_plugin_atb.so")
    names = subprocess.run(["nm", "-D", "--undefined-only", str(wheels)], capture_output=True, text=True, check=True)
    functions = re.findall(r" U (_ZN3atb\w+)", names.stdout)
    assert functions
    source = libraries / "atb.c"
    source.write_text("\n".join(f"long {name}(void) {{ return 0; }}" for name in functions))
    library = str(libraries / "libatb.so")
    subprocess.run(["gcc", "-w", "-shared", "-fPIC", "-o", library, str(source)], check=True)


def described(value: Any) -> Any:
    """Tensors as shape and dtype, in what JSON carries."""
    if isinstance(value, Tensor):
        return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    return [described(each) for each in value] if isinstance(value, list | tuple) else value


def calls_of(run: tuple[str, str], folder: Path) -> list[dict[str, Any]]:
    """Every different call of an engine's chunks, mixed steps and decodes, with its result."""
    family, model = run
    with plugged(family), recorded() as calls:
        engine = Engine(make_checkpoint("tiny", MODELS[model], folder), "float16", "npu", block_tokens=128, kv_blocks=8)
        engine.add(make_prompt(0, 140), 4)
        engine.step()
        engine.add(make_prompt(1, 9), 4)
        engine.run()
        engine.close()
    different = {}
    for call in calls:
        arguments = {name: described(value) for name, value in call.arguments.items()}
        each = {"name": call.name, "arguments": arguments, "result": described(call.result)}
        different[json.dumps(each)] = each
    return list(different.values())


@pytest.mark.parametrize(
    "run", [("A2", "llama 128"), ("A2", "llama 64"), ("A2", "qwen3_moe 128"), ("310P", "llama 128")], ids="-".join
)
def test_the_wheel_takes_every_call(wheel: Wheel, tmp_path: Path, run: tuple[str, str]) -> None:
    """Names, order and types of arguments are those of the wheel's schemas; its meta kernels infer the same results."""
    calls = calls_of(run, tmp_path)
    file = tmp_path / "calls.json"
    file.write_text(json.dumps(calls))
    answers = wheel.run("bind", str(file))
    inferred = 0
    for call, answer in zip(calls, answers, strict=True):
        assert "error" not in answer, (call["name"], answer["error"])
        if answer["result"] is not None:
            inferred += 1
            ours = call["result"]
            if call["name"] == "npu_fused_infer_attention_score":  # its second result is empty unless asked for
                ours, answer["result"] = ours[0], answer["result"][0]
            assert ours == answer["result"], call["name"]
    assert inferred >= len(calls) // 2


def test_the_wheel_refuses_what_its_schema_does_not_have(wheel: Wheel, tmp_path: Path) -> None:
    """The check can fail: an argument too many, one too few, one of another type."""
    calls = [call for call in calls_of(("A2", "llama 128"), tmp_path) if call["name"] == "npu_rotary_mul"][:1] * 3
    calls = json.loads(json.dumps(calls))
    calls[0]["arguments"]["mode"] = "half"
    del calls[1]["arguments"]["r2"]
    calls[2]["arguments"]["r1"] = "half"
    file = tmp_path / "calls.json"
    file.write_text(json.dumps(calls))
    assert all("error" in answer for answer in wheel.run("bind", str(file)))


@pytest.mark.parametrize("model", ["llama 64", "qwen3_moe 128"])
def test_the_engine_runs_on_the_wheel(wheel: Wheel, tmp_path: Path, model: str) -> None:
    """On the wheel's own tensors, copies, events and dispatch, kernels computed on the host: the CPU's tokens."""
    said = wheel.run("serve", str(make_checkpoint("tiny", MODELS[model], tmp_path)))
    assert said["npu"] == said["cpu"]
    assert set(said["operators"]) == FUSED | (EXPERTS if "moe" in model else set())
    assert said["about"].startswith("attention on A2, head size")


def test_the_wheel_updates_the_lengths_that_graphs_bake_in(wheel: Wheel) -> None:
    """The name under which a captured decode gets new lengths before a replay is one that the wheel knows."""
    assert "actual_seq_lengths_kv" in wheel.run("updates", "npu_fused_infer_attention_score.default")
