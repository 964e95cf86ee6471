"""The simulated cluster: SimPy behind the seam."""

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

import msgspec
from simpy.core import EmptySchedule

from cluster import events as ev
from cluster.acceptance import Acceptance
from cluster.actions import (
    AbortTask,
    Action,
    CancelRequest,
    DispatchTask,
    DispatchWork,
    DrainExecutor,
    EndCall,
    EndRequest,
    EndRun,
    EndWork,
    LaunchExecutor,
    ReleaseKvContext,
    RetireExecutor,
    SetTimer,
    SubmitCall,
    SubmitRequest,
    SubmitWork,
    SwitchRole,
)
from cluster.latency import LatencyModel
from cluster.relay import relayed, work_lost
from cluster.request import Answer, Task
from cluster.seam import Cluster
from cluster.vocabulary import WORKERS, ExecutorSpec, FailureReason, Stage, to_ns
from cluster.work import WORK, Secrets, WorkTask
from flowserve.core import messages
from flowserve.core.fetch_cost import CostModel, PrefillTime, TransferTime
from flowserve.core.messages import (
    Abort,
    Dispatch,
    Drain,
    KvFetched,
    KvMoved,
    KvOffered,
    KvRequested,
    Message,
    PeerLost,
    ReleaseContext,
)
from flowserve.core.outbox import Outbox, Transfer
from flowserve.core.plan import Verify
from flowserve.core.record import StepSpan, TransferSpan
from flowserve.core.task_executor import TaskExecutor
from flowserve.core.tiers import Move
from flowserve.core.transfer import contiguous_runs, pieces_by_layer
from flowserve.core.worker import Worker
from sim.clock import Clock
from sim.contention import Computing, Contention, Shared
from sim.executor import SimExecutor
from sim.network import Flow, Network, Path
from sim.node import Delays, Failure, Node, WorkNode
from sim.noise import Noisy
from sim.starting import Starter
from sim.tokenizers import Tokenizers
from sim.topology import Hosts, Topology
from sim.worker import SimWorker

MOST_TRANSFERS = 50_000
"""So many are remembered."""


def _accept(acceptance: Acceptance, verify: Verify) -> int:
    sequence = verify.sequence
    return acceptance.tokens(sequence.task.request.request_id, sequence.sampled, verify.draft)


