"""What a benchmark yields, and the data file that keeps it."""

from pathlib import Path

import msgspec
import numpy as np

SCHEMA = "deepflow-bench/1"

DATA = Path(__file__).resolve().parents[2] / "data" / "bench"
"""One file per benchmark: its last run, wherever that was."""


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`KEY=VALUE` arguments of a benchmark. `threads`: of compute, each pinned to a core of its own."""

    threads: int = 1
    repeats: int = 3

    def __post_init__(self) -> None:
        for name in ("threads", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")


class Row(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One number, or None with the reason in `detail`. `samples`: what `value` is the median of. `at_least`, `at_most`:
    what it should be.
    """

    name: str
    value: float | None
    unit: str
    detail: str = ""
    at_least: float | None = None
    at_most: float | None = None
    samples: list[float] = []

    @property
    def met(self) -> bool | None:
        """None where there is no target."""
        if self.value is None:
            return None
        if self.at_least is not None:
            return self.value >= self.at_least
        return None if self.at_most is None else self.value <= self.at_most


def median_row(
    name: str,
    samples: list[float],
    unit: str,
    detail: str = "",
    *,
    at_least: float | None = None,
    at_most: float | None = None,
) -> Row:
    """The median of some samples."""
    value = float(np.median(samples))
    return Row(name=name, value=value, unit=unit, detail=detail, at_least=at_least, at_most=at_most, samples=samples)


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """One run of a benchmark. `busy`: share of the machine's cores that others kept busy just before and just after;
    `load`: the system's load average just before.
    """

    schema: str = SCHEMA
    bench: str
    about: str
    date: str
    machine: str
    cores: int
    threads: int
    options: dict[str, str | int | float | bool | None]
    versions: dict[str, str]
    load: float
    busy: tuple[float, float]
    seconds: float
    rows: list[Row]


def save(result: Result, folder: Path = DATA) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result.bench}.json"
    path.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")
    return path


def load(path: Path) -> Result:
    """Raises ValueError: not a result of this version."""
    try:
        result = msgspec.json.decode(path.read_bytes(), type=Result)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise ValueError(f"{path}: {error}") from None
    if result.schema != SCHEMA:
        raise ValueError(f"{path}: its schema is {result.schema!r}, this version reads {SCHEMA!r}")
    return result
