"""Who else used this machine while something was measured: CPU time that neither we nor our children spent."""

import os
import threading
import time
from bisect import bisect_left, bisect_right
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

PERIOD_S = 0.5

DISTURBING = 0.12
"""CPUs' worth of others' work that spoils a measurement. An idle machine's own is some 0.02."""


class Sample(NamedTuple):
    """Up to a time of the monotonic clock, in ns: CPU seconds spent by anybody, and by us; hypervisor's theft included
    in the first.
    """

    at_ns: int
    all_s: float
    ours_s: float


class Bystanders:
    """Watches from `__enter__` to `__exit__`, in a thread of its own. Linux tells by /proc; else nothing is known."""

    def __init__(self) -> None:
        self.samples: list[Sample] = []
        self._known: list[int] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Bystanders":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def share(self, start_ns: int = 0, end_ns: int = 1 << 62) -> float:
        """CPUs' worth of others' work in a span of time, of one CPU. NaN where too little is known of it."""
        within = [sample for sample in self.samples if start_ns <= sample.at_ns <= end_ns]
        if len(within) < 2:
            return float("nan")
        return _share(within[0], within[-1])

    def disturb(self, start_ns: int, end_ns: int) -> bool:
        """Whether others used the machine around a span of time, as far as is known."""
        times = self._times
        first = max(bisect_left(times, start_ns) - 2, 0)
        return any(
            _share(one, other) > DISTURBING
            for one, other in pairwise(self.samples[first : bisect_right(times, end_ns) + 2])
        )

    @property
    def _times(self) -> list[int]:
        if len(self._known) != len(self.samples):
            self._known = [sample.at_ns for sample in self.samples]
        return self._known

    def _watch(self) -> None:
        while True:
            sample = _sample()
            if sample is None:
                return
            self.samples.append(sample)
            if self._stop.wait(PERIOD_S):
                return


def await_idle(patience_s: float = 60.0, calm_s: float = 2.0) -> None:
    """Wait until nobody else has used the machine for a while, or patience is at its end."""
    deadline, calm = time.monotonic() + patience_s, 0.0
    before = _sample()
    while before is not None and calm < calm_s and time.monotonic() < deadline:
        time.sleep(PERIOD_S)
        sample = _sample()
        assert sample is not None
        calm = calm + PERIOD_S if _share(before, sample) <= DISTURBING else 0.0
        before = sample


def _share(first: Sample, last: Sample) -> float:
    others = (last.all_s - first.all_s) - (last.ours_s - first.ours_s)
    return others / ((last.at_ns - first.at_ns) / 1e9)


def _sample() -> Sample | None:
    tick = os.sysconf("SC_CLK_TCK")
    if not Path("/proc/self/task", str(os.getpid()), "children").exists():
        return None  # what our own engines do would pass for others' work
    try:
        # user, nice, system, idle, iowait, irq, softirq, steal
        fields = [int(each) for each in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    except OSError:
        return None
    busy = sum(fields) - fields[3] - fields[4]
    now, usage = time.monotonic_ns(), os.times()
    ours = usage.user + usage.system + usage.children_user + usage.children_system
    return Sample(now, busy / tick, ours + sum(_of(pid) for pid in _children()) / tick)


def _children() -> list[int]:
    found: list[int] = []
    for path in Path("/proc/self/task").glob("*/children"):
        found += map(int, path.read_text().split())
    return found


def _of(pid: int) -> int:
    """Ticks that a process, and those of its children that it has waited for, have used."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0  # gone: whoever waited for it counts it
    return sum(map(int, fields[11:15]))
