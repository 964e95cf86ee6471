"""Batching engines and workers as queues: M/M/c, M/G/1-PS and closed networks, through the whole control plane.

Every mean is of independent replications: its 99.9 % confidence interval by Student's t must hold the theory's value,
so that a dozen of such intervals all do with 99 %. What is simulated differs from the theory by the length of a step,
some per mille of a service, which is far below the interval.

* A place in the batch is a server where a step takes the same time whatever is in it: an engine of c places is a
  central queue with c servers, an answer of n tokens a service of n steps.
* An engine shares its processor where a step takes a quantum per token: each of k sequences gets 1 / k of the steps'
  time, processor sharing in the limit of many quanta per service.
* A user who thinks, a batch of one place and a worker of one slot are the stations of a closed network.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from cluster.client import Client
from cluster.control import ControlPlane
from cluster.job_executor import JobExecutor
from cluster.jobs.executor import WorkJobExecutor
from cluster.latency import LatencyModel
from cluster.manager import ClusterManager
from cluster.recorder import Recorder
from cluster.request import Answer, Arrival, Trigger
from cluster.vocabulary import NS_PER_S, WORKERS, Outcome, Role, to_ns
from cluster.work import WORK, AnyArrival
from flowserve.core.config import EngineConfig
from policies.dispatch.round_robin import RoundRobin
from policies.scaling.fixed import Fixed
from sim.cluster import SimCluster
from sim.latency import Constant, Fitted
from sim.node import Node, WorkNode
from sim.topology import HostShape, Wire
from tests.builders import disaggregated, make_agent, make_request, no_stages, simple_times, workers

QUANTUM_S = 0.001
TOKENS = 100
"""Mean of an answer: services are so many steps or quanta long."""
SERVICE_S = QUANTUM_S * TOKENS
REPLICATIONS = 10
WARM_UP = 0.1
"""Share of each replication that is left out: it begins with an empty system."""

Floats = npt.NDArray[np.float64]


@dataclass
class Station:
    """What a run is made of: the engine's places, its latency model, a worker's slots."""

    places: int
    latency: Callable[[], LatencyModel]
    slots: int = 1


def simulate(workload: Sequence[AnyArrival], station: Station) -> tuple[Recorder, WorkJobExecutor]:
    """One run, to its end; no decision log is written."""
    node = Node(
        engine=EngineConfig(
            station.places * 1000,
            token_budget=station.places + 64,
            max_sequences=station.places,
            prefix_cache=False,
            allocator="stack",
            watermark=0.0,
        ),
        latency=station.latency,
        stages=no_stages(),
        kv_bytes_per_token=1,
        kv_segments=1,
        host=HostShape(Wire(1e9)),
    )
    worker = WorkNode(station.slots, simple_times)
    work = WorkJobExecutor(("je-0",))
    groups = (*disaggregated(0, 0, 1), *workers(1))
    control = ControlPlane(
        Client(workload, ("je-0",), np.random.default_rng(0), closed_loop=True),
        [JobExecutor("je-0", 0, RoundRobin())],
        ClusterManager(groups, Fixed(), ("je-0",)),
        Recorder(),
        work,
    )
    actors = ("client", "je-0", "cm", WORK)
    with SimCluster(actors, lambda spec: worker if spec.role in WORKERS else node, report_period_s=1e6) as cluster:
        control.drive(cluster)
    assert set(control.recorder.outcomes) <= {str(Outcome.FINISHED)}
    return control.recorder, work


def in_order(recorder: Recorder, name: str) -> npt.NDArray[np.int64]:
    """A column of the records, in order of request id."""
    order = np.argsort(recorder.requests["request_id"])
    return recorder.requests[name][order]


def open_loop(rng: np.random.Generator, rate: float, tokens: npt.NDArray[np.int64]) -> list[Arrival]:
    """Poisson arrivals at `rate` per second, with answers of so many tokens."""
    times = np.cumsum(rng.exponential(1 / rate, len(tokens))).tolist()
    return [
        Arrival(make_request(number, 1, count), Answer(count), to_ns(at))
        for number, (at, count) in enumerate(zip(times, tokens.tolist(), strict=True))
    ]


def settled(values: Floats) -> float:
    """The mean behind the warm-up."""
    return float(values[int(WARM_UP * len(values)) :].mean())


def interval(means: Sequence[float]) -> tuple[float, float]:
    """The 99.9 % confidence interval of the mean of independent replications."""
    values = np.array(means)
    half = float(stats.t.ppf(0.9995, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))
    return float(values.mean()) - half, float(values.mean()) + half


def geometric(rng: np.random.Generator, count: int) -> npt.NDArray[np.int64]:
    """The discrete exponential distribution."""
    return rng.geometric(1 / TOKENS, count)


def constant(rng: np.random.Generator, count: int) -> npt.NDArray[np.int64]:
    return np.full(count, TOKENS)


def hyperexponential(rng: np.random.Generator, count: int) -> npt.NDArray[np.int64]:
    """Two exponentials with balanced means and a squared coefficient of variation of 4."""
    share = (1 + math.sqrt(3 / 5)) / 2
    means = np.where(rng.random(count) < share, TOKENS / (2 * share), TOKENS / (2 * (1 - share)))
    return np.maximum(1, np.rint(rng.exponential(means))).astype(np.int64)


# -- M/M/c --------------------------------------------------------------------------------------------------------


def erlang_c(servers: int, load: float) -> float:
    """The probability of waiting in M/M/c (Erlang 1917): `load` = arrival rate x mean service < servers."""
    below = sum(load**k / math.factorial(k) for k in range(servers))
    full = load**servers / math.factorial(servers) * servers / (servers - load)
    return full / (below + full)


@pytest.mark.parametrize(("servers", "rho"), [(1, 0.6), (4, 0.8), (16, 0.9)])
def test_m_m_c(servers: int, rho: float) -> None:
    """Probability of waiting: Erlang C; mean wait: C / (c mu - lambda)."""
    waits, waited = [], []
    station = Station(servers, lambda: Constant(QUANTUM_S))
    for replication in range(REPLICATIONS):
        rng = np.random.default_rng([11, servers, replication])
        recorder, _ = simulate(open_loop(rng, rho * servers / SERVICE_S, geometric(rng, 1200)), station)
        # From arrival to the first token: the wait, then the step that computes it. Who finds a free place waits for
        # the step in progress alone.
        first = (in_order(recorder, "first_token_ns") - in_order(recorder, "arrival_ns")) / NS_PER_S - QUANTUM_S
        waits.append(settled(first))
        waited.append(settled((first > QUANTUM_S).astype(float)))
    probability = erlang_c(servers, rho * servers)
    low, high = interval(waited)
    assert low <= probability <= high
    low, high = interval(waits)
    assert low <= probability * SERVICE_S / (servers * (1 - rho)) + QUANTUM_S / 2 <= high


def test_erlang_c_of_one_server_is_its_load() -> None:
    """With one server the probability of waiting is rho; with two, 2 rho^2 / (1 + rho)."""
    assert erlang_c(1, 0.7) == pytest.approx(0.7)
    assert erlang_c(2, 1.4) == pytest.approx(2 * 0.7**2 / 1.7)


# -- M/G/1-PS -----------------------------------------------------------------------------------------------------


def processor_sharing() -> LatencyModel:
    """A step takes one quantum for each token in it, whoever's it is."""
    quantum_ns = QUANTUM_S * NS_PER_S
    named = dict.fromkeys(Fitted.FEATURES, 0.0) | {"prefill_tokens": quantum_ns, "decode_sequences": quantum_ns}
    return Fitted(list(named.values()))


