"""What happened, noted while it happens: a row per request, the gaps between its tokens, loads, steps of scaling."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from struct import pack, unpack_from
from typing import Any, ClassVar, Final, NamedTuple

import numpy as np

from cluster import events as ev
from cluster.actions import Action, LaunchExecutor
from cluster.client import ClientActor
from cluster.spool import Ints, OpenFile, Spool
from cluster.vocabulary import NS_PER_S, ExecutorSpec, Outcome, Role

NONE = -1
"""Stands for "never" in the integer columns of records, which turn it into NaN when they are read."""


TIMES_AT_ONCE = 1 << 13
"""Of so many tokens the gaps are computed together."""


class _Live:
    """`times` of tokens, packed; `breaks`: places in it before which it is not known how long the pause was."""

    __slots__ = (
        "accepted",
        "arrival",
        "attempts",
        "breaks",
        "cached",
        "drafted",
        "dram",
        "first",
        "gap_end",
        "lag",
        "last",
        "model",
        "preemptions",
        "prompt",
        "rejections",
        "ssd",
        "started",
        "times",
    )

    def __init__(self, arrival: int, lag: int, prompt: int, model: str) -> None:
        self.arrival = arrival
        self.lag = lag
        self.prompt = prompt
        self.model = model
        self.first = NONE
        self.last = NONE
        self.gap_end = NONE
        self.times = b""
        self.breaks: list[int] | None = None
        self.cached = 0
        self.dram = 0
        self.ssd = 0
        self.preemptions = 0
        self.drafted = 0
        self.accepted = 0
        self.rejections = 0
        self.attempts = 0
        self.started = ""


class Held(NamedTuple):
    """An executor's time in ns from launch to retirement or the end of the run, and that in which it computed."""

    executor: str
    spec: ExecutorSpec
    held_ns: int
    busy_ns: int


class Load(NamedTuple):
    """What one load report said, see `LoadReport`; times in ns."""

    time: int
    occurred: int
    executor: str
    waiting: int
    running: int
    waiting_tokens: int
    free_blocks: int
    cached_blocks: int
    total_blocks: int
    generated_tokens: int
    preemptions: int
    busy_ns: int


class Loads:
    """Load reports, in the order they arrived."""

    COLUMNS: ClassVar[tuple[str, ...]] = Load._fields

    def __init__(self, table: Ints, words: list[str]) -> None:
        self._table = table
        self._words = words

    def __len__(self) -> int:
        return len(self._table)

    def column(self, name: str) -> Ints:
        """One of the numbers of all reports."""
        return self._table[:, self.COLUMNS.index(name)]

    @property
    def executors(self) -> list[str]:
        """Who reported."""
        return [self._words[number] for number in self.column("executor").tolist()]

    def __iter__(self) -> Iterator[Load]:
        for time, occurred, executor, *rest in self._table.tolist():
            yield Load(time, occurred, self._words[executor], *rest)


