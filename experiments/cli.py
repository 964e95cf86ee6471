"""The `deepflow` command: our own small dispatcher. A user's error is one line and exit code 2."""

import os
import signal
import sys
from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple

OURS = ("cluster", "policies", "flowserve", "sim", "real", "traces", "experiments")


class Command(NamedTuple):
    """A subcommand: `module` has a `main(arguments) -> int`, imported only when called."""

    module: str
    about: str


COMMANDS = {
    "run": Command("experiments.commands.run", "one experiment: trace + policies + backend=sim|real"),
    "sweep": Command("experiments.commands.sweep", "many runs (Hydra multirun) and one comparison report"),
    "replay": Command("experiments.commands.replay", "feed a run's events back, check the actions"),
    "inspect": Command("experiments.commands.inspect", "step through a simulated run; any executor's queue and cache"),
    "validate": Command("experiments.commands.validate", "the same trace on both backends; error table per metric"),
    "profile": Command("experiments.commands.profile", "measure the engine here and write a latency profile"),
    "bench": Command("experiments.commands.bench", "benchmarks of engine, scheduling and devices; one by name, or all"),
    "heatmap": Command("experiments.commands.heatmap", "simulate where disaggregation pays; write a heat map"),
    "demo": Command("experiments.commands.demo", "the main job: two policies on 910B, on this CPU, and simulated CPU"),
    "generate": Command("experiments.commands.generate", "text from one engine on this machine, as it comes"),
    "traces": Command("experiments.commands.traces", "list | stats | convert | generate"),
    "doctor": Command("experiments.commands.doctor", "what this machine has, and operator self-tests"),
}


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: deepflow COMMAND [arguments]      (deepflow COMMAND --help tells more)\n")
        for name, command in COMMANDS.items():
            print(f"  {name:<10}{command.about}")
        return 0
    if arguments[0] not in COMMANDS:
        return _error(f"unknown command {arguments[0]!r}: allowed are {', '.join(COMMANDS)}")
    foreign = _shadowed()
    if foreign is not None:
        return _error(foreign)
    signal.signal(signal.SIGTERM, _interrupt)
    sys.path.insert(0, os.getcwd())  # policies outside the repository are named by their import path
    run: Callable[[list[str]], int] = import_module(COMMANDS[arguments[0]].module).main
    try:
        return run(arguments[1:])
    except KeyboardInterrupt:
        print("deepflow: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0
    except Exception as error:
        if isinstance(error, ValueError | OSError) or type(error).__module__.startswith(("hydra.", "omegaconf.")):
            return _error(_one_line(error))
        raise


def _interrupt(number: int, frame: object) -> None:
    """A polite kill ends like Ctrl-C: engines stopped, what there is written."""
    raise KeyboardInterrupt


def _error(message: str) -> int:
    print(f"deepflow: error: {message}", file=sys.stderr)
    return 2


def _one_line(error: BaseException) -> str:
    """The message on one line, without what Hydra adds: its search path, and where it was in its own data."""
    key = getattr(error, "full_key", None)
    if key and type(error).__name__ == "MissingMandatoryValue":  # not imported: OmegaConf may not have been so far
        return f"{key} has no value: set it, as in {key}=VALUE (its file in conf/ says what it is)"
    message = str(error)
    for added in ("Config search path:", "full_key:", "    object_type="):
        message = message.partition(added)[0]
    return " ".join(message.split())


def _shadowed() -> str | None:
    """Our package names are common words: say so where another distribution's package comes first."""
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    for name in OURS:
        path = getattr(import_module(name), "__file__", None) or ""
        if not os.path.abspath(path).startswith(here + os.sep):
            return f"package {name!r} is taken from {path}, not from {here}: use an environment of its own (make run)"
    return None


if __name__ == "__main__":
    sys.exit(main())
