"""The compiled core's process: it runs what was compiled, with its objects in huge pages."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from experiments import compiled
from flowserve.core import scheduler

pytestmark = pytest.mark.skipif(not compiled.is_active(), reason="needs DEEPFLOW_COMPILED=1")


def test_the_core_is_the_compiled_one(tmp_path: Path) -> None:
    """Also where these sources are found by way of their installation, not of the folder that Python is started in."""
    assert Path(scheduler.__file__).is_relative_to(compiled.BUILT)
    program = "import experiments, flowserve.core.fetch_cost, flowserve.core.scheduler as core; print(core.__file__)"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip() == scheduler.__file__, done.stderr
    assert find_spec("another__mypyc") is None, "libraries of other packages are not ours to find"


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
def test_objects_are_in_memory_that_may_have_huge_pages() -> None:
    """Mappings that the kernel was advised to make of huge pages (`hg`) hold most of 90 MB of objects."""
    objects = [bytes(400) for _ in range(200_000)]
    regions: list[tuple[int, int]] = []
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            low, high = (int(address, 16) for address in first.split("-"))
        elif first == "VmFlags:" and "hg" in line.split():
            regions.append((low, high))
    inside = sum(any(low <= id(each) < high for low, high in regions) for each in objects)
    assert inside > 0.8 * len(objects)
