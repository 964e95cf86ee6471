"""Sim against real: the same workload and policies on real engines here, and on a simulation of them."""

from pathlib import Path
from typing import NamedTuple

import msgspec
from omegaconf import DictConfig

from experiments.config import compose
from experiments.run import RunResult, run_one_of_several
from sim.profile import Profile

REAL_BASE = [
    "model=tiny_llama",
    "engine=small",
    "hardware=cpu",
    "fleet=colocated2",
    "slo=tiny",
    "trace.start_s=100",
    "trace.duration_s=20",
    "trace.rate=3",
    "trace.prompt_scale=0.1",
    "trace.output_scale=0.1",
]
"""Two engines of the tiny model on this machine's CPU, and a slice of the trace scaled down to what they can do."""


class Pair(NamedTuple):
    """One policy (or other variant) on real engines, and simulated from the profile."""

    label: str
    real: RunResult
    simulated: RunResult


def save_profile(profile: Profile, folder: Path) -> Path:
    """Write profile.json to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "profile.json"
    path.write_bytes(msgspec.json.format(msgspec.json.encode(profile), indent=1))
    return path


def real_config(overrides: list[str], config_dirs: list[str] | None = None) -> DictConfig:
    return compose([*REAL_BASE, "backend=real", *overrides], config_dirs)


def simulated_config(
    overrides: list[str], profile: Path, measured: Profile, config_dirs: list[str] | None = None
) -> DictConfig:
    """The same run, simulated: step times, message delays and start-up stages from the profile."""
    own = ["backend=sim", *used_profile(profile, measured)]
    return compose([*REAL_BASE, *own, *_without_backend(overrides)], config_dirs)


def used_profile(path: Path, profile: Profile) -> list[str]:
    """The overrides of a simulation that uses a profile, which is in that file."""
    stages = profile.stages_s
    assert profile.dispatch_s is not None and profile.event_s is not None, "a profile measured here has them"
    contention = ",".join(f"{name}:{value}" for name, value in msgspec.to_builtins(profile.contention).items())
    return [
        "latency=profile",
        f"latency.path={path.resolve()}",
        f"coldstart.scaler_pre_s={stages['scaler_pre']}",
        f"coldstart.te_pre_load_s={stages['te_pre_load']}",
        f"coldstart.load_setup_s={stages['te_load']}",
        "coldstart.load=none",
        f"coldstart.te_post_load_s={stages['te_post_load']}",
        f"coldstart.scaler_post_s={stages['scaler_post']}",
        f"backend.delays.dispatch_s={profile.dispatch_s}",
        f"backend.delays.event_s={profile.event_s}",
        f"backend.delays.peer_s={profile.dispatch_s + profile.event_s}",
        "backend.delays.decision_s=0",
        f"hardware.contention={{{contention}}}",
        f"hardware.kv_host_s={profile.handover_s or 0.0}",
    ]


def slug(label: str) -> str:
    """A label as the name of a folder."""
    return "".join(character if character.isalnum() or character in "._-" else "_" for character in label)


def pair(
    label: str,
    overrides: list[str],
    profile: Path,
    measured: Profile,
    folder: Path,
    config_dirs: list[str] | None = None,
) -> Pair:
    """Run a variant on both backends."""
    real = run_one_of_several(real_config(overrides, config_dirs), folder / "real", f"{label}, real CPU")
    simulated = run_one_of_several(
        simulated_config(overrides, profile, measured, config_dirs), folder / "sim", f"{label}, sim of this CPU"
    )
    return Pair(label, real, simulated)


def _without_backend(overrides: list[str]) -> list[str]:
    return [override for override in overrides if not override.startswith("backend.")]
