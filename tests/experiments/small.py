"""Command lines of runs that take a fraction of a second, and a profile without measuring."""

import pytest

from cluster.vocabulary import Stage
from experiments import matrix, profiling
from experiments.bystanders import Bystanders
from sim.contention import Contention
from sim.latency import Fitted
from sim.profile import SCHEMA, FitError, Profile

WORKLOAD = ("trace=synthetic", "trace.duration_s=20", "progress=false")
"""A hundred requests of the generator."""

SIM = ("coldstart=none", "report=false", *WORKLOAD)

NULL = (
    "backend=real",
    "backend.device=null",
    "backend.step_s=0.0005",
    "model=tiny_llama",
    "engine=small",
    "hardware=cpu",
    "fleet=colocated2",
    "trace=synthetic",
    "trace.duration_s=20",
    "trace.rate=20",
    "trace.prompt_scale=0.05",
    "trace.output_scale=0.05",
    "trace.limit=60",
    "progress=false",
    "report=false",
)
"""Sixty small requests on engines that sleep."""

ONE_BY_ONE = "hydra.launcher.n_jobs=1"
"""For a sweep: no worker processes."""

PROFILE = Profile(
    schema=SCHEMA,
    machine="none",
    time="2026-01-01T00:00:00",
    versions={},
    model="m",
    engines=1,
    steps=100,
    coefficients_ns=[1e6] * len(Fitted.FEATURES),
    knots=[],
    held_out=FitError(100, 0.0, 0.0, 0.0),
    ranges={},
    dispatch_s=0.0,
    event_s=0.0,
    stages_s={str(stage): 0.01 for stage in Stage},
    contention=Contention(),
    residuals=[],
    disturbed=None,
)


def undisturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measurements on engines that sleep do not care who else uses the machine."""
    for module in (profiling, matrix):
        monkeypatch.setattr(module, "await_idle", lambda patience_s: None)
    monkeypatch.setattr(Bystanders, "disturb", lambda *_: False)
    monkeypatch.setattr(Bystanders, "share", lambda *_: 0.0)
