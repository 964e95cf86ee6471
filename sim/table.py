"""A latency model that interpolates between measured steps."""

import csv
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from pathlib import Path

from cluster.latency import LatencyModel, StepShape
from cluster.vocabulary import NS_PER_S
from sim.latency import Measured


class Grid:
    """Times over two axes, linear in each between its points, and beyond them as in the last cell."""

    def __init__(self, rows: Sequence[float], columns: Sequence[float], ns: Sequence[Sequence[float]]) -> None:
        self.rows, self.columns = list(rows), list(columns)
        self._ns = ns

    def inside(self, row: float, column: float) -> bool:
        """Not larger than what was measured."""
        return row <= self.rows[-1] and column <= self.columns[-1]

    def at(self, row: float, column: float) -> float:
        low, high, share = _cell(self.rows, row)
        left, right, part = _cell(self.columns, column)
        above, below = self._ns[low], self._ns[high]
        first = above[left] + part * (above[right] - above[left])
        return first + share * (below[left] + part * (below[right] - below[left]) - first)


def _cell(points: list[float], value: float) -> tuple[int, int, float]:
    """(point before, point behind, how far between them)."""
    if len(points) == 1:
        return 0, 0, 0.0
    high = min(max(bisect_right(points, value), 1), len(points) - 1)
    return high - 1, high, (value - points[high - 1]) / (points[high] - points[high - 1])


class Table(Measured, LatencyModel):
    """Prefills by tokens and the context before each chunk, decodes by sequences and their mean context.

    Steps of both: the decoding sequences go through the matrices like that many more prompt tokens, and add what a
    decode takes longer for its context than for the shortest measured one. Guesses to be verified count as prompt
    tokens beside a decode.
    """

    def __init__(self, prefill: Grid, decode: Grid) -> None:
        self.prefill, self.decode = prefill, decode

    def step_ns(self, shape: StepShape) -> int:
        tokens, attention, chunks, sequences, keys, drafts = shape
        self.asked += 1
        context = keys / sequences if sequences else 0.0
        inside, time = True, 0.0
        if tokens:
            before = max(0.0, attention / tokens - (tokens / max(chunks, 1) + 1) / 2)
            inside = self.prefill.inside(tokens + sequences, before)
            time = self.prefill.at(tokens + sequences + drafts, before)
            if sequences:
                decode = self.decode
                time += max(0.0, decode.at(sequences, context) - decode.at(sequences, decode.columns[0]))
        elif sequences:
            time = self.decode.at(sequences + drafts, context)
        if not (inside and (not sequences or self.decode.inside(sequences, context))):
            self.outside += 1
        return max(1, round(time))


COLUMNS = ("kind", "tokens", "context", "duration_s")


def load_table(path: str | Path) -> Table:
    """Read a CSV of `COLUMNS`. kind: prefill (tokens of the prompt, context before it) or decode (sequences, context of
    each). Every number of tokens is needed with every context. ValueError, with the line: what is not so.
    """
    try:
        with Path(path).open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except FileNotFoundError as error:
        raise ValueError(f"table {path} does not exist: it is a CSV of {', '.join(COLUMNS)}") from error
    times: dict[str, dict[tuple[float, float], float]] = {"prefill": {}, "decode": {}}
    for number, row in enumerate(rows, 2):
        try:
            key, took = (float(row["tokens"]), float(row["context"])), float(row["duration_s"])
            kind = times[row["kind"]]
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{path}, line {number}: {row}: expected prefill or decode, and three numbers") from None
        if key[0] <= 0 or key[1] < 0 or not took > 0 or key in kind:
            raise ValueError(f"{path}, line {number}: {row}: tokens and times above 0, each tokens and context once")
        kind[key] = took * NS_PER_S
    return Table(*(_grid(times[kind], kind, path) for kind in ("prefill", "decode")))


def _grid(times: Mapping[tuple[float, float], float], kind: str, path: str | Path) -> Grid:
    rows, columns = sorted({row for row, _ in times}), sorted({column for _, column in times})
    for row in rows:
        for column in columns:
            if (row, column) not in times:
                raise ValueError(f"{path}: there is no {kind} of {row:g} tokens with a context of {column:g}")
    if not times:
        raise ValueError(f"{path}: there is no row of kind {kind}")
    return Grid(rows, columns, [[times[row, column] for column in columns] for row in rows])
