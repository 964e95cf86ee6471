"""The process of one executor: TE-shell, engine core and a runner, driven by one loop over one socket.

Started as `python -m flowserve.runtime.engine_process SETUP` with an `EngineSetup` in JSON. It ends on `Stop`, and
with the process that started it, however that one ends.
"""

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO

import msgspec
import zmq

from cluster import identity
from cluster.events import Event, ExecutorDrained, TaskAborted, TaskFailed, TaskFinished
from cluster.vocabulary import Stage, to_s
from flowserve.core.fetch_cost import FetchCost
from flowserve.core.messages import Dispatch, KvFetched, KvOffered, Message
from flowserve.core.outbox import Outbox
from flowserve.core.record import PlanRecord, TurnRecord
from flowserve.core.task_executor import TaskExecutor
from flowserve.runtime import wire
from flowserve.runtime.child import follow_parent
from flowserve.runtime.intake import NOTHING, Intake, Taken
from flowserve.runtime.log import engine_logger
from flowserve.runtime.mover import Mover
from flowserve.runtime.runner import KvHandle, Payload, Runner
from flowserve.runtime.tier_costs import measured

PERMANENT: tuple[type[Exception], ...] = (
    ValueError,
    TypeError,
    LookupError,
    ImportError,
    FileNotFoundError,
    NotADirectoryError,
    PermissionError,
)
"""What in a start-up another launch would meet again. Not so what may be short for a while: memory, a busy device."""


