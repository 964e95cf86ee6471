"""One simulated executor: the real TE-shell and engine core, with a latency model where the device would be.

Decode steps that nothing can change are one SimPy event: a segment. A message that arrives in mid-segment cuts it at
the end of the step in progress, which is when a real engine would look at its messages; so the result is the one that
single steps give (`coalesce=False`), to the nanosecond.
"""

import heapq
from bisect import bisect_right
from collections.abc import Callable

import simpy
from simpy.events import EventPriority

from cluster import identity
from cluster.latency import LatencyModel, StepShape
from cluster.request import Answer
from flowserve.core.messages import Dispatch, Message
from flowserve.core.outbox import Outbox
from flowserve.core.plan import Plan, Verify
from flowserve.core.record import StepSpan
from flowserve.core.sequence import Sequence, Status
from flowserve.core.task_executor import TaskExecutor

LONGEST_SEGMENT = 4096
_BEFORE_ALL = -(1 << 40)


def _nothing_right(verify: Verify) -> int:
    return 1


class _StepEnd(simpy.Event):
    """Fires ahead of everything else at its time: a step that ends as a message arrives has ended.

    Steps that end at the same time do so in the order of the executors' numbers, not of when they were scheduled,
    which a segment does earlier than single steps.
    """

    def __init__(
        self, env: simpy.Environment, delay: int, number: int, callback: Callable[[simpy.Event], None]
    ) -> None:
        super().__init__(env)
        self._ok = True
        self._value = None
        self.callbacks.append(callback)
        env.schedule(self, priority=EventPriority(_BEFORE_ALL + number), delay=delay)


