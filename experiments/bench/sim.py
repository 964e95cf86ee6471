"""How fast the simulator is: requests simulated per second of CPU time, from the first event to the last.

Lengths of the Azure 2023 conversation trace in file order, Poisson arrivals, an 8B model on engines with chunked
prefill and prefix cache.

A peer on the same requests, which simulates a server of its own: the mocker of NVIDIA Dynamo, compiled from Rust. It
needs an environment to itself, `python -m venv ENV; ENV/bin/pip install ai-dynamo==1.4.2`, and `dynamo=ENV/bin/python`;
its rate is of its own wall time for the loop. Without the argument the row is left out.
"""

import csv
import gc
import resource
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import numpy as np

from cluster.client import Client
from cluster.control import ControlPlane
from cluster.job_executor import JobExecutor
from cluster.manager import ClusterManager, GroupPlan
from cluster.policy import DispatchPolicy
from cluster.recorder import Recorder
from cluster.request import Answer, Arrival, Request
from cluster.vocabulary import BLOCK_TOKENS, NS_PER_S, ExecutorSpec, Role
from experiments.bench.harness.result import Options as CommonOptions
from experiments.bench.harness.result import Row, median_row
from flowserve.core.config import EngineConfig
from policies.dispatch.deepflow import DeepFlow
from policies.dispatch.heat_map import HeatMap
from policies.dispatch.round_robin import RoundRobin
from policies.scaling.fixed import Fixed
from sim.cluster import Node, SimCluster
from sim.latency import Fitted
from sim.link import Link
from traces.catalog import find, resolve

TRACE = "azure2023_conv"
MODEL = "8b"
RATE = 6.0
"""Requests per second and executor."""
PREFIXES, PREFIX_BLOCKS = 64, 16
"""Where prompts share prefixes: of how many, and how long each is."""
# Of the order of an 8B model on one card of about 300 TFLOPs and 1.6 TB/s; what a step takes is not what is measured.
STEP_NS = (6e6, 0.0, 2.6e4, 0.3, 0.0, 0.0, 2e4, 12.0)
KV_BYTES_PER_TOKEN = 131_072
COLOCATED = ((Role.COLOCATED, 16),)


class Options(CommonOptions, frozen=True, kw_only=True):
    """`requests`: in every run but that of a single executor, which gets an eighth. `dynamo`: see above."""

    requests: int = 16_000
    dynamo: str | None = None


def missing(options: Options) -> str | None:
    """Why it cannot run here."""
    return None if find(TRACE) is not None else f"there is no trace {TRACE}: deepflow traces list says where it belongs"


