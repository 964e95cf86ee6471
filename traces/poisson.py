"""The lengths of a trace file in file order, over again where it ends, with Poisson arrivals of any rate."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from cluster.request import Arrival
from cluster.streams import stream
from cluster.vocabulary import NS_PER_S
from traces.errors import require
from traces.readers.azure2023 import AzureTrace

_DRAWN = 4096


@dataclass(frozen=True)
class PoissonTrace(AzureTrace):
    """As many requests as are read, `rate` per second on average.

    `swing`: 0 for a constant rate; else it goes from (1 - swing) times the rate at time 0 to (1 + swing) times it half
    a `period_s` later and back, like a day. Arrivals of a changing rate are those of the highest one, thinned out.
    """

    rate: float = 1.0
    seed: int = 0
    swing: float = 0.0
    period_s: float = 86_400.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.rate < math.inf, "rate", self.rate, "requests per second above 0", "choose one")
        require(0 <= self.swing <= 1, "swing", self.swing, "a share from 0 to 1", "0 keeps the rate constant")
        require(0 < self.period_s < math.inf, "period_s", self.period_s, "seconds above 0", "86400 is a day")

    def read(self, file: Path) -> Iterator[Arrival]:
        lengths = list(super().read(file))
        for number, at_s in enumerate(self._times()):
            arrival = lengths[number % len(lengths)]
            request = msgspec.structs.replace(arrival.request, request_id=number)
            yield Arrival(request, arrival.answer, round(at_s * NS_PER_S))

    def _times(self) -> Iterator[float]:
        rng, highest, at = stream(self.seed, "arrivals"), self.rate * (1 + self.swing), 0.0
        while True:
            gaps, drawn = rng.exponential(1 / highest, _DRAWN).tolist(), rng.random(_DRAWN).tolist()
            for gap, share in zip(gaps, drawn, strict=True):
                at += gap
                now = 1 - self.swing * math.cos(2 * math.pi * at / self.period_s)
                if share * (1 + self.swing) < now:
                    yield at