def shared_sojourns(
    draw: Callable[[np.random.Generator, int], npt.NDArray[np.int64]], rho: float, latency: Callable[[], LatencyModel]
) -> list[float]:
    """Mean time in the system per replication."""
    means = []
    for replication in range(REPLICATIONS):
        rng = np.random.default_rng([12, replication])
        workload = open_loop(rng, rho / SERVICE_S, draw(rng, 1000))
        recorder, _ = simulate(workload, Station(200, latency))
        means.append(settled((in_order(recorder, "last_token_ns") - in_order(recorder, "arrival_ns")) / NS_PER_S))
    return means


@pytest.mark.parametrize("draw", [geometric, constant, hyperexponential])
def test_m_g_1_ps(draw: Callable[[np.random.Generator, int], npt.NDArray[np.int64]]) -> None:
    """Mean response E[S] / (1 - rho), whatever the distribution of the service (insensitivity)."""
    low, high = interval(shared_sojourns(draw, 0.6, processor_sharing))
    assert low <= SERVICE_S / (1 - 0.6) <= high


def test_a_batch_that_costs_something_is_no_processor_sharing() -> None:
    """Steps that take a tenth of a quantum longer fall outside the interval, so the check above can fail."""

    def slower() -> LatencyModel:
        quantum_ns = 1.1 * QUANTUM_S * NS_PER_S
        return Fitted([0.0, 0.0, quantum_ns, 0.0, 0.0, 0.0, quantum_ns, 0.0])

    low, high = interval(shared_sojourns(constant, 0.6, slower))
    assert not low <= SERVICE_S / (1 - 0.6) <= high
    assert low <= 1.1 * SERVICE_S / (1 - 0.66) <= high


# -- closed networks ----------------------------------------------------------------------------------------------


