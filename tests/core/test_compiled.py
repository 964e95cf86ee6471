"""The compiled core's process: it runs what was compiled, with its objects in huge pages."""

import sys
from pathlib import Path

import pytest

from experiments import compiled
from flowserve.core import scheduler

pytestmark = pytest.mark.skipif(not compiled.is_active(), reason="needs DEEPFLOW_COMPILED=1")


def test_the_core_is_the_compiled_one() -> None:
    assert Path(scheduler.__file__).is_relative_to(compiled.BUILT)


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
def test_objects_are_in_memory_that_may_have_huge_pages() -> None:
    """Mappings that the kernel was advised to make of huge pages (`hg`) hold most of 90 MB of objects, made just now."""
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
