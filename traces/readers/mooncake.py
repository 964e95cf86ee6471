"""Mooncake traces (Moonshot AI, Apache-2.0): Kimi requests with prefix-chained block hashes.

https://github.com/kvcache-ai/Mooncake, FAST25-release/traces.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from cluster import identity
from cluster.request import Arrival
from cluster.streams import stream
from cluster.vocabulary import NS_PER_S
from traces.file_trace import FileTrace
from traces.rows import Row, jsonl_rows

TOKENS_PER_HASH = 512
GRID_NS = 3 * NS_PER_S

_MS = NS_PER_S // 1000


@dataclass(frozen=True)
class MooncakeTrace(FileTrace):
    """JSONL with timestamp (ms), input_length, output_length, hash_ids (one per started 512 tokens of the prompt).

    The published stamps lie on a grid of about 3 s. `spread` puts the requests of one stamp at random times, uniform
    over the gap to the next stamp (at most 3 s, which is also what the last stamp gets), in file order. Counts per
    stamp are Poisson, so the result is again near Poisson; even spacing would hide queueing. `seed` fixes the draws.
    Memory: the rows of one stamp. `request_id` is the row's index.
    """

    spread: bool = True
    seed: int = 0

    def read(self, file: Path) -> Iterator[Arrival]:
        rng = stream(self.seed, "mooncake spread")
        seed = identity.salt(self.model)
        batch: list[Arrival] = []
        for index, row in enumerate(jsonl_rows(file)):
            arrival = self._arrival(index, row, seed)
            if batch:
                row.not_before("timestamp", arrival.at_ns, batch[0].at_ns)
                if arrival.at_ns > batch[0].at_ns:
                    yield from self._spread(batch, arrival.at_ns - batch[0].at_ns, rng)
                    batch = []
            batch.append(arrival)
        yield from self._spread(batch, GRID_NS, rng)

    def _arrival(self, index: int, row: Row, seed: int) -> Arrival:
        prompt = row.integer("input_length", least=1)
        hashes = row.numbers("hash_ids", -(-prompt // TOKENS_PER_HASH), "one per started 512 tokens of input_length")
        ids = identity.from_trace(hashes, TOKENS_PER_HASH, prompt, seed)
        return self.arrival(index, row.time_ns("timestamp", _MS), prompt, self.output_tokens(row, "output_length"), ids)

    def _spread(self, batch: list[Arrival], gap_ns: int, rng: np.random.Generator) -> list[Arrival]:
        if not self.spread:
            return batch
        draws = np.sort(rng.random(len(batch))) * min(gap_ns, GRID_NS)
        return [
            msgspec.structs.replace(arrival, at_ns=arrival.at_ns + int(draw))
            for arrival, draw in zip(batch, draws, strict=True)
        ]