class Recorder:
    """Turns events into records: per request, per load report, per step of scaling. Columns of integers.

    `ended` requests, and `finished` ones of these, so far. `open_file`: makes a file for the records of a run that is
    too long for memory.
    """

    REQUEST_COLUMNS: ClassVar[tuple[str, ...]] = (
        "request_id",
        "arrival_ns",
        "lag_ns",
        "first_token_ns",
        "last_token_ns",
        "prompt_tokens",
        "output_tokens",
        "cached_tokens",
        "dram_tokens",
        "ssd_tokens",
        "preemptions",
        "failed_tasks",
        "draft_tokens",
        "accepted_tokens",
        "draft_rejections",
    )

    WORDS: ClassVar[tuple[str, ...]] = ("outcome", "reason", "executor", "model")
    """Behind them and the number of gaps in a row, as numbers of words."""

    def __init__(self, open_file: OpenFile | None = None) -> None:
        self._rows = Spool(open_file)
        # Not `Struct`s, which a snapshot could not take along.
        self._pack_row = partial(pack, f"{len(self.REQUEST_COLUMNS) + 1 + len(self.WORDS)}q")
        self._pack_load = partial(pack, f"{len(Loads.COLUMNS)}q")
        self._gaps = Spool(open_file)
        self._loads = Spool(open_file)
        self._words: dict[str, int] = {}
        # Times of tokens whose gaps are not computed yet (of many requests at once that is fast), how many these are,
        # and which of their places begin something.
        self._times: list[bytes] = []
        self._num_times = 0
        self._no_gaps: list[int] = []
        self.ended = 0
        self.finished = 0
        self.scaling: list[tuple[int, str, str, int]] = []
        """(time_ns, executor, what, took_ns): launches, stages, state changes."""
        self.weights_from: dict[str, str] = {}
        """Where each executor's weights came from, as far as the backend says."""
        self.end_ns = 0
        self._specs: dict[str, ExecutorSpec] = {}
        self._held: dict[str, tuple[int, int]] = {}
        self._last_reports: dict[str, ev.LoadReport] = {}
        self._last_done: dict[str, int] = {}
        self._live: dict[int, _Live] = {}

    @property
    def requests(self) -> dict[str, Ints]:
        """`REQUEST_COLUMNS` by name, a row per request in the order they ended."""
        rows = self._table()
        return {name: rows[:, place] for place, name in enumerate(self.REQUEST_COLUMNS)}

    @property
    def gap_counts(self) -> Ints:
        """How many of `gaps` are of each request."""
        return self._table()[:, len(self.REQUEST_COLUMNS)]

    def _table(self) -> Ints:
        return self._rows.array().reshape(-1, len(self.REQUEST_COLUMNS) + 1 + len(self.WORDS))

    def words(self, name: str) -> list[str]:
        """One of `WORDS` of all requests, in the order they ended."""
        words = list(self._words)
        return [words[number] for number in self._table()[:, self.WORDS.index(name) - len(self.WORDS)].tolist()]

    @property
    def outcomes(self) -> list[str]:
        return self.words("outcome")

    @property
    def reasons(self) -> list[str]:
        return self.words("reason")

    @property
    def executors(self) -> list[str]:
        """That finished the first task of each request."""
        return self.words("executor")

    @property
    def models(self) -> list[str]:
        return self.words("model")

    @property
    def gaps(self) -> Ints:
        """Gaps between tokens in ns, request after request."""
        self._find_gaps()
        return self._gaps.array()

    def gap_part(self, start: int, end: int) -> Ints:
        """Some of `gaps`, from place `start` up to `end`."""
        self._find_gaps()
        return self._gaps.part(start, end)

    @property
    def loads(self) -> Loads:
        """Load reports, in the order they arrived."""
        return Loads(self._loads.array().reshape(-1, len(Loads.COLUMNS)), list(self._words))

    def _word(self, word: str) -> int:
        number = self._words.get(word)
        if number is None:
            number = self._words[word] = len(self._words)
        return number

    def _find_gaps(self) -> None:
        if self._times:
            times = np.frombuffer(b"".join(self._times), np.int64)
            known = np.ones(len(times), np.bool_)
            known[self._no_gaps] = False
            self._gaps.extend_bytes((times[1:] - times[:-1])[known[1:]].tobytes())
            self._times, self._num_times, self._no_gaps = [], 0, []

    def record(self, event: ev.Event, actions: Sequence[Action], client: ClientActor) -> None:
        """Note what an event says. `client` knows when its requests were due."""
        if event.time > self.end_ns:
            self.end_ns = event.time
        note = _NOTES.get(type(event))
        if note is not None:
            note(self, event)
        elif type(event) is ev.RequestArrived:
            self._arrived(event, event.occurred - client.due[event.request.request_id])
        for action in actions:
            if type(action) is LaunchExecutor:
                self._specs[action.executor] = action.spec
                self._held[action.executor] = (event.time, NONE)
                self.scaling.append((event.time, action.executor, "launch", 0))

    def _arrived(self, event: ev.RequestArrived | ev.CallArrived, lag: int = 0) -> None:
        """A job is never late with its calls."""
        request = event.request
        self._live[request.request_id] = _Live(event.occurred, lag, request.prompt_tokens, request.model)

    def _first_token(self, event: ev.FirstToken) -> None:
        live = self._live.get(event.request_id)
        if live is not None and live.first == NONE:
            live.first = live.last = live.gap_end = event.occurred

    def _task_failed(self, event: ev.TaskFailed) -> None:
        live = self._live.get(event.request_id)
        if live is not None:
            live.attempts += 1
            live.gap_end = NONE  # when the lost executor's last token came is not known here

    def _load_reported(self, event: ev.LoadReport) -> None:
        if event.to != "cm":
            return
        self._last_reports[event.executor] = event
        self._loads.extend_bytes(
            self._pack_load(
                event.time,
                event.occurred,
                self._word(event.executor),
                event.waiting,
                event.running,
                event.waiting_tokens,
                event.free_blocks,
                event.cached_blocks,
                event.total_blocks,
                event.generated_tokens,
                event.preemptions,
                event.busy_ns,
            )
        )

    def _scaled(self, event: ev.StageFinished | ev.ExecutorReady | ev.ExecutorDrained | ev.RoleSwitched) -> None:
        took = 0
        match event:
            case ev.StageFinished():
                what, took = str(event.stage), event.took_ns
                if event.source:
                    self.weights_from[event.executor] = event.source
            case ev.ExecutorReady():
                what = "ready"
            case ev.ExecutorDrained():
                what = "drained"
            case ev.RoleSwitched():
                what = f"serves {event.spec.role}"
        self.scaling.append((event.occurred, event.executor, what, took))

    def _gone(self, event: ev.ExecutorRetired | ev.ExecutorFailed) -> None:
        what = "retired" if isinstance(event, ev.ExecutorRetired) else "failed"
        self.scaling.append((event.occurred, event.executor, what, 0))
        launched, until = self._held[event.executor]
        self._held[event.executor] = (launched, event.occurred if until == NONE else until)

    def _task_finished(self, event: ev.TaskFinished) -> None:
        self._last_done[event.executor] = event.last_token_ns
        live = self._live.get(event.request_id)
        if live is None:
            return
        live.preemptions += event.preemptions
        if event.cached_tokens > live.cached:
            live.cached, live.dram, live.ssd = event.cached_tokens, event.dram_tokens, event.ssd_tokens
        if event.draft_tokens or event.draft_rejections:
            live.drafted += event.draft_tokens
            live.accepted += event.accepted_tokens
            live.rejections += event.draft_rejections
        live.started = live.started or event.executor
        live.last = event.last_token_ns
        before, times = live.gap_end, event.token_times
        place, first = len(live.times) // ev.TIME_BYTES, unpack_from("q", times)[0]
        if place and (before == NONE or first <= before):
            live.breaks = [*(live.breaks or ()), place]
        elif not place and NONE != before < first:
            times = ev.pack_times((before,)) + times
        live.times += times
        live.gap_end = event.last_token_ns

    def _work_finished(self, event: ev.WorkFinished) -> None:
        self._last_done[event.executor] = event.occurred

    def _ended(self, event: ev.RequestEnded | ev.CallEnded) -> None:
        self._append(event.request_id, self._live.pop(event.request_id), event.outcome, event.reason, event.generated)

    def _append(self, request_id: int, live: _Live, outcome: str, reason: str, generated: int) -> None:
        times, start = live.times, self._num_times
        gaps = 0
        if times:
            self._times.append(times)
            tokens = len(times) // ev.TIME_BYTES
            self._num_times += tokens
            self._no_gaps.append(start)
            gaps = tokens - 1
            if live.breaks is not None:
                self._no_gaps.extend([start + place for place in live.breaks])
                gaps -= len(live.breaks)
            if self._num_times > TIMES_AT_ONCE:
                self._find_gaps()
        done = outcome == Outcome.FINISHED
        self.ended += 1
        self.finished += done
        self._rows.extend_bytes(
            self._pack_row(
                request_id,
                live.arrival,
                live.lag,
                live.first,
                live.last if done else NONE,
                live.prompt,
                generated,
                live.cached,
                live.dram,
                live.ssd,
                live.preemptions,
                live.attempts,
                live.drafted,
                live.accepted,
                live.rejections,
                gaps,
                self._word(outcome),
                self._word(reason),
                self._word(live.started),
                self._word(live.model),
            )
        )

    def censor(self) -> None:
        """The run is over: what has not ended by now is recorded as unfinished."""
        for request_id, live in list(self._live.items()):
            self._append(request_id, live, "unfinished", "the run ended first", 0)
        self._live.clear()

    def held(self) -> Iterator[Held]:
        """Every executor, for how long it was paid for and how much of that it computed."""
        reports = self._last_reports
        for name, (launched, until) in self._held.items():
            report, end = reports.get(name), self.end_ns if until == NONE else until
            busy = 0
            if report is not None:  # what finishes after the last report was computed since
                busy = report.busy_ns + max(0, self._last_done.get(name, 0) - report.occurred)
            yield Held(name, self._specs[name], end - launched, busy)

    def npu_seconds(self, model: str | None = None, role: Role | None = None) -> float:
        """NPUs times seconds held, from launch to retirement (or to the end of the run); by executors of one model or
        one role, where it is named.
        """
        held = (each for each in self.held() if model is None or each.spec.model == model)
        return sum(each.spec.npus * each.held_ns for each in held if role is None or each.spec.role is role) / NS_PER_S


_NOTES: Final[dict[type, Callable[[Recorder, Any], None]]] = {
    ev.FirstToken: Recorder._first_token,
    ev.TaskFinished: Recorder._task_finished,
    ev.TaskFailed: Recorder._task_failed,
    ev.RequestEnded: Recorder._ended,
    ev.CallArrived: Recorder._arrived,
    ev.CallEnded: Recorder._ended,
    ev.WorkFinished: Recorder._work_finished,
    ev.LoadReport: Recorder._load_reported,
    ev.StageFinished: Recorder._scaled,
    ev.ExecutorReady: Recorder._scaled,
    ev.ExecutorDrained: Recorder._scaled,
    ev.RoleSwitched: Recorder._scaled,
    ev.ExecutorRetired: Recorder._gone,
    ev.ExecutorFailed: Recorder._gone,
}
"""What is noted of each kind of event; of a request's arrival, more than it says."""
