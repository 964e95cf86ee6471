"""The models of a run: one, or those that the groups of its fleet name; their shapes, and their weights on the disk."""

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from cluster.vocabulary import WORKERS
from experiments.config import CONF, typed
from sim.model_shape import ModelShape

LARGEST_RANDOM_MODEL = 500_000_000
"""Parameters. Random weights serve to try things out; nobody means to write those of a large model to the disk."""


def served(cfg: DictConfig) -> dict[str, DictConfig]:
    """What `cfg.model` or an option of conf/model says, by the name that requests ask for: in the order of
    `fleet.groups`, the most popular one first where a mix of models is drawn (conf/mix).
    """
    found: dict[str, DictConfig] = {}
    for number, (node, called) in enumerate(by_group(cfg)):
        for name in called:
            if found.setdefault(name, node) is not node:
                raise ValueError(f"fleet.groups[{number}].model is another one of the name {name!r}: rename its shape")
    return found or {shape_of(cfg, cfg.model).name: cfg.model}


def by_group(cfg: DictConfig) -> list[tuple[DictConfig, list[str]]]:
    """For each entry of `fleet.groups` its model, and the names under which that is served: none for workers."""
    nodes: dict[str, DictConfig] = {"": cfg.model}
    entries: list[tuple[DictConfig, list[str]]] = []
    for number, group in enumerate(cfg.fleet.groups):
        option = str(group.get("model", ""))
        if option not in nodes:
            nodes[option] = _option(option, f"fleet.groups[{number}].model")
        if group.get("role") in WORKERS:
            entries.append((nodes[option], []))
            continue
        name, copies = shape_of(cfg, nodes[option]).name, group.get("copies", 0)
        entries.append((nodes[option], [f"{name}-{copy}" for copy in range(copies)] if copies else [name]))
    return entries


def _option(option: str, where: str) -> DictConfig:
    """An option of conf/model, a YAML file like these, or a Hugging Face folder. ValueError: there is none of these."""
    if (Path(option) / "config.json").is_file():
        return OmegaConf.create({"shape": None, "folder": option})
    file = Path(option) if option.endswith(".yaml") else CONF / "model" / f"{option}.yaml"
    if not file.is_file():
        options = ", ".join(sorted(option.stem for option in (CONF / "model").glob("*.yaml")))
        raise ValueError(f"{where} is {option!r}: allowed are {options}, a YAML file and a Hugging Face folder")
    node = OmegaConf.load(file)
    assert isinstance(node, DictConfig)
    return node


def model_name(cfg: DictConfig) -> str:
    """The model that a request asks for where its trace names none: the run's, or the first that the fleet serves."""
    own = shape_of(cfg, cfg.model).name
    found = served(cfg)
    return own if own in found else next(iter(found))


def model_shape(cfg: DictConfig, name: str | None = None) -> ModelShape:
    """The sizes of the run's model, or of the one that is served under this name: from config.json where a folder is
    named, else as configured.

    A real engine keeps weights and KV cache in its own dtype, a simulated one in that of the files.
    """
    return shape_of(cfg, served(cfg)[name or model_name(cfg)])


def shape_of(cfg: DictConfig, node: DictConfig) -> ModelShape:
    """The same of an entry of `served`."""
    if node.folder is None:
        return typed(node.shape, ModelShape, "model.shape")
    folder = Path(node.folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"model.folder is {folder}: there is no config.json of a Hugging Face model")
    from flowserve.models import read_config

    config = read_config(folder)
    dtype = cfg.backend.get("dtype", config.dtype)
    return ModelShape(
        name=folder.resolve().name,
        family=config.model_type,
        layers=config.num_layers,
        hidden=config.hidden_size,
        heads=config.num_heads,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        intermediate=config.intermediate_size,
        vocab=config.vocab_size,
        bytes_per_value=4 if dtype == "float32" else 2,
        tied_embeddings=config.tied,
        sparse_layers=sum(config.is_sparse(layer) for layer in range(config.num_layers)),
        experts=config.num_experts,
        experts_per_token=config.num_experts_per_tok,
        expert_intermediate=config.moe_intermediate_size,
    )


def model_folder(cfg: DictConfig, name: str | None = None) -> str:
    """The Hugging Face folder of the run's model, or of that name; random weights of its shape, made once, where none
    is named.
    """
    node = served(cfg)[name or model_name(cfg)]
    if node.folder is not None:
        return str(node.folder)
    shape = shape_of(cfg, node)
    if shape.parameters > LARGEST_RANDOM_MODEL:
        raise ValueError(
            f"model {shape.name} has no weights: name a Hugging Face folder with model.folder=DIR, or take "
            "model=tiny_llama, whose weights are drawn at random"
        )
    from flowserve.runtime.checkpoint import CheckpointShape, make_checkpoint

    return str(
        make_checkpoint(
            shape.name,
            CheckpointShape(
                hidden_size=shape.hidden,
                num_layers=shape.layers,
                num_heads=shape.heads,
                num_kv_heads=shape.kv_heads,
                head_dim=shape.head_dim,
                intermediate_size=shape.intermediate,
                vocab_size=shape.vocab,
                family=shape.family,
                num_experts=shape.experts,
                experts_per_token=shape.experts_per_token,
                expert_size=shape.expert_intermediate,
                dense_layers=shape.layers - shape.sparse_layers if shape.experts else 0,
                tie=shape.tied_embeddings,
            ),
        )
    )
