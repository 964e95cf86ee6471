"""Where traces are found, and which formats and names there are."""

import subprocess
import sys
from pathlib import Path

import pytest

from traces import catalog, formats
from traces.errors import TraceError
from traces.readers.azure2023 import AzureTrace
from traces.readers.deepflow import DeepFlowTrace
from traces.readers.mooncake import MooncakeTrace


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    first, second = tmp_path / "a", tmp_path / "b"
    for folder in (first, second):
        (folder / "azure2023").mkdir(parents=True)
    monkeypatch.setenv("DEEPFLOW_TRACES", f"{first}:{second}:")
    return first, second


def test_first_folder_wins(folders: tuple[Path, Path]) -> None:
    """Folders are searched in the order they are listed, by known name or by path below them."""
    first, second = folders
    below = catalog.KNOWN["azure2023_conv"].file
    (second / below).touch()
    assert catalog.find("azure2023_conv") == second / below
    (first / below).touch()
    assert catalog.find("azure2023_conv") == first / below
    assert catalog.resolve(below) == first / below
    assert catalog.resolve(second / below) == second / below
    assert catalog.find("no/such.csv") is None


def test_not_found_names_the_folders(folders: tuple[Path, Path]) -> None:
    """The error says where was looked, which variable to set, and where the file is from."""
    with pytest.raises(TraceError) as error:
        DeepFlowTrace("mine.csv", "m")
    for part in ("mine.csv", str(folders[0]), str(folders[1]), "DEEPFLOW_TRACES", "data/traces", "azure2023_conv"):
        assert part in str(error.value)
    with pytest.raises(TraceError, match=r"get mooncake/toolagent_trace.jsonl from https://github.com/kvcache-ai/"):
        formats.open_trace("mooncake_toolagent", "m")


@pytest.mark.usefixtures("folders")
def test_no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the variable, the checkout and the user's cache are searched."""
    monkeypatch.delenv("DEEPFLOW_TRACES")
    checkout, cache = catalog.folders()
    assert checkout.parts[-2:] == ("data", "traces")
    assert cache.parts[-3:] == (".cache", "deepflow", "traces")


def test_formats_are_modules(folders: tuple[Path, Path]) -> None:
    """Readers are found by file name; known traces know their format; other files are taken for our own format."""
    assert {"azure2023", "deepflow", "mooncake"} <= set(formats.names())
    assert formats.reader_of("mooncake") is MooncakeTrace
    assert {known.format for known in catalog.KNOWN.values()} <= set(formats.names())
    (folders[0] / catalog.KNOWN["azure2023_conv"].file).touch()
    (folders[0] / "mine.csv").touch()
    assert isinstance(formats.open_trace("azure2023_conv", "m", min_output=1), AzureTrace)
    assert isinstance(formats.open_trace("mine.csv", "m"), DeepFlowTrace)
    assert isinstance(formats.open_trace("mine.csv", "m", format="mooncake", spread=False), MooncakeTrace)


@pytest.mark.parametrize("name", ["vidur", "", "../stats"])
def test_unknown_format(name: str) -> None:
    """An unknown format is refused with the list of known ones."""
    with pytest.raises(
        TraceError, match=f"the trace format is '{name}': allowed is azure2023, claude_code, deepflow, mooncake; "
    ):
        formats.reader_of(name)


def test_light_imports() -> None:
    """Reading traces loads none of the heavy table libraries."""
    modules = "formats, transforms, synthetic, sharing, stats, convert"
    code = f"import sys; from traces import {modules}; print({{'pandas', 'pyarrow', 'torch'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=_checkout())
    assert done.stdout.strip() == "set()"


def _checkout() -> Path:
    return Path(formats.__file__).parent.parent