class SimCluster(Cluster):
    """Executors in simulated time.

    `node_for`: what an executor spec runs on. `report_period_s`: shortest time between load reports of an executor.
    `coalesce`: advance decode steps that nothing can change in one event (the result is the same without). `record`:
    keep what every executor computed when, in `steps`, and copies between tiers beside the first transfers between
    executors in `transfers`. `latencies`: the models that executors have used so far. `hosts`: how many there are, and
    what lies in their memory.
    """

    def __init__(
        self,
        actors: Sequence[str],
        node_for: Callable[[ExecutorSpec], Node | WorkNode],
        report_period_s: float = 1.0,
        delays: Delays | None = None,
        failures: Sequence[Failure] = (),
        coalesce: bool = True,
        record: bool = False,
        hosts: Hosts | None = None,
    ) -> None:
        self.steps: list[StepSpan] = []
        self.transfers: list[TransferSpan] = []
        self.latencies: list[LatencyModel] = []
        self._record = self.steps.append if record else None
        self.clock = Clock()
        self.executors: dict[str, SimExecutor] = {}
        self._peers: dict[str, dict[str, SimExecutor]] = {}  # by model: those that may exchange KV cache
        self._node_for = node_for
        self.workers: dict[str, SimWorker] = {}
        self._report_to = tuple(actor for actor in actors if actor not in ("client", WORK))
        self._report_period_ns = to_ns(report_period_s)
        delays = delays or Delays()
        self._dispatch_ns, self._event_ns = to_ns(delays.dispatch_s), to_ns(delays.event_s)
        self._decision_ns, self._peer_ns = to_ns(delays.decision_s), to_ns(delays.peer_s)
        self._tokenizers = Tokenizers(delays.tokenizers, delays.token_s) if delays.token_s else None
        self._encoded: dict[int, int] = {}  # when the prompts of open requests are
        self._coalesce = coalesce
        self._shared = Shared(self._suffers)
        self._answers: dict[int, Answer] = {}
        self._secrets = Secrets()
        self._tasks: dict[str, dict[int, tuple[str, Task]]] = {}
        self._work_nodes: dict[str, WorkNode] = {}
        self._work_tasks: dict[str, dict[int, tuple[str, WorkTask]]] = {}
        self._nodes: dict[str, Node] = {}
        self._following: dict[str, dict[Flow, tuple[int, int]]] = {}
        """By source: what is sent while a step computes it, with that plan and the bytes of its last layer."""
        self.network, self.topology = Network(self.clock), Topology(hosts or Hosts())
        self._starter = Starter(self.clock, self.topology, self.network, self._stage_finished, self._ready)
        self._events: deque[ev.Event] = deque(ev.RunStarted(to=actor, time=0, occurred=0) for actor in actors)
        self._undone: list[Action] = []
        self._ended = False
        for failure in failures:
            self._at(to_ns(failure.at_s), partial(self.kill, failure.executor))

    # -- the seam -------------------------------------------------------------------------------------------------

    def submit(self, action: Action) -> None:
        self._undone.append(action)

    def next_event(self) -> ev.Event | None:
        clock = self.clock
        if self._undone:
            if self._decision_ns:
                clock.run_until(clock.now + self._decision_ns)
            actions, self._undone = self._undone, []
            for action in actions:
                self._perform(action)
        if self._ended:
            return None
        # All that happens at one time happens before anyone reacts to it.
        events = self._events
        try:
            while not events or clock.is_due():
                clock.step()
        except EmptySchedule:
            raise RuntimeError(f"nothing can happen any more at {clock.now} ns, yet the run has not ended") from None
        event = events.popleft()
        return event if event.time == clock.now else msgspec.structs.replace(event, time=clock.now)

    def close(self) -> None:
        self.executors.clear()
        self.workers.clear()
        self._starter.close()
        self._ended = True

    def now(self) -> int:
        """ns since the start of the run."""
        return self.clock.now

    def pause_at(self, time: int) -> None:
        """Have `next_event` return a timer of nobody's at this time, or now where that is past, for whoever watches."""
        self._set_timer(SetTimer(actor="", name="pause", at_ns=time))

    # -- actions --------------------------------------------------------------------------------------------------

    def _perform(self, action: Action) -> None:
        perform = _PERFORM.get(type(action))
        if perform is None:
            self._relay(action)
        else:
            perform(self, action)

    def _set_timer(self, action: SetTimer) -> None:
        self._at(max(0, action.at_ns - self.now()), partial(self._timer, action))

    def _abort(self, action: AbortTask) -> None:
        self._send(action.executor, Abort(action.task_id), self._dispatch_ns)

    def _start(self, action: LaunchExecutor) -> None:
        self._starter.launch(action, self._node_for(action.spec))

    def _drain(self, action: DrainExecutor) -> None:
        self._send(action.executor, Drain(), self._dispatch_ns)

    def _switch_role(self, action: SwitchRole) -> None:
        self._send(action.executor, messages.SwitchRole(action.role), self._dispatch_ns)

    def _release_context(self, action: ReleaseKvContext) -> None:
        self._send(action.executor, ReleaseContext(action.context), self._dispatch_ns)

    def _retire(self, action: RetireExecutor) -> None:
        if self._has(action.executor):
            self._stop(action.executor)
            now = self.now()
            self._emit(ev.ExecutorRetired(to="cm", time=now, occurred=now, executor=action.executor))

    def _end(self, action: EndRun) -> None:
        self._ended = True

    def _relay(self, action: Action) -> None:
        if type(action) is SubmitRequest:
            if action.answer is None:
                raise ValueError(f"request {action.request.request_id} has no answer: a simulated sampler must be told")
            self._answers[action.request.request_id] = action.answer
        elif type(action) is EndRequest:
            del self._answers[action.request_id]
        event = relayed(action, self.now())
        assert event is not None
        self._emit(event, 0 if self._tokenizers is None else self._encoding(self._tokenizers, action))

    def _encoding(self, tokenizers: Tokenizers, action: Action) -> int:
        """How long, in ns, the frontend holds back what is said of a prompt that is not yet encoded."""
        now = self.now()
        match action:
            case SubmitRequest() | SubmitCall():
                done = tokenizers.encode(now, action.request.prompt_tokens)
                self._encoded[action.request.request_id] = done
                return done - now
            case CancelRequest():
                return max(0, self._encoded.get(action.request_id, now) - now)  # work has no prompt
            case EndRequest() | EndCall():
                del self._encoded[action.request_id]
        return 0

    def _dispatch(self, action: DispatchTask) -> None:
        task = action.task
        if action.executor not in self.executors:
            self._lose(action.executor, action.job_executor, task, task.generated)
            return
        self._tasks[action.executor][task.task_id] = (action.job_executor, task)
        self._send(action.executor, Dispatch(action.job_executor, task), self._dispatch_ns)

    def _timer(self, action: SetTimer) -> None:
        now = self.now()
        self._emit(ev.TimerFired(to=action.actor, time=now, occurred=min(now, max(action.at_ns, 0)), name=action.name))

    def _stage_finished(self, executor: str, stage: Stage, took_ns: int, source: str) -> None:
        now = self.now()
        self._emit(
            ev.StageFinished(
                to="cm", time=now, occurred=now, executor=executor, stage=stage, took_ns=took_ns, source=source
            )
        )

    def _ready(self, action: LaunchExecutor, node: Node | WorkNode) -> None:
        assert isinstance(node, WorkNode) == (action.spec.role in WORKERS)
        if isinstance(node, WorkNode):
            self._employ(action, node)
            return
        latency, fetch_cost = node.latency(), None
        if node.engine.tiers.blocks:
            rates = self.topology.tier_rates(action.executor, node.block_bytes, node.kv_segments)
            fetch_cost = CostModel(PrefillTime(latency, node.engine.token_budget), TransferTime(rates))
        shell = TaskExecutor(
            action.executor, action.spec, node.engine, self._report_to, self._report_period_ns, fetch_cost
        )
        self._nodes[action.executor] = node
        self._tasks[action.executor] = {}
        if latency not in self.latencies:
            self.latencies.append(latency)
        if node.noise is not None:
            latency = Noisy(latency, node.noise, action.executor)
        executor = SimExecutor(
            self.clock,
            shell,
            latency,
            self._answers,
            partial(self._take, action.executor),
            self._coalesce,
            len(self._nodes),
            self._shared if node.contention else None,
            self._record,
            to_ns(node.host_step_s),
            partial(_accept, node.acceptance),
            retimed=partial(self._retimed, action.executor),
        )
        self.executors[action.executor] = executor
        self._peers.setdefault(action.spec.model, {})[action.executor] = executor
        self._emit(
            ev.ExecutorReady(
                to="cm",
                time=self.now(),
                occurred=self.now(),
                executor=action.executor,
                spec=action.spec,
                kv_blocks=node.engine.kv_blocks,
                block_tokens=node.engine.block_tokens,
                max_sequences=node.engine.max_sequences,
            )
        )

    def _suffers(self, engine: Computing) -> Contention:
        assert isinstance(engine, SimExecutor)
        return self._nodes[engine.shell.shell.name].contention

    # -- work other than serving ----------------------------------------------------------------------------------

    def _submit_work(self, action: SubmitWork) -> None:
        self._secrets.add(action.request, action.truth)
        self._relay(action)

    def _submit_call(self, action: SubmitCall) -> None:
        request = action.request
        self._answers[request.request_id] = self._secrets.answer(action.work, action.step, request)
        self._relay(action)

    def _end_call(self, action: EndCall) -> None:
        del self._answers[action.request_id]
        self._relay(action)

    def _end_work(self, action: EndWork) -> None:
        self._secrets.forget(action.request_id)
        self._relay(action)

    def _employ(self, action: LaunchExecutor, node: WorkNode) -> None:
        """A worker is up."""
        name, now = action.executor, self.now()
        worker = Worker(name, action.spec, node.slots, ("cm",), self._report_period_ns)
        self._work_nodes[name], self._work_tasks[name] = node, {}
        self.workers[name] = SimWorker(self.clock, worker, partial(self._deliver_work, name))
        self._emit(
            ev.ExecutorReady(
                to="cm",
                time=now,
                occurred=now,
                executor=name,
                spec=action.spec,
                kv_blocks=0,
                block_tokens=0,
                max_sequences=node.slots,
            )
        )

    def _dispatch_work(self, action: DispatchWork) -> None:
        name, task = action.executor, action.task
        worker = self.workers.get(name)
        if worker is None:
            self._emit(work_lost(self.now(), name, action.job_executor, task))
            return
        try:
            took = self._secrets.duration_ns(task, worker.worker.shell.spec, self._work_nodes[name].time)
        except ValueError as error:
            self._emit(work_lost(self.now(), name, action.job_executor, task, str(error)))
            return
        self._work_tasks[name][task.task_id] = (action.job_executor, task)
        self._send(name, messages.DispatchWork(action.job_executor, task, took), self._dispatch_ns)

    def _deliver_work(self, name: str, outbox: Outbox) -> None:
        for event in outbox.events:
            if isinstance(event, ev.WorkFinished | ev.WorkFailed | ev.WorkAborted):
                self._work_tasks[name].pop(event.task_id, None)
            self._emit(event, self._event_ns)

    def _dismiss(self, name: str) -> None:
        """A worker is gone, and with it its tasks."""
        worker = self.workers.pop(name, None)
        if worker is not None:
            worker.kill()
            for job_executor, task in self._work_tasks.pop(name).values():
                self._emit(work_lost(self.now(), name, job_executor, task))

    # -- failures -------------------------------------------------------------------------------------------------

    def kill(self, executor: str) -> None:
        """An executor dies now: its tasks come back as failed, then the executor itself."""
        if not self._has(executor):
            return
        self._stop(executor)
        now = self.now()
        self._emit(ev.ExecutorFailed(to="cm", time=now, occurred=now, executor=executor, reason="killed"))

    def _has(self, name: str) -> bool:
        return name in self.executors or name in self.workers or name in self._starter

    def _stop(self, name: str) -> None:
        executor = self.executors.pop(name, None)
        if executor is None:
            self._dismiss(name)
            self._starter.stop(name)
            return
        executor.kill()
        peers = self._peers[executor.shell.shell.spec.model]
        del peers[name]
        for task_id, (job_executor, task) in self._tasks.pop(name).items():
            sequence = executor.shell.core.sequence(task_id)
            self._lose(name, job_executor, task, task.generated if sequence is None else sequence.generated)
        for other in peers.values():
            other.receive(PeerLost(name))
        self._starter.stop(name)

    def _lose(self, executor: str, job_executor: str, task: Task, generated: int) -> None:
        now = self.now()
        self._emit(
            ev.TaskFailed(
                to=job_executor,
                time=now,
                occurred=now,
                request_id=task.request.request_id,
                task_id=task.task_id,
                executor=executor,
                reason=FailureReason.EXECUTOR_LOST,
                generated=generated,
            )
        )

    # -- what executors send --------------------------------------------------------------------------------------

    def _take(self, name: str, shell: TaskExecutor) -> None:
        self._deliver(name, shell.outbox())

    def _deliver(self, name: str, outbox: Outbox) -> None:
        for event in outbox.events:
            if type(event) is ev.TaskFinished or type(event) is ev.TaskFailed or type(event) is ev.TaskAborted:
                self._tasks[name].pop(event.task_id, None)
            self._emit(event, self._event_ns)
        for other, message in outbox.peers:
            if other in self.executors:
                self._send(other, message, self._peer_ns)
            elif isinstance(message, KvRequested):
                self._send(name, KvOffered(message.task_id, message.for_task, other, None), self._peer_ns)
        for transfer in outbox.transfers:
            self._transfer(name, transfer)
        for move in outbox.moves:
            self._move(name, move)

    def _move(self, name: str, move: Move) -> None:
        node, asked = self._nodes[name], self.now()
        pieces = len(contiguous_runs(move.source_blocks, move.target_blocks)) * node.kv_segments
        hops = self.topology.moving(name, move.source, move.target)
        self._hop(name, move, asked, hops, pieces)

    def _hop(self, name: str, move: Move, asked: int, hops: Sequence[Path], pieces: int) -> None:
        """One way of a copy after the other, each host with its share of the blocks."""
        blocks = len(move.source_blocks) * self._nodes[name].block_bytes
        on_end = partial(self._hopped, name, move, asked, hops[1:], pieces)
        self.network.start(hops[0], round(blocks * self.topology.seats[name].share), pieces, on_end, (name,))

    def _hopped(self, name: str, move: Move, asked: int, hops: Sequence[Path], pieces: int, success: bool) -> None:
        if hops and success:
            self._hop(name, move, asked, hops, pieces)
            return
        if success and self._record is not None:
            source, target = (f"{name} {tier.name}" for tier in (move.source, move.target))
            blocks = len(move.source_blocks)
            num_bytes = blocks * self._nodes[name].block_bytes
            self.transfers.append(TransferSpan(source, target, asked, self.now(), blocks, num_bytes, pieces))
        self._send(name, KvMoved(move.ticket, success), 0)

    def _transfer(self, name: str, transfer: Transfer) -> None:
        node, source = self._nodes[name], transfer.source
        runs = contiguous_runs(transfer.source_blocks, transfer.blocks)
        num_bytes = len(transfer.blocks) * node.block_bytes
        if node.kv_host_s:
            self.executors[name].hold(to_ns(node.kv_host_s))
        pieces = len(runs) * node.kv_segments
        if transfer.step is not None:
            pieces = pieces_by_layer(node.engine.kv_layout, node.layers, [length for _, _, length in runs])
        on_end = partial(self._fetched, name, transfer, self.now(), num_bytes, pieces)
        if transfer.step is not None:
            self._follow(name, transfer, transfer.step, num_bytes, pieces, on_end)
            return
        if source not in self.executors:  # it died after it made the offer
            on_end(False)
            return
        self.network.start(self.topology.path(source, name), num_bytes, pieces, on_end, (source, name))

    def _follow(
        self, name: str, transfer: Transfer, plan: int, num_bytes: int, pieces: int, on_end: Callable[[bool], None]
    ) -> None:
        """Send what the source computes just now, each layer when it is there: from the first one on no faster than
        they come, and as fast as the links are from the end of the step on.
        """
        engine, now = self.executors.get(transfer.source), self.now()
        if engine is None or name not in self.executors:  # one of them has died since
            on_end(False)
            return
        path, parties = self.topology.path(transfer.source, name), (transfer.source, name)
        start, end = engine.step_of(plan) or (now, now)
        layers = self._nodes[name].layers
        first = start + -(-(end - start) // layers)
        if now < first:
            self._at(first - now, partial(self._follow, name, transfer, plan, num_bytes, pieces, on_end))
            return
        flow = self.network.start(path, num_bytes, pieces, on_end, parties, (end - now) * layers // max(1, layers - 1))
        self._following.setdefault(transfer.source, {})[flow] = (plan, num_bytes // layers)
        self._at(end - now, partial(self._lift, transfer.source, plan, flow))

    def _lift(self, source: str, plan: int, flow: Flow) -> None:
        """At the end of the step, unless that has moved meanwhile."""
        engine = self.executors.get(source)
        step = None if engine is None else engine.step_of(plan)
        if flow in self._following[source] and (step is None or step[1] <= self.now()):
            del self._following[source][flow]
            self.network.lift(flow)

    def _retimed(self, source: str) -> None:
        """Its step ends sooner or later than was thought, and with it what follows it layer by layer."""
        for flow, (plan, behind) in list(self._following.get(source, {}).items()):
            step = self.executors[source].step_of(plan)
            if step is not None:
                left = step[1] - self.now()
                if left:
                    self.network.pace(flow, behind, left)
                self._at(left, partial(self._lift, source, plan, flow))

    def _fetched(self, name: str, transfer: Transfer, asked: int, num_bytes: int, pieces: int, success: bool) -> None:
        """A source that died in the middle took the rest of the KV cache with it."""
        copied = asked + to_ns(self._nodes[name].kv_host_s)  # by the engine itself, where its host must
        if success and self.now() < copied:
            again = partial(self._fetched, name, transfer, asked, num_bytes, pieces, success)
            self._at(copied - self.now(), again)
            return
        if success and len(self.transfers) < MOST_TRANSFERS:
            source, blocks, task_id = transfer.source, len(transfer.blocks), transfer.task_id
            self.transfers.append(TransferSpan(source, name, asked, self.now(), blocks, num_bytes, pieces, task_id))
        self._send(name, KvFetched(transfer.task_id, success), 0)

    def _send(self, name: str, message: Message, delay: int) -> None:
        # Even without delay not at once: steps of the receiver that end now have ended when it arrives.
        self.clock.alarm(delay, partial(self._arrive, name, message))

    def _arrive(self, name: str, message: Message) -> None:
        executor = self.executors.get(name) or self.workers.get(name)
        if executor is not None:
            executor.receive(message)

    def _emit(self, event: ev.Event, delay: int = 0) -> None:
        if delay:
            self.clock.alarm(delay, partial(self._events.append, event))
        else:
            self._events.append(event)

    def _at(self, delay: int, action: Callable[[], None]) -> None:
        if delay:
            self.clock.alarm(delay, action)
        else:
            action()


_PERFORM: Final[dict[type, Callable[[SimCluster, Any], None]]] = {
    DispatchTask: SimCluster._dispatch,
    SetTimer: SimCluster._set_timer,
    AbortTask: SimCluster._abort,
    LaunchExecutor: SimCluster._start,
    DrainExecutor: SimCluster._drain,
    SwitchRole: SimCluster._switch_role,
    ReleaseKvContext: SimCluster._release_context,
    RetireExecutor: SimCluster._retire,
    EndRun: SimCluster._end,
    SubmitWork: SimCluster._submit_work,
    SubmitCall: SimCluster._submit_call,
    EndCall: SimCluster._end_call,
    DispatchWork: SimCluster._dispatch_work,
    EndWork: SimCluster._end_work,
}
"""What executors or timers have to act on; everything else is relayed."""
