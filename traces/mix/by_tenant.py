"""By tenant: every tenant has a model of its own choice."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import msgspec

from cluster.work import AnyArrival
from traces.errors import TraceError, require


@dataclass(frozen=True, slots=True)
class ByTenant:
    """All requests of a tenant ask for one model: tenants get `models` in turn, in the order in which they appear.

    Whatever model an arrival named is replaced. TraceError: a request without a tenant.
    """

    arrivals: Iterable[AnyArrival]
    models: Sequence[str]

    def __post_init__(self) -> None:
        require(len(self.models) > 0, "models", list(self.models), "at least one", "name groups in fleet.groups")

    def __iter__(self) -> Iterator[AnyArrival]:
        chosen: dict[str, str] = {}
        for arrival in self.arrivals:
            tenant = arrival.request.tenant
            if not tenant:
                raise TraceError(
                    f"request {arrival.request.request_id} has no tenant: allowed are requests with one; take a trace "
                    "with tenants, or mix=zipf"
                )
            model = chosen.get(tenant) or chosen.setdefault(tenant, self.models[len(chosen) % len(self.models)])
            yield msgspec.structs.replace(arrival, request=msgspec.structs.replace(arrival.request, model=model))
