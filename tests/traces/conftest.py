"""Public trace files, where they are found."""

from collections.abc import Callable
from pathlib import Path

import pytest

from traces import catalog


@pytest.fixture
def real_trace() -> Callable[[str], Path]:
    """The file of a known trace; skips the test, saying why, where no folder has it."""

    def file_of(name: str) -> Path:
        file = catalog.find(name)
        if file is None:
            pytest.skip(
                f"no {catalog.KNOWN[name].file} in the folders of {catalog.VARIABLE} or the other trace folders"
            )
        return file

    return file_of
