"""Scheduling ahead, lean messages, packing by change: decode throughput at a fixed TPOT, one version after the other.

DeepServe's three versions (arXiv 2501.14417, figure 3: 34B, TP 4; asynchronous scheduling and IPC gave more than twice
the throughput at a TPOT of 50 ms, data structures and sampling about a fifth more), as far as this engine can be put
back: v1 completes a plan before it schedules the next and sends a message for each token; v2 has two plans in flight
and sends one message a step; v3, the engine as it is, packs only what has changed. Each is an engine process of its
own, which serves a batch of sequences that decode together. Versions alternate.

On the CPU, host and device are the same two cores. So there is also a device that only takes its time, chosen for the
paper's setting (assumed: 17 GB of weights per NPU at 1.2 of the published 1.6 TB/s are 14 ms, and 2K tokens of KV
cache, 125 MB, 0.1 ms for each sequence; a model a tenth as large takes a tenth), while the host's work is the real one.
"""

import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from typing import NamedTuple

import numpy as np
import zmq

from cluster.events import TaskFinished
from cluster.request import Answer, Request, Task
from cluster.vocabulary import ExecutorSpec, Role, TaskKind
from experiments.bench.harness import machine
from experiments.bench.harness.result import Options as CommonOptions
from experiments.bench.harness.result import Row, median_row
from experiments.bench.harness.workload import VOCABULARY, checkpoint
from flowserve.core.config import EngineConfig
from flowserve.core.messages import Dispatch
from flowserve.core.outbox import Outbox
from flowserve.core.plan import Plan
from flowserve.ops.step import Ints
from flowserve.runtime import wire
from flowserve.runtime.engine_process import EngineLoop
from flowserve.runtime.intake import Taken
from flowserve.runtime.log import engine_logger
from flowserve.runtime.mover import Mover
from flowserve.runtime.null_runner import NullRunner
from flowserve.runtime.packing import PackedStep, Packer
from flowserve.runtime.runner import Payload, Runner
from flowserve.runtime.sampling import Sampling

PROMPT = 16
WARM, MEASURED = 12, 40
"""Decode steps of a batch: those in which its sequences come together, and those whose time counts."""


class Options(CommonOptions, frozen=True, kw_only=True):
    """`tpot_ms`: the limit in the paper's setting; `small_tpot_ms`: for the small model on such a device;
    `cpu_tpot_ms`: for a model on the CPU.
    """

    tpot_ms: float = 50.0
    small_tpot_ms: float = 5.0
    cpu_tpot_ms: float = 100.0


class Version(NamedTuple):
    """`lean`: one message a step. `by_change`: packing looks only at what has changed."""

    name: str
    in_flight: int
    lean: bool
    by_change: bool


VERSIONS = (Version("v1", 1, False, False), Version("v2", 2, True, False), Version("v3", 2, True, True))


class Device(NamedTuple):
    """`folder`: of the model, on the CPU; else a step takes `step_s` and `sequence_s` for each sequence that decodes.
    `batches`: where TPOT is measured; between them it is interpolated.
    """

    name: str
    batches: tuple[int, ...]
    folder: str | None = None
    step_s: float = 0.0
    sequence_s: float = 0.0


def run(options: Options) -> list[Row]:
    large = Device("34B, device timed", (256, 320, 384), step_s=14e-3, sequence_s=0.1e-3)
    small = Device("3.4B, device timed", (64, 128, 256, 384), step_s=1.4e-3, sequence_s=0.01e-3)
    cpu = Device("101 M on the CPU", (4, 16, 48), folder=str(checkpoint()))
    return [
        *_compare(large, options.tpot_ms, options.repeats),
        *_compare(small, options.small_tpot_ms, options.repeats),
        *_compare(cpu, options.cpu_tpot_ms, options.repeats),
    ]


