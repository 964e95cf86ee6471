"""Who else used the machine: from samples made up, and from a machine that has /proc."""

import math
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.bystanders import Bystanders, Sample


def samples(*others_s: float) -> Bystanders:
    """A sample per second: we always use one CPU, others as much as said."""
    watched = Bystanders()
    total = 0.0
    watched.samples.append(Sample(0, 0.0, 0.0))
    for second, others in enumerate(others_s, 1):
        total += 1 + others
        watched.samples.append(Sample(second * 10**9, total, float(second)))
    return watched


def test_others_are_what_is_not_ours() -> None:
    """As a share of one CPU, over any span that has samples; unknown where it has not."""
    watched = samples(0.0, 0.5, 1.5, 0.0)
    assert watched.share() == pytest.approx(0.5)
    assert watched.share(10**9, 3 * 10**9) == pytest.approx(1.0)
    assert math.isnan(watched.share(10**9, 10**9))
    assert math.isnan(Bystanders().share())


def test_a_span_is_disturbed_by_what_happens_around_it() -> None:
    """A step within a second in which others compute, or next to one: the samples do not say when exactly."""
    watched = samples(0.0, 0.0, 0.0, 0.9, 0.0, 0.0, 0.0)
    disturbed = [watched.disturb(at, at + 10**8) for at in range(5 * 10**8, 7 * 10**9, 10**9)]
    assert disturbed == [False, False, True, True, True, False, False]
    assert not Bystanders().disturb(0, 1)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="there is no /proc")
def test_our_children_are_ours() -> None:
    """CPU time of this process, and of a child that computes, counts as ours."""
    with Bystanders() as watched:
        spin = "import time\nend = time.monotonic() + 1.1\nwhile time.monotonic() < end: pass"
        subprocess.run([sys.executable, "-c", spin], check=True)
        end = time.monotonic() + 0.7
        while time.monotonic() < end:
            pass
    ours = watched.samples[-1].ours_s - watched.samples[0].ours_s
    assert watched.samples[-1].all_s - watched.samples[0].all_s >= ours - 0.1
    assert ours > 0.2
