"""The stand-in torch_npu for tests: `plugged` makes NPUs of a family appear, and none be there afterwards."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.flowserve import npu_operators

FAKE = str(Path(__file__).parent / "fake_npu")


@contextmanager
def plugged(family: str = "A2", devices: int = 1) -> Iterator[Any]:
    """The stand-in torch_npu, with this many chips of this family.

    From the first time on, this process has a device type npu, as with the real one. Processes that it starts find the
    stand-in only meanwhile: others must not take it for the real one.
    """
    sys.path.insert(0, FAKE)
    import torch_npu

    assert torch_npu.__file__.startswith(FAKE)
    torch_npu.npu.plug(devices, family)
    try:
        yield torch_npu
    finally:
        torch_npu.npu.plug(0)
        sys.path.remove(FAKE)


@contextmanager
def recorded() -> Iterator[list[Any]]:
    """Every call of an operator, with its name and arguments."""
    npu_operators.recording = []
    try:
        yield npu_operators.recording
    finally:
        npu_operators.recording = None
