"""A look into a simulated run at any time: it is simulated again up to there, and checked to be the same run.

A run depends on its configuration, traces and code alone, so nothing but decisions.jsonl has to be kept of it. Where
the folder has a snapshot from before that time, it begins there.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple, cast

from omegaconf import DictConfig, OmegaConf

from cluster.actions import Action
from cluster.client import Client
from cluster.control import ControlPlane
from cluster.events import Event
from cluster.jobs.record import JobRow
from cluster.recorder import Recorder
from cluster.vocabulary import NS_PER_S, WORKERS, to_ns
from experiments import build
from experiments import snapshot as snapshots
from experiments.task_log import TaskLog
from flowserve.core.rtc import Node
from flowserve.core.sequence import Sequence, Status
from sim.cluster import SimCluster
from sim.executor import SimExecutor

EVERY = 1 << 62
_WHOLE = (1 << 64) - 1


class Checked:
    """Takes the place of the decision log: compares what is decided with what was, line by line.

    `different`: the first time in ns from which on it is not the same run; `decisions`: how many were the same.
    """

    def __init__(self, path: Path, start: int) -> None:
        self.different: int | None = None
        self.decisions = 0
        self.now = 0
        self._file: IO[bytes] | None = path.open("rb") if path.is_file() else None
        if self._file is not None:
            self._file.seek(start)

    @property
    def possible(self) -> bool:
        return self._file is not None

    def write(self, line: bytes) -> int:
        if self._file is not None and self.different is None:
            if self._file.readline() == line:
                self.decisions += 1
            else:
                self.different = self.now
        return len(line)


class Change(NamedTuple):
    """What happened in one step: the time in ns, and sentences."""

    at_ns: int
    said: list[str]


class Inspection:
    """A run of which time stands still where one likes. `folder`: of a finished simulated run.

    ValueError: it is no such folder, or its traces are not found here.
    """

    def __init__(self, folder: Path, until_s: float) -> None:
        config = folder / "config.yaml"
        if not config.is_file():
            raise ValueError(f"{folder} holds no config.yaml: give the folder of a finished run")
        cfg = OmegaConf.load(config)
        assert isinstance(cfg, DictConfig)
        if cfg.backend.name != "sim":
            raise ValueError(f"{folder} is of real engines: only simulated runs can be run again to look into them")
        self.cfg, self.over = cfg, False
        start = 0
        found = _snapshot(folder, cfg, to_ns(until_s))
        if found is None:
            workload = build.workload(cfg)
            self.control: ControlPlane[Client] = build.control_plane(cfg, workload.arrivals, Recorder())
            self.cluster = cast(SimCluster, build.cluster(cfg, None))
            self.tasks = TaskLog(EVERY)
            self.began = "from its beginning"
        else:
            taken, changed = found
            self.cluster, self.control, self.tasks = snapshots.go_on(taken, cfg, changed).state
            start = taken.header.decisions_bytes or 0
            self.began = f"from its snapshot at {snapshots.seconds(taken.header)}"
        self.log = Checked(folder / "decisions.jsonl", start)
        self.control.log_to(cast(IO[bytes], self.log))

    @property
    def now_s(self) -> float:
        return self.cluster.now() / NS_PER_S

    def until(self, time_s: float) -> None:
        """Simulate up to this time; all that happens then has happened. ValueError: it is past."""
        if to_ns(time_s) < self.cluster.now():
            raise ValueError(f"t={time_s:g} is past: it is {self.now_s:g} s, and time does not go back")
        if not self.over:
            self.cluster.pause_at(to_ns(time_s))
            while self._next(pausing=True) is not None:
                pass
        self._settle()

    def step(self, executor: str | None = None) -> Change:
        """The next event of the control plane, or the end of the step that an executor computes; what it changed."""
        if executor is None:
            done = self._next()
            said = (
                ["the run is over"]
                if done is None
                else [describe(done[0]), *(f"  → {describe(each)}" for each in done[1])]
            )
            self._settle()
            return Change(self.cluster.now(), said)
        watched = self._executor(executor)
        before = _Seen(watched)
        while not self.over and (end := watched.step_ends) is None:
            if self._next() is None or watched.dead:
                break
        if (end := watched.step_ends) is not None and not self.over:
            plan = watched.shell.core.in_flight[0]
            self.until(end / NS_PER_S)
            shape = plan.shape
            said = [f"step of {shape.prefill_tokens} prompt tokens and {shape.decode_sequences} decodes ended"]
        else:
            said = ["it computes nothing more"]
        return Change(self.cluster.now(), said + before.compare(_Seen(watched)))

    def _next(self, pausing: bool = False) -> tuple[Event, list[Action]] | None:
        """The next event and what was decided on it; None: the run is over, or a pause that was asked for."""
        while True:
            event = None if self.over else self.cluster.next_event()
            if event is None:
                self.over = True
                return None
            if event.to:
                break
            if pausing:
                return None
        self.log.now = event.time
        actions = self.control.on_event(event)
        for action in actions:
            self.cluster.submit(action)
        self.tasks.record(event, actions)
        return event, actions

    def _settle(self) -> None:
        """Steps that have ended in the middle of a segment have ended."""
        for executor in self.cluster.executors.values():
            executor.settle()

    def _executor(self, name: str) -> SimExecutor:
        if name not in self.cluster.executors:
            if name in self.cluster.workers:
                raise ValueError(f"executor {name!r} is a worker: leave executor= out, its tasks are counted there")
            known = ", ".join(self.cluster.executors) or "none"
            raise ValueError(f"executor {name!r} is not up at {self.now_s:g} s: there are {known}")
        return self.cluster.executors[name]

    # -- what there is --------------------------------------------------------------------------------------------

    def overview(self) -> Iterator[str]:
        """The run as a whole, and a line per executor."""
        recorder, client = self.control.recorder, self.control.client
        yield f"t = {self.now_s:.6f} s{' (over)' if self.over else ''}, simulated again {self.began}"
        yield self.verdict()
        loads = self.control.manager.loads()
        parked = sum({spec.model: load.parked for spec, load in loads.items() if spec.role not in WORKERS}.values())
        yield f"{recorder.ended} requests have ended, {len(client.due)} are open, {parked} wait for an executor"
        tasks = sum(load.parked for spec, load in loads.items() if spec.role in WORKERS)
        if tasks:
            yield f"{tasks} tasks wait for a worker"
        rows: list[tuple[str, ...]] = [
            ("executor", "role", "wait", "run", "in flight", "KV used", "cached", "tiers", "hits")
        ]
        for name, executor in self.cluster.executors.items():
            core, rtc = executor.shell.core, executor.shell.core.rtc
            used = rtc.total_blocks - rtc.available
            tiers = " ".join(f"{tier.name} {pool.cached}" for tier, pool in list(rtc.pools.items())[1:]) or "–"
            rows.append(
                (
                    name,
                    str(executor.shell.shell.spec.role),
                    str(core.waiting.count),
                    str(core.num_running),
                    str(len(core.in_flight)),
                    f"{used}/{rtc.total_blocks}",
                    str(rtc.cached_blocks),
                    tiers,
                    str(sum(node.hits for node in rtc.nodes())),
                )
            )
        for name, each in self.cluster.workers.items():
            slots, role = each.worker.slots, str(each.worker.shell.spec.role)
            rows.append((name, role, str(slots.waiting), str(len(slots.running)), *["–"] * 5))
        yield from _table(rows)

    def verdict(self) -> str:
        """Whether this is the run that the folder holds."""
        if not self.log.possible:
            return "not checked: the run was made with decisions=false"
        if self.log.different is not None:
            since = f"{self.log.different / NS_PER_S:g} s"
            return f"NOT THE SAME RUN from {since} on: code, traces or policies have changed since it was made"
        return f"the same run so far: {self.log.decisions} decisions equal those of decisions.jsonl"

    def executor(self, name: str, most: int = 20) -> Iterator[str]:
        """One executor: its queue, its batch and its cache. ValueError: it is not up."""
        executor = self._executor(name)
        core, now = executor.shell.core, self.cluster.now()
        sequences = [sequence for task in core.task_ids() if (sequence := core.sequence(task)) is not None]
        waiting = [sequence for sequence in sequences if sequence.status is Status.WAITING]
        running = [sequence for sequence in sequences if sequence.status is not Status.WAITING]
        ends = executor.step_ends
        yield f"{name}: {executor.steps} steps so far, " + (
            "idle" if ends is None else f"the step in progress ends in {(ends - now) / 1e6:.3f} ms"
        )
        yield f"queue: {len(waiting)}, in order of arrival"
        yield from _table(
            [
                ("request", "prompt", "generated", "since arrival s"),
                *(
                    (str(_id(each)), str(_prompt(each)), str(each.generated), self._wait(each))
                    for each in waiting[:most]
                ),
            ]
        )
        yield f"batch: {len(running)}"
        yield from _table(
            [
                ("request", "phase", "computed", "of", "generated", "cached", "blocks", "preempted"),
                *(_row(each) for each in running[:most]),
            ]
        )
        yield from self._cache(executor, most)

    def _cache(self, executor: SimExecutor, most: int) -> Iterator[str]:
        rtc = executor.shell.core.rtc
        for tier, pool in rtc.pools.items():
            yield f"{tier.name}: {pool.cached} blocks cached, {pool.allocator.free} free"
        yield f"prefix tree: {sum(1 for _ in rtc.nodes())} nodes; the largest prefixes below the root:"
        roots = sorted(rtc.root.children.values(), key=_below, reverse=True)[:most]
        yield from _table(
            [
                ("first block", "blocks", "hits", "used by"),
                *(
                    (f"{node.first & _WHOLE:016x}", str(_below(node)), str(_hits(node)), str(node.locks))
                    for node in roots
                ),
            ]
        )

    def request(self, request_id: int) -> Iterator[str]:
        """Where one request is, and where it was. ValueError: it has not arrived."""
        client, recorder = self.control.client, self.control.recorder
        columns = recorder.requests
        ended = [row for row, each in enumerate(columns["request_id"]) if each == request_id]
        if request_id in client.due:
            since = (self.cluster.now() - client.due[request_id]) / NS_PER_S
            yield f"request {request_id}: open, {since:.3f} s since its arrival"
        elif ended:
            row = ended[0]
            yield (
                f"request {request_id}: {recorder.outcomes[row]} {recorder.reasons[row]}".rstrip()
                + f", {columns['prompt_tokens'][row]} prompt tokens, {columns['output_tokens'][row]} generated"
            )
        elif jobs := [row for row in self._jobs() if row.request_id == request_id]:
            said = [f"{row.kind} {row.outcome} {row.reason}".rstrip() for row in jobs]
            yield f"request {request_id}: {', '.join(said)}"
        elif any(task.request_id == request_id for task in self.tasks.tasks):
            yield f"request {request_id}: a job's call, open"
        else:
            raise ValueError(f"request {request_id} has not arrived at {self.now_s:g} s")
        for task in self.tasks.tasks:
            if task.request_id != request_id:
                continue
            times = f"placed at {task.start_ns / NS_PER_S:.6f} s"
            times += "" if task.first_ns is None else f", first token at {task.first_ns / NS_PER_S:.6f} s"
            times += "" if task.end_ns is None else f", over at {task.end_ns / NS_PER_S:.6f} s {task.failed}".rstrip()
            yield f"  task {task.task_id} ({task.kind}) on {task.executor}: {times}"
            executor = self.cluster.executors.get(task.executor)
            sequence = None if executor is None else executor.shell.core.sequence(task.task_id)
            if sequence is not None:
                names = ("phase", "computed", "of", "generated", "cached", "blocks", "preempted")
                yield "    " + ", ".join(
                    f"{name} {value}" for name, value in zip(names, _row(sequence)[1:], strict=True)
                )

    def _jobs(self) -> list[JobRow]:
        return [] if self.control.work is None else self.control.work.recorder.rows

    def _wait(self, sequence: Sequence) -> str:
        due = self.control.client.due.get(_id(sequence))
        return "–" if due is None else f"{(self.cluster.now() - due) / NS_PER_S:.3f}"


def _snapshot(folder: Path, cfg: DictConfig, until_ns: int) -> tuple[snapshots.Snapshot, frozenset[str]] | None:
    """The one to begin from: that of the folder where it is early enough and of this code; of a resumed run that went
    on with other policies, the one that it went on from. ValueError: the latter cannot be read.
    """
    resumed = cfg.get("resumed")
    changed = frozenset(resumed.changed if resumed else ())
    try:
        taken = snapshots.load(folder / "snapshot.bin")
        if taken.header.at_ns <= until_ns:
            return taken, frozenset({"rate"} & changed)
    except ValueError:
        pass
    if not changed:
        return None
    assert resumed is not None
    if until_ns < to_ns(resumed.at_s):
        raise ValueError(
            f"{folder} was resumed at {resumed.at_s:g} s with other {' and '.join(sorted(changed))}: for times before, "
            f"inspect {Path(resumed.snapshot).parent}"
        )
    return snapshots.load(Path(resumed.snapshot)), changed


class _Seen:
    """What is compared of an executor from step to step."""

    def __init__(self, executor: SimExecutor) -> None:
        core = executor.shell.core
        found = [sequence for task in core.task_ids() if (sequence := core.sequence(task)) is not None]
        self.sequences = {_id(each): _row(each)[1:] for each in found}
        self.blocks = {"free": core.rtc.available, "cached": core.rtc.cached_blocks}

    def compare(self, later: "_Seen") -> list[str]:
        """What is new, gone or different, sentence by sentence."""
        names = ("phase", "computed", "of", "generated", "cached", "blocks", "preempted")
        said = [f"r{request} is gone" for request in self.sequences if request not in later.sequences]
        for request, values in later.sequences.items():
            if (before := self.sequences.get(request)) is None:
                said.append(f"r{request} is new: " + ", ".join(map(" ".join, zip(names, values, strict=True))))
            elif before != values:
                moved = [
                    f"{name} {old} → {new}" for name, old, new in zip(names, before, values, strict=True) if old != new
                ]
                said.append(f"r{request}: {', '.join(moved)}")
        moved = [
            f"{name} {old} → {later.blocks[name]}" for name, old in self.blocks.items() if old != later.blocks[name]
        ]
        return said + ([f"blocks {', '.join(moved)}"] if moved else [])


def _id(sequence: Sequence) -> int:
    return sequence.task.request.request_id


def _prompt(sequence: Sequence) -> int:
    return sequence.task.request.prompt_tokens


def _row(sequence: Sequence) -> tuple[str, ...]:
    return (
        str(_id(sequence)),
        sequence.status.name.lower(),
        str(sequence.position),
        str(sequence.target),
        str(sequence.generated),
        str(sequence.cached_tokens),
        str(len(sequence.blocks)),
        str(sequence.preemptions),
    )


def _below(node: Node) -> int:
    """Blocks of a node and all below it."""
    total, stack = 0, [node]
    while stack:
        node = stack.pop()
        total += len(node.blocks)
        stack.extend(node.children.values())
    return total


def _hits(node: Node) -> int:
    total, stack = 0, [node]
    while stack:
        node = stack.pop()
        total += node.hits
        stack.extend(node.children.values())
    return total


def _table(rows: list[tuple[str, ...]]) -> Iterator[str]:
    if len(rows) == 1:
        return
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            f"{row[0]:<{widths[0]}}",
            *(f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True)),
        ]
        yield "  " + "  ".join(cells).rstrip()


def describe(what: Event | Action) -> str:
    """An event or an action on one line: its kind, and what is short of it."""
    parts = []
    for name in what.__struct_fields__:
        value = getattr(what, name)
        if name in ("time", "occurred") or isinstance(value, tuple | list | bytes) or value in ("", None, 0):
            continue
        if name in ("task", "request"):
            request = getattr(value, "request", value)
            works = getattr(value, "operation", getattr(value, "work", None))
            what_of = f"prompt={request.prompt_tokens}" if works is None else f"work={type(works).__name__}"
            parts.append(f"request={request.request_id} {what_of}")
        else:
            parts.append(f"{name}={value}")
    return f"{type(what).__name__} {' '.join(parts)}"
