"""The limits and policies of an engine, the same on both backends."""

from typing import Any

from omegaconf import DictConfig

from cluster.engine_policy import ChunkPolicy, EvictionPolicy, PolicySpec, QueueOrder, VictimPolicy
from cluster.vocabulary import ExecutorSpec
from experiments.config import plain, typed
from experiments.models import model_shape
from experiments.parts.fleet import hardware_of
from flowserve.core.config import EngineConfig
from sim.model_shape import ModelShape

ENGINE_POLICIES = {
    "order": QueueOrder,
    "victim": VictimPolicy,
    "eviction": EvictionPolicy,
    "chunking": ChunkPolicy,
}


def engine_config(cfg: DictConfig, spec: ExecutorSpec, shape: ModelShape | None = None) -> EngineConfig:
    """Engine limits; KV cache blocks by what fits where the configuration leaves them open. `shape`: of the model that
    the executor serves, where it is known.
    """
    from sim.hardware import kv_blocks

    values = plain(cfg.engine)
    if values["kv_blocks"] is None:
        shape = shape or model_shape(cfg, spec.model)
        budgets = (values.get(name) or 0 for name in ("token_budget", "prefill_token_budget", "decode_token_budget"))
        sizes = (values["block_tokens"], max(budgets), values["max_sequences"])
        values["kv_blocks"] = kv_blocks(hardware_of(cfg, spec), shape, spec.npus, *sizes)
    for name, kind in ENGINE_POLICIES.items():
        if name in values:  # an option of one's own may leave it to the engine's default
            values[name] = engine_policy(values[name], kind, f"engine.{name}")
    return typed(values, EngineConfig, "engine")


def engine_policy(node: dict[str, Any], kind: type, where: str) -> PolicySpec:
    """A policy inside the engines: each makes its own from this. ValueError: it cannot be made."""
    spec = PolicySpec(node["_target_"], {name: value for name, value in node.items() if name != "_target_"})
    try:
        spec.build(kind)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return spec
