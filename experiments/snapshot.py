"""A simulated run in a file, in the middle of whatever it does: to be gone on from, as it is or with other policies.

The file is a line of JSON that says what it is, and a pickle. **A pickle can run any code when it is read: resume only
files that you trust.** It is read only by the code that wrote it: pickled objects of another version might be taken
for what they are not.
"""

import hashlib
import importlib.metadata
import io
import pickle
import platform
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

import msgspec
from omegaconf import DictConfig, OmegaConf

from cluster.client import Client
from cluster.control import ControlPlane
from cluster.vocabulary import NS_PER_S
from experiments import build, compiled
from experiments.config import CHECKOUT, compose
from experiments.task_log import TaskLog
from sim.cluster import SimCluster

SCHEMA = "deepflow-snapshot/1"
CODE = ("cluster", "policies", "flowserve/core", "sim")
"""What a simulated run is made of."""
GROUPS = ("dispatch", "scaling", "slo")
VALUES = (
    "trace.rate",
    "out",
    "report",
    "decisions",
    "progress",
    "watch",
    "warmup_s",
    "cooldown_s",
    "electricity_per_kwh",
    "snapshot_at",
)
"""What may differ from there on: policies, objectives, the rate of arrivals, and what is written."""
_STACK_BYTES = 1 << 30
_DEEPEST = 10_000_000

T = TypeVar("T")


class Header(msgspec.Struct, frozen=True):
    """The first line. `config`: of the run, as YAML. `decisions_bytes`: so much of decisions.jsonl was written by then;
    None: the run writes none.
    """

    schema: str
    version: str
    code: str
    python: str
    at_ns: int
    trace: str
    config: str
    decisions_bytes: int | None
    sha256: str


class State(NamedTuple):
    """A run under way. `cluster` and `control` share objects, so they are kept together."""

    cluster: SimCluster
    control: ControlPlane[Client]
    tasks: TaskLog


class Snapshot(NamedTuple):
    header: Header
    state: State

    @property
    def config(self) -> DictConfig:
        """Of the run that it was taken from."""
        cfg = OmegaConf.create(self.header.config)
        assert isinstance(cfg, DictConfig)
        return cfg


def save(path: Path, state: State, cfg: DictConfig, trace: str, decisions_bytes: int | None) -> None:
    """Write a snapshot. ValueError: a policy or another object of the user's cannot be pickled."""
    try:
        with _at_rest(state.control):
            payload = pickled(state)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise ValueError(
            f"snapshot_at: the run cannot be pickled ({error}): policies and latency models of your own must hold "
            "plain data, no open files, locks or generators"
        ) from error
    header = Header(
        SCHEMA,
        importlib.metadata.version("deepflow"),
        code_hash(),
        _python(),
        state.cluster.now(),
        trace,
        OmegaConf.to_yaml(cfg, resolve=True),
        decisions_bytes,
        hashlib.sha256(payload).hexdigest(),
    )
    part = path.with_name(path.name + ".part")
    part.write_bytes(msgspec.json.encode(header) + b"\n" + payload)
    part.replace(path)


@contextmanager
def _at_rest(control: ControlPlane[Client]) -> Iterator[None]:
    """Without the log and the workload, open files or the like: what goes on from here has others."""
    log, control.log = control.log, None
    workload = control.client.take_workload()
    try:
        yield
    finally:
        control.log = log
        control.client.give_workload(workload)


def load(path: Path) -> Snapshot:
    """Read a snapshot that this code wrote. ValueError: it is none, of other code, or damaged; nothing is unpickled
    then.
    """
    if compiled.is_active():
        raise ValueError(f"resume={path}: a snapshot holds objects of the pure core: resume without {compiled.SWITCH}")
    if not path.is_file():
        raise ValueError(f"{path} does not exist: a run with snapshot_at=SECONDS writes snapshot.bin to its folder")
    with path.open("rb") as file:
        try:
            header = msgspec.json.decode(file.readline(), type=Header)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is no snapshot of a run, or of another version ({error})") from error
        payload = file.read()
    for what, found, here in (
        ("schema", header.schema, SCHEMA),
        ("version", header.version, importlib.metadata.version("deepflow")),
        ("Python", header.python, _python()),
        ("code of the simulator and its policies (hash)", header.code, code_hash()),
    ):
        if found != here:
            raise ValueError(
                f"{path} was written with another {what}, {found}, and here it is {here}: go on with what wrote it, or "
                "run the experiment again"
            )
    if hashlib.sha256(payload).hexdigest() != header.sha256:
        raise ValueError(f"{path} is damaged: run the experiment again")
    try:
        state = pickle.loads(payload)
    except Exception as error:  # whatever objects of the user's make of it
        raise ValueError(f"{path} cannot be read ({type(error).__name__}: {error})") from error
    return Snapshot(header, state)