def run(options: Options) -> list[Row]:
    count = options.requests
    cases = [
        ("1 executor", count // 8, ((Role.COLOCATED, 1),), RoundRobin),
        ("16 executors", count, COLOCATED, RoundRobin),
        ("6 prefill, 10 decode, 25 GB/s between them", count, ((Role.PREFILL, 6), (Role.DECODE, 10)), RoundRobin),
        ("16 executors, prefix-aware, shared prompts", count, COLOCATED, _prefix_aware),
        ("64 executors", count, ((Role.COLOCATED, 64),), RoundRobin),
        ("256 executors", count, ((Role.COLOCATED, 256),), RoundRobin),
        ("1024 executors", count, ((Role.COLOCATED, 1024),), RoundRobin),
    ]
    rows = []
    for name, requests, groups, policy in cases:
        measured = [_simulate(requests, groups, policy()) for _ in range(options.repeats)]
        rates, details = [rate for rate, _ in measured], measured[-1][1]
        rows.append(median_row(f"w16, {name}" if requests == count else f"w1, {name}", rates, "requests/s", details))
    if options.dynamo is not None:
        rates = [_dynamo(options.dynamo, count) for _ in range(options.repeats)]
        rows.append(median_row("peer on w16: Dynamo mocker, 16 workers", rates, "requests/s", "round robin, wall time"))
    unit = 1024 if sys.platform == "darwin" else 1
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit / 1024
    return [*rows, Row(name="peak memory of the whole process", value=peak, unit="MiB", at_most=500)]


def _prefix_aware() -> DispatchPolicy:
    return DeepFlow(HeatMap([0, 1_000_000], [0, 1_000_000], [[0.0, 0.0], [0.0, 0.0]], "bench"))


def _dynamo(python: str, requests: int) -> float:
    """Requests per second of its loop. Raises CalledProcessError: it cannot run."""
    engine = {"num_gpu_blocks": 28_000, "block_size": BLOCK_TOKENS, "max_num_batched_tokens": 512, "max_num_seqs": 512}
    with TemporaryDirectory() as folder:
        trace, report, first = Path(folder, "trace.jsonl"), Path(folder, "report.json"), 0
        with trace.open("wb") as file:
            for arrival in workload(requests, 16 * RATE, False):
                blocks = -(-arrival.request.prompt_tokens // BLOCK_TOKENS)
                row = {
                    "timestamp": arrival.at_ns / 1e6,
                    "input_length": arrival.request.prompt_tokens,
                    "output_length": arrival.answer.output_tokens,
                    "hash_ids": list(range(first, first + blocks)),
                }
                file.write(msgspec.json.encode(row) + b"\n")
                first += blocks
        arguments = f"--trace-format mooncake --trace-block-size {BLOCK_TOKENS} --replay-mode offline --num-workers 16"
        command = [python, "-m", "dynamo.replay", str(trace), *arguments.split(), "--router-mode", "round_robin"]
        command += ["--extra-engine-args", msgspec.json.encode(engine).decode(), "--report-json", str(report)]
        subprocess.run(command, check=True, capture_output=True, cwd=folder)
        wall_ms: float = msgspec.json.decode(report.read_bytes())["wall_time_ms"]
        return requests / wall_ms * 1e3


def workload(requests: int, rate: float, shared: bool) -> list[Arrival]:
    """The first requests of the trace, over again where it ends. `shared`: prompts begin with one of a few prefixes."""
    with resolve(TRACE).open() as file:
        lengths = [(int(prompt), max(1, int(output))) for _, prompt, output in list(csv.reader(file))[1:]]
    rng = np.random.default_rng(42)
    times = np.cumsum(rng.exponential(1 / rate, requests)) * NS_PER_S
    chosen = rng.integers(PREFIXES, size=requests)
    arrivals = []
    for number, at in enumerate(times):
        prompt, output = lengths[number % len(lengths)]
        ids = None
        if shared:
            blocks, first = prompt // BLOCK_TOKENS, int(chosen[number]) * PREFIX_BLOCKS
            own = (PREFIXES + number) << 20
            ids = (*range(first, first + min(blocks, PREFIX_BLOCKS)), *range(own, own + max(0, blocks - PREFIX_BLOCKS)))
        arrivals.append(Arrival(Request(number, prompt, output, MODEL, ids), Answer(output), int(at)))
    return arrivals


def _simulate(requests: int, groups: tuple[tuple[Role, int], ...], policy: DispatchPolicy) -> tuple[float, str]:
    """(requests per second of CPU time, what was simulated)."""
    executors = sum(count for _, count in groups)
    arrivals = workload(requests, RATE * executors, not isinstance(policy, RoundRobin))
    engine = EngineConfig(kv_blocks=28_000, token_budget=512, max_sequences=512)
    node = Node(
        engine=engine,
        latency=lambda: Fitted(STEP_NS),
        stages=(),
        kv_bytes_per_token=KV_BYTES_PER_TOKEN,
        kv_segments=64,
        link=lambda: Link(25e9, 2e-5, 0.0),
    )
    plans = tuple(GroupPlan(ExecutorSpec(MODEL, role), count, count, count) for role, count in groups)
    recorder = Recorder()
    control = ControlPlane(
        Client(arrivals, ("je-0",), np.random.default_rng(0)),
        [JobExecutor("je-0", 0, policy)],
        ClusterManager(plans, Fixed(), ("je-0",)),
        recorder,
    )
    gc.collect()
    start = time.process_time()  # CPU, as others may use the machine too
    with SimCluster(("client", "je-0", "cm"), lambda spec: node) as cluster:
        control.drive(cluster)
        seconds = time.process_time() - start
        steps = sum(executor.steps for executor in cluster.executors.values())
    simulated = recorder.end_ns / NS_PER_S
    said = f"{requests} requests, {steps} steps, {simulated:.0f} s simulated: {simulated / seconds:.0f} times real time"
    return requests / seconds, said
