"""Rows of a trace file with their line numbers, and the checks that turn their fields into numbers.

Files are read line by line. Whatever is wrong with a row becomes a `TraceError` that names file, line and field.
"""

import csv
import re
from collections.abc import Collection, Iterator, Mapping
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import msgspec

from cluster.vocabulary import NS_PER_S
from traces.errors import TraceError

MAX_TOKENS = 1 << 27
"""Longest prompt or output taken for real. Two of them fit the block ids of one request (`identity.unique`)."""

_MAX_NS = (1 << 63) - 1
_WHOLE = re.compile(r"\s*[+-]?[0-9]{1,20}\s*", re.ASCII)


class Row:
    """One row: `values` by field name, as text (CSV) or as JSON values with decimals kept exact (JSONL)."""

    __slots__ = ("file", "line", "values")

    def __init__(self, file: Path, line: int, values: Mapping[str, Any]) -> None:
        self.file = file
        self.line = line
        self.values = values

    def error(self, name: str, allowed: str, remedy: str = "correct the row or delete it") -> TraceError:
        """The error that says field `name` is not what is allowed."""
        found = f"is {_short(self.values[name])}" if name in self.values else "is missing"
        return TraceError(f"{self.file}:{self.line}: field {name} {found}: allowed is {allowed}; {remedy}")

    def has(self, name: str) -> bool:
        """Whether the field is there and not empty."""
        return self.values.get(name) not in (None, "")

    def integer(self, name: str, least: int, most: int = MAX_TOKENS) -> int:
        """A whole number from `least` to `most`."""
        value = self.values.get(name)
        if isinstance(value, str) and _WHOLE.fullmatch(value):
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise self.error(name, f"a whole number from {least} to {most}")
        return value

    def time_ns(self, name: str, unit_ns: int = NS_PER_S) -> int:
        """A time of at least 0 in units of `unit_ns`, to integer nanoseconds without passing through a float."""
        value = self.values.get(name)
        try:
            number = Decimal(value) if isinstance(value, int | str | Decimal) else Decimal("nan")
        except InvalidOperation:
            number = Decimal("nan")
        if isinstance(value, bool) or not number.is_finite() or not 0 <= number <= _MAX_NS // unit_ns:
            raise self.error(name, f"a number from 0 to {_MAX_NS // unit_ns}")
        return int((number * unit_ns).to_integral_value())

    def text(self, name: str) -> str:
        """A text; empty where the field is absent."""
        value = self.values.get(name)
        if value is None:
            return ""
        if not isinstance(value, str):
            raise self.error(name, "a text")
        return value

    def numbers(self, name: str, count: int, why: str) -> tuple[int, ...]:
        """A list of exactly `count` whole numbers of up to 64 bits."""
        value = self.values.get(name)
        if not isinstance(value, list) or len(value) != count or not all(map(_is_id, value)):
            found = f" (found {len(value)})" if isinstance(value, list) else ""
            raise self.error(name, f"a list of {count} whole numbers of up to 64 bits, {why}{found}")
        return tuple(value)

    def not_before(self, name: str, time_ns: int, earlier_ns: int) -> None:
        """Arrivals must not go back in time."""
        if time_ns < earlier_ns:
            raise self.error(name, "a time not before the row above", "sort the file by time, keeping ties in order")


def csv_rows(file: Path, required: Collection[str], allowed: Collection[str] | None = None) -> Iterator[Row]:
    """Rows below a header with at least the `required` columns and, if given, none but the `allowed` ones.

    Line ends may be CRLF, the last may be missing, empty lines are skipped.
    """
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines)
        try:
            header = [name.strip() for name in next(reader, [])]
            _check_header(file, header, required, allowed)
            for fields in reader:
                if not fields:
                    continue
                if len(fields) != len(header):
                    raise TraceError(
                        f"{file}:{reader.line_num}: the row has {len(fields)} fields: allowed is {len(header)}, as the "
                        "header has; correct the row, or fetch the file again if it was cut here"
                    )
                yield Row(file, reader.line_num, dict(zip(header, fields, strict=True)))
        except (csv.Error, UnicodeDecodeError) as error:
            raise TraceError(
                f"{file}:{reader.line_num + 1}: the text cannot be read ({error}): allowed is CSV in UTF-8; "
                "check that it is the right file"
            ) from error


def jsonl_rows(file: Path) -> Iterator[Row]:
    """One JSON object per line; empty lines are skipped."""
    decoder = msgspec.json.Decoder(float_hook=Decimal)
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.isspace():
                continue
            try:
                values = decoder.decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError, InvalidOperation) as error:
                remedy = f"fetch the file again if it was cut here ({error})"
                raise _not_an_object(file, number, line, remedy) from error
            if not isinstance(values, dict):
                raise _not_an_object(file, number, line, "check that it is the right file")
            yield Row(file, number, values)


def _check_header(
    file: Path, header: Collection[str], required: Collection[str], allowed: Collection[str] | None
) -> None:
    for name in required:
        if name not in header:
            raise TraceError(
                f"{file}:1: field {name} is missing: allowed is a header with {', '.join(required)}; "
                "check that the format is the right one"
            )
    for name in header:
        if allowed is not None and name not in allowed:
            raise TraceError(
                f"{file}:1: field {name} is unknown: allowed is {', '.join(allowed)}; rename the column or delete it"
            )


def _not_an_object(file: Path, number: int, line: bytes, remedy: str) -> TraceError:
    text = _short(line.decode(errors="replace").rstrip())
    return TraceError(f"{file}:{number}: the line is {text}: allowed is one whole JSON object; {remedy}")


def _is_id(value: object) -> bool:
    return type(value) is int and -(1 << 63) <= value < 1 << 64


def _short(value: object) -> str:
    text = str(value) if isinstance(value, Decimal) else repr(value)
    return text if len(text) <= 60 else f"{text[:40]}…{text[-12:]}"
