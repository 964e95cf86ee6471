"""`deepflow profile`: measure the engine here and write a latency profile for the simulator."""

from datetime import datetime
from pathlib import Path

from experiments.commands.usage import compose_from, wants_help

USAGE = """usage: deepflow profile [KEY=VALUE ...]

Runs two engines of the tiny model on this machine's CPU (or what the overrides say) under a load of its own, fits a
latency model to the steps, and writes profile.json. Use it with latency=profile latency.path=FILE.
"""

BASE = ["backend=real", "model=tiny_llama", "engine=small", "hardware=cpu", "fleet=colocated2", "trace=synthetic"]


def main(arguments: list[str]) -> int:
    if wants_help(arguments, USAGE):
        return 0
    from experiments.fidelity import save_profile
    from experiments.profiling import measure
    from sim.profile import describe

    cfg = compose_from(arguments, BASE)
    folder = Path(cfg.out) if cfg.out else Path("runs") / f"{datetime.now():%Y-%m-%d_%H-%M-%S}_profile"
    profile = measure(cfg, folder)
    print(describe(profile))
    print(save_profile(profile, folder))
    return 0
