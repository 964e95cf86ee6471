"""A progress bar for the drive loop of a run: costs one clock reading per call, draws at most ten times a second."""

import sys
import time
from collections import deque
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Self, TextIO

from experiments.process import memory_bytes

if TYPE_CHECKING:
    from rich.progress import Progress

DRAW_EVERY_S = 0.1
LINE_EVERY_S = 10.0
_RATE_OVER_S = 5.0


class Moment(NamedTuple):
    """Requests done, and where the simulated clock was, at a time of this process."""

    now: float
    done: int
    sim_time_s: float | None


class ProgressBar:
    """Shows requests done, the simulated (or elapsed) time, how fast both go, and the memory held, on standard error.

    On a terminal it is a bar; elsewhere a plain line every ten seconds; `enabled=False` is silent. Used as a context
    manager around a run, it is told of progress by `update`, which may be called as often as convenient.
    """

    draw_every_s = DRAW_EVERY_S

    def __init__(self, total: int | None, label: str, *, enabled: bool = True, stream: TextIO | None = None) -> None:
        """`total`: requests of the run, None where nobody knows; `stream`: in place of standard error."""
        self.total = total
        self.label = label
        self._stream = stream if stream is not None else sys.stderr
        self._terminal = self._stream.isatty()
        self._enabled = enabled
        self._every_s = self.draw_every_s if self._terminal else LINE_EVERY_S
        self._bar: Progress | None = None
        self._due = 0.0
        self._first = self._last = Moment(0.0, 0, None)
        self._recent: deque[Moment] = deque()
        self._under_way = 0
        self._drawn = False

    def __enter__(self) -> Self:
        self._first = self._last = Moment(time.perf_counter(), 0, None)
        self._due = self._first.now + self._every_s if self._enabled else float("inf")
        self._recent.append(self._first)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._drawn:
            self._draw(time.perf_counter(), over=True)
        self._stop()

    def update(self, done: int, sim_time_s: float | None = None, under_way: int = 0) -> None:
        """`done` requests have ended so far, `under_way` are sent and have not; `sim_time_s`: where the simulated clock
        is, None for a real run.
        """
        now = time.perf_counter()
        self._last, self._under_way = Moment(now, done, sim_time_s), under_way
        if now >= self._due:
            self._due = now + self._every_s
            self._draw(now)

    def _draw(self, now: float, over: bool = False) -> None:
        self._drawn = True
        current = self._last._replace(now=now)
        self._recent.append(current)
        while now - self._recent[0].now > max(_RATE_OVER_S, self._every_s) and len(self._recent) > 2:
            self._recent.popleft()
        self._show(current, self._first if over else self._recent[0])

    def _show(self, current: Moment, since: Moment) -> None:
        """Draw what is current; speeds are those since the other moment."""
        text = self._text(current, since)
        if self._terminal:
            self._draw_bar(text)
        else:
            share = f" ({current.done / self.total:.0%})" if self.total else ""
            self._print(f"{self.label}: {self._count()}{share}, {text}")

    def _print(self, line: str) -> None:
        print(line, file=self._stream, flush=True)

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _count(self) -> str:
        done = self._last.done
        if self.total is not None:
            return f"{done:,}/{self.total:,} requests"
        return f"{done:,} requests" + (f" ({self._under_way:,} under way)" if self._under_way else "")

    def _text(self, current: Moment, since: Moment) -> str:
        took = current.now - since.now
        parts = [f"{_speed((current.done - since.done) / took if took > 0 else 0.0)}/s"]
        if current.sim_time_s is None:
            parts.append(f"elapsed {_clock(current.now - self._first.now)}")
        else:
            speed = (current.sim_time_s - (since.sim_time_s or 0.0)) / took if took > 0 else 0.0
            parts.append(f"simulated {_clock(current.sim_time_s)} at {_speed(speed)}x")
        memory = memory_bytes()
        return ", ".join(parts if memory is None else [*parts, f"{memory / 1e6:,.0f} MB"])

    def _draw_bar(self, text: str) -> None:
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn

            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=10),
                TextColumn("{task.fields[text]}", markup=False),
                console=Console(file=self._stream),
                auto_refresh=False,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._bar.add_task(self.label, total=self.total, text="")
            self._bar.start()
        task = self._bar.task_ids[0]
        self._bar.update(task, completed=self._last.done, text=f"{self._count()}, {text}")
        self._bar.refresh()


def _speed(value: float) -> str:
    return f"{value:,.{0 if value >= 10 else 1}f}"


def _clock(time_s: float) -> str:
    """h:mm:ss, as clocks show it."""
    whole = int(time_s)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