def _compare(device: Device, limit_ms: float, repeats: int) -> Iterator[Row]:
    """Throughput of the first version, and what each of the others gains over the one before it."""
    found: dict[str, list[float]] = {version.name: [] for version in VERSIONS}
    tpots: dict[str, list[list[float]]] = {version.name: [] for version in VERSIONS}
    with _engines(device) as clients:
        for _ in range(repeats):
            measured: dict[str, list[float]] = {version.name: [] for version in VERSIONS}
            for batch in device.batches:
                for version, client in zip(VERSIONS, clients, strict=True):
                    measured[version.name].append(client.tpot_ms(batch))
            for name, times in measured.items():
                tpots[name].append(times)
                found[name].append(_batch_at(limit_ms, device.batches, times) / limit_ms * 1e3)
    for before, version in zip((None, *VERSIONS[:-1]), VERSIONS, strict=True):
        medians = np.median(tpots[version.name], axis=0)
        detail = ", ".join(f"{took:.1f} ms at {batch}" for batch, took in zip(device.batches, medians, strict=True))
        detail = f"{np.median(found[version.name]):.0f} tok/s; TPOT {detail}"
        if before is None:
            what = f"{device.name}: {version.name}, decode at TPOT {limit_ms:g} ms"
            yield median_row(what, found[version.name], "tok/s", detail)
        else:
            ratios = [a / b for a, b in zip(found[version.name], found[before.name], strict=True)]
            yield median_row(f"{device.name}: {version.name} / {before.name}", ratios, "x", detail)


def _batch_at(limit_ms: float, batches: Sequence[int], times_ms: Sequence[float]) -> float:
    """The batch whose TPOT is the limit, on the line through the two measured ones next to it; 1 to the largest."""
    place = min(max(int(np.searchsorted(times_ms, limit_ms)), 1), len(batches) - 1)
    (low, high), (first, last) = batches[place - 1 : place + 1], times_ms[place - 1 : place + 1]
    if last <= first:  # noise: more sequences took no longer
        return float(high if last <= limit_ms else low)
    return float(np.clip(low + (high - low) * (limit_ms - first) / (last - first), 1, batches[-1]))


# -- the client's side ---------------------------------------------------------------------------------------------


class _Client:
    """Dispatches batches to one engine process and takes what it says."""

    def __init__(self, socket: "zmq.Socket[bytes]", process: BaseProcess) -> None:
        self._socket = socket
        self._process = process
        self._tasks = 0
        assert isinstance(self._hear(), wire.Ready)

    def tpot_ms(self, batch: int) -> float:
        """Mean time between tokens while a whole batch decodes."""
        output = WARM + MEASURED
        for _ in range(batch):
            self._tasks += 1
            request = Request(self._tasks, PROMPT, output, "bench")
            tokens = np.random.default_rng(self._tasks).integers(0, VOCABULARY, PROMPT).tolist()
            payload = Payload(tokens, Sampling(ignore_eos=True), Answer(output))
            self._say(wire.Deliver(Dispatch("je", Task(self._tasks, request, TaskKind.SERVE)), payload))
        gaps: list[float] = []
        finished = taken = 0
        while finished < batch:
            message = self._hear()
            assert isinstance(message, wire.Output)
            taken += len(list(message.tokens or ()))
            for event in message.events:
                if isinstance(event, TaskFinished):
                    finished += 1
                    gaps += event.token_gaps_ns[WARM - 1 :]
        assert taken == batch * output
        return float(np.mean(gaps)) / 1e6

    def stop(self) -> None:
        self._say(wire.Stop())
        self._process.join()

    def _say(self, message: wire.ToEngine) -> None:
        self._socket.send_multipart([b"engine", wire.encode(message)])

    def _hear(self) -> wire.FromEngine:
        while not self._socket.poll(1000):
            if not self._process.is_alive():
                raise RuntimeError("the engine process has ended")
        message: wire.FromEngine = wire.decode_from_engine(self._socket.recv_multipart()[1])
        return message


