"""Engines that share a memory slow each other down, and a profile tells by how much."""

import numpy as np
import pytest

from cluster.client import Client
from cluster.control import ControlPlane
from cluster.job_executor import JobExecutor
from cluster.latency import StepShape
from cluster.manager import ClusterManager, GroupPlan
from cluster.recorder import Recorder
from cluster.request import Answer, Arrival, Request
from cluster.streams import stream
from cluster.vocabulary import ExecutorSpec, Role
from flowserve.core.config import EngineConfig
from policies.dispatch.round_robin import RoundRobin
from policies.scaling.fixed import Fixed
from sim.cluster import SimCluster
from sim.latency import Constant, Fitted
from sim.node import Node
from sim.profile import alone, contention_of, fit
from sim.topology import HostShape, Wire

ENGINE = EngineConfig(kv_blocks=100, max_sequences=8)


def measured(contention: float) -> tuple[list[tuple[StepShape, int]], list[float]]:
    """Steps of an engine that the other one slows down half of the time."""
    rng = np.random.default_rng(3)
    truth = Fitted([1_000_000, 500_000, 40_000, 0, 0, 0, 200_000, 500])
    steps, busy = [], []
    for _ in range(600):
        decodes, prefill = int(rng.integers(1, 9)), int(rng.integers(0, 2)) * int(rng.integers(1, 65))
        shape = StepShape(prefill, prefill * (prefill + 1) // 2, int(prefill > 0), decodes, decodes * 100)
        share = float(rng.integers(0, 2))
        steps.append((shape, round(truth.step_ns(shape) * (1 + contention * share))))
        busy.append(share)
    return steps, busy


@pytest.mark.parametrize("contention", [0.0, 0.25])
def test_a_profile_tells_contention_from_the_steps_themselves(contention: float) -> None:
    """The share is found again, and with it the times of an engine that computes alone."""
    steps, busy = measured(contention)
    found = contention_of(steps, busy)
    assert found == pytest.approx(contention, abs=0.01)
    model = fit(alone(steps, busy, found))
    quiet = [(shape, took) for (shape, took), share in zip(steps, busy, strict=True) if not share]
    assert max(abs(model.step_ns(shape) / took - 1) for shape, took in quiet) < 0.02


def test_engines_that_are_never_alone_show_no_contention() -> None:
    """Without steps of both kinds there is nothing to compare."""
    steps, _ = measured(0.25)
    assert contention_of(steps, [1.0] * len(steps)) == 0.0


def test_two_busy_executors_take_longer_each() -> None:
    """A step that starts while another executor computes takes the stated share longer; alone it does not."""
    times = {}
    for contention in (0.0, 0.5):
        node = Node(ENGINE, lambda: Constant(0.01), [], 1000, 1, HostShape(Wire(1e9)), contention)
        for executors in (1, 2):
            recorder = Recorder()
            groups = (GroupPlan(ExecutorSpec("m", Role.COLOCATED), executors, executors, executors),)
            requests = [Arrival(Request(n, 10, 64, "m"), Answer(11)) for n in range(executors)]
            control = ControlPlane(
                Client(requests, ("je-0",), stream(0, "client")),
                [JobExecutor("je-0", 0, RoundRobin())],
                ClusterManager(groups, Fixed(), ("je-0",)),
                recorder,
            )
            with SimCluster(["client", "je-0", "cm"], lambda _, node=node: node) as cluster:
                control.drive(cluster)
            times[contention, executors] = list(recorder.gaps)
    assert set(times[0.0, 1]) == set(times[0.0, 2]) == set(times[0.5, 1]) == {10_000_000}
    assert set(times[0.5, 2]) == {15_000_000}
