"""What every test needs: a quiet environment, the same examples in every run, and a way to the real traces."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

from experiments import compiled  # ahead of the modules that it may replace
from tests.invariants import Watch

# Before anything loads torch or huggingface_hub, which read these once.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

hypothesis.settings.register_profile("deepflow", derandomize=True, deadline=None, max_examples=60)
hypothesis.settings.load_profile("deepflow")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips a test marked `gpu` where torch sees no CUDA device, and one marked `pure` on the compiled core."""
    if item.get_closest_marker("pure") is not None and compiled.is_active():
        pytest.skip("compiled objects cannot be copied, nor their methods replaced")
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device, and torch sees none")


@pytest.fixture(autouse=True)
def laws() -> Iterator[Watch]:
    """Holds every simulated run of the test to Little's law and to the conservation of requests, tasks and work; not on
    the compiled core, whose methods cannot be watched.
    """
    watch = Watch()
    if compiled.is_active():
        yield watch
        return
    with watch.patched():
        yield watch
    watch.check()


@pytest.fixture(scope="session")
def trace_file() -> Callable[[str], Path]:
    """Gives the path of a real trace, as in trace_file("mooncake/conversation_trace.jsonl"), or skips the test."""

    def find(name: str) -> Path:
        folders = [Path(folder) for folder in os.environ.get("DEEPFLOW_TRACES", "").split(":") if folder]
        for folder in folders:
            if (path := folder / name).exists():
                return path
        where = "in " + ", ".join(map(str, folders)) if folders else "anywhere, DEEPFLOW_TRACES is not set"
        pytest.skip(f"needs the real trace {name}, not found {where}")

    return find
