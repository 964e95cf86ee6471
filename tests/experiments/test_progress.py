"""The progress bar: on a terminal, in a log file, switched off; and what it costs."""

import io
import re
import subprocess
import sys
import time

import pytest

from experiments import progress
from experiments.progress import ProgressBar


class Terminal(io.StringIO):
    """Takes itself for a terminal."""

    def isatty(self) -> bool:
        return True


class Clock:
    """Stands in for `time.perf_counter`."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Time goes on when the test says so."""
    clock = Clock()
    monkeypatch.setattr(progress.time, "perf_counter", clock)
    monkeypatch.setattr(progress, "memory_bytes", lambda: 123_000_000)
    return clock


def test_a_log_gets_a_plain_line_every_ten_seconds(clock: Clock) -> None:
    """Where there is no terminal, lines without control characters, at most one in ten seconds and one at the end."""
    out = io.StringIO()
    with ProgressBar(1000, "round_robin", stream=out) as bar:
        for step in range(1, 251):
            clock.now = 100 + 0.1 * step
            bar.update(4 * step, 2.0 * step)
    assert out.getvalue().splitlines() == [
        "round_robin: 400/1,000 requests (40%), 40/s, simulated 0:03:20 at 20x, 123 MB",
        "round_robin: 800/1,000 requests (80%), 40/s, simulated 0:06:40 at 20x, 123 MB",
        "round_robin: 1,000/1,000 requests (100%), 40/s, simulated 0:08:20 at 20x, 123 MB",
    ]


def test_a_short_run_leaves_no_line_in_a_log(clock: Clock) -> None:
    """What is over in less than ten seconds needs no progress."""
    out = io.StringIO()
    with ProgressBar(10, "quick", stream=out) as bar:
        clock.now += 3
        bar.update(10)
    assert out.getvalue() == ""


def test_a_terminal_gets_a_bar(clock: Clock) -> None:
    """On a terminal the bar shows requests done, their rate, the simulated clock and its speed."""
    out = Terminal()
    with ProgressBar(200, "round [robin]", stream=out) as bar:
        clock.now += 2
        bar.update(50, 61.0)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    assert "round [robin]" in shown
    said = "50/200 requests, 25/s, simulated 0:01:01 at 30x, 123 MB"
    assert said in " ".join(shown.split())
    assert "\x1b[?25h" in out.getvalue()  # the cursor is back


def test_a_real_run_shows_elapsed_time_and_may_not_know_its_length(clock: Clock) -> None:
    """Without a total and without a simulated clock there are counts and the time since the start."""
    out = io.StringIO()
    with ProgressBar(None, "serve", stream=out) as bar:
        clock.now += 3725
        bar.update(7, under_way=3)
    assert out.getvalue().splitlines()[0] == "serve: 7 requests (3 under way), 0.0/s, elapsed 1:02:05, 123 MB"


def test_it_draws_at_most_ten_times_a_second(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often it is told, it draws when a tenth of a second has passed."""
    drawn = []
    monkeypatch.setattr(ProgressBar, "_draw_bar", lambda self, text: drawn.append(clock.now))
    with ProgressBar(None, "busy", stream=Terminal()) as bar:
        for step in range(2001):
            clock.now = 100 + step / 1000
            bar.update(step, 0.0)
    assert 18 <= len(drawn) <= 21


def test_switched_off_it_is_silent(clock: Clock) -> None:
    """`enabled=False` writes nothing at all."""
    out = Terminal()
    with ProgressBar(10, "quiet", enabled=False, stream=out) as bar:
        clock.now += 1000
        bar.update(10, 5.0)
    assert out.getvalue() == ""


def test_an_error_passes_and_the_bar_stops(clock: Clock) -> None:
    """An exception in the run is not swallowed, and the terminal is left in order."""
    out = Terminal()

    def fail() -> None:
        with ProgressBar(10, "broken", stream=out) as bar:
            clock.now += 1
            bar.update(3)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert "\x1b[?25h" in out.getvalue()
    assert "10/10" not in out.getvalue()


def test_a_call_costs_next_to_nothing() -> None:
    """Being told costs a few microseconds at most, so the drive loop may do it often."""
    with ProgressBar(None, "fast", stream=io.StringIO()) as bar:
        started = time.perf_counter()
        for done in range(20_000):
            bar.update(done, 1.0)
        took = time.perf_counter() - started
    assert took / 20_000 < 20e-6


def test_rich_is_loaded_only_when_a_bar_is_drawn() -> None:
    """A run that ends before the first drawing never loads rich."""
    program = (
        "import sys; from experiments.progress import ProgressBar\n"
        "with ProgressBar(1, 'x') as bar: bar.update(1)\n"
        "print('rich' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