def mean_value_analysis(users: int, think_s: float, services_s: Sequence[float]) -> tuple[float, float]:
    """(throughput per second, time at the stations per round) of a closed product-form network of single servers.

    Reiser and Lavenberg 1980: a user who arrives sees the network with one user less, R_k(n) = S_k (1 + Q_k(n - 1)),
    X(n) = n / (Z + sum R_k(n)), Q_k(n) = X(n) R_k(n).
    """
    queues = [0.0] * len(services_s)
    throughput, there = 0.0, 0.0
    for present in range(1, users + 1):
        responses = [service * (1 + queue) for service, queue in zip(services_s, queues, strict=True)]
        there = sum(responses)
        throughput = present / (think_s + there)
        queues = [throughput * response for response in responses]
    return throughput, there


USERS, ROUNDS, THINK_S = 8, 125, 0.5


def users(rng: np.random.Generator, make: Callable[..., Any]) -> list[AnyArrival]:
    """Each user asks, waits for the end, thinks, and asks again; `make(number, round, user, at_ns, after)`."""
    rows = []
    for turn in range(ROUNDS):
        for user in range(USERS):
            number, think = turn * USERS + user, to_ns(rng.exponential(THINK_S))
            after = None if turn == 0 else Trigger("ended", request_id=number - USERS, delay_ns=think)
            rows.append((think if after is None else 0, number, after))
    first = sorted(at for at, _, after in rows if after is None)
    return [make(number, first[number] if after is None else 0, after) for _, number, after in rows]


def test_a_closed_network_of_users_and_an_engine() -> None:
    """Users who think, and one engine that serves them one at a time: throughput and response are those of MVA."""
    throughputs, responses = [], []
    for replication in range(REPLICATIONS):
        rng = np.random.default_rng([13, replication])
        tokens = geometric(rng, USERS * ROUNDS).tolist()

        def ask(number: int, at_ns: int, after: Trigger | None, tokens: list[int] = tokens) -> Arrival:
            return Arrival(make_request(number, 1, tokens[number]), Answer(tokens[number]), at_ns, after)

        recorder, _ = simulate(users(rng, ask), Station(1, lambda: Constant(QUANTUM_S)))
        ends, arrivals = in_order(recorder, "last_token_ns"), in_order(recorder, "arrival_ns")
        responses.append(settled((ends - arrivals) / NS_PER_S))
        throughputs.append(rate_of(ends))
    throughput, response = mean_value_analysis(USERS, THINK_S, [SERVICE_S])
    low, high = interval(throughputs)
    assert low <= throughput <= high
    low, high = interval(responses)
    assert low <= response <= high


def test_a_closed_network_of_agents_with_tools() -> None:
    """Agents whose users think, one place at the engine and one slot for tools: two stations, and MVA's times."""
    throughputs, responses = [], []
    tool_s = 0.08
    for replication in range(REPLICATIONS):
        rng = np.random.default_rng([14, replication])
        tokens = geometric(rng, USERS * ROUNDS).tolist()
        tools = rng.exponential(tool_s, USERS * ROUNDS).tolist()

        def ask(
            number: int,
            at_ns: int,
            after: Trigger | None,
            tokens: list[int] = tokens,
            tools: list[float] = tools,
        ) -> AnyArrival:
            return make_agent(number, [(1, tokens[number])], [tools[number]], at_s=at_ns / NS_PER_S, after=after)

        _, work = simulate(users(rng, ask), Station(1, lambda: Constant(QUANTUM_S)))
        rows = sorted(work.recorder.rows, key=lambda row: row.request_id)
        ends = np.array([row.ended_ns for row in rows])
        responses.append(settled((ends - np.array([row.started_ns for row in rows])) / NS_PER_S))
        throughputs.append(rate_of(ends))
        assert len(work.recorder.waits[Role.CPU]) == USERS * ROUNDS
    throughput, response = mean_value_analysis(USERS, THINK_S, [SERVICE_S, tool_s])
    low, high = interval(throughputs)
    assert low <= throughput <= high
    low, high = interval(responses)
    assert low <= response <= high


def rate_of(ends_ns: npt.NDArray[np.int64]) -> float:
    """Ends per second between the first and the last tenth of them, while all users are there."""
    ends = np.sort(ends_ns)
    low, high = int(WARM_UP * len(ends)), int((1 - WARM_UP) * len(ends))
    return float((high - low) / ((ends[high] - ends[low]) / NS_PER_S))


def test_mean_value_analysis_of_one_user_is_no_queue() -> None:
    """Alone, a user meets nobody; with many, the slowest station sets the rate."""
    assert mean_value_analysis(1, 1.0, [0.2, 0.3]) == pytest.approx((1 / 1.5, 0.5))
    assert mean_value_analysis(500, 1.0, [0.2, 0.3])[0] == pytest.approx(1 / 0.3, rel=1e-3)
