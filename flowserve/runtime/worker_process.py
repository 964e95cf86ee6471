"""The process of one worker: TE-shell and slots, driven by one loop over one socket. Its tasks sleep.

Started as `python -m flowserve.runtime.worker_process SETUP` with a `WorkerSetup` in JSON. It ends on `Stop`, and with
the process that started it, however that one ends.
"""

import heapq
import sys
import time
from contextlib import suppress

import msgspec
import zmq

from cluster.vocabulary import Stage
from flowserve.core.worker import Worker
from flowserve.runtime import wire
from flowserve.runtime.child import follow_parent
from flowserve.runtime.log import engine_logger


class WorkerLoop:
    """Turns of: messages in, tasks that are due done, free slots filled, output out, a sleep until the next is due."""

    def __init__(self, setup: wire.WorkerSetup, socket: "zmq.Socket[bytes]") -> None:
        self._setup = setup
        self._socket = socket
        self._worker = Worker(setup.executor, setup.spec, setup.slots, setup.report_to, setup.report_period_ns)
        self._due: list[tuple[int, int]] = []

    def run(self) -> None:
        """Work until told to stop."""
        worker = self._worker
        while self._receive():
            now = self.now()
            while self._due and self._due[0][0] <= now:
                worker.finish(heapq.heappop(self._due)[1], now)
            for task_id, end in worker.start(now):
                heapq.heappush(self._due, (end, task_id))
            worker.shell.report(now)
            outbox = worker.outbox()
            if outbox.events:
                self._socket.send(wire.encode(wire.Output(None, outbox.events, [])))

    def now(self) -> int:
        return time.monotonic_ns() - self._setup.start_ns

    def _receive(self) -> bool:
        """Take what has arrived, after waiting for it until something is due; False for a stop."""
        dues = [self._due[0][0]] if self._due else []
        if self._worker.shell.report_due is not None:
            dues.append(self._worker.shell.report_due)
        left = max(0, min(dues) - self.now()) if dues else None
        if left is not None and left < 2_000_000:  # finer than the poller's milliseconds
            time.sleep(left / 1e9)
            left = 0
        self._socket.poll(None if left is None else left // 1_000_000)
        with suppress(zmq.Again):
            while True:
                received = wire.decode_to_engine(self._socket.recv(zmq.NOBLOCK))
                if isinstance(received, wire.Stop):
                    return False
                self._worker.receive(received.message, self.now())
        return True


def main() -> int:
    """Entry point of the process."""
    setup = msgspec.json.decode(sys.argv[1], type=wire.WorkerSetup)
    born_ns = time.monotonic_ns() - setup.start_ns
    if not follow_parent(setup.parent):
        return 1
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.IDENTITY, setup.executor.encode())
    socket.setsockopt(zmq.LINGER, 2000)
    socket.connect(setup.address)
    log = engine_logger(setup.executor, setup.log_level)
    try:
        loop = WorkerLoop(setup, socket)
        at = loop.now()
        socket.send(wire.encode(wire.StageDone(Stage.TE_PRE_LOAD, at, at - born_ns)))
        for stage in (Stage.TE_LOAD, Stage.TE_POST_LOAD):  # no weights, no KV cache
            socket.send(wire.encode(wire.StageDone(stage, at, 0)))
        socket.send(wire.encode(wire.Ready(at, 0, None)))
        log.info("ready", extra={"spec": msgspec.to_builtins(setup.spec), "slots": setup.slots})
        loop.run()
        log.info("told to stop")
        return 0
    except Exception as error:
        log.exception("crashed")
        socket.send(wire.encode(wire.Crashed(f"{type(error).__name__}: {error}")))
        return 1
    finally:
        socket.close()
        context.term()


if __name__ == "__main__":
    sys.exit(main())
