"""How far a sweep is: told by the folders of its runs, so it works wherever these are computed."""

import math
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self, TextIO

LOOK_EVERY_S = 0.5


def runs_of(overrides: list[str]) -> tuple[int | None, frozenset[str]]:
    """How many runs the overrides of a sweep make, None where a sweeper of its own decides, and the keys that differ.
    Raises Hydra's errors.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    swept = [each for each in OverridesParser.create().parse_overrides(overrides) if each.is_sweep_override()]
    keys = frozenset(each.key_or_group for each in swept)
    if not all(each.is_discrete_sweep() for each in swept):
        return None, keys
    return math.prod(len(list(each.sweep_iterator())) for each in swept), keys


class SweepProgress:
    """Says on standard error when a run has ended: how many of how many, which, and how long all has taken.

    A run has ended when its summary is there. On a terminal the line is written over, elsewhere each run has its own.
    """

    def __init__(
        self, folder: Path, total: int | None, keys: frozenset[str] = frozenset(), stream: TextIO | None = None
    ) -> None:
        """`total`: runs, None where nobody knows; `keys`: by which they are named."""
        self._folder = folder
        self._total = total
        self._keys = keys
        self._stream = stream if stream is not None else sys.stderr
        self._terminal = self._stream.isatty()
        self._seen: set[Path] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._started = 0.0

    def __enter__(self) -> Self:
        self._started = time.perf_counter()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._look()
        if self._terminal and self._seen:
            print(file=self._stream)

    def _watch(self) -> None:
        while not self._stop.wait(LOOK_EVERY_S):
            self._look()

    def _look(self) -> None:
        for summary in sorted(set(self._folder.glob("*/summary.json")) - self._seen):
            self._seen.add(summary)
            of = "" if self._total is None else f" of {self._total}"
            took = time.perf_counter() - self._started
            line = f"sweep: {len(self._seen)}{of} runs after {took:.0f} s, the last was {self._label(summary.parent)}"
            if self._terminal:
                print(f"\r\x1b[K{line[:150]}", end="", file=self._stream, flush=True)
            else:
                print(line, file=self._stream, flush=True)

    def _label(self, folder: Path) -> str:
        """What makes a run different from the others."""
        overrides = (folder / "overrides").read_text().splitlines()
        return " ".join(each for each in overrides if each.partition("=")[0] in self._keys) or f"number {folder.name}"
