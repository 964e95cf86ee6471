"""A step of more or fewer rows than the one before takes longer, however simulated steps are put together."""

import pytest

from cluster.latency import LatencyModel, StepShape
from flowserve.core.config import EngineConfig
from sim.latency import Constant
from sim.noise import Noise, Noisy
from tests.builders import make_arrival, run_sim

STEP_NS, RESHAPE_NS = 1_000_000, 400_000


class Reshaping(LatencyModel):
    """A millisecond, and more where the number of rows changes."""

    reshape_ns = RESHAPE_NS

    def step_ns(self, shape: StepShape) -> int:
        return STEP_NS


@pytest.mark.parametrize("coalesce", [True, False])
def test_each_change_of_rows_is_paid_once(coalesce: bool) -> None:
    """Two full chunks, the rest of a prompt, and decodes: the number of rows is new in the first step, with the rest,
    and with the first decode. A second request, long after, has the same; its last prompt has one row, as decodes have.
    """
    workload = [make_arrival(0, 0.0, 40, 20), make_arrival(1, 1.0, 40, 20), make_arrival(2, 2.0, 1, 20)]
    engine = EngineConfig(kv_blocks=1000, token_budget=16, max_sequences=8)
    times = {}
    for latency in (Reshaping, lambda: Constant(STEP_NS / 1e9)):
        run = run_sim(workload, engine=engine, latency=latency, coalesce=coalesce)
        times[latency] = [row["last_token_ns"] - row["arrival_ns"] for row in run.rows.values()]
    longer = [with_ - without for with_, without in zip(*times.values(), strict=True)]
    assert longer == [3 * RESHAPE_NS, 3 * RESHAPE_NS, 0]


def test_noise_leaves_it_alone() -> None:
    """Steps scatter; what a change of rows takes does not."""
    noisy = Noisy(Reshaping(), Noise((0.5, 1.5), 0), "te-0")
    assert noisy.reshape_ns == RESHAPE_NS
    assert StepShape(5, 15, 1, 3, 30, 2).rows == 10
