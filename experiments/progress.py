"""A progress bar for the drive loop of a run: costs one clock reading per call, draws at most ten times a second."""

import sys
import time
from collections import deque
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress

DRAW_EVERY_S = 0.1
LINE_EVERY_S = 10.0
_RATE_OVER_S = 5.0


class ProgressBar:
    """Shows requests done, requests per second and simulated (or elapsed) time on standard error.

    On a terminal it is a bar; elsewhere a plain line every ten seconds; `enabled=False` is silent. Used as a context
    manager around a run, it is told of progress by `update`, which may be called as often as convenient.
    """

    def __init__(self, total: int | None, label: str, *, enabled: bool = True, stream: TextIO | None = None) -> None:
        """`total`: requests of the run, None where nobody knows; `stream`: in place of standard error."""
        self.total = total
        self.label = label
        self._stream = stream if stream is not None else sys.stderr
        self._terminal = self._stream.isatty()
        self._enabled = enabled
        self._every_s = DRAW_EVERY_S if self._terminal else LINE_EVERY_S
        self._bar: Progress | None = None
        self._started = self._due = 0.0
        self._last: tuple[int, float | None] = (0, None)
        self._recent: deque[tuple[float, int]] = deque()
        self._drawn = False

    def __enter__(self) -> Self:
        self._started = time.perf_counter()
        self._due = self._started + self._every_s if self._enabled else float("inf")
        self._recent.append((self._started, 0))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._drawn:
            self._draw(time.perf_counter(), over=True)
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int, sim_time_s: float | None = None) -> None:
        """`done` requests have ended so far; `sim_time_s`: where the simulated clock is, None for a real run."""
        self._last = (done, sim_time_s)
        now = time.perf_counter()
        if now >= self._due:
            self._due = now + self._every_s
            self._draw(now)

    def _draw(self, now: float, over: bool = False) -> None:
        self._drawn = True
        done, _ = self._last
        self._recent.append((now, done))
        while now - self._recent[0][0] > max(_RATE_OVER_S, self._every_s) and len(self._recent) > 2:
            self._recent.popleft()
        since, before = (self._started, 0) if over else self._recent[0]
        rate = (done - before) / (now - since) if now > since else 0.0
        if self._terminal:
            self._draw_bar(self._text(now, rate))
        else:
            share = f" ({done / self.total:.0%})" if self.total else ""
            print(
                f"{self.label}: {self._count()} requests{share}, {self._text(now, rate)}", file=self._stream, flush=True
            )

    def _count(self) -> str:
        return f"{self._last[0]:,}" + (f"/{self.total:,}" if self.total is not None else "")

    def _text(self, now: float, rate: float) -> str:
        sim_time_s = self._last[1]
        clock = f"elapsed {_clock(now - self._started)}" if sim_time_s is None else f"simulated {_clock(sim_time_s)}"
        return f"{rate:,.{0 if rate >= 10 else 1}f}/s, {clock}"

    def _draw_bar(self, text: str) -> None:
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn

            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=30),
                TextColumn("{task.fields[count]} requests, {task.fields[text]}", markup=False),
                console=Console(file=self._stream),
                auto_refresh=False,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._bar.add_task(self.label, total=self.total, count="", text="")
            self._bar.start()
        task = self._bar.task_ids[0]
        self._bar.update(task, completed=self._last[0], count=self._count(), text=text)
        self._bar.refresh()


def _clock(time_s: float) -> str:
    """h:mm:ss, as clocks show it."""
    whole = int(time_s)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