def configure(
    cfg: DictConfig, overrides: list[str], config_dirs: list[str] | None = None
) -> tuple[DictConfig, frozenset[str]]:
    """The configuration to go on with, and which of `dispatch`, `scaling` and `rate` are new. ValueError: an override
    of what cannot change in the middle of a run.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    changed, result = set(), cfg.copy()
    parsed = OverridesParser.create().parse_overrides(overrides)
    for each in parsed:
        known = each.key_or_group.partition(".")[0] in GROUPS or each.key_or_group in VALUES
        if not known or each.is_sweep_override() or each.is_delete():
            raise ValueError(
                f"{each.input_line}: allowed in a resumed run are {', '.join(GROUPS)}, {', '.join(VALUES)}, with one "
                "value each; all else is in the middle of what it was"
            )
    chosen = [str(each.input_line) for each in parsed if each.key_or_group in GROUPS]
    fresh = compose(chosen, config_dirs) if chosen else None
    for each in sorted(parsed, key=lambda each: each.key_or_group not in GROUPS):
        key, root = each.key_or_group, each.key_or_group.partition(".")[0]
        if fresh is not None and key in GROUPS:
            result[key] = fresh[key]
        elif OmegaConf.select(result, key, default=_ABSENT) is _ABSENT and not each.is_add():
            raise ValueError(f"{each.input_line}: there is no {key} in the run's configuration")
        else:
            OmegaConf.update(result, key, each.value())
        changed.add("rate" if key == "trace.rate" else root)
    return result, frozenset(changed & {"dispatch", "scaling", "rate"})


class Resumed(NamedTuple):
    workload: build.Workload
    state: State


def go_on(taken: Snapshot, cfg: DictConfig, changed: frozenset[str]) -> Resumed:
    """The run of a snapshot, ready to go on, with what has changed in `cfg`. ValueError: its trace is another here."""
    before, (cluster, control, _) = taken.config, taken.state
    workload = build.workload(before)
    if workload.source != taken.header.trace:
        raise ValueError(
            f"the snapshot is of a run on the trace {taken.header.trace!r}, but here that is {workload.source!r}: set "
            "DEEPFLOW_TRACES as it was then"
        )
    arrivals = workload.arrivals
    if "rate" in changed:
        since = taken.header.at_ns - control.client.start_ns
        arrivals = build.rate_from(arrivals, since, float(cfg.trace.rate), float(before.trace.rate))
    control.client.resume(arrivals)
    if "dispatch" in changed:
        for job_executor in control.job_executors:
            job_executor.policy = build.dispatch_policy(cfg, job_executor.name)
    if "scaling" in changed:
        for action in control.manager.follow(build.scaling_policy(cfg), taken.header.at_ns):
            cluster.submit(action)
    return Resumed(workload, taken.state)


_ABSENT = object()


def code_hash() -> str:
    """Of all files that a simulated run is made of."""
    digest = hashlib.sha256()
    for folder in CODE:
        for path in sorted((CHECKOUT / folder).rglob("*.py")):
            digest.update(str(path.relative_to(CHECKOUT)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def seconds(header: Header) -> str:
    return f"{header.at_ns / NS_PER_S:g} s"


def _python() -> str:
    return ".".join(platform.python_version_tuple()[:2])


def pickled(state: State) -> bytes:
    """A run as bytes. What pickle and cloudpickle cannot take raises what they raise."""
    import cloudpickle

    out = io.BytesIO()
    _deep(lambda: cloudpickle.dump(state, out, pickle.HIGHEST_PROTOCOL))
    return out.getvalue()


def _deep(call: Callable[[], T]) -> T:
    """Call in a thread with a stack for deep recursion: pickling walks through trees and queues object by object."""
    result: list[T] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            result.append(call())
        except BaseException as error:
            errors.append(error)

    stack, deepest = threading.stack_size(_STACK_BYTES), sys.getrecursionlimit()
    sys.setrecursionlimit(_DEEPEST)
    try:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    finally:
        threading.stack_size(stack)
        sys.setrecursionlimit(deepest)
    if errors:
        raise errors[0]
    return result[0]
