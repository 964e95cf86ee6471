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
from sim.contention import Contention, Shared
from sim.latency import Constant, Fitted
from sim.node import Node
from sim.profile import Shares, alone, contention_of, fit
from sim.topology import HostShape, Wire

ENGINE = EngineConfig(kv_blocks=100, max_sequences=8)


TRUTH = Contention(0.25, 0.1, 0.0, 0.15)


def measured(contention: Contention, ever_alone: bool = True) -> tuple[list[tuple[StepShape, int]], list[Shares]]:
    """Steps of an engine beside which another one decodes, computes prompts, or does nothing."""
    rng = np.random.default_rng(3)
    truth = Fitted([1_000_000, 500_000, 40_000, 0, 0, 0, 200_000, 500])
    steps, busy = [], []
    for _ in range(1200):
        decodes, prefill = int(rng.integers(1, 9)), int(rng.integers(0, 2)) * int(rng.integers(1, 65))
        shape = StepShape(prefill, prefill * (prefill + 1) // 2, int(prefill > 0), decodes, decodes * 100)
        shares = (Shares(0.0, 1.0), Shares(1.0, 0.0), Shares(0.0, 0.0))[int(rng.integers(3)) if ever_alone else 0]
        by_decode, by_prefill = contention.by(prefill > 0)
        slower = 1 + by_decode * shares.decode + by_prefill * shares.prefill
        steps.append((shape, round(truth.step_ns(shape) * slower)))
        busy.append(shares)
    return steps, busy


@pytest.mark.parametrize("contention", [Contention(), TRUTH])
def test_a_profile_tells_contention_from_the_steps_themselves(contention: Contention) -> None:
    """The shares are found again, by kind of step, and with them the times of an engine that computes alone."""
    steps, busy = measured(contention)
    found = contention_of(steps, busy, [0] * len(steps))
    for field in Contention.__struct_fields__:
        assert getattr(found, field) == pytest.approx(getattr(contention, field), abs=0.01)
    model = fit(alone(steps, busy, found))
    quiet = [(shape, took) for (shape, took), shares in zip(steps, busy, strict=True) if shares == (0, 0)]
    assert max(abs(model.step_ns(shape) / took - 1) for shape, took in quiet) < 0.02


def test_a_slow_process_is_not_contention() -> None:
    """One engine is slower than the other whatever that one does: steps are compared within a process only."""
    steps, busy = measured(Contention())
    engines = [int(shares.decode > 0 or number % 3 == 0) for number, shares in enumerate(busy)]
    slower = [(shape, round(took * (1 + 0.2 * engine))) for (shape, took), engine in zip(steps, engines, strict=True)]
    assert contention_of(slower, busy, engines).decode_by_decode < 0.03
    assert contention_of(slower, busy, [0] * len(steps)).decode_by_decode > 0.1


def test_engines_that_are_never_alone_show_no_contention() -> None:
    """Without steps of both kinds there is nothing to compare."""
    steps, busy = measured(TRUTH, ever_alone=False)
    assert contention_of(steps, busy, [0] * len(steps)) == Contention()


class Engine:
    """Notes when its step is said to end."""

    def __init__(self) -> None:
        self.ends: list[int] = []

    def retime(self, end: int) -> None:
        self.ends.append(end)


def test_steps_go_on_slower_while_others_compute() -> None:
    """A step of 100 ns of decodes, beside which another one decodes for a while, then computes prompts, then rests."""
    one, other = Engine(), Engine()
    shared = Shared(lambda engine: TRUTH if engine is one else Contention())
    assert shared.begin(one, False, 0, 100) == 100
    assert shared.begin(other, False, 20, 1000) == 1020
    assert one.ends[-1] == 120  # 80 left, a quarter longer
    assert shared.begin(other, True, 70, 1000) == 1070
    assert one.ends[-1] == 70 + 44  # 40 left, a tenth longer
    shared.idle(other, 92)
    assert one.ends[-1] == 92 + 20
    assert other.ends == []
    assert shared.begin(one, False, 112, 50) == 162
    assert shared.extend(one, 122, 30) == 192


def test_a_number_is_contention_of_every_kind() -> None:
    """So a YAML file may say one share, or four; negative ones are refused by name."""
    assert Contention.of(0.2) == Contention(0.2, 0.2, 0.2, 0.2)
    assert Contention.of(TRUTH) is TRUTH
    with pytest.raises(ValueError, match=r"contention.prefill_by_decode is -1: allowed are 0"):
        Contention(0, 0, -1, 0)


def test_two_busy_executors_take_longer_each() -> None:
    """A step that starts while another executor computes takes the stated share longer; alone it does not."""
    times = {}
    for contention in (0.0, 0.5):
        node = Node(ENGINE, lambda: Constant(0.01), [], 1000, 1, HostShape(Wire(1e9)), Contention.of(contention))
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
