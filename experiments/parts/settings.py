"""Single values of a configuration: their types, before anything is started, and how tokens are drawn."""

import msgspec
from omegaconf import DictConfig

from experiments import compiled
from experiments.config import plain, typed
from flowserve.runtime.sampling import Sampling

DRAWING = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logprobs",
)
"""What `sampling` sets of `Sampling`, for all requests of a run."""


class Settings(msgspec.Struct, frozen=True):
    """Single values of the configuration, for their types. Here: its top level."""

    seed: int
    start_when_ready: bool
    job_executors: int
    max_attempts: int
    max_parked: int
    warmup_s: float
    cooldown_s: float
    profile_max_prompt: int
    electricity_per_kwh: float
    profile_launches: int
    decisions: bool
    report: bool
    progress: bool
    watch: bool
    snapshot_at: float | None
    out: str | None


class TraceSettings(msgspec.Struct, frozen=True):
    """The same in `trace`."""

    name: str
    stand_in: str | None
    stand_in_rate: float | None
    start_s: float
    duration_s: float | None
    rate: float
    prompt_scale: float
    output_scale: float
    max_prompt_tokens: int | None
    max_output_tokens: int | None
    limit: int | None
    max_tokens: int
    closed_loop: bool


class SimSettings(msgspec.Struct, frozen=True):
    """The same in `backend=sim`."""

    report_period_s: float
    coalesce: bool
    record: bool
    draft_acceptance: float
    hosts: int | None


class RealSettings(msgspec.Struct, frozen=True):
    """The same in `backend=real`."""

    report_period_s: float
    device: str | None
    draft_model: str | None
    dtype: str
    threads: int
    ssd_folder: str | None
    graph_sizes: list[int]
    memory_share: float | None
    pin: bool
    record: bool
    metrics_port: int | None
    log_level: str
    keep_outputs: bool
    step_s: float
    prefill_token_s: float
    draft_acceptance: float


def check_types(cfg: DictConfig) -> None:
    """ValueError: a value of the wrong type, or a time below 0, before anything is started."""
    for node, kind, where in (
        (cfg, Settings, "config"),
        (cfg.trace, TraceSettings, "trace"),
        (cfg.backend, RealSettings if cfg.backend.name == "real" else SimSettings, "backend"),
    ):
        typed({field: plain(node[field]) for field in kind.__struct_fields__}, kind, where)
    sampling(cfg)
    if cfg.snapshot_at is not None and not (cfg.snapshot_at >= 0 and cfg.backend.name == "sim"):
        raise ValueError(
            f"snapshot_at is {cfg.snapshot_at} on backend {cfg.backend.name}: allowed are seconds from 0 up of a "
            "simulated run"
        )
    if cfg.snapshot_at is not None and compiled.is_active():
        raise ValueError(
            f"snapshot_at is {cfg.snapshot_at}, but objects of the compiled core cannot be pickled: run without "
            f"{compiled.SWITCH}, or without a snapshot"
        )
    if cfg.electricity_per_kwh < 0:
        raise ValueError(f"electricity_per_kwh is {cfg.electricity_per_kwh}: allowed are 0 (in the price) and more")
    for field in ("report_period_s", "step_s", "prefill_token_s"):
        if cfg.backend.get(field, 0.0) < 0:
            raise ValueError(f"backend.{field} is {cfg.backend[field]}: allowed are seconds from 0 up")


def sampling(cfg: DictConfig) -> Sampling:
    """How real engines draw tokens; each request gets a seed of its own, counted from the run's."""
    values = plain(cfg.sampling)
    unknown = sorted(set(values) - set(DRAWING))
    if unknown:
        raise ValueError(f"sampling.{unknown[0]}: allowed are {', '.join(DRAWING)}; where outputs end is in the trace")
    return typed(values, Sampling, "sampling").for_request(cfg.seed)
