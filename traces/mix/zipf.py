"""Zipf: a few models get most of the requests."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from cluster.streams import stream
from cluster.work import AnyArrival
from traces.errors import require

_CHUNK = 4096


@dataclass(frozen=True, slots=True)
class Zipf:
    """Each request asks for the i-th of `models` with a probability in proportion to i^-exponent, independently.

    Whatever model an arrival named is replaced. Requests of one session or with a common prefix may so be spread over
    models, which share no cache: `ByTenant` keeps them together. The same seed gives the same models.
    """

    arrivals: Iterable[AnyArrival]
    models: Sequence[str]
    exponent: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        require(len(self.models) > 0, "models", list(self.models), "at least one", "name groups in fleet.groups")
        ok = 0 <= self.exponent < math.inf
        require(ok, "exponent", self.exponent, "0 (all alike) and more", "1 is Zipf's own law")

    def __iter__(self) -> Iterator[AnyArrival]:
        shares = np.arange(1, len(self.models) + 1, dtype=float) ** -self.exponent
        upto = np.cumsum(shares / shares.sum())
        chosen = self._draws(upto)
        for arrival in self.arrivals:
            request = msgspec.structs.replace(arrival.request, model=self.models[next(chosen)])
            yield msgspec.structs.replace(arrival, request=request)

    def _draws(self, upto: np.ndarray) -> Iterator[int]:
        rng, last = stream(self.seed, "models"), len(self.models) - 1
        while True:
            yield from np.minimum(np.searchsorted(upto, rng.random(_CHUNK), side="right"), last).tolist()