class SimExecutor:
    """Runs one shell in simulated time. `answers` is the sampler's side: how long each request's output really is.
    `slowdown`: by what a step's time is multiplied when it starts; with it, every step is an event of its own.
    `record`: told of every segment when it is over.
    `host_ns`: what the host needs for a step beside the device's time. The device waits for it where a plan is launched
    only when the last one is done; with plans in flight it runs meanwhile, and shows only where it takes longer.

    `accept`: how many tokens a verification yields, before a stop cuts it. `number`: the executor's own, by which ties
    in time are broken.
    """

    def __init__(
        self,
        env: simpy.Environment,
        shell: TaskExecutor,
        latency: LatencyModel,
        answers: dict[int, Answer],
        deliver: Callable[[Outbox], None],
        coalesce: bool = True,
        number: int = 0,
        slowdown: Callable[[], float] | None = None,
        record: Callable[[StepSpan], None] | None = None,
        host_ns: int = 0,
        accept: Callable[[Verify], int] = _nothing_right,
    ) -> None:
        self.shell = shell
        self.dead = False
        self.steps = 0
        self._env = env
        self._latency = latency
        self._answers = answers
        self._deliver = deliver
        self._coalesce = coalesce
        self._slowdown = slowdown
        self._record = record
        self._since = 0
        self._host = host_ns
        self._accept = accept
        self._number = number
        self._inbox: list[Message] = []
        self._timer: simpy.Event | None = None
        self._ends: list[int] = []
        self._batch: tuple[Sequence, ...] | None = None
        self._stops: list[tuple[int, int]] = []

    # -- what arrives ---------------------------------------------------------------------------------------------

    def receive(self, *messages: Message) -> None:
        """Messages reach the executor: looked at now if it is idle, else when the step in progress ends."""
        self._inbox.extend(messages)
        if not self.shell.core.in_flight:
            self._next_step()
        elif len(self._ends) > 1:
            self._settle()
            if len(self._ends) > 1:
                del self._ends[1:]
                self._wait_for(self._ends[0])

    def kill(self) -> None:
        """Stop in the middle of whatever it does. What finished by now stays readable in the shell."""
        self._settle()
        self.dead = True
        self._timer = None

    def _settle(self) -> None:
        """Bring the core up to now: the steps of the segment that have ended are complete."""
        ended = bisect_right(self._ends, self._env.now)
        if ended and ended < len(self._ends):
            self._write_down(ended)
            self.shell.advance(self._ends[:ended])
            self.steps += ended
            del self._ends[:ended]

    # -- the engine loop ------------------------------------------------------------------------------------------

    def _next_step(self) -> None:
        """What a real engine loop does between two steps: messages in, schedule, outbox out, launch."""
        now, shell = int(self._env.now), self.shell
        messages, self._inbox = self._inbox, []
        for message in messages:
            ids: identity.BlockIds = ()
            if isinstance(message, Dispatch):
                request = message.task.request
                known = self._answers[request.request_id].block_ids or request.block_ids
                ids = identity.of_context(request.request_id, request.max_tokens, known)
            shell.receive(message, now, ids)
        ahead = bool(shell.core.in_flight)
        while shell.next_plan() is not None:
            pass
        if shell.core.in_flight:
            self._launch(shell.core.in_flight[0], ahead)
        elif shell.report_due is not None:
            self._wait_for(max(now, shell.report_due))
        self._deliver(shell.outbox())

    def _launch(self, plan: Plan, ahead: bool) -> None:
        """The oldest plan in flight is next on the device; `ahead`: it was launched while another one computed."""
        now, shape, latency = int(self._env.now), plan.shape, self._latency
        took = latency.step_ns(shape)
        if self._slowdown is not None:
            took = round(took * self._slowdown())
        end = now + self._with_host(took, ahead)
        self._ends, self._since = [end], now
        if plan.decodes is not self._batch:
            self._find_stops(plan)
        if self._coalesce and self._slowdown is None and not plan.chunks:
            most = min(self._stops[0][0] - plan.clock if self._stops else LONGEST_SEGMENT, LONGEST_SEGMENT)
            batch, due = shape.decode_sequences, self.shell.next_report
            context, ahead = shape.decode_context, len(self.shell.core.in_flight) > 1
            for _ in range(self.shell.core.steady_steps(most) if end < due else 0):
                context += batch
                end += self._with_host(latency.step_ns(StepShape(0, 0, 0, batch, context)), ahead)
                self._ends.append(end)
                if end >= due:
                    break
        self._wait_for(self._ends[-1])

    def _with_host(self, took: int, ahead: bool) -> int:
        return max(took, self._host) if ahead else took + self._host

    def _wait_for(self, time: int) -> None:
        self._timer = _StepEnd(self._env, time - int(self._env.now), self._number, self._on_timer)

    def _on_timer(self, timer: simpy.Event) -> None:
        if timer is not self._timer:
            return  # the segment was cut, or the executor is dead
        now, shell = int(self._env.now), self.shell
        if shell.core.in_flight:
            self._write_down(len(self._ends))
            if len(self._ends) > 1:
                shell.advance(self._ends[:-1])
                self.steps += len(self._ends) - 1
            plan = shell.core.in_flight[0]
            self._ends = []
            self.steps += 1
            accepted = self._accepted(plan) if plan.verifies else {}
            shell.complete(plan, self._stopped(plan, accepted), now, accepted)
        else:
            shell.report(now)
        self._next_step()

    def _write_down(self, steps: int) -> None:
        """The first `steps` of the segment are over."""
        if self._record is not None:
            shape = self.shell.core.in_flight[0].shape
            self._record(StepSpan(self.shell.shell.name, self._since, self._ends[steps - 1], steps, shape))
            self._since = self._ends[steps - 1]

    # -- the sampler's side ---------------------------------------------------------------------------------------

    def _find_stops(self, plan: Plan) -> None:
        """At which value of the decode clock each sequence of a new batch samples its last token."""
        self._batch = plan.decodes
        self._stops = [
            (
                sequence.joined + self._answers[sequence.task.request.request_id].output_tokens - sequence.sampled,
                sequence.task_id,
            )
            for sequence in plan.decodes
            if sequence.status in (Status.DECODE, Status.LAST)
        ]
        heapq.heapify(self._stops)

    def _accepted(self, plan: Plan) -> dict[int, int]:
        """Tokens that verifications yield, none behind a request's last."""
        accepted = {}
        for verify in plan.verifies:
            sequence = verify.sequence
            if sequence.status is not Status.ENDED:  # of an aborted request the answer may be gone
                left = self._answers[sequence.task.request.request_id].output_tokens - sequence.sampled
                accepted[sequence.task_id] = max(1, min(self._accept(verify), left))
        return accepted

    def _stopped(self, plan: Plan, accepted: dict[int, int]) -> list[int]:
        stopped = []
        while self._stops and self._stops[0][0] <= plan.clock and plan.decodes:
            stopped.append(heapq.heappop(self._stops)[1])
        for chunk in plan.chunks:
            sequence = chunk.sequence
            if not chunk.samples or sequence.status is Status.ENDED:  # of an aborted request the answer may be gone
                continue
            if sequence.sampled + 1 >= self._answers[sequence.task.request.request_id].output_tokens:
                stopped.append(sequence.task_id)
        for verify in plan.verifies:
            sequence, tokens = verify.sequence, accepted.get(verify.sequence.task_id)
            if tokens is None:
                continue
            if sequence.sampled + tokens >= self._answers[sequence.task.request.request_id].output_tokens:
                stopped.append(sequence.task_id)
        return stopped
