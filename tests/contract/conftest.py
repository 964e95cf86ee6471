"""Every contract test runs twice: on the simulated cluster and on real processes."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from cluster.seam import Cluster
from tests.contract.backends import BACKENDS, Driver


@pytest.fixture(params=["sim", "real"])
def make_cluster(request: pytest.FixtureRequest) -> Callable[..., Cluster]:
    """Makes a cluster of the backend under test; the caller closes it."""
    return BACKENDS[request.param]


@pytest.fixture
def make_driver(make_cluster: Callable[..., Cluster]) -> Iterator[Callable[..., Driver]]:
    """Makes a driver of a new cluster, which is closed after the test."""
    with ExitStack() as stack:
        yield lambda **options: Driver(stack.enter_context(make_cluster(**options)))


@pytest.fixture
def driver(make_driver: Callable[..., Driver]) -> Driver:
    """A driver of a cluster with the usual options."""
    return make_driver()
