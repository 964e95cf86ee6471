"""Formats by name: a reader is found by the file name of its module, so adding one changes nothing here."""

import pkgutil
from importlib import import_module
from pathlib import Path
from typing import Any

from traces import readers
from traces.catalog import KNOWN
from traces.errors import TraceError
from traces.file_trace import FileTrace


def names() -> list[str]:
    """All formats that can be read."""
    return sorted(module.name for module in pkgutil.iter_modules(readers.__path__))


def reader_of(format: str) -> type[FileTrace]:
    """The reader class in `traces/readers/<format>.py`. TraceError: there is none."""
    if format not in names():
        raise TraceError(f"the trace format is {format!r}: allowed is {', '.join(names())}; choose one of them")
    module = import_module(f"{readers.__name__}.{format}")
    (reader,) = (
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, FileTrace) and value.__module__ == module.__name__
    )
    return reader


def open_trace(path: str | Path, model: str, format: str | None = None, **options: Any) -> FileTrace:
    """A reader for a file or a known trace. Known traces know their format, other files are taken for our own."""
    if format is None:
        known = KNOWN.get(str(path))
        format = known.format if known else "deepflow"
    return reader_of(format)(path, model, **options)
