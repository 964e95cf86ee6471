"""The torch-free core compiled by mypyc: the same modules, several times as fast. Pure Python stays the default.

`make compiled` builds into build/compiled; with DEEPFLOW_COMPILED=1 in the environment these modules are imported from
there. Built of other sources than those at hand, they are refused.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from hashlib import sha256
from importlib import import_module
from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader, ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

SWITCH = "DEEPFLOW_COMPILED"
ROOT = Path(__file__).resolve().parents[1]
BUILT = ROOT / "build" / "compiled"
HUGE_PAGES = Path("experiments", "huge_pages.c")
# What the simulator spends its time in. msgspec's structs cannot be compiled, so modules that define some are not here.
MODULES = (
    "cluster.client",
    "cluster.control",
    "cluster.fleet",
    "cluster.identity",
    "cluster.job_executor",
    "cluster.recorder",
    "cluster.relay",
    "flowserve.core.allocator",
    "flowserve.core.decodes",
    "flowserve.core.leases",
    "flowserve.core.master",
    "flowserve.core.outbox",
    "flowserve.core.plan",
    "flowserve.core.rtc",
    "flowserve.core.scheduler",
    "flowserve.core.sequence",
    "flowserve.core.shell",
    "flowserve.core.task_executor",
    "flowserve.core.transfer",
    "flowserve.core.waiting",
    "policies.dispatch.deepflow",
    "policies.dispatch.prompt_tree",
    "policies.dispatch.round_robin",
    "sim.clock",
    "sim.cluster",
    "sim.executor",
    "sim.latency",
    "sim.network",
    "sim.roofline",
    "sim.table",
)


def is_active() -> bool:
    """Whether this process runs the compiled modules."""
    return bool(os.environ.get(SWITCH))


def environment(active: bool) -> dict[str, str]:
    """Of a process that runs the compiled modules, or does not."""
    others = {name: value for name, value in os.environ.items() if name != SWITCH}
    return others | {SWITCH: "1"} if active else others


def build(quiet: bool = False) -> None:
    """Compile, unless that is done: needs mypy and a C compiler, and takes a minute or two. CalledProcessError: it
    failed, and said why.
    """
    if _is_current():
        return
    shutil.rmtree(BUILT, ignore_errors=True)
    program = (
        "import sys; from setuptools import Extension, setup; from mypyc.build import mypycify; files = sys.argv[3:]; "
        "del sys.argv[3:]; extensions = mypycify(files, opt_level='3'); "
        f"extensions.append(Extension({HUGE_PAGES.stem!r}, [{str(HUGE_PAGES)!r}])); "
        "setup(name='deepflow-compiled', packages=[], ext_modules=extensions)"
    )
    command = [sys.executable, "-c", program, "build_ext", f"--build-lib={BUILT}", *map(str, _sources(relative=True))]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL if quiet else None)
    (BUILT / "sources.sha256").write_text(_digest())


def try_build() -> tuple[bool, str]:
    """Whether it is compiled now, and if not, why."""
    try:
        build(quiet=True)
    except (subprocess.CalledProcessError, OSError) as error:
        return False, f"the core could not be compiled: {error}"
    return True, ""


def _sources(relative: bool = False) -> list[Path]:
    paths = [Path(*module.split(".")).with_suffix(".py") for module in MODULES]
    return paths if relative else [ROOT / path for path in paths]


def _digest() -> str:
    digest = sha256(sys.version.encode())
    for path in (*_sources(), ROOT / HUGE_PAGES):
        digest.update(path.read_bytes())
    return digest.hexdigest()


class _Finder:
    """Finds the compiled modules ahead of their sources, and the libraries behind them. In `sys.path` the folders here
    would hide the packages of an installation in development mode.
    """

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        file = BUILT.joinpath(*name.split(".")).with_suffix(EXTENSION_SUFFIXES[0])
        if name not in MODULES and not file.is_file():
            return None
        return spec_from_file_location(name, file, loader=ExtensionFileLoader(name, str(file)))


def _is_current() -> bool:
    said = BUILT / "sources.sha256"
    return said.is_file() and said.read_text() == _digest()


def _activate() -> None:
    """ImportError: there is nothing built of these sources."""
    if not _is_current():
        raise ImportError(f"{SWITCH} is set, but {BUILT} was not built of these sources: make compiled, or unset it")
    sys.meta_path.insert(0, _Finder)
    import_module(HUGE_PAGES.stem).use()


if __name__ == "__main__":
    build()
elif is_active() and _Finder not in sys.meta_path:
    _activate()