class EngineLoop:
    """Turns of: messages in, schedule, answers to peers out, launch as many plans as may be in flight, complete the
    oldest, output out.

    With two plans in flight, all that a turn does is done while the device computes the other plan. Single-threaded;
    waits for the oldest plan, or for messages where there is nothing to compute.
    """

    def __init__(
        self,
        setup: wire.EngineSetup,
        socket: "zmq.Socket[bytes]",
        runner: Runner,
        mover: Mover,
        record: IO[bytes] | None,
        log: logging.Logger,
        fetch_cost: FetchCost | None = None,
    ) -> None:
        self._log = log
        self._setup = setup
        self._socket = socket
        self._runner = runner
        self._record = record
        self._intake = Intake(runner.eos)
        self._done: list[Message] = []
        self._payloads: dict[int, Payload] = {}
        self._incomplete: set[int] = set()
        self._handles: dict[str, KvHandle | None] = {}
        self._shell = TaskExecutor(
            setup.executor, setup.spec, setup.engine, setup.report_to, setup.report_period_ns, fetch_cost
        )
        self._mover = mover
        self._poller = zmq.Poller()
        self._poller.register(socket, zmq.POLLIN)
        self._poller.register(self._mover.fd, zmq.POLLIN)

    def run(self) -> None:
        """Serve until told to stop."""
        shell, runner, now = self._shell, self._runner, self.now
        in_flight = shell.core.in_flight
        done: int | None = None
        while True:
            messages = self._receive(block=done is None)  # what a plan has freed may let in what waits
            if messages is None:
                return
            start = end = now()
            for message in messages:
                self._take(message, start)
            shell.report(start)
            plans = []
            plan, moves = shell.next_plan(), shell.moves()
            answers = shell.outbox()
            self._send(NOTHING, answers)  # peers wait for these: a launch may compute, and take as long as a step
            while plan is not None:
                runner.launch(plan)
                if self._record is not None:
                    plans.append(PlanRecord.of(plan))
                plan = shell.next_plan()
            preemptions, moves = shell.core.preemptions, moves + shell.moves()
            self._mover.start(moves)
            taken, done = NOTHING, None
            if in_flight:
                done = in_flight[0].number
                output = runner.collect()
                end = now()
                taken = self._intake.take(in_flight[0], output)
                for task_id, reason in output.failed.items():
                    shell.fail(task_id, reason, end)
                shell.complete(in_flight[0], taken.stopped, end, taken.accepted)
            outbox = shell.outbox()
            self._send(taken, outbox)
            if self._record is not None:
                transfers = [
                    (each.task_id, each.source_blocks, each.blocks) for each in answers.transfers + outbox.transfers
                ]
                turn = TurnRecord(
                    start, end, messages, plans, done, taken.stopped, preemptions, transfers, moves, taken.accepted
                )
                self._record.write(msgspec.json.encode(turn) + b"\n")
                self._record.flush()

    def now(self) -> int:
        return time.monotonic_ns() - self._setup.start_ns

    # -- in -------------------------------------------------------------------------------------------------------

    def _receive(self, block: bool) -> list[Message] | None:
        """Everything that has arrived; None for a stop. Waits for something, or for a report to be due, if `block`."""
        messages, self._done = [*self._done, *self._mover.ended()], []
        timeout = 0
        if block and not messages:
            due = self._shell.report_due
            timeout = -1 if due is None else max(0, (due - self.now()) // 1_000_000 + 1)
        ready = dict(self._poller.poll(timeout))
        if self._mover.fd in ready:
            messages += self._mover.ended()
        if self._socket not in ready:
            return messages
        while True:
            try:
                received = wire.decode_to_engine(self._socket.recv(zmq.NOBLOCK))
            except zmq.Again:
                return messages
            if isinstance(received, wire.Stop):
                return None
            message = received.message
            if isinstance(message, Dispatch):
                assert received.payload is not None
                self._payloads[message.task.task_id] = received.payload
            elif isinstance(message, KvOffered):
                self._handles[message.source] = received.handle
                if received.payload is not None:
                    self._payloads[message.for_task] = received.payload
            messages.append(message)

    def _take(self, message: Message, now: int) -> None:
        if not isinstance(message, Dispatch):
            if isinstance(message, KvOffered) and (all_of_it := self._payloads.pop(message.for_task, None)):
                self._complete(message.for_task, all_of_it, now)
            self._shell.receive(message, now)
            return
        request, task_id = message.task.request, message.task.task_id
        payload = self._payloads.pop(task_id)
        known = (payload.answer and payload.answer.block_ids) or request.block_ids
        self._shell.receive(message, now, identity.of_context(request.request_id, request.max_tokens, known))
        if len(payload.tokens) < message.task.context_tokens:
            self._incomplete.add(task_id)  # its prefill is under way, and yields the token that is missing
        else:
            self._begin(task_id, payload, now)

    def _complete(self, task_id: int, payload: Payload, now: int) -> None:
        """The tokens of a task, which may be over meanwhile, are known now."""
        if task_id in self._incomplete:
            self._incomplete.discard(task_id)
            self._begin(task_id, payload, now)

    def _begin(self, task_id: int, payload: Payload, now: int) -> None:
        self._intake.add(task_id, payload)
        try:
            self._runner.add(task_id, payload)
        except ValueError as error:
            self._shell.fail(task_id, str(error), now)

    # -- out ------------------------------------------------------------------------------------------------------

    def _send(self, taken: Taken, outbox: Outbox) -> None:
        in_flight = self._shell.core.in_flight
        for task_id in outbox.forgotten:
            self._runner.remove(task_id)
            self._incomplete.discard(task_id)
            self._intake.forget(task_id, in_flight[-1].number if in_flight else None)
        for _, message in outbox.peers:
            if isinstance(message, KvOffered) and message.blocks is not None:
                self._runner.stage(message.blocks)
        if taken.tokens is not None or outbox.events or outbox.peers:
            output = wire.Output(taken.tokens, outbox.events, outbox.peers, taken.logprobs, taken.ended)
            self._socket.send(wire.encode(output))
        for event in outbox.events:
            log_event(self._log, event)
        for transfer in outbox.transfers:
            try:
                self._runner.fetch(self._handles[transfer.source], transfer.source_blocks, transfer.blocks)
                success = True
            except OSError:  # the source died and its memory with it: reported as a lost KV cache
                success = False
            self._done.append(KvFetched(transfer.task_id, success))


def log_event(log: logging.Logger, event: Event) -> None:
    """Say in the log what became of a task."""
    match event:
        case TaskFailed():
            about = {"request_id": event.request_id, "task_id": event.task_id}
            log.warning("task failed", extra={**about, "reason": event.reason.value, "detail": event.detail})
        case TaskFinished():
            about = {"request_id": event.request_id, "task_id": event.task_id, "tokens": event.tokens}
            log.debug(
                "task finished",
                extra={**about, "cached_tokens": event.cached_tokens, "preemptions": event.preemptions},
            )
        case TaskAborted():
            log.debug("task aborted", extra={"request_id": event.request_id, "task_id": event.task_id})
        case ExecutorDrained():
            log.info("drained")
        case _:
            pass


def make_runner(setup: wire.EngineSetup) -> tuple[Callable[[], Runner], Callable[[], None]]:
    """(load weights and make the runner, import what that takes): the two start-up stages before the KV cache."""
    device = setup.device
    if isinstance(device, wire.NullDevice):
        from flowserve.runtime.null_runner import NullRunner

        return (lambda: NullRunner(device)), (lambda: None)

    def torch_imports() -> None:
        import flowserve.runtime.torch_runner  # noqa: F401

    def torch_runner() -> Runner:
        from flowserve.runtime.torch_runner import TorchRunner

        return TorchRunner(
            device.model_dir,
            setup.engine,
            device.dtype,
            device.device,
            device.threads,
            device.ssd_folder,
            device.graph_sizes,
            device.draft_dir,
            device.memory_share,
        )

    return torch_runner, torch_imports


@contextmanager
def start_up(
    setup: wire.EngineSetup, socket: "zmq.Socket[bytes]", born_ns: int, log: logging.Logger
) -> Iterator[EngineLoop]:
    """Start up stage by stage, to an engine loop that is ready to run."""

    def now() -> int:
        return time.monotonic_ns() - setup.start_ns

    def stage_done(stage: Stage, since: int) -> int:
        at = now()
        socket.send(wire.encode(wire.StageDone(stage, at, at - since)))
        log.info("start-up stage done", extra={"stage": stage.value, "seconds": to_s(at - since)})
        return at

    make, imports = make_runner(setup)
    imports()
    at = stage_done(Stage.TE_PRE_LOAD, born_ns)
    runner = make()
    at = stage_done(Stage.TE_LOAD, at)
    if runner.kv_blocks is not None:
        engine = msgspec.structs.replace(setup.engine, kv_blocks=runner.kv_blocks)
        setup = msgspec.structs.replace(setup, engine=engine)
    record = None if setup.record is None else open(setup.record, "wb")  # noqa: SIM115 (closed below)
    mover: Mover | None = None
    try:
        runner.warm_up()
        by_cost = setup.engine.tiers.blocks and setup.engine.tiers.fetch == "cost"
        mover = Mover(runner.move)
        loop = EngineLoop(
            setup, socket, runner, mover, record, log, measured(runner, setup.engine) if by_cost else None
        )
        stage_done(Stage.TE_POST_LOAD, at)
        socket.send(wire.encode(wire.Ready(now(), setup.engine.kv_blocks, runner.kv_handle)))
        spec, built = msgspec.to_builtins(setup.spec), msgspec.to_builtins(setup.engine)
        log.info("ready", extra={"spec": spec, "engine": built, "runner": runner.about})
        yield loop
    finally:
        if mover is not None:
            mover.close()
        runner.close()
        if record is not None:
            record.close()


def main() -> int:
    """Entry point of the process."""
    setup = msgspec.json.decode(sys.argv[1], type=wire.EngineSetup)
    born_ns = time.monotonic_ns() - setup.start_ns
    if not follow_parent(setup.parent):
        return 1
    if setup.cpu is not None:
        os.sched_setaffinity(0, {setup.cpu})
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.IDENTITY, setup.executor.encode())
    socket.setsockopt(zmq.LINGER, 2000)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.connect(setup.address)
    log = engine_logger(setup.executor, setup.log_level)
    permanent = PERMANENT
    try:
        with start_up(setup, socket, born_ns, log) as loop:
            permanent = ()
            loop.run()
            log.info("told to stop")
        return 0
    except Exception as error:
        log.exception("crashed")
        socket.send(wire.encode(wire.Crashed(f"{type(error).__name__}: {error}", isinstance(error, permanent))))
        return 1
    finally:
        socket.close()
        context.term()


if __name__ == "__main__":
    sys.exit(main())
