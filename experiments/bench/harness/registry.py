"""Benchmarks by name, and running one in a process of its own."""

import os
import pkgutil
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec

from experiments import bench
from experiments.bench.harness.result import Options

WORDS = {"null": None, "yes": "true", "no": "false"}
"""As in the overrides that other commands take from Hydra."""


def names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(bench.__path__) if not module.ispkg)


def find(name: str) -> ModuleType:
    """Raises ValueError: there is no such benchmark."""
    if name not in names():
        raise ValueError(f"no benchmark {name!r}: there are {', '.join(names())}")
    return import_module(f"{bench.__name__}.{name}")


def about(module: ModuleType) -> str:
    return (module.__doc__ or "").split("\n", 1)[0]


def parse(module: ModuleType, arguments: list[str]) -> Any:
    """The benchmark's `Options` from `KEY=VALUE` arguments. Raises ValueError for what it does not take."""
    kind: type[Options] = module.Options
    values: dict[str, str | None] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or key not in kind.__struct_fields__:
            allowed = ", ".join(f"{field}=" for field in kind.__struct_fields__)
            raise ValueError(f"argument {argument!r}: {module.__name__.rpartition('.')[2]} takes {allowed}")
        values[key] = WORDS.get(value, value)
    try:
        return msgspec.convert(values, kind, strict=False)
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from None


def missing(module: ModuleType, options: Any) -> str | None:
    """Why a benchmark cannot run on this machine; None where it can."""
    reason: str | None = module.missing(options) if hasattr(module, "missing") else None
    return reason


def no_peer() -> str | None:
    """Why there is no transformers to compare with; None where it is installed."""
    return None if find_spec("transformers") else "transformers is not installed, it comes with pip install -e '.[dev]'"


def run_apart(name: str, arguments: list[str], threads: int, folder: Path) -> bool:
    """Run a benchmark in a new process, whose thread counts are set before it imports anything. True on success."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "passive",  # spinning threads would disturb whatever else is measured
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    command = [sys.executable, "-m", "experiments.bench.harness.measure", name, str(folder), *arguments]
    return subprocess.run(command, env=environment, check=False).returncode == 0


def fields(module: ModuleType) -> list[tuple[str, object]]:
    """Names and defaults of a benchmark's options."""
    defaults = module.Options()
    return [(name, getattr(defaults, name)) for name in defaults.__struct_fields__]
