"""Other simulators of LLM serving that `sim` measures itself against, each in a process and environment of its own."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from experiments.bench.harness.sim_case import Case

LIMIT_S = 3600
"""Longer than any takes on 16,000 requests, and than Vidur trains its predictors at the first run."""
HYDRA_ADVICE = "Set the environment variable HYDRA_FULL_ERROR"
"""How the last line of a failing program on Hydra begins."""


class Peer(NamedTuple):
    """`rate`: requests per second of its own wall time; None where it is not here, and `why`. `disaggregated`: it has
    prefill and decode executors too. `prefixes`: and a prefix cache with a router that knows of it.
    """

    name: str
    about: str
    rate: Callable[[int, Case], float] | None
    why: str = ""
    disaggregated: bool = False
    prefixes: bool = False

    def takes(self, case: Case) -> bool:
        return (self.disaggregated or len(case.groups) == 1) and (self.prefixes or not case.shared)


class PeerError(Exception):
    """A peer could not simulate the requests; the message is its own."""


def run(command: list[str], folder: Path) -> str:
    """What it prints. It sees none of our packages. Raises PeerError."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, errors="replace", timeout=LIMIT_S
        )
    except OSError as error:
        raise PeerError(f"{command[0]} cannot be run: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise PeerError(f"it was not done after {LIMIT_S} s") from None
    if done.returncode:
        said = _last_words(done.stderr) or _last_words(done.stdout) or "it did not say why"
        raise PeerError(f"it failed with {done.returncode}: {said[:200]}")
    return done.stdout


def _last_words(said: str) -> str:
    """The last line. Hydra ends with advice instead, and begins with what is wrong where that is the config."""
    lines = [line for line in said.splitlines() if line.strip()]
    if not lines or not lines[-1].startswith(HYDRA_ADVICE):
        return lines[-1] if lines else ""
    return lines[-2] if any(line.startswith("Traceback") for line in lines) else " ".join(lines[:2])
