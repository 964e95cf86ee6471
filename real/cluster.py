"""The real cluster: engine processes on this machine, behind the seam."""

import heapq
import itertools
import os
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import zmq

from cluster import events as ev
from cluster.actions import (
    AbortTask,
    Action,
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
from cluster.relay import relayed, work_lost
from cluster.request import Answer, Request, Task
from cluster.seam import Cluster
from cluster.vocabulary import WORKERS, ExecutorSpec, FailureReason, Stage, to_ns
from cluster.work import WORK, OperationTime, Secrets, WorkTask
from flowserve.core import messages
from flowserve.core.config import EngineConfig
from flowserve.core.messages import Abort, Dispatch, Drain, KvOffered, KvRequested, Message, PeerLost, ReleaseContext
from flowserve.runtime import wire
from flowserve.runtime.log import LEVELS
from flowserve.runtime.runner import KvHandle, Payload
from flowserve.runtime.sampling import Sampling
from real.frontend import ClientPrompt, Frontend, NewTokens
from real.metrics import ServingMetrics
from real.process import ChildProcess


class Engine(msgspec.Struct, frozen=True):
    """What stands behind one kind of executor: engine limits and the device."""

    engine: EngineConfig
    device: wire.NullDevice | wire.TorchDevice


class WorkEngine(msgspec.Struct, frozen=True):
    """What stands behind one kind of worker: tasks that sleep, `slots` side by side, for as long as `time` says."""

    slots: int
    time: OperationTime


class _Executor:
    __slots__ = ("crash", "early", "handle", "launched", "process", "ready", "spec", "tasks", "work")

    def __init__(self, spec: ExecutorSpec, process: ChildProcess, launched: int) -> None:
        self.spec = spec
        self.process = process
        self.launched = launched
        self.ready = False
        self.handle: KvHandle | None = None
        self.crash: wire.Crashed | None = None
        self.tasks: dict[int, tuple[str, Task]] = {}
        self.early: set[int] = set()  # dispatched before the frontend had all their tokens
        self.work: dict[int, tuple[str, WorkTask]] = {}


class RealCluster(Cluster):
    """Executors as processes. Time is the monotonic clock since construction; one thread, the caller's.

    `engine_for`: what an executor spec runs. `vocab_for`: vocabulary size of a model. `log_dir`: where engine processes
    write their logs, from `log_level` up (without a folder, warnings go to stderr), and with `record` every turn of
    their loops (`NAME.turns.jsonl`). `pin`: give each engine process one CPU of its own in turn. `metrics`: told of
    everything that happens; closed with the cluster, and written to `log_dir` as `metrics.prom` then.
    """

    STOP_TIMEOUT_S = 5.0

    def __init__(
        self,
        actors: Sequence[str],
        engine_for: Callable[[ExecutorSpec], Engine | WorkEngine],
        vocab_for: Callable[[str], int],
        sampling: Sampling | None = None,
        report_period_s: float = 1.0,
        log_dir: Path | None = None,
        record: bool = False,
        keep_outputs: bool = False,
        pin: bool = False,
        metrics: ServingMetrics | None = None,
        log_level: str = "info",
    ) -> None:
        if log_level not in LEVELS:
            raise ValueError(f"log_level is {log_level!r}: allowed are {', '.join(LEVELS)}")
        self._log_level = log_level
        self._metrics = metrics or ServingMetrics()
        self._engine_for = engine_for
        self._vocab_for = vocab_for
        self._sampling = sampling or Sampling()
        self._report_to = tuple(actor for actor in actors if actor not in ("client", WORK))
        self._secrets = Secrets()
        self._report_period_ns = to_ns(report_period_s)
        self._log_dir = log_dir
        self._record = record
        self._keep_outputs = keep_outputs
        self._cpus = itertools.cycle(sorted(os.sched_getaffinity(0))) if pin else None
        self._executors: dict[str, _Executor] = {}
        self._leaving: list[ChildProcess] = []
        self._frontends: dict[str, Frontend] = {}
        self._frontend_of: dict[int, Frontend] = {}
        self._prompts: dict[int, ClientPrompt] = {}
        self._on_tokens: Callable[[NewTokens], None] | None = None
        self._watched: dict[zmq.Socket[bytes] | int, Callable[[], None]] = {}
        self._timers: list[tuple[int, int, SetTimer]] = []
        self._order = itertools.count()
        self._ended = False
        # The socket lives in a private folder that goes with us.
        self._folder = tempfile.TemporaryDirectory(prefix="deepflow-")
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._address = f"ipc://{self._folder.name}/engines"
        self._socket.bind(self._address)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._start_ns = time.monotonic_ns()
        self._events: deque[ev.Event] = deque(ev.RunStarted(to=actor, time=0, occurred=0) for actor in actors)

    # -- the seam -------------------------------------------------------------------------------------------------

    def submit(self, action: Action) -> None:
        match action:
            case DispatchTask():
                self._dispatch(action)
            case SetTimer():
                heapq.heappush(self._timers, (action.at_ns, next(self._order), action))
            case AbortTask():
                self._send(action.executor, wire.Deliver(Abort(action.task_id)))
            case LaunchExecutor():
                self._launch(action)
            case DrainExecutor():
                self._send(action.executor, wire.Deliver(Drain()))
            case ReleaseKvContext():
                self._send(action.executor, wire.Deliver(ReleaseContext(action.context)))
            case SwitchRole():
                self._send(action.executor, wire.Deliver(messages.SwitchRole(action.role)))
            case RetireExecutor():
                self._retire(action.executor)
            case EndRun():
                self._ended = True
            case DispatchWork():
                self._dispatch_work(action)
            case _:
                self._relay(action)

    def next_event(self) -> ev.Event | None:
        while not self._ended:
            now = self.now()
            due = self._timers[0][0] if self._timers else None
            if due is not None and due <= now:
                self._wait(0)  # a client that is late with its timers must not keep what engines say waiting
            elif not self._events:
                self._wait(None if due is None else due - now)
            if self._events and (due is None or due > min(now, self._events[0].time)):
                return msgspec.structs.replace(self._events.popleft(), time=self.now())
            if due is not None and due <= now:
                at, _, timer = heapq.heappop(self._timers)
                return ev.TimerFired(to=timer.actor, time=now, occurred=max(0, at), name=timer.name)
        return None

    def close(self) -> None:
        if self._context.closed:
            return
        self._ended = True
        for name, executor in self._executors.items():
            self._stop(name, executor)
        deadline = time.monotonic() + self.STOP_TIMEOUT_S
        for process in [executor.process for executor in self._executors.values()] + self._leaving:
            process.close(max(0.0, deadline - time.monotonic()))
        self._executors.clear()
        self._leaving.clear()
        self._socket.close()
        self._context.term()
        self._folder.cleanup()
        if self._log_dir is not None:
            (self._log_dir / "metrics.prom").write_bytes(self._metrics.text())
        self._metrics.close()

    # -- beside the seam ------------------------------------------------------------------------------------------

    def now(self) -> int:
        """ns since the start of the run."""
        return time.monotonic_ns() - self._start_ns

    def outputs(self) -> dict[int, list[int]]:
        """Tokens by request id: of open requests, and of all with `keep_outputs`."""
        return {number: tokens for frontend in self._frontends.values() for number, tokens in frontend.outputs.items()}

    def offer(self, request_id: int, prompt: ClientPrompt) -> None:
        """The prompt of a request that a client is about to submit."""
        self._prompts[request_id] = prompt

    def listen(self, on_tokens: Callable[[NewTokens], None]) -> None:
        """Call back with the tokens of all requests as they come, from within `next_event`."""
        self._on_tokens = on_tokens

    def watch(self, source: "zmq.Socket[bytes] | int", on_readable: Callable[[], None]) -> None:
        """Call back from within `next_event` whenever a socket or file descriptor has something to read."""
        self._watched[source] = on_readable
        self._poller.register(source, zmq.POLLIN)

    def unwatch(self, source: "zmq.Socket[bytes] | int") -> None:
        """The end of `watch`."""
        del self._watched[source]
        self._poller.unregister(source)

    def process_ids(self) -> dict[str, int]:
        """Process id of each executor."""
        return {name: executor.process.pid for name, executor in self._executors.items()}

    # -- requests and tasks ---------------------------------------------------------------------------------------

    def _open(self, request: Request, answer: Answer | None) -> None:
        model, number = request.model, request.request_id
        if model not in self._frontends:
            self._frontends[model] = Frontend(self._vocab_for(model), self._sampling, self._keep_outputs)
        self._frontend_of[number] = self._frontends[model]
        self._frontends[model].open(request, answer, self._prompts.pop(number, None))

    def _relay(self, action: Action) -> None:
        match action:
            case SubmitRequest():
                self._open(action.request, action.answer)
            case SubmitCall():
                self._open(action.request, self._secrets.answer(action.work, action.step, action.request))
            case EndRequest() | EndCall():
                self._frontend_of.pop(action.request_id).close(action.request_id)
                self._metrics.ended(action.request_id)
            case SubmitWork():
                self._secrets.add(action.request, action.truth)
            case EndWork():
                self._secrets.forget(action.request_id)
            case _:
                pass
        event = relayed(action, self.now())
        assert event is not None
        self._emit(event)

    def _dispatch(self, action: DispatchTask) -> None:
        task, executor = action.task, self._executors.get(action.executor)
        if executor is None or not executor.ready:
            self._lose(action.executor, action.job_executor, task)
            return
        executor.tasks[task.task_id] = (action.job_executor, task)
        self._metrics.dispatched(action.executor, task, self.now())
        frontend = self._frontend_of[task.request.request_id]
        if frontend.generated(task.request.request_id) < task.generated:
            executor.early.add(task.task_id)
        payload = frontend.payload(task)
        self._send(action.executor, wire.Deliver(Dispatch(action.job_executor, task), payload=payload))

    def _lose(self, executor: str, job_executor: str, task: Task) -> None:
        now, frontend = self.now(), self._frontend_of[task.request.request_id]
        frontend.close_task(task.task_id)
        self._emit(
            ev.TaskFailed(
                to=job_executor,
                time=now,
                occurred=now,
                request_id=task.request.request_id,
                task_id=task.task_id,
                executor=executor,
                reason=FailureReason.EXECUTOR_LOST,
                generated=frontend.generated(task.request.request_id),
            )
        )

    # -- work other than serving ----------------------------------------------------------------------------------

    def _dispatch_work(self, action: DispatchWork) -> None:
        name, task, executor = action.executor, action.task, self._executors.get(action.executor)
        if executor is None or not executor.ready:
            self._emit(work_lost(self.now(), name, action.job_executor, task))
            return
        engine = self._engine_for(executor.spec)
        assert isinstance(engine, WorkEngine)
        try:
            took = self._secrets.duration_ns(task, executor.spec, engine.time)
        except ValueError as error:
            self._emit(work_lost(self.now(), name, action.job_executor, task, str(error)))
            return
        executor.work[task.task_id] = (action.job_executor, task)
        self._send(name, wire.Deliver(messages.DispatchWork(action.job_executor, task, took)))

    def _launch_worker(self, action: LaunchExecutor, engine: WorkEngine) -> ChildProcess:
        name, folder = action.executor, self._log_dir
        setup = wire.WorkerSetup(
            executor=name,
            spec=action.spec,
            slots=engine.slots,
            address=self._address,
            start_ns=self._start_ns,
            report_to=("cm",),
            report_period_ns=self._report_period_ns,
            parent=os.getpid(),
            log_level="warning" if folder is None else self._log_level,
        )
        log = None if folder is None else folder / f"{name}.log"
        return ChildProcess("flowserve.runtime.worker_process", setup, log)

    # -- executors ------------------------------------------------------------------------------------------------

    def _launch(self, action: LaunchExecutor) -> None:
        name, engine = action.executor, self._engine_for(action.spec)
        folder, launched = self._log_dir, self.now()
        self._metrics.launched(name, action.spec.model)
        assert isinstance(engine, WorkEngine) == (action.spec.role in WORKERS)
        if isinstance(engine, WorkEngine):
            process = self._launch_worker(action, engine)
        else:
            process = self._launch_engine(action, engine, None if folder is None else folder / f"{name}.log")
        self._executors[name] = _Executor(action.spec, process, launched)
        self._poller.register(process.sentinel, zmq.POLLIN)

    def _launch_engine(self, action: LaunchExecutor, engine: Engine, log: Path | None) -> ChildProcess:
        name, folder = action.executor, self._log_dir
        setup = wire.EngineSetup(
            executor=name,
            spec=action.spec,
            engine=engine.engine,
            device=engine.device,
            address=self._address,
            start_ns=self._start_ns,
            report_to=self._report_to,
            report_period_ns=self._report_period_ns,
            parent=os.getpid(),
            cpu=None if self._cpus is None else next(self._cpus),
            record=str(folder / f"{name}.turns.jsonl") if folder is not None and self._record else None,
            log_level="warning" if folder is None else self._log_level,
        )
        return ChildProcess("flowserve.runtime.engine_process", setup, log)

    def _retire(self, name: str) -> None:
        executor = self._executors.pop(name, None)
        if executor is None:
            return
        self._stop(name, executor)
        self._poller.unregister(executor.process.sentinel)
        for gone in [process for process in self._leaving if process.ended]:
            gone.close(0)
            self._leaving.remove(gone)
        self._leaving.append(executor.process)
        self._lose_tasks(name, executor)
        now = self.now()
        self._emit(ev.ExecutorRetired(to="cm", time=now, occurred=now, executor=name))

    def _stop(self, name: str, executor: _Executor) -> None:
        if executor.ready:
            self._send(name, wire.Stop())
        else:
            executor.process.kill()  # it may not listen yet

    def _died(self, name: str) -> None:
        executor = self._executors.pop(name)
        self._poller.unregister(executor.process.sentinel)
        crash = executor.crash or wire.Crashed(executor.process.how_it_ended())
        executor.process.close(self.STOP_TIMEOUT_S)
        self._lose_tasks(name, executor)
        now = self.now()
        self._emit(
            ev.ExecutorFailed(
                to="cm", time=now, occurred=now, executor=name, reason=crash.reason, permanent=crash.permanent
            )
        )

    def _lose_tasks(self, name: str, executor: _Executor) -> None:
        for job_executor, task in executor.tasks.values():
            self._lose(name, job_executor, task)
        for job_executor, work in executor.work.values():
            self._emit(work_lost(self.now(), name, job_executor, work))
        for other in self._executors:
            self._send(other, wire.Deliver(PeerLost(name)))

    # -- messages -------------------------------------------------------------------------------------------------

    def _wait(self, timeout_ns: int | None) -> None:
        """Wait for a message or the end of a process, at most until the next timer."""
        if timeout_ns and timeout_ns < 1_000_000:  # finer than the poller's milliseconds
            if not self._socket.poll(0):
                time.sleep(timeout_ns / 1e9)
            timeout_ns = 0
        ready = dict(self._poller.poll(None if timeout_ns is None else timeout_ns // 1_000_000))
        if self._socket in ready:
            self._read()
        for name, executor in list(self._executors.items()):
            if executor.process.sentinel in ready:
                self._read()  # its last words come before its end
                self._died(name)
        for source, on_readable in list(self._watched.items()):
            if source in ready:
                on_readable()

    def _read(self) -> None:
        while True:
            try:
                name, body = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._received(name.decode(), wire.decode_from_engine(body))

    def _received(self, name: str, message: wire.FromEngine) -> None:
        executor = self._executors.get(name)
        if executor is None:
            return  # retired: nothing it says counts any more
        match message:
            case wire.Output():
                self._output(name, executor, message)
            case wire.StageDone():
                if message.stage is Stage.TE_PRE_LOAD:
                    born = message.at_ns - message.took_ns
                    self._stage(name, Stage.SCALER_PRE, born, born - executor.launched)
                self._stage(name, message.stage, message.at_ns, message.took_ns)
            case wire.Ready():
                self._ready(name, executor, message)
            case wire.Crashed():
                executor.crash = message

    def _output(self, name: str, executor: _Executor, output: wire.Output) -> None:
        if output.tokens is not None:
            new: dict[int, NewTokens] | None = None if self._on_tokens is None else {}
            self._frontends[executor.spec.model].take(output.tokens, new)
            if self._on_tokens is not None and new:
                for task_id, _, logprobs in output.logprobs:
                    if task_id in new:
                        new[task_id].logprobs.append(logprobs)
                for task_id, each in new.items():
                    self._on_tokens(each._replace(ended=task_id in output.ended))
        for event in output.events:
            if isinstance(event, ev.TaskFinished | ev.TaskFailed | ev.TaskAborted):
                executor.tasks.pop(event.task_id, None)
                executor.early.discard(event.task_id)
                frontend = self._frontend_of.get(event.request_id)
                if frontend is not None:
                    frontend.close_task(event.task_id)
                    # What the frontend holds is what the client has, whatever the engine thought it had sampled.
                    event = msgspec.structs.replace(event, generated=frontend.generated(event.request_id))
            elif isinstance(event, ev.WorkFinished | ev.WorkFailed | ev.WorkAborted):
                executor.work.pop(event.task_id, None)
            self._emit(event)
        for other, message in output.peers:
            self._forward(name, executor, other, message)

    def _forward(self, name: str, executor: _Executor, other: str, message: Message) -> None:
        if other in self._executors:
            self._send(other, wire.Deliver(message, self._late_payload(other, message), executor.handle))
        elif isinstance(message, KvRequested):
            self._send(name, wire.Deliver(KvOffered(message.task_id, message.for_task, other, None)))

    def _late_payload(self, name: str, message: Message) -> Payload | None:
        """What an executor lacks of a task that was dispatched early: with this message, the prefill is done."""
        executor = self._executors[name]
        if not isinstance(message, KvOffered) or message.blocks is None or message.more:
            return None
        if message.for_task not in executor.early:
            return None
        executor.early.discard(message.for_task)
        _, task = executor.tasks[message.for_task]
        return self._frontend_of[task.request.request_id].payload(task)

    def _ready(self, name: str, executor: _Executor, message: wire.Ready) -> None:
        executor.ready, executor.handle = True, message.handle
        now, engine = self.now(), self._engine_for(executor.spec)
        self._stage(name, Stage.SCALER_POST, now, now - message.at_ns)
        self._emit(
            ev.ExecutorReady(
                to="cm",
                time=now,
                occurred=now,
                executor=name,
                spec=executor.spec,
                kv_blocks=message.kv_blocks,
                block_tokens=0 if isinstance(engine, WorkEngine) else engine.engine.block_tokens,
                max_sequences=engine.slots if isinstance(engine, WorkEngine) else engine.engine.max_sequences,
            )
        )

    def _stage(self, name: str, stage: Stage, at: int, took: int) -> None:
        self._emit(ev.StageFinished(to="cm", time=at, occurred=at, executor=name, stage=stage, took_ns=took))

    def _send(self, name: str, message: wire.ToEngine) -> None:
        # An identity that is not connected (yet) would be dropped silently: before Ready, nothing is sent but a stop.
        self._socket.send_multipart([name.encode(), wire.encode(message)])

    def _emit(self, event: ev.Event) -> None:
        self._metrics.observe(event)
        self._events.append(event)
