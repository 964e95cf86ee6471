"""Shared prefixes for workloads that say nothing of content: a system prompt, and conversations of several turns."""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import msgspec
import xxhash

from cluster import identity
from cluster.request import Arrival
from cluster.streams import stream
from cluster.vocabulary import BLOCK_TOKENS
from cluster.work import AnyArrival
from traces.errors import TraceError, require

GROWTH_MU, GROWTH_SIGMA = 6.16, 1.79
"""New tokens per turn, lognormal: median 474 and p90 4,701, measured on the Mooncake conversation trace."""

_ID_BITS = 24


@dataclass(frozen=True, slots=True)
class PrefixSharing:
    """Gives block ids to arrivals that have none; times and lengths stay as they are.

    All prompts begin with one system prompt of `system_tokens`. A share `continue_share` of requests goes on with one
    of the `sessions` latest contexts (prompt and output of an earlier request, each continued once): with the longest
    that leaves room for a drawn number of new tokens, or with none where no context is short enough. The default
    share is calibrated: on the lengths of the Mooncake conversation trace it gives that trace's reuse, 37 % of prompt
    tokens. Answers get ids too, so that the next turn finds what was generated. Memory: `sessions` contexts.
    """

    arrivals: Iterable[AnyArrival]
    continue_share: float = 0.41
    system_tokens: int = 512
    sessions: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        share = self.continue_share
        require(0 <= share <= 1, "continue_share", share, "a number from 0 to 1", "0 keeps the system prompt alone")
        require(self.system_tokens >= 0, "system_tokens", self.system_tokens, "0 or more tokens", "0 for none")
        require(self.sessions >= 1, "sessions", self.sessions, "at least 1", "use continue_share=0 for single turns")
        stream(self.seed, "")

    def __iter__(self) -> Iterator[AnyArrival]:
        rng = stream(self.seed, "prefix sharing")
        contexts: deque[tuple[int, ...]] = deque(maxlen=self.sessions)
        for arrival in self.arrivals:
            if not isinstance(arrival, Arrival):
                yield arrival
                continue
            request, answer = arrival.request, arrival.answer
            if request.block_ids is not None:
                raise TraceError(
                    f"request {request.request_id} has block ids: allowed are requests without; leave out PrefixSharing"
                )
            salt = identity.salt(request.model, request.adapter, request.tenant)
            full = request.prompt_tokens // BLOCK_TOKENS
            goes_on, growth = rng.random() < self.continue_share, rng.lognormal(GROWTH_MU, GROWTH_SIGMA)
            room = full - growth / BLOCK_TOKENS
            before = _longest(contexts, room) if goes_on else None
            if before is None:
                before = tuple(_ids(salt, "system")[: min(full, self.system_tokens // BLOCK_TOKENS)])
            total = (request.prompt_tokens + answer.output_tokens) // BLOCK_TOKENS
            context = before + tuple(_ids(salt, str(request.request_id))[len(before) : total])
            contexts.append(context)
            yield msgspec.structs.replace(
                arrival,
                request=msgspec.structs.replace(request, block_ids=context[:full]),
                answer=msgspec.structs.replace(answer, block_ids=context),
            )


def _longest(contexts: deque[tuple[int, ...]], room: float) -> tuple[int, ...] | None:
    """Take the longest context of at most `room` blocks, if there is one."""
    best = max((context for context in contexts if len(context) <= room), key=len, default=None)
    if best is not None:
        contexts.remove(best)
    return best


def _ids(salt: int, name: str) -> range:
    """Ids for the blocks of a content called `name`, by position."""
    base = xxhash.xxh3_64_intdigest(f"{salt}:{name}".encode()) >> _ID_BITS << _ID_BITS
    return range(base, base + (1 << _ID_BITS))
