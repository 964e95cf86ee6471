"""`timeline.json`: a run in the Trace Event Format, as Perfetto (ui.perfetto.dev) and Chrome read it.

A process for the requests that arrive, one per executor with its life, its steps, its tasks and its load, and one for
the links. Arrows (flow events) lead from a request's arrival over its prefill and its transfer of KV cache to its
decode. An arrow binds to the slice around its end, so tasks are slices of threads, as many threads as there are tasks
at a time, and no slice is shorter than a microsecond.

So that viewers can open it, it holds the first TIMELINE_REQUESTS requests to arrive with their tasks and transfers,
the first TIMELINE_STEPS steps, and of load reports every n-th, to make TIMELINE_COUNTERS; `otherData` says how many
of how many.
"""

import heapq
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from cluster.recorder import Recorder
from cluster.vocabulary import Outcome, Stage, TaskKind
from experiments.task_log import TaskLog
from flowserve.core.record import StepSpan, TransferSpan

SCHEMA = "deepflow-timeline/2"
TIMELINE_REQUESTS = 10_000
TIMELINE_COUNTERS = 50_000
TIMELINE_STEPS = 200_000

_STAGES = frozenset(str(stage) for stage in Stage)
_DETAILS = ("prompt_tokens", "output_tokens", "cached_tokens", "preemptions")
_LIFE, _STEPS, _SLOTS = 1, 2, 10
"""Threads of an executor's process; slots for tasks are numbered from the last on."""
SHORTEST_NS = 1000

Event = dict[str, Any]
_Stop = tuple[float, int, int]
"""Where an arrow touches: us, process, thread."""


class Spans(NamedTuple):
    """What happened when, beside the records. `steps`: of the engines, in order of each, where they were recorded."""

    tasks: TaskLog
    steps: Iterable[StepSpan] = ()
    transfers: Iterable[TransferSpan] = ()


class _Slots:
    """Threads for slices that may overlap: each slice gets the first that is free, in order of their begin."""

    def __init__(self) -> None:
        self._free: list[int] = []
        self._taken: list[tuple[int, int]] = []
        self.count = 0

    def take(self, start_ns: int, end_ns: int) -> int:
        """The thread for a slice between these times."""
        while self._taken and self._taken[0][0] <= start_ns:
            heapq.heappush(self._free, heapq.heappop(self._taken)[1])
        if self._free:
            slot = heapq.heappop(self._free)
        else:
            slot, self.count = self.count, self.count + 1
        heapq.heappush(self._taken, (max(end_ns, start_ns + SHORTEST_NS), slot))
        return _SLOTS + slot


def write_timeline(path: Path, recorder: Recorder, spans: Spans) -> None:
    """Write the timeline of a finished run."""
    encode = msgspec.json.Encoder().encode
    shown = len(spans.tasks.requests)
    other = {
        "schema": SCHEMA,
        "requests": f"{shown} of {max(shown, recorder.ended)}, the first to arrive",
        "steps": f"the first {TIMELINE_STEPS}, where backend.record is true",
        "load reports": f"every {_thinning(recorder)}. of each executor",
    }
    with path.open("wb") as out:
        out.write(b'{"displayTimeUnit":"ms","otherData":' + encode(other) + b',"traceEvents":[\n')
        separator = b""
        for event in _Timeline(recorder, spans).events():
            out.write(separator + encode(event))
            separator = b",\n"
        out.write(b"\n]}\n")


def _thinning(recorder: Recorder) -> int:
    return max(1, math.ceil(len(recorder.loads) / TIMELINE_COUNTERS))


