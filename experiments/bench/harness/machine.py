"""The machine under a benchmark: what it is, whether others use it, and pinning to its cores."""

import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

QUIET = 0.1
"""Share of all cores that others may keep busy on a machine that counts as idle."""

PACKAGES = ("torch", "transformers", "numpy", "msgspec")


def describe() -> str:
    """The processor's name, as the system tells it, and the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(names, None) or platform.processor() or 'unknown processor'}, {platform.machine()}"


def cores() -> int:
    """Those this process may use."""
    return len(os.sched_getaffinity(0))


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def busy_share(seconds: float = 0.5) -> float:
    """Share of all cores' time that somebody used while this process slept; 0 where the system does not tell."""
    before = _cpu_times()
    time.sleep(seconds)
    total, idle = (after - then for after, then in zip(_cpu_times(), before, strict=True))
    return 1 - idle / total if total else 0.0


def pin(threads: int) -> None:
    """Keep this process, and threads it starts later, to the last `threads` cores it may use. Raises ValueError where
    there are fewer.
    """
    allowed = sorted(os.sched_getaffinity(0))
    if threads > len(allowed):
        raise ValueError(f"threads is {threads}, but this process may use {len(allowed)} cores")
    os.sched_setaffinity(0, allowed[-threads:])


def _cpu_times() -> tuple[int, int]:
    """(all, idle) ticks of all cores since the start of the system."""
    try:
        first = Path("/proc/stat").read_text().split("\n", 1)[0]
    except OSError:
        return 0, 0
    ticks = [int(tick) for tick in first.split()[1:9]]
    return sum(ticks), ticks[3] + ticks[4]


@contextmanager
def unpinned() -> Iterator[None]:
    """For what this process starts meanwhile: all cores that the machine has for it."""
    pinned = os.sched_getaffinity(0)
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    try:
        yield
    finally:
        os.sched_setaffinity(0, pinned)
