"""Several workloads as one: serving, agents and fine-tuning on one cluster."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from heapq import merge
from typing import NamedTuple

import msgspec

from cluster.work import AnyArrival


class _Placed(NamedTuple):
    """An arrival with its place in the whole: when it comes, or the timed one ahead of it in its own workload."""

    at_ns: int
    stream: int
    number: int
    arrival: AnyArrival


@dataclass(frozen=True, slots=True)
class Merge:
    """The arrivals of all `workloads` in order of time, requests numbered anew from 0.

    What waits for another request of its own workload goes on doing so; a count of requests counts all of them. Memory:
    16 bytes per request of workloads with such.
    """

    workloads: Sequence[Iterable[AnyArrival]]

    def __iter__(self) -> Iterator[AnyArrival]:
        numbers: list[dict[int, int]] = [{} for _ in self.workloads]
        streams = [_placed(stream, workload) for stream, workload in enumerate(self.workloads)]
        for number, (_, stream, _, arrival) in enumerate(merge(*streams)):
            numbers[stream][arrival.request.request_id] = number
            yield _renumbered(arrival, number, numbers[stream])


def _placed(stream: int, workload: Iterable[AnyArrival]) -> Iterator[_Placed]:
    at_ns = 0
    for number, arrival in enumerate(workload):
        if arrival.after is None:
            at_ns = arrival.at_ns
        yield _Placed(at_ns, stream, number, arrival)


def _renumbered(arrival: AnyArrival, number: int, numbers: dict[int, int]) -> AnyArrival:
    after = arrival.after
    if after is not None and after.request_id is not None:
        after = msgspec.structs.replace(after, request_id=numbers[after.request_id])
    request = msgspec.structs.replace(arrival.request, request_id=number)
    return msgspec.structs.replace(arrival, request=request, after=after)
