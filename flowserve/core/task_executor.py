"""A task executor: a TE-shell in front of the master of an engine, behind one small interface.

Sans I/O: the simulator and the process of a real executor run the same object. Whoever drives it calls `receive`,
`next_plan`, `complete` (or `advance`), passes the time, and delivers what it finds in the outbox.
"""

from collections.abc import Collection, Mapping

from cluster.identity import BlockIds
from cluster.vocabulary import ExecutorSpec
from flowserve.core.config import EngineConfig
from flowserve.core.fetch_cost import FetchCost
from flowserve.core.master import Master
from flowserve.core.messages import Message
from flowserve.core.outbox import Outbox
from flowserve.core.plan import Plan
from flowserve.core.scheduler import NONE
from flowserve.core.shell import TeShell
from flowserve.core.tiers import Move


class TaskExecutor:
    """One executor whose engine is up. Load reports go to `report_to`, at most every `report_period_ns`."""

    def __init__(
        self,
        name: str,
        spec: ExecutorSpec,
        config: EngineConfig,
        report_to: tuple[str, ...],
        report_period_ns: int,
        fetch_cost: FetchCost | None = None,
    ) -> None:
        self._outbox = Outbox()
        self.shell = TeShell(name, spec, self._outbox, report_to, report_period_ns)
        self.master = Master(name, config, self._outbox, fetch_cost)
        self.core = self.master.core
        self.shell.attach(self.master)

    def receive(self, message: Message, now: int, ids: BlockIds = ()) -> None:
        """Take one message. `ids`: block identities of the context, with a `Dispatch`."""
        self.shell.receive(message, now, ids)

    def next_plan(self) -> Plan | None:
        """Decide the next step; also starts the transfers that the engine has made room for."""
        said = len(self._outbox.events)
        plan = self.master.next_plan()
        if len(self._outbox.events) > said:  # a task was given up, and there may be no step after it to say so
            self.shell.observe(self._outbox.events[-1].time)
        return plan

    def complete(self, plan: Plan, stopped: Collection[int], now: int, accepted: Mapping[int, int] = NONE) -> None:
        """A plan's tokens are there. `stopped`: task ids whose last token ends the request. `accepted`: tokens by task
        id, of those that speculate.
        """
        self.master.complete(plan, stopped, now, accepted)
        self.shell.observe(now)

    def fail(self, task_id: int, detail: str, now: int) -> None:
        """The engine cannot go on with this task; the others are unharmed, and nothing of it is cached from here on.

        Where a plan has failed for it: before that plan is completed.
        """
        self.master.fail(task_id, detail, now)
        self.shell.observe(now)

    def advance(self, ends: list[int]) -> None:
        """Steps after which the same went on, see `EngineCore.advance`, ended at these times."""
        self.master.advance(ends)
        self.shell.changed()

    def moves(self) -> list[Move]:
        """Copies between tiers that the last plans asked for, ahead of the rest of the outbox."""
        moves, self._outbox.moves = self._outbox.moves, []
        return moves

    def outbox(self) -> Outbox:
        """Everything since the last call; the caller delivers it."""
        return self._outbox.take()

    @property
    def has_said(self) -> bool:
        """Whether the outbox holds anything."""
        return bool(self._outbox)

    @property
    def next_report(self) -> int:
        """The earliest time of the next load report."""
        return self.shell.next_report

    @property
    def report_due(self) -> int | None:
        """When the next load report is due, if anything changed since the last."""
        return self.shell.report_due

    def report(self, now: int) -> None:
        """Send a load report, if one is due."""
        self.shell.report(now)