class _Timeline:
    """The events of one run; times in microseconds from its start."""

    def __init__(self, recorder: Recorder, spans: Spans) -> None:
        self._recorder = recorder
        self._tasks = sorted(spans.tasks.tasks, key=lambda task: task.start_ns)
        self._requests = spans.tasks.requests
        self._steps = spans.steps
        wanted = {task.task_id for task in self._tasks}
        self._transfers = sorted(
            (each for each in spans.transfers if each.task_id is None or each.task_id in wanted),
            key=lambda each: each.start_ns,
        )
        names = dict.fromkeys(executor for _, executor, _, _ in recorder.scaling)
        names |= dict.fromkeys(recorder.loads.executors)
        names |= dict.fromkeys(task.executor for task in self._tasks)
        self._client = 1
        self._pids = {name: number for number, name in enumerate(names, start=2)}
        self._links = len(self._pids) + 2

    def events(self) -> Iterator[Event]:
        yield from self._process(self._client, "requests", {})
        for name, pid in self._pids.items():
            yield from self._process(pid, name, {_LIFE: "life", _STEPS: "steps"})
        yield from self._process(self._links, "links", {})
        yield from self._life()
        yield from self._step_slices()
        yield from self._counters()
        yield from self._request_slices()

    def _process(self, pid: int, name: str, threads: Mapping[int, str]) -> Iterator[Event]:
        yield {"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": name}}
        yield {"ph": "M", "name": "process_sort_index", "pid": pid, "tid": 0, "args": {"sort_index": pid}}
        for tid, thread in threads.items():
            yield from self._thread(pid, tid, thread)

    def _thread(self, pid: int, tid: int, name: str) -> Iterator[Event]:
        yield {"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": name}}
        yield {"ph": "M", "name": "thread_sort_index", "pid": pid, "tid": tid, "args": {"sort_index": tid}}

    # -- executors ------------------------------------------------------------------------------------------------

    def _life(self) -> Iterator[Event]:
        """Spans from launch to ready, with the stages in them, and from ready to the end of the executor or the run."""
        since: dict[str, tuple[str, int]] = {}
        spans: list[tuple[int, int, str, str]] = []
        for time, executor, what, took in sorted(self._recorder.scaling, key=lambda step: step[0]):
            if what in _STAGES:
                spans.append((time - took, time, what, executor))
                continue
            if what in ("ready", "retired", "failed") and executor in since:
                name, start = since.pop(executor)
                spans.append((start, time, name, executor))
            if what in ("launch", "ready"):
                since[executor] = ("launching" if what == "launch" else "serving", time)
            else:
                where = {"pid": self._pids[executor], "tid": _LIFE, "cat": "life"}
                yield {"ph": "i", "s": "p", "name": what, "ts": time / 1e3, **where}
        end_ns = self._recorder.end_ns
        spans += [(start, max(start, end_ns), name, executor) for executor, (name, start) in since.items()]
        for start, end, name, executor in sorted(spans, key=lambda span: (span[0], -span[1])):  # the outer one first
            yield _slice(name, "life", self._pids[executor], _LIFE, start, end)

    def _step_slices(self) -> Iterator[Event]:
        """What each engine computed: a span per step, or for as many steps as only went on decoding one batch."""
        for number, step in enumerate(self._steps):
            if number == TIMELINE_STEPS:
                return
            shape = step.shape
            parts = [f"{shape.prefill_tokens} prompt tokens"] if shape.prefill_tokens else []
            parts += [f"{shape.decode_sequences} decodes"] if shape.decode_sequences else []
            args = {"steps": step.steps, **shape._asdict()}
            pid = self._pids[step.executor]
            yield _slice(" + ".join(parts), "step", pid, _STEPS, step.start_ns, step.end_ns, args)

    def _counters(self) -> Iterator[Event]:
        every = _thinning(self._recorder)
        seen: dict[str, int] = {}
        for load in self._recorder.loads:
            number = seen[load.executor] = seen.get(load.executor, -1) + 1
            if number % every:
                continue
            where = {"ph": "C", "ts": load.occurred / 1e3, "pid": self._pids[load.executor]}
            yield {**where, "name": "running", "args": {"requests": load.running}}
            yield {**where, "name": "waiting", "args": {"requests": load.waiting}}
            used = (load.total_blocks - load.free_blocks) / max(1, load.total_blocks)
            yield {**where, "name": "KV cache used", "args": {"percent": round(100 * used, 2)}}

    # -- requests -------------------------------------------------------------------------------------------------

    def _request_slices(self) -> Iterator[Event]:
        """Arrivals, tasks and transfers, then the arrows between them."""
        stops: dict[int, list[_Stop]] = {request_id: [] for request_id in self._requests}
        for part in (self._arrivals(stops), self._task_slices(stops), self._transfer_slices(stops)):
            yield from part
        for number, places in enumerate(stops.values(), start=1):
            places.sort()
            for place, (ts, pid, tid) in enumerate(places if len(places) > 1 else []):
                flow = {"name": "request", "cat": "flow", "id": number, "pid": pid, "tid": tid, "ts": ts}
                if place == 0:
                    yield {"ph": "s", **flow}
                else:  # "bp": it ends at the slice around this moment, not at the next one to begin
                    yield {"ph": "f" if place == len(places) - 1 else "t", "bp": "e", **flow}

    def _arrivals(self, stops: dict[int, list[_Stop]]) -> Iterator[Event]:
        """Requests from their arrival to the placing of their first task, or to their end where none was placed."""
        recorder, placed = self._recorder, dict[int, int]()
        for task in self._tasks:
            placed.setdefault(task.request_id, task.start_ns)
        columns = recorder.requests
        ids = columns["request_id"].tolist()
        rows = {request_id: row for row, request_id in enumerate(ids) if request_id in stops}
        outcomes, reasons = recorder.outcomes, recorder.reasons
        slots = _Slots()
        for row in sorted(rows.values(), key=lambda row: columns["arrival_ns"][row]):
            request_id, start = ids[row], int(columns["arrival_ns"][row])
            args: Event = {"request": request_id, "outcome": outcomes[row]}
            args |= {name: int(columns[name][row]) for name in _DETAILS}
            if outcomes[row] != Outcome.FINISHED:
                args["reason"] = reasons[row]
            unplaced = recorder.end_ns if outcomes[row] == "unfinished" else start
            end = max(placed.get(request_id, unplaced), start)
            tid = slots.take(start, end)
            stops[request_id].append((start / 1e3, self._client, tid))
            yield _slice(f"r{request_id} arrives", "request", self._client, tid, start, end, args)
        yield from self._slot_names(self._client, slots, "waiting for an executor")

    def _task_slices(self, stops: dict[int, list[_Stop]]) -> Iterator[Event]:
        """Tasks from being placed to their end, and in them prefill (queueing included), fetching and decode."""
        fetched = {each.task_id: each.end_ns for each in self._transfers}
        slots = {pid: _Slots() for pid in self._pids.values()}
        for task in self._tasks:
            pid, start = self._pids[task.executor], task.start_ns
            end = max(start, self._recorder.end_ns if task.end_ns is None else task.end_ns)
            tid = slots[pid].take(start, end)
            args: Event = {"request": task.request_id, "task": task.task_id}
            if task.failed:
                args["failed"] = task.failed
            yield _slice(f"r{task.request_id} {task.kind}", "task", pid, tid, start, end, args)
            decodes = task.kind is TaskKind.DECODE
            turn = fetched.get(task.task_id) if decodes else task.first_ns
            touched = start if turn is None or not decodes else max(start, min(turn, end - 1))
            stops[task.request_id].append((touched / 1e3, pid, tid))
            if turn is not None and turn <= end:
                for name, since, until in (
                    ("fetch KV cache" if decodes else "prefill", start, turn),
                    ("decode", turn, end),
                ):
                    if until > since:
                        yield _slice(name, "phase", pid, tid, since, until)
        for pid, used in slots.items():
            yield from self._slot_names(pid, used, "tasks")

    def _transfer_slices(self, stops: dict[int, list[_Stop]]) -> Iterator[Event]:
        """KV cache on its way, from being asked for to being there; a track for each sender and as many as overlap."""
        request_of = {task.task_id: task.request_id for task in self._tasks}
        slots: dict[str, _Slots] = {}
        tracks: dict[tuple[str, int], int] = {}
        for each in self._transfers:
            track = each.source, slots.setdefault(each.source, _Slots()).take(each.start_ns, each.end_ns)
            if track not in tracks:
                tracks[track] = len(tracks) + 1
                yield from self._thread(self._links, tracks[track], f"from {each.source}")
            what = f"r{request_of[each.task_id]}" if each.task_id in request_of else "blocks"
            name = f"{what} {each.source} → {each.target}"
            args = {"blocks": each.blocks, "bytes": each.num_bytes, "pieces": each.pieces}
            yield _slice(name, "transfer", self._links, tracks[track], each.start_ns, each.end_ns, args)
            if each.task_id in request_of:
                stops[request_of[each.task_id]].append((each.start_ns / 1e3, self._links, tracks[track]))

    def _slot_names(self, pid: int, slots: _Slots, name: str) -> Iterator[Event]:
        for number in range(slots.count):
            yield from self._thread(pid, _SLOTS + number, name)


def _slice(
    name: str, category: str, pid: int, tid: int, start_ns: int, end_ns: int, args: Event | None = None
) -> Event:
    event: Event = {"ph": "X", "name": name, "cat": category, "pid": pid, "tid": tid, "ts": start_ns / 1e3}
    event["dur"] = max(end_ns - start_ns, SHORTEST_NS) / 1e3
    return event if args is None else {**event, "args": args}
