"""Runs a peer's own program and prints how long its event loop took, with nothing of ours but this file.

Arguments, from the peer's checkout and by its interpreter: MODULE:CLASS.METHOD PROGRAM [ARGUMENTS ...], where the
method is the loop, and the program a module or a .py file.
"""

import os
import runpy
import sys
import time
from importlib import import_module
from typing import Any

SAID = "loop_s="


def main(loop: str, program: str, *arguments: str) -> None:
    sys.path[0] = os.getcwd()  # in place of this file's own folder
    module, _, names = loop.partition(":")
    owner, _, method = names.partition(".")
    _time(getattr(import_module(module), owner), method)
    sys.argv = [program, *arguments]
    if program.endswith(".py"):
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)


def _time(owner: Any, method: str) -> None:
    inner = getattr(owner, method)

    def timed(*given: Any, **named: Any) -> Any:
        start = time.perf_counter()
        result = inner(*given, **named)
        print(f"{SAID}{time.perf_counter() - start}", flush=True)
        return result

    setattr(owner, method, timed)


if __name__ == "__main__":
    main(*sys.argv[1:])
