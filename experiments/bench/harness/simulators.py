"""Other simulators of LLM serving that `sim` measures itself against, each in a process and environment of its own."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from experiments.bench.harness.sim_case import Case

LIMIT_S = 3600
"""Longer than any takes on 16,000 requests, and than Vidur trains its predictors at the first run."""


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
    """A peer could not simulate the requests; the message is its own last line."""


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
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise PeerError(f"it failed with {done.returncode}: {said[-1][:200] if said else 'it did not say why'}")
    return done.stdout
