"""The state of a running experiment, TE group by TE group: a live table on a terminal, plain lines elsewhere."""

from array import array
from typing import TYPE_CHECKING, TextIO

import numpy as np

from cluster.client import Client
from cluster.control import ControlPlane
from cluster.recorder import NONE
from cluster.vocabulary import NS_PER_S, WORKERS, ExecutorSpec
from experiments.progress import Moment, ProgressBar
from experiments.tables import UNKNOWN, duration, three_digits

if TYPE_CHECKING:
    from rich.live import Live

COLUMNS = ("group", "ready", "start", "drain", "wait", "run", "KV", "TTFT p50", "req/s")


def _name(spec: ExecutorSpec) -> str:
    model = "" if spec.role in WORKERS else f" {spec.model}"
    return f"{spec.role}{model} {spec.hardware}".rstrip()


class Watch(ProgressBar):
    """The progress bar with a table under it. It looks at the control plane only when it draws: twice a second on a
    terminal, every ten seconds elsewhere.

    Executors, queues and KV cache are as the cluster manager knows them, from load reports. TTFT p50 and requests per
    second (simulated, or of the clock in a real run) are of all requests so far, at the group that served them first.
    """

    draw_every_s = 0.5

    def __init__(
        self,
        control: "ControlPlane[Client]",
        total: int | None,
        label: str,
        *,
        stream: TextIO | None = None,
    ) -> None:
        super().__init__(total, label, stream=stream)
        self._control = control
        self._drawn = True  # however short the run, its end is shown
        self._seen = 0
        self._served: dict[str, array[int]] = {}
        self._live: Live | None = None

    def _show(self, current: Moment, since: Moment) -> None:
        head = f"{self.label}: {self._count()}, {self._text(current, since)}"
        elapsed = current.now - self._first.now if current.sim_time_s is None else current.sim_time_s
        rows = self._rows(elapsed)
        if self._terminal:
            self._draw_table(head, rows)
            return
        self._print(head)
        for row in rows:
            self._print("  " + ", ".join(f"{name} {value}" for name, value in zip(COLUMNS, row, strict=True)))

    def _stop(self) -> None:
        if self._live is not None:
            self._live.stop()

    def _rows(self, elapsed_s: float) -> list[list[str]]:
        """A line per TE group."""
        self._read_on()
        rows, loads = [], self._control.manager.loads()
        for spec, load in loads.items():
            name = _name(spec)
            used = f"{load.kv_used / load.kv_total:.0%}" if load.kv_total else UNKNOWN
            # Tasks wait for a worker's slot at their job executor.
            waiting = load.waiting + (load.parked if spec.role in WORKERS else 0)
            numbers = (load.ready, load.pending, load.draining, waiting, load.running)
            served = self._served.get(name)
            ttft = rate = UNKNOWN
            if served:
                ttft = duration(float(np.median(np.array(served))) / NS_PER_S)
                rate = three_digits(len(served) / elapsed_s)
            rows.append([name, *map(str, numbers), used, ttft, rate])
        parked = sum({spec.model: load.parked for spec, load in loads.items() if spec.role not in WORKERS}.values())
        if parked:
            rows.append(["no executor yet", *["0"] * 3, str(parked), "0", *[UNKNOWN] * 3])
        return rows

    def _read_on(self) -> None:
        """The requests that have ended since the last look."""
        recorder = self._control.recorder
        columns = recorder.requests
        arrivals, firsts = columns["arrival_ns"], columns["first_token_ns"]
        executors = recorder.executors
        groups = {each.executor: _name(each.spec) for each in recorder.held()}
        for row in range(self._seen, recorder.ended):
            if firsts[row] != NONE:
                group = groups.get(executors[row], "")
                self._served.setdefault(group, array("q")).append(int(firsts[row] - arrivals[row]))
        self._seen = recorder.ended

    def _draw_table(self, head: str, rows: list[list[str]]) -> None:
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.live import Live
        from rich.table import Table

        table = Table(title=head, title_justify="left", title_style="", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for column in COLUMNS:
            table.add_column(column, justify="left" if column == "group" else "right", no_wrap=column != "group")
        for row in rows:
            table.add_row(*row)
        if self._live is None:
            self._live = Live(console=Console(file=self._stream), auto_refresh=False)
            self._live.start()
        self._live.update(table, refresh=True)
