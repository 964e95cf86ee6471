"""One simulation of the `sim` benchmark, in this process: python -m experiments.bench.harness.sim_case NAME REQUESTS.

Prints a line of JSON, see `Measured`. In a process of its own, so that pure Python and the compiled core are compared
in one run.
"""

import csv
import resource
import sys
import time
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

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
from experiments.run import without_collector
from flowserve.core.config import EngineConfig
from policies.dispatch.deepflow import DeepFlow
from policies.dispatch.heat_map import HeatMap
from policies.dispatch.round_robin import RoundRobin
from policies.scaling.fixed import Fixed
from sim.cluster import SimCluster
from sim.latency import Fitted
from sim.node import Node
from sim.topology import HostShape, Wire
from traces.catalog import resolve

TRACE = "azure2023_conv"
MODEL = "8b"
RATE = 6.0
"""Requests per second and executor."""
PREFIXES, PREFIX_BLOCKS = 64, 16
"""Where prompts share prefixes: of how many, and how long each is."""
# Of the order of an 8B model on one card of about 300 TFLOPs and 1.6 TB/s; what a step takes is not what is measured.
STEP_NS = (6e6, 0.0, 2.6e4, 0.3, 0.0, 0.0, 2e4, 12.0)
KV_BYTES_PER_TOKEN = 131_072
KV_BLOCKS, TOKEN_BUDGET, MAX_SEQUENCES = 28_000, 512, 512


class Case(NamedTuple):
    """What is simulated: executors by role, and how requests are placed. `shared`: prompts share prefixes."""

    groups: tuple[tuple[Role, int], ...]
    aware: bool = False
    shared: bool = False

    @property
    def executors(self) -> int:
        return sum(count for _, count in self.groups)

    def policy(self) -> DispatchPolicy:
        """Round robin; or by prefix, else by load."""
        if not self.aware:
            return RoundRobin()
        return DeepFlow(HeatMap([0, 1_000_000], [0, 1_000_000], [[0.0, 0.0], [0.0, 0.0]], "bench"))


def colocated(executors: int, aware: bool = False, shared: bool = False) -> Case:
    return Case(((Role.COLOCATED, executors),), aware, shared)


CASES = {
    "w1": colocated(1),
    "w16": colocated(16),
    "w16, 6 prefill and 10 decode executors": Case(((Role.PREFILL, 6), (Role.DECODE, 10))),
    "w16, prefix-aware": colocated(16, aware=True, shared=True),
    **{f"{executors} executors": colocated(executors, aware=True) for executors in (10, 100, 1024)},
}


class Measured(msgspec.Struct, frozen=True):
    """Wall and CPU seconds from the first event to the last, what was simulated, and the process's peak memory."""

    wall_s: float
    cpu_s: float
    steps: int
    simulated_s: float
    peak_mib: float


def main(name: str, requests: int) -> None:
    print(msgspec.json.encode(simulate(requests, CASES[name])).decode())


@cache
def trace_lengths() -> list[tuple[int, int]]:
    """Of all prompts and answers of the trace, read once and ahead of what is measured."""
    with resolve(TRACE).open() as file:
        return [(int(prompt), max(1, int(output))) for _, prompt, output in list(csv.reader(file))[1:]]


def workload(requests: int, rate: float, shared: bool) -> Iterator[Arrival]:
    """The first requests of the trace, over again where it ends, as Poisson arrivals (seed 42).

    `shared`: prompts begin with one of a few prefixes.
    """
    lengths = trace_lengths()
    rng = np.random.default_rng(42)
    times = np.cumsum(rng.exponential(1 / rate, requests)) * NS_PER_S
    chosen = rng.integers(PREFIXES, size=requests)
    for number, at in enumerate(times):
        prompt, output = lengths[number % len(lengths)]
        ids = None
        if shared:
            blocks, first = prompt // BLOCK_TOKENS, int(chosen[number]) * PREFIX_BLOCKS
            own = (PREFIXES + number) << 20
            ids = (*range(first, first + min(blocks, PREFIX_BLOCKS)), *range(own, own + max(0, blocks - PREFIX_BLOCKS)))
        yield Arrival(Request(number, prompt, output, MODEL, ids), Answer(output), int(at))


def simulate(requests: int, case: Case) -> Measured:
    """The whole control plane and engine core, with every record."""
    engine = EngineConfig(kv_blocks=KV_BLOCKS, token_budget=TOKEN_BUDGET, max_sequences=MAX_SEQUENCES)
    node = Node(
        engine=engine,
        latency=lambda: Fitted(STEP_NS),
        stages=(),
        kv_bytes_per_token=KV_BYTES_PER_TOKEN,
        kv_segments=64,
        host=HostShape(Wire(25e9, 2e-5)),
    )
    plans = tuple(GroupPlan(ExecutorSpec(MODEL, role), count, count, count) for role, count in case.groups)
    recorder = Recorder()
    control = ControlPlane(
        Client(workload(requests, RATE * case.executors, case.shared), ("je-0",), np.random.default_rng(0)),
        [JobExecutor("je-0", 0, case.policy())],
        ClusterManager(plans, Fixed(), ("je-0",)),
        recorder,
    )
    trace_lengths()
    with without_collector():
        wall, cpu = time.perf_counter(), time.process_time()
        with SimCluster(("client", "je-0", "cm"), lambda spec: node) as cluster:
            control.drive(cluster)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            steps = sum(executor.steps for executor in cluster.executors.values())
    assert recorder.finished == requests
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10)
    return Measured(wall, cpu, steps, recorder.end_ns / NS_PER_S, peak)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
