"""Which model requests ask for: by popularity, or by tenant."""

import numpy as np
import pytest

from cluster.request import Answer, Arrival, Request
from traces.errors import TraceError
from traces.mix.by_tenant import ByTenant
from traces.mix.zipf import Zipf

MODELS = ["a", "b", "c"]


def requests(count: int, tenants: str = "") -> list[Arrival]:
    return [
        Arrival(Request(number, 100, 60, "m", tenant=tenants and tenants[number % len(tenants)]), Answer(50), number)
        for number in range(count)
    ]


def test_zipf_draws_by_rank() -> None:
    """Models get 6/11, 3/11 and 2/11 of the requests with exponent 1, nearly; nothing else of an arrival changes."""
    arrivals = list(Zipf(requests(11_000), MODELS, 1.0, seed=3))
    counts = [sum(arrival.request.model == model for arrival in arrivals) for model in MODELS]
    assert np.allclose(np.array(counts) / 1000, [6, 3, 2], rtol=0.05)
    assert [(arrival.request.request_id, arrival.at_ns) for arrival in arrivals[:3]] == [(0, 0), (1, 1), (2, 2)]


def test_zipf_is_seeded_and_starts_afresh() -> None:
    """The same seed gives the same models at every reading, another seed others; exponent 0 prefers none."""
    trace = Zipf(requests(100), MODELS, seed=1)
    assert list(trace) == list(trace) == list(Zipf(requests(100), MODELS, seed=1))
    assert list(trace) != list(Zipf(requests(100), MODELS, seed=2))
    even = [arrival.request.model for arrival in Zipf(requests(3000), MODELS, 0.0)]
    assert all(900 < even.count(model) < 1100 for model in MODELS)


def test_tenants_keep_to_their_model() -> None:
    """Tenants get models in order of appearance, over again where there are more tenants; theirs stays theirs."""
    found = [arrival.request.model for arrival in ByTenant(requests(8, "wxyz"), MODELS)]
    assert found == ["a", "b", "c", "a"] * 2


def test_senseless_mixes() -> None:
    """No models, a negative exponent and requests without a tenant are errors that say what is allowed."""
    with pytest.raises(ValueError, match=r"models is \[\]: allowed is at least one"):
        Zipf(requests(1), [])
    with pytest.raises(ValueError, match="exponent is -1: allowed is 0"):
        Zipf(requests(1), MODELS, -1)
    with pytest.raises(TraceError, match="request 0 has no tenant"):
        list(ByTenant(requests(1), MODELS))
