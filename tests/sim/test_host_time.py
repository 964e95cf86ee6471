"""Host time per step: serial where plans go one by one, hidden behind the device where they are in flight."""

import pytest

from cluster import events as ev
from cluster.request import Answer, Arrival, Request
from cluster.vocabulary import to_ns
from flowserve.core.config import EngineConfig
from sim.latency import Constant
from tests.builders import MODEL, Run, run_sim

STEP_S = 0.010


def serve(in_flight: int, host_step_s: float) -> Run:
    """Eight requests that decode 50 tokens each, together."""
    return run_sim(
        [Arrival(Request(number, 20, 60, MODEL), Answer(50)) for number in range(8)],
        engine=EngineConfig(kv_blocks=200, max_in_flight=in_flight),
        latency=lambda: Constant(STEP_S),
        host_step_s=host_step_s,
    )


@pytest.mark.parametrize(
    ("in_flight", "host_step_s", "gap_s"),
    [
        (1, 0.0, 0.010),
        (2, 0.0, 0.010),
        (1, 0.004, 0.014),
        (2, 0.004, 0.010),
        (3, 0.004, 0.010),
        (1, 0.025, 0.035),
        (2, 0.025, 0.025),
    ],
)
def test_the_scheduling_bubble(in_flight: int, host_step_s: float, gap_s: float) -> None:
    """One plan at a time: every token waits for host and device; with plans in flight, for whichever takes longer."""
    run = serve(in_flight, host_step_s)
    assert list(run.recorder.gaps) == [to_ns(gap_s)] * 8 * 49


def test_plans_in_flight_are_worth_the_bubble() -> None:
    """With as much host as device time a step, they double the throughput of decodes."""
    ends = {n: serve(n, STEP_S).of(ev.TaskFinished)[-1].occurred for n in (1, 2)}
    # The first request comes alone; the others get into the first plan behind those that are in flight by then.
    assert ends == {1: to_ns((1 + 50) * 2 * STEP_S), 2: to_ns((1 + 2 + 50) * STEP_S)}
