"""Lockstep: the recorded step durations and delivery order of a real engine, fed into a simulated one.

Everything else (schedule, prefix hits, preemptions, transfers) the simulated engine must then do by itself in the same
way, plan by plan; the first turn where it does not is reported.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from cluster.latency import LatencyModel, StepShape
from cluster.request import Answer
from cluster.vocabulary import ExecutorSpec
from flowserve.core.config import EngineConfig
from flowserve.core.messages import Message
from flowserve.core.plan import Verify
from flowserve.core.record import PlanRecord, TurnRecord
from flowserve.core.task_executor import TaskExecutor
from sim.clock import Clock
from sim.executor import SimExecutor


class Difference(NamedTuple):
    """The first turn (index in the record) that came out differently."""

    turn: int
    what: str
    recorded: object
    simulated: object


class Lockstep(LatencyModel):
    """One simulated executor driven by the record of a real one. `compared`: turns that came out the same so far."""

    def __init__(
        self,
        name: str,
        spec: ExecutorSpec,
        config: EngineConfig,
        turns: Sequence[TurnRecord],
        answers: dict[int, Answer],
        report_period_ns: int,
    ) -> None:
        self._clock = Clock()
        self._turns = [
            (number, turn, turns[number + 1].start_ns if number + 1 < len(turns) else turn.end_ns)
            for number, turn in enumerate(turns)
            if turn.done is not None or turn.messages
        ]
        self.compared = 0
        self.difference: Difference | None = None
        self._injected = False
        self._scheduled = 0
        shell = TaskExecutor(name, spec, config, (), report_period_ns)
        self.executor = SimExecutor(
            self._clock, shell, self, answers, self._compare, coalesce=False, accept=self._recorded_acceptance
        )
        busy = False
        for _, turn, _ in self._turns:
            if turn.messages:
                # In the middle of a step a message is taken at its end; an idle engine takes it at once.
                at = turn.start_ns - 1 if busy else turn.start_ns
                self._clock.alarm(at, partial(self._inject, turn.messages))
            busy = turn.done is not None

    def run(self) -> Difference | None:
        """Simulate the whole record; None if every turn came out the same."""
        while self.difference is None and self.compared < len(self._turns):
            if self._clock.next_ns is None:
                number, turn, _ = self._turns[self.compared]
                return Difference(number, "the simulation has nothing to do", turn.plans, None)
            self._clock.step()
        return self.difference

    def step_ns(self, shape: StepShape) -> int:
        """As long as the recorded step took, until the engine looked at its messages again."""
        if self.compared >= len(self._turns):
            return 1
        _, _, next_start = self._turns[self.compared]
        return max(1, next_start - self._clock.now)

    def _recorded_acceptance(self, verify: Verify) -> int:
        """What the step that ends now yielded in the record."""
        _, turn, _ = self._turns[self.compared - 1]
        return turn.accepted[verify.sequence.task_id]

    def _inject(self, messages: list[Message]) -> None:
        self._injected = True
        self.executor.receive(*messages)

    def _compare(self, shell: TaskExecutor) -> None:
        outbox = shell.outbox()
        in_flight = self.executor.shell.core.in_flight
        if not in_flight and not self._injected:
            return  # a load report was due
        plans = [PlanRecord.of(plan) for plan in in_flight if plan.number > self._scheduled]
        self._scheduled += len(plans)
        self._injected = False
        if self.compared >= len(self._turns) or self.difference is not None:
            return
        number, turn, _ = self._turns[self.compared]
        transfers = [(each.task_id, each.source_blocks, each.blocks) for each in outbox.transfers]
        for what, recorded, simulated in (
            ("plans", turn.plans, plans),
            ("preemptions", turn.preemptions, self.executor.shell.core.preemptions),
            ("transfers", turn.transfers, transfers),
            ("moves", turn.moves, outbox.moves),
        ):
            if recorded != simulated:
                self.difference = Difference(number, what, recorded, simulated)
                return
        self.compared += 1
