"""A simulated run leaves nothing to the search for cycles, which is off while it lasts."""

import gc

from flowserve.core.config import EngineConfig
from policies.dispatch.round_robin import RoundRobin
from tests.builders import disaggregated, make_arrival, run_sim


def test_a_run_makes_no_cycles() -> None:
    """Two hundred requests with hand-overs, reports and evictions."""
    gc.collect()
    gc.disable()
    try:
        arrivals = [make_arrival(number, number * 0.01, 100, 20) for number in range(200)]
        run = run_sim(arrivals, groups=disaggregated(1, 1), policy=RoundRobin, engine=EngineConfig(kv_blocks=60))
        assert gc.collect() < 50, "objects that only the search for cycles frees"
        del run
    finally:
        gc.enable()
