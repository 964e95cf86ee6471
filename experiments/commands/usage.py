"""What the subcommands share: help, and composing a configuration from arguments."""

import argparse
from pathlib import Path
from typing import NoReturn

from omegaconf import DictConfig

from experiments.config import CONF, compose


class Parser(argparse.ArgumentParser):
    """Leaves errors to whoever asked."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; {self.prog} --help tells more")


def wants_help(arguments: list[str], usage: str) -> bool:
    """Print the usage and the options of every group if asked for it."""
    if not {"-h", "--help"} & set(arguments):
        return False
    print(usage)
    print("groups and their options:")
    for folder in sorted(path for path in CONF.rglob("*") if path.is_dir() and any(path.glob("*.yaml"))):
        group = folder.relative_to(CONF).as_posix()
        print(f"  {group:<17}{', '.join(sorted(path.stem for path in folder.glob('*.yaml')))}")
    return True


def compose_from(arguments: list[str], base: list[str] | None = None) -> DictConfig:
    """The configuration that `[--config-dir DIR] OVERRIDE ...` asks for, on top of the overrides in `base`."""
    config_dirs, overrides = split(arguments)
    return compose([*(base or []), *overrides], config_dirs)


def split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """(config folders, Hydra overrides) of a command line."""
    config_dirs, overrides, rest = [], [], list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument == "--config-dir":
            if not rest:
                raise ValueError("--config-dir needs a folder with options laid out like conf/")
            config_dirs.append(rest.pop(0))
            if not Path(config_dirs[-1]).is_dir():
                raise ValueError(f"--config-dir {config_dirs[-1]}: there is no such folder")
        elif argument.startswith("-"):
            raise ValueError(f"unknown option {argument!r}: allowed are --help, --config-dir DIR and KEY=VALUE")
        else:
            overrides.append(argument)
    return config_dirs, overrides
