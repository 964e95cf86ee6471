"""Queues near saturation: mean waits of the simulated cluster against closed forms (M/M/1, Crommelin's M/D/c).

An executor with one place in the batch and answers of one token is a server; the prompt length sets its service time.
With constant service, taking turns over c of them is the central queue with c servers.
"""

import cmath

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from cluster.client import Client
from cluster.control import ControlPlane
from cluster.job_executor import JobExecutor
from cluster.manager import ClusterManager, GroupPlan
from cluster.metrics import RequestTable, Window
from cluster.recorder import Recorder
from cluster.request import Answer, Arrival
from cluster.vocabulary import Outcome, to_ns
from flowserve.core.config import EngineConfig
from policies.dispatch.round_robin import RoundRobin
from policies.scaling.fixed import Fixed
from sim.cluster import SimCluster
from sim.latency import Constant
from sim.node import Node
from sim.topology import HostShape, Wire
from tests.builders import make_request, make_spec, no_stages

REQUESTS, BATCHES = 30_000, 30
TOKEN_S = 0.001
Floats = npt.NDArray[np.float64]


def simulated_waits(gaps_s: Floats, prompts: npt.NDArray[np.int64], servers: int, token_s: float = TOKEN_S) -> Floats:
    """Time to first token less the service, of every request in order of arrival; no decision log is written."""
    longest = int(prompts.max())
    node = Node(
        engine=EngineConfig(-(-longest // 1024) + 1, 1024, longest, 1, prefix_cache=False),
        latency=lambda: Constant(0.0, token_s),
        stages=no_stages(),
        kv_bytes_per_token=1,
        kv_segments=1,
        host=HostShape(Wire(1e9)),
    )
    workload = (
        Arrival(make_request(number, prompt, 1), Answer(1), at)
        for number, (prompt, at) in enumerate(zip(prompts.tolist(), map(to_ns, np.cumsum(gaps_s)), strict=True))
    )
    control = ControlPlane(
        Client(workload, ("je-0",), np.random.default_rng(0)),
        [JobExecutor("je-0", 0, RoundRobin())],
        ClusterManager((GroupPlan(make_spec(), servers, servers, servers),), Fixed(), ("je-0",)),
        Recorder(),
    )
    with SimCluster(("client", "je-0", "cm"), lambda spec: node, report_period_s=1e6) as cluster:
        control.drive(cluster)
    table = RequestTable(control.recorder, Window())
    assert set(table.outcome) == {str(Outcome.FINISHED)} and len(table) == len(prompts)
    order = np.argsort(table.columns["request_id"])
    return np.asarray((table.ttft - table.columns["prompt_tokens"] * token_s)[order])


def interval(waits: Floats) -> tuple[float, float]:
    """The 99 % confidence interval of the mean wait by batch means."""
    means = waits.reshape(BATCHES, -1).mean(axis=1)
    half = float(stats.t.ppf(0.995, BATCHES - 1) * means.std(ddof=1) / np.sqrt(BATCHES))
    return float(means.mean()) - half, float(means.mean()) + half


def md_c_wait(servers: int, rho: float) -> float:
    """Mean wait in M/D/c, in service times.

    Crommelin 1932: the generating function of the number of customers has the denominator z^c - exp(a (z - 1)), with
    a = c rho. Its c - 1 zeros z_k inside the unit circle, which the numerator must share, give the mean queue; Little's
    law the wait. Each zero is the fixed point of z = (k-th root of 1) x exp(a (z - 1) / c), a contraction.
    """
    load = servers * rho
    queue = (load**2 - servers * (servers - 1)) / (2 * (servers - load))
    for k in range(1, servers):
        zero = 0j
        for _ in range(2000):
            zero = cmath.exp(2j * cmath.pi * k / servers + rho * (zero - 1))
        queue += (1 / (1 - zero)).real
    return queue / load


def chain_wait(servers: int, rho: float) -> float:
    """The same by brute force: iterate the number of customers from one service time to the next."""
    load, size = servers * rho, 400
    arrivals = stats.poisson.pmf(np.arange(size), load)
    law = np.zeros(size)
    law[0] = 1.0
    for _ in range(3000):
        rest = np.concatenate([[law[: servers + 1].sum()], law[servers + 1 :]])
        law = np.convolve(rest, arrivals)[:size]
    return float(np.maximum(np.arange(size) - servers, 0) @ law) / load


@pytest.mark.parametrize("rho", [0.1, 0.5, 0.9])
def test_formula_for_one_server(rho: float) -> None:
    """With c = 1 it is Pollaczek and Khinchine's rho / (2 (1 - rho))."""
    assert md_c_wait(1, rho) == pytest.approx(rho / (2 * (1 - rho)), rel=1e-12)


@pytest.mark.parametrize(("servers", "rho"), [(2, 0.7), (2, 0.9), (4, 0.7), (4, 0.9)])
def test_formula_for_more_servers(servers: int, rho: float) -> None:
    """It is what iterating the queue itself gives."""
    assert md_c_wait(servers, rho) == pytest.approx(chain_wait(servers, rho), rel=1e-6)


@pytest.mark.parametrize("rho", [0.5, 0.8])
def test_m_m_1_wait(rho: float) -> None:
    """Poisson arrivals, exponential prompt lengths, one server: the mean wait is rho / (mu - lambda)."""
    rng = np.random.default_rng([1, round(100 * rho)])
    prompts = np.maximum(1, np.rint(rng.exponential(1000, REQUESTS))).astype(np.int64)
    mu = 1 / (1000 * TOKEN_S)
    low, high = interval(simulated_waits(rng.exponential(1 / (rho * mu), REQUESTS), prompts, 1))
    assert low <= rho / (mu - rho * mu) <= high


@pytest.mark.parametrize(("servers", "rho"), [(2, 0.7), (2, 0.9), (4, 0.7), (4, 0.9)])
def test_m_d_c_wait(servers: int, rho: float) -> None:
    """Poisson arrivals, equal prompts, c servers in turn: the mean wait of M/D/c."""
    rng = np.random.default_rng([servers, round(100 * rho)])
    prompts = np.full(REQUESTS, 1000)
    waits = simulated_waits(rng.exponential(1 / (rho * servers), REQUESTS), prompts, servers)
    low, high = interval(waits)
    assert low <= md_c_wait(servers, rho) <= high


def test_a_wrong_service_rate_is_noticed() -> None:
    """Executors a tenth slower than the formula assumes fall outside the interval, so the checks above can fail."""
    rng = np.random.default_rng(7)
    prompts, gaps = np.full(REQUESTS, 1000), rng.exponential(1 / (0.7 * 2), REQUESTS)
    low, high = interval(simulated_waits(gaps, prompts, 2, token_s=1.1 * TOKEN_S))
    assert not low <= md_c_wait(2, 0.7) <= high
    assert low <= 1.1 * md_c_wait(2, 0.77) <= high
