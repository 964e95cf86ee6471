"""`deepflow replay DIR`: feed a run's events back to new actors, and check that they decide the same, bit for bit."""

from collections.abc import Iterator
from pathlib import Path

import msgspec
from omegaconf import DictConfig, OmegaConf

from cluster.decision_log import LOG_SCHEMA, Decision, LogHeader
from cluster.recorder import Recorder
from experiments import build
from experiments.outputs import read_summary

USAGE = """usage: deepflow replay DIR

DIR: the folder of a finished run, simulated or real. Prints how many decisions were the same; exit code 1 at the
first that was not.
"""


def main(arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return 0
    if len(arguments) != 1:
        raise ValueError(f"{len(arguments)} arguments: name the folder of one finished run, deepflow replay DIR")
    folder = Path(arguments[0])
    count, difference = replay(folder)
    if difference is not None:
        print(difference)
        print(folder)
        return 1
    print(f"{count} decisions, all the same")
    print(folder)
    return 0


def replay(folder: Path) -> tuple[int, str | None]:
    """(decisions that were the same, what differs first or None). ValueError: no readable run in `folder`."""
    config = folder / "config.yaml"
    if not config.is_file():
        raise ValueError(f"{folder} holds no config.yaml: give the folder of a finished run")
    cfg = OmegaConf.load(config)
    assert isinstance(cfg, DictConfig)
    resumed = cfg.get("resumed")
    if resumed and resumed.changed:
        raise ValueError(
            f"{folder} was resumed at {resumed.at_s:g} s with other {' and '.join(resumed.changed)}: its decisions are "
            "of two configurations, and cannot be replayed by one"
        )
    workload, recorded = build.workload(cfg), read_summary(folder).provenance["trace"]
    if workload.source != recorded:
        raise ValueError(
            f"{folder} ran on the trace {recorded!r}, but here that is {workload.source!r}: "
            "set DEEPFLOW_TRACES as it was then"
        )
    control = build.control_plane(cfg, workload.arrivals, Recorder())
    count = 0
    for line, decision in read_decisions(folder / "decisions.jsonl"):
        if decision.sequence != count:
            return count, f"decisions.jsonl:{line}: decision {decision.sequence} stands where number {count} should"
        try:
            now = str(actions) if (actions := control.on_event(decision.event)) != decision.actions else None
        except Exception as error:  # whatever the policy makes of an event that it cannot have met
            now = f"{type(error).__name__}: {error}"
        if now is not None:
            return count, (
                f"decisions.jsonl:{line}: on {decision.event}\n  the run decided {decision.actions}\n  now it is {now}"
            )
        count += 1
    return count, None


def read_decisions(path: Path) -> Iterator[tuple[int, Decision]]:
    """(line number, decision). ValueError: missing, another schema, or a line that cannot be read."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist: the run was made with decisions=false, or is not finished")
    decode = msgspec.json.Decoder(Decision).decode
    with path.open("rb") as file:
        try:
            schema = msgspec.json.decode(file.readline(), type=LogHeader).schema
        except (msgspec.DecodeError, msgspec.ValidationError) as error:
            raise ValueError(f"{path}:1: {error}") from error
        if schema != LOG_SCHEMA:
            raise ValueError(f"{path}: its schema is {schema!r}, this version reads {LOG_SCHEMA!r}")
        for number, line in enumerate(file, 2):
            try:
                yield number, decode(line)
            except (msgspec.DecodeError, msgspec.ValidationError) as error:
                raise ValueError(f"{path}:{number}: {error}") from error