@contextmanager
def _engines(device: Device) -> Iterator[list[_Client]]:
    """An engine process for each version; those that are not measured wait for messages."""
    spawn, context = multiprocessing.get_context("spawn"), zmq.Context()
    clients = []
    with tempfile.TemporaryDirectory(prefix="deepflow-") as folder:
        try:
            for version in VERSIONS:
                socket = context.socket(zmq.ROUTER)
                socket.setsockopt(zmq.LINGER, 0)
                address = f"ipc://{folder}/{version.name}"
                socket.bind(address)
                process = spawn.Process(target=_serve, args=(address, version, device), daemon=True)
                with machine.unpinned():  # a core for the host's part, one for the device's
                    process.start()
                clients.append(_Client(socket, process))
            yield clients
        finally:
            for client in clients:
                client.stop()
            context.destroy()


# -- the engine's side ---------------------------------------------------------------------------------------------


class _MessagePerToken(EngineLoop):
    """Sends each token by itself."""

    def _send(self, taken: Taken, outbox: Outbox) -> None:
        for task_id, index, token in taken.tokens or ():
            one = wire.Tokens.of(*(np.array([value]) for value in (task_id, index, token)))
            self._socket.send(wire.encode(wire.Output(one, [], [])))
        super()._send(taken._replace(tokens=None), outbox)


class _PackerAnew(Packer):
    """Looks at every sequence in every step, as if the decode batch had just come together."""

    def pack(self, plan: Plan, guesses: Sequence[Ints] = ()) -> PackedStep:
        self._place[:] = -1
        self._decodes = Packer(self._block_tokens)._decodes
        return super().pack(plan, guesses)


class _TimedRunner(NullRunner):
    """Packs what a model would get; then time passes."""

    def __init__(self, device: Device, packer: Packer) -> None:
        super().__init__(wire.NullDevice(vocab=VOCABULARY))
        self._timing = device
        self._packer = packer

    def add(self, task_id: int, payload: Payload) -> None:
        super().add(task_id, payload)
        self._packer.add(task_id, payload.tokens)

    def remove(self, task_id: int) -> None:
        super().remove(task_id)
        self._packer.remove(task_id)  # its row is not used again, which spares keeping count of plans in flight

    def launch(self, plan: Plan) -> None:
        self._packer.pack(plan)
        super().launch(plan)

    def step_s(self, plan: Plan) -> float:
        return self._timing.step_s + self._timing.sequence_s * plan.shape.decode_sequences


def _serve(address: str, version: Version, device: Device) -> None:
    """The engine process of one version."""
    most = max(device.batches)
    config = EngineConfig(
        kv_blocks=most * (PROMPT + WARM + MEASURED + 16) // 16,
        token_budget=most * PROMPT,
        max_sequences=most,
        max_in_flight=version.in_flight,
        prefix_cache=False,
    )
    packer = Packer(config.block_tokens) if version.by_change else _PackerAnew(config.block_tokens)
    runner: Runner
    if device.folder is None:
        runner = _TimedRunner(device, packer)
    else:
        from flowserve.runtime.torch_runner import TorchRunner

        runner = TorchRunner(device.folder, config)
        runner._packer = packer
    setup = wire.EngineSetup(
        executor="engine",
        spec=ExecutorSpec("bench", Role.COLOCATED),
        engine=config,
        device=wire.NullDevice(),
        address=address,
        start_ns=time.monotonic_ns(),
        report_to=(),
        report_period_ns=1_000_000_000,
        parent=os.getppid(),
    )
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.IDENTITY, b"engine")
    socket.connect(address)
    runner.warm_up()
    mover = Mover(runner.move)
    kind = EngineLoop if version.lean else _MessagePerToken
    loop = kind(setup, socket, runner, mover, None, engine_logger("engine", "error"))
    socket.send(wire.encode(wire.Ready(0, setup.engine.kv_blocks, None)))
    try:
        loop.run()
    finally:
        mover.close()
        runner.close()
        context.destroy(linger=0)
