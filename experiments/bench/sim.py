"""How fast the simulator is: requests simulated per second of CPU time, from the first event to the last.

Lengths of the Azure 2023 conversation trace in file order, Poisson arrivals, an 8B model on engines with chunked
prefill and prefix cache. What others reach on the same requests, each simulating its own server: docs/log.md.
"""

import csv
import gc
import resource
import sys
import time

import numpy as np

from cluster.client import Client
from cluster.control import ControlPlane
from cluster.job_executor import JobExecutor
from cluster.manager import ClusterManager, GroupPlan
from cluster.metrics import Recorder
from cluster.policy import DispatchPolicy
from cluster.request import Answer, Arrival, Request
from cluster.vocabulary import BLOCK_TOKENS, NS_PER_S, ExecutorSpec, Role
from experiments.bench.harness.result import Options as CommonOptions
from experiments.bench.harness.result import Row, median_row
from flowserve.core.scheduler import EngineConfig
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
    """`requests`: of the runs with 16 executors; more executors get more, a single one an eighth."""

    requests: int = 16_000


def missing(options: Options) -> str | None:
    """Why it cannot run here."""
    return None if find(TRACE) is not None else f"there is no trace {TRACE}: deepflow traces list says where it belongs"


def run(options: Options) -> list[Row]:
    count = options.requests
    prefix_aware = DeepFlow(HeatMap([0, 1_000_000], [0, 1_000_000], [[0.0, 0.0], [0.0, 0.0]], "bench"))
    cases = [
        ("1 executor", count // 8, ((Role.COLOCATED, 1),), None),
        ("16 executors", count, COLOCATED, None),
        ("6 prefill, 10 decode, 25 GB/s between them", count, ((Role.PREFILL, 6), (Role.DECODE, 10)), None),
        ("16 executors, prefix-aware, shared prompts", count, COLOCATED, prefix_aware),
        ("64 executors", count, ((Role.COLOCATED, 64),), None),
        ("256 executors", count, ((Role.COLOCATED, 256),), None),
        ("1024 executors", count, ((Role.COLOCATED, 1024),), None),
    ]
    rows = []
    for name, requests, groups, policy in cases:
        measured = [_simulate(requests, groups, policy or RoundRobin()) for _ in range(options.repeats)]
        rates, details = [rate for rate, _ in measured], measured[-1][1]
        rows.append(median_row(f"w16, {name}" if requests == count else f"w1, {name}", rates, "requests/s", details))
    unit = 1024 if sys.platform == "darwin" else 1
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit / 1024
    return [*rows, Row(name="peak memory of the whole process", value=peak, unit="MiB", at_most=500)]


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
