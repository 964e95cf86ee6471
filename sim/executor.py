"""One simulated executor: the real TE-shell and engine core, with a latency model where the device would be.

Steps that nothing can change are one SimPy event: a segment. A message that arrives in mid-segment cuts it at
the end of the step in progress, which is when a real engine would look at its messages; so the result is the one that
single steps give (`coalesce=False`), to the nanosecond.
"""

import heapq
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping

from simpy.events import EventPriority

from cluster import identity
from cluster.latency import LatencyModel
from cluster.request import Answer
from flowserve.core.messages import Dispatch, KvRequested, Message
from flowserve.core.plan import Plan, Verify
from flowserve.core.record import StepSpan
from flowserve.core.scheduler import NONE
from flowserve.core.sequence import DECODE, ENDED, LAST, Sequence
from flowserve.core.task_executor import TaskExecutor
from sim.clock import Alarm, Clock
from sim.contention import Shared

LONGEST_SEGMENT = 4096
FEWEST_TIMED = 16
"""So many steps of a segment are timed at first, and twice as many when they are over: most segments are cut early."""
_BEFORE_ALL = -(1 << 40)


def _nothing_right(verify: Verify) -> int:
    return 1


def _nobody_follows() -> None:
    pass


class SimExecutor:
    """Runs one shell in simulated time. `answers` is the sampler's side: how long each request's output really is.
    `shared`: what it shares with others, which slow its steps down; with it, every step is an event of its own.
    `record`: told of every segment when it is over.
    `host_ns`: what the host needs for a step beside the device's time. The device waits for it where a plan is launched
    only when the last one is done; with plans in flight it runs meanwhile, and shows only where it takes longer.

    `deliver`: called at the end of a turn to take what the outbox holds; with `every_turn` also where that is nothing.
    `retimed`: called when the step under way ends at another time than was thought.
    `accept`: how many tokens a verification yields, before a stop cuts it. `number`: the executor's own, by which ties
    in time are broken.
    """

    def __init__(
        self,
        clock: Clock,
        shell: TaskExecutor,
        latency: LatencyModel,
        answers: dict[int, Answer],
        deliver: Callable[[TaskExecutor], None],
        coalesce: bool = True,
        number: int = 0,
        shared: Shared | None = None,
        record: Callable[[StepSpan], None] | None = None,
        host_ns: int = 0,
        accept: Callable[[Verify], int] = _nothing_right,
        every_turn: bool = False,
        retimed: Callable[[], None] = _nobody_follows,
    ) -> None:
        self.shell = shell
        self._core = shell.core
        self.dead = False
        self.steps = 0
        self._clock = clock
        self._latency = latency
        self._answers = answers
        self._deliver = deliver
        self._coalesce = coalesce
        self._shared = shared
        self._varies = latency.varies
        self._reshape, self._rows = latency.reshape_ns, 0
        self._record = record
        self._since = 0
        self._host = host_ns
        self._accept = accept
        self._every_turn = every_turn
        self._retimed = retimed
        self._priority = EventPriority(_BEFORE_ALL + number)
        self._inbox: list[Message] = []
        self._timer: Alarm | None = None
        # When the steps of the segment end that are timed so far, and how many more it may have.
        self._ends: list[int] = []
        self._untimed = 0
        self._batch: tuple[Sequence, ...] | None = None
        # (decode clock, task id, when it joined, sequence): when each sequence in the batch samples its last token.
        # Those that left otherwise stay until they come to the top.
        self._stops: list[tuple[int, int, int, Sequence]] = []
        self._launched_clock = 0

    # -- what arrives ---------------------------------------------------------------------------------------------

    def receive(self, *messages: Message) -> None:
        """Messages reach the executor: looked at now if it is idle, else when the step in progress ends."""
        if self._core.in_flight and self._core.config.kv_transfer == "by_layer":
            self._inbox.extend(self._answer(messages))
        else:
            self._inbox.extend(messages)
        if not self._core.in_flight:
            self._next_step()
        elif len(self._ends) > 1 or self._untimed:
            self._untimed = 0
            ended = bisect_right(self._ends, self._clock.now)
            if ended + 1 < len(self._ends):
                del self._ends[ended + 1 :]
                self._wait_for(self._ends[ended])

    def _answer(self, messages: tuple[Message, ...]) -> list[Message]:
        """Where layers are sent while the step computes them, who asks for KV cache is answered meanwhile, too: this is
        not for the engine's loop to do. What is left of the messages.
        """
        asked = [message for message in messages if isinstance(message, KvRequested)]
        if asked:
            self.settle()
            for message in asked:
                self.shell.master.receive(message, self._clock.now)
            self._deliver(self.shell)
        return [message for message in messages if not isinstance(message, KvRequested)]

    def kill(self) -> None:
        """Stop in the middle of whatever it does. What finished by now stays readable in the shell."""
        self.settle()
        self.dead = True
        if self._timer is not None:
            self._timer.cancel()
        if self._shared is not None:
            self._shared.idle(self, self._clock.now)

    def hold(self, ns: int) -> None:
        """The host needs so long for something else before it launches what it has just scheduled."""
        if not self._core.in_flight:
            return
        self._ends = [end + ns for end in self._ends]
        if self._shared is not None:
            self._ends = [self._shared.extend(self, self._clock.now, ns)]
        self._end_for_report()
        self._wait_for(self._ends[-1])
        self._retimed()

    def retime(self, end: int) -> None:
        """The step under way ends at another time, because others begin or cease to slow it down."""
        self._ends = [end]
        self._wait_for(end)
        self._retimed()

    @property
    def step_ends(self) -> int | None:
        """When the step in progress ends; None where nothing is computed."""
        ended = bisect_right(self._ends, self._clock.now)
        return self._ends[ended] if ended < len(self._ends) and self._core.in_flight else None

    def step_of(self, plan: int) -> tuple[int, int] | None:
        """From when to when the device computes this plan; None if it is done. It was launched, and decodes alone do
        not make it up.
        """
        in_flight = self._core.in_flight
        return (self._since, self._ends[0]) if in_flight and in_flight[0].number == plan else None

    def settle(self) -> None:
        """Bring the core up to now: the steps of the segment that have ended are complete."""
        ended = bisect_right(self._ends, self._clock.now)
        if ended and ended < len(self._ends):
            if self._record is not None:
                self._write_down(ended)
            self.shell.advance(self._ends[:ended])
            self.steps += ended
            del self._ends[:ended]

    # -- the engine loop ------------------------------------------------------------------------------------------

    def _next_step(self) -> None:
        """What a real engine loop does between two steps: messages in, schedule, outbox out, launch."""
        now, shell, in_flight = self._clock.now, self.shell, self._core.in_flight
        if self._inbox:
            messages, self._inbox = self._inbox, []
            for message in messages:
                shell.receive(message, now, self._context(message) if isinstance(message, Dispatch) else ())
        ahead = bool(in_flight)
        most = self._core.config.max_in_flight
        while len(in_flight) < most and shell.next_plan() is not None:
            pass
        if in_flight:
            self._launch(in_flight[0], ahead)
        else:
            if self._shared is not None:
                self._shared.idle(self, now)
            if shell.report_due is not None:
                self._wait_for(max(now, shell.report_due))
        if shell.has_said or self._every_turn:
            self._deliver(shell)

    def _context(self, message: Dispatch) -> identity.BlockIds:
        """Block identities of prompt and answer: what the tokens will be is the sampler's to know."""
        request = message.task.request
        known = self._answers[request.request_id].block_ids or request.block_ids
        return identity.of_context(request.request_id, request.max_tokens, known)

    def _launch(self, plan: Plan, ahead: bool) -> None:
        """The oldest plan in flight is next on the device; `ahead`: it was launched while another one computed."""
        now, steps = self._clock.now, 0
        reshape = self._reshape if self._reshape and plan.shape.rows != self._rows else 0
        if self._varies:
            self._latency.seek(self.steps)
        if plan.decodes is not self._batch:
            self._find_stops(plan)
        self._since = now
        if self._coalesce and self._shared is None:
            steps = self._steps_behind(plan)
        if steps:
            self._ends, self._untimed = [], steps + 1
            self._extend(plan, now, ahead, reshape)
        else:
            took = self._latency.step_ns(plan.shape) + reshape
            took = max(took, self._host) if ahead else took + self._host + self._latency.fill_ns(plan.shape)
            end = now + took
            if self._shared is not None:
                end = self._shared.begin(self, bool(plan.chunks), now, took)
            self._ends, self._untimed = [end], 0
        self._wait_for(self._ends[-1])

    def _steps_behind(self, plan: Plan) -> int:
        """How many steps may follow the first of a segment: up to a stop, or a step that is different."""
        most = LONGEST_SEGMENT
        if plan.decodes:
            stop = self._next_stop()
            if stop is not None and stop - plan.clock < most:
                most = stop - plan.clock
                if most <= 0:
                    return 0
        return self._core.steady_steps(most)

    def _extend(self, plan: Plan, end: int, ahead: bool, reshape: int = 0) -> None:
        """Time the next steps of the segment, which ends at `end` by now, or fewer where a load report is due.
        `reshape`: by how much the first of them takes longer.
        """
        ends, host, latency = self._ends, self._host, self._latency
        done = len(ends)
        count = min(self._untimed, max(FEWEST_TIMED, done))
        self._untimed -= count
        _, _, _, batch, context, _ = plan.shape
        if plan.chunks:
            shapes = [plan.shape_after(step) for step in range(done, done + count)]
            took = [latency.step_ns(shape) for shape in shapes]
            if self._reshape and shapes[-1].rows != plan.shape.rows:  # the end of the prompt
                took[-1] += self._reshape
        else:
            took = latency.decode_ns(batch, context + batch * done, count)
        took[0] += reshape
        if host or latency.stages > 1:
            hidden = len(self._core.in_flight) > 1
            for place, each in enumerate(took):
                if hidden if done + place else ahead:
                    took[place] = max(each, host)
                else:
                    took[place] = each + host + latency.fill_ns(plan.shape_after(done + place))
        for each in took:
            end += each
            ends.append(end)
        self._end_for_report()

    def _end_for_report(self) -> None:
        """Let the segment end with the step in which a load report is due."""
        ends, due = self._ends, self.shell.next_report
        if ends[-1] >= due:
            del ends[bisect_left(ends, due) + 1 :]
            self._untimed = 0

    def _wait_for(self, time: int) -> None:
        """Wake up ahead of everything else at that time: a step that ends as a message arrives has ended.

        Steps that end at the same time do so in the order of the executors' numbers, not of when they were scheduled,
        which a segment does earlier than single steps.
        """
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._clock.alarm(time - self._clock.now, self._on_timer, self._priority)

    def _on_timer(self) -> None:
        self._timer = None
        now, shell, ends = self._clock.now, self.shell, self._ends
        if self._untimed:
            if self._varies:
                self._latency.seek(self.steps + len(ends))
            self._extend(self._core.in_flight[0], now, True)
            self._wait_for(ends[-1])
            return
        if self._core.in_flight:
            plan = self._core.in_flight[0]
            if self._record is not None:
                self._write_down(len(ends))
            self.steps += len(ends)
            if len(ends) > 1:
                ends.pop()
                shell.advance(ends)
            self._ends = []
            if self._reshape:
                self._rows = plan.shape.rows
            accepted = self._accepted(plan) if plan.verifies else NONE
            shell.complete(plan, self._stopped(plan, accepted), now, accepted)
        else:
            shell.report(now)
        self._next_step()

    def _write_down(self, steps: int) -> None:
        """The first `steps` of the segment are over: one span where they only decoded, else one for each chunk."""
        assert self._record is not None
        plan, name = self._core.in_flight[0], self.shell.shell.name
        spans = enumerate(self._ends[:steps]) if plan.chunks else [(0, self._ends[steps - 1])]
        for step, end in spans:
            self._record(StepSpan(name, self._since, end, 1 if plan.chunks else steps, plan.shape_after(step)))
            self._since = end

    # -- the sampler's side ---------------------------------------------------------------------------------------

    def _find_stops(self, plan: Plan) -> None:
        """At which value of the decode clock each sequence that is new in the batch samples its last token, if that is
        not the last that its client allows.

        A batch is in order of joining, so the new ones are at its end.
        """
        self._batch = plan.decodes
        for sequence in reversed(plan.decodes):
            if sequence.joined < self._launched_clock:
                break
            if sequence.status is DECODE or sequence.status is LAST:
                task, limit = sequence.task, sequence.limit
                stop = sequence.joined + self._answers[task.request.request_id].output_tokens - sequence.sampled
                if limit is None or stop < limit:  # else the core ends it by itself
                    heapq.heappush(self._stops, (stop, task.task_id, sequence.joined, sequence))
        self._launched_clock = plan.clock

    def _next_stop(self) -> int | None:
        """The value of the decode clock at which the next sequence stops."""
        stops = self._stops
        while stops:
            clock, _, joined, sequence = stops[0]
            if sequence.joined == joined and (sequence.status is DECODE or sequence.status is LAST):
                return clock
            heapq.heappop(stops)
        return None

    def _accepted(self, plan: Plan) -> dict[int, int]:
        """Tokens that verifications yield, none behind a request's last."""
        accepted = {}
        for verify in plan.verifies:
            sequence = verify.sequence
            if sequence.status is not ENDED:  # of an aborted request the answer may be gone
                left = self._answers[sequence.task.request.request_id].output_tokens - sequence.sampled
                accepted[sequence.task_id] = max(1, min(self._accept(verify), left))
        return accepted

    def _stopped(self, plan: Plan, accepted: Mapping[int, int]) -> list[int]:
        stopped: list[int] = []
        if plan.decodes:
            while (stop := self._next_stop()) is not None and stop <= plan.clock:
                stopped.append(heapq.heappop(self._stops)[1])
        answers = self._answers
        for chunk in plan.chunks:
            sequence = chunk.sequence
            if not chunk.samples or sequence.status is ENDED:  # of an aborted request the answer may be gone
                continue
            if sequence.sampled + 1 >= answers[sequence.task.request.request_id].output_tokens:
                stopped.append(sequence.task_id)
        for sequence, _, _ in plan.verifies:
            tokens = accepted.get(sequence.task_id)
            if tokens is None:
                continue
            if sequence.sampled + tokens >= answers[sequence.task.request.request_id].output_tokens:
                stopped.append(sequence.task_id)
        return stopped
