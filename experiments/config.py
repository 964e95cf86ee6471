"""Composing a run's configuration from `conf/`, and reading parts of it into typed, checked structs."""

import inspect
import logging
import os
from enum import EnumType
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import msgspec
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf

CHECKOUT = Path(__file__).resolve().parent.parent
CONF = CHECKOUT / "conf"
DATA = Path(__file__).resolve().parent / "data"

T = TypeVar("T")

# ${data:PATH}: a file that comes with the program (profiles, heat maps).
OmegaConf.register_new_resolver("data", lambda path: str(DATA / path), replace=True)


def compose(overrides: list[str] | None = None, config_dirs: list[str] | None = None) -> DictConfig:
    """A run's configuration: the defaults of `conf/config.yaml` with Hydra overrides, e.g. `["dispatch=deepflow"]`.

    `config_dirs`: folders with more options, laid out like `conf/`. Raises Hydra's errors for unknown options or keys.
    """
    search = [f"file://{os.path.abspath(path)}" for path in config_dirs or []]
    extra = [f"hydra.searchpath=[{','.join(search)}]"] if search else []
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra_compose("config", overrides=[*extra, *(overrides or [])])


def plain(node: Any) -> Any:
    """A config node as dicts, lists and values, interpolations resolved."""
    return OmegaConf.to_container(node, resolve=True, throw_on_missing=True) if OmegaConf.is_config(node) else node


def typed(node: Any, kind: type[T], where: str) -> T:
    """A config node as a struct. ValueError: a missing key or a wrong type, with where it stands."""
    try:
        return msgspec.convert(plain(node), kind)
    except msgspec.ValidationError as error:
        raise ValueError(f"{where}: {error}{_allowed(str(error), kind)}") from error


def _allowed(said: str, kind: type) -> str:
    """What may stand where `said` names a field that takes only certain words."""
    field = said.rpartition("`$.")[2].rstrip("`")
    hint = get_type_hints(kind).get(field) if said.startswith("Invalid enum value") else None
    words = get_args(hint) if get_origin(hint) is Literal else list(hint) if isinstance(hint, EnumType) else []
    return f": allowed are {', '.join(map(str, words))}" if words else ""


def build(node: Any, where: str, **known: Any) -> Any:
    """The object that a node with `_target_` describes; of `known`, it gets what its signature asks for.

    ValueError: the target cannot be imported or refuses its arguments, with the reason.
    """
    logging.getLogger("hydra").setLevel(logging.CRITICAL)  # it would print the error that is raised here
    try:
        accepted = inspect.signature(get_object(node["_target_"])).parameters
        return instantiate(node, **{name: value for name, value in known.items() if name in accepted})
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, ValueError):
            raise ValueError(f"{where}: {cause}") from error
        raise ValueError(f"{where}: {' '.join(str(error).split())}") from error
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
