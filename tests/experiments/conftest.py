"""The command line in this process: a `deepflow` that tests call, in an empty folder of their own."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest


class Said(NamedTuple):
    """What a command returned and printed."""

    code: int
    out: str
    err: str

    @property
    def folder(self) -> Path:
        """The last line."""
        return Path(self.out.splitlines()[-1])


Command = Callable[..., Said]


@pytest.fixture
def deepflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Runs `deepflow ARGUMENTS` and returns what it said. The current folder is empty at first."""
    from experiments.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["deepflow"])
    monkeypatch.setattr(sys, "path", [*sys.path])

    def call(*arguments: str) -> Said:
        capfd.readouterr()
        importlib.invalidate_caches()  # a test may just have written a module
        try:
            code = main(list(arguments))
        except SystemExit as leaving:  # argparse leaves this way after --help
            code = leaving.code if isinstance(leaving.code, int) else 1
        return Said(code, *capfd.readouterr())

    return call
