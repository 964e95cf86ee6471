"""The control plane of one run: the actors, who hears what, and the log that lets a run be replayed bit for bit."""

from collections.abc import Sequence
from typing import IO, Generic, Protocol, TypeVar

import msgspec

from cluster.actions import Action
from cluster.client import ClientActor
from cluster.decision_log import Decision, LogHeader
from cluster.events import Event, FirstToken
from cluster.job_executor import JobExecutor
from cluster.jobs.executor import WorkJobExecutor
from cluster.manager import ClusterManager
from cluster.recorder import Recorder
from cluster.seam import Cluster

_encode = msgspec.json.Encoder().encode

C = TypeVar("C", bound=ClientActor)


class Actor(Protocol):
    """Anything that events are addressed to."""

    @property
    def name(self) -> str: ...

    def on_event(self, event: Event) -> list[Action]:
        """What to do about an event. No I/O, no clock."""
        ...


class ControlPlane(Generic[C]):
    """Client, job executors and cluster manager; the same objects whichever cluster they drive.

    `work`: the job executor for work other than serving, where a run has such. `log`: the decision log, open.
    """

    def __init__(
        self,
        client: C,
        job_executors: Sequence[JobExecutor],
        manager: ClusterManager,
        recorder: Recorder,
        work: WorkJobExecutor | None = None,
    ) -> None:
        self.client = client
        self.job_executors = tuple(job_executors)
        self.manager = manager
        self.recorder = recorder
        self.work = work
        actors: list[Actor] = [client, *job_executors, manager, *([] if work is None else [work])]
        self._actors = {actor.name: actor for actor in actors}
        self.log: IO[bytes] | None = None
        self._sequence = 0

    def log_to(self, log: IO[bytes]) -> None:
        """Write every decision from here on as a line of JSON, behind a header line with the schema where it is the
        first.
        """
        self.log = log
        if not self._sequence:
            log.write(_encode(LogHeader()) + b"\n")

    def on_event(self, event: Event) -> list[Action]:
        """Let the addressed actor decide. A first token is heard by the client too: it sees its answer begin."""
        actions = self._actors[event.to].on_event(event)
        if type(event) is FirstToken:
            actions = [*actions, *self.client.on_event(event)]
        self.recorder.record(event, actions, self.client)
        if self.log is not None:
            self.log.write(_encode(Decision(self._sequence, event, actions)) + b"\n")
            self._sequence += 1
        return actions

    def drive(self, cluster: Cluster) -> None:
        """Run until the cluster has no more events."""
        while (event := cluster.next_event()) is not None:
            for action in self.on_event(event):
                cluster.submit(action)
