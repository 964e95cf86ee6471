"""`backend=real`: the processes that executors are."""

from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from cluster.acceptance import Acceptance
from cluster.vocabulary import WORKERS, ExecutorSpec, Role
from experiments.models import model_folder, model_name, model_shape, served, shape_of
from experiments.parts.engine import engine_config
from experiments.parts.fleet import group_entries, work_times
from experiments.parts.settings import sampling

if TYPE_CHECKING:
    from real.cluster import RealCluster


def real_cluster(cfg: DictConfig, actors: list[str], folder: Path | None) -> "RealCluster":
    from flowserve.runtime.wire import NullDevice, TorchDevice
    from real.cluster import Engine, RealCluster, WorkEngine
    from real.metrics import ServingMetrics

    backend, found, entries = cfg.backend, served(cfg), group_entries(cfg)
    if cfg.engine.get("kv_transfer") == "by_layer":
        raise ValueError(
            "engine.kv_transfer is by_layer: a real engine computes all layers of a step in one call, and nobody can "
            "fetch one before the others; take by_chunk, or backend=sim"
        )
    null = device_name(cfg) == "null"
    if not null and any(spec.role is Role.TRAINING for spec in entries):
        raise ValueError(
            f"fleet.groups has a training group, but backend.device is {device_name(cfg)}: nothing here trains on "
            "a device; take backend=sim, or backend.device=null, where training sleeps for as long as it would take"
        )
    vocab = {name: shape_of(cfg, node).vocab for name, node in found.items()}
    devices: dict[str, NullDevice | TorchDevice] = {}
    for name in found:
        if null:
            acceptance = Acceptance(backend.draft_acceptance, cfg.seed)
            devices[name] = NullDevice(backend.step_s, backend.prefill_token_s, vocab[name], acceptance)
        else:
            devices[name] = TorchDevice(
                model_folder(cfg, name),
                device_name(cfg),
                backend.dtype,
                backend.threads,
                backend.ssd_folder,
                tuple(backend.graph_sizes),
                draft_model(cfg, name),
                backend.memory_share,
            )
    engines: dict[ExecutorSpec, Engine | WorkEngine] = {}
    for spec, entry in entries.items():
        if spec.role in WORKERS:
            engines[spec] = WorkEngine(entry.slots, work_times(cfg, spec))
        else:
            engines[spec] = Engine(engine_config(cfg, spec), devices[spec.model])
    logs = None
    if folder is not None:
        logs = folder / "engines"
        logs.mkdir(parents=True, exist_ok=True)
    return RealCluster(
        actors,
        engines.__getitem__,
        lambda name: vocab.get(name, min(vocab.values())),  # nobody serves another, so it fails in any case
        sampling(cfg),
        backend.report_period_s,
        logs,
        record=backend.record,
        keep_outputs=backend.keep_outputs,
        pin=backend.pin,
        metrics=ServingMetrics(backend.metrics_port),
        log_level=backend.log_level,
    )


def device_name(cfg: DictConfig) -> str:
    """What real engines run on. YAML reads an unquoted null, and what a shell leaves of a quoted one, as nothing."""
    return "null" if cfg.backend.device is None else str(cfg.backend.device)


def draft_model(cfg: DictConfig, name: str | None = None) -> str | None:
    """The folder of the model that guesses. ValueError: it is missing, no model, of another vocabulary, or not used."""
    folder, engine = cfg.backend.draft_model, cfg.engine
    used = engine.speculative_tokens and engine.drafter == "model"
    if folder is None:
        if used:
            raise ValueError(
                "engine.drafter is model, but backend.draft_model names none: set it to a Hugging Face folder, or take "
                "engine.drafter=ngram"
            )
        return None
    if not used:
        raise ValueError(
            f"backend.draft_model is {folder}, but nothing uses it: set engine.drafter=model and "
            "engine.speculative_tokens to the number of guesses, 1 or more"
        )
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"backend.draft_model is {folder}: there is no config.json of a Hugging Face model")
    from flowserve.models import read_config

    found, wanted = read_config(Path(folder)).vocab_size, model_shape(cfg, name).vocab
    if found != wanted:
        raise ValueError(
            f"backend.draft_model {folder} has a vocabulary of {found} tokens, the model {name or model_name(cfg)} of "
            f"{wanted}: take a smaller model of the same family"
        )
    return str(folder)
