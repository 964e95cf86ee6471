"""The seam between the control plane and what is behind it: `sim.cluster.SimCluster` or `real.cluster.RealCluster`."""

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self

from cluster.actions import Action
from cluster.events import Event


class Cluster(ABC):
    """A set of executors that one control plane drives. Use it in a `with` block, from one thread.

    The contract, held to by `tests/contract`:

    * `next_event` delivers events in order of their `time`; `occurred <= time`; nothing is delivered twice.
    * Every action is answered by the events its docstring names, refusals and failures included; none is lost.
    * The first event of every actor named at construction is `RunStarted`, at time 0.
    * When an executor dies, each of its tasks comes back as `TaskFailed` before the `ExecutorFailed`.
    * Tokens do not pass here: the control plane hears of first tokens, counts and ends.
    """

    @abstractmethod
    def submit(self, action: Action) -> None:
        """Take an action decided on the last delivered event. Returns at once; raises only on a programming error."""

    @abstractmethod
    def next_event(self) -> Event | None:
        """The next event: advances simulated time, or waits for it in real time. None once the run has ended."""

    @abstractmethod
    def close(self) -> None:
        """Stop everything and leave no process, thread, socket or shared memory behind. May be called twice."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
