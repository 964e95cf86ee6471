"""Block identity, one thing cluster-wide: every full block of 16 tokens has a 64-bit id that names its whole prefix.

Ids are chained, so two contexts share a prefix of n blocks exactly when their n-th ids are equal. That makes
prefix comparison one look at the last id, and lets an engine with blocks of 128 tokens use every eighth id.
"""

from array import array
from collections.abc import Iterable, Sequence

import xxhash

from cluster.vocabulary import BLOCK_TOKENS

BlockIds = Sequence[int]
"""Identities of consecutive blocks from position 0: a tuple, or a `range` where the content is shared with nobody."""

_UNIQUE_BITS = 24
_BLOCK_BYTES = 8 * BLOCK_TOKENS


def salt(model: str, adapter: str = "", tenant: str = "") -> int:
    """Seed of the chain: caches of different models, adapters or tenants never meet."""
    return xxhash.xxh3_64_intdigest("\x1f".join((model, adapter, tenant)).encode())


def unique(request_id: int) -> range:
    """Ids of a context that no other request shares (a trace that gives lengths only).

    They are negative, hashes are not, so the two kinds cannot meet. A slice of the range costs no memory.
    """
    base = -(request_id + 1) << _UNIQUE_BITS
    return range(base, base + (1 << _UNIQUE_BITS))


def of_context(request_id: int, max_tokens: int, known: tuple[int, ...] | None) -> BlockIds:
    """Ids of prompt and output together: the known ones, then such as no other request shares.

    `known` covers the prompt's full blocks, or as much of the answer too as a later turn will present again.
    """
    if known is None:
        return unique(request_id)
    return (*known, *unique(request_id)[: max_tokens // BLOCK_TOKENS + 2])


def from_tokens(tokens: Sequence[int], seed: int, parent: int | None = None) -> tuple[int, ...]:
    """Ids of the full blocks of `tokens`, chained behind `parent` (or the seed at position 0): the hash of a block's
    tokens as 64-bit integers, seeded by the id before it.
    """
    ids: list[int] = []
    link = seed if parent is None else parent
    values = array("q", tokens).tobytes()
    for start in range(0, len(values) - _BLOCK_BYTES + 1, _BLOCK_BYTES):
        link = xxhash.xxh3_64_intdigest(values[start : start + _BLOCK_BYTES], link)
        ids.append(link)
    return tuple(ids)


def from_trace(hashes: Iterable[int | str], tokens_per_hash: int, num_tokens: int, seed: int) -> tuple[int, ...]:
    """Ids for a trace that names blocks of `tokens_per_hash` tokens by already chained hashes (Mooncake: 512).

    Only the `num_tokens // 16` full blocks get an id; a partial last trace block gives as many as it covers.
    """
    per_hash = tokens_per_hash // BLOCK_TOKENS
    ids: list[int] = []
    for value in hashes:
        base = xxhash.xxh3_64_intdigest(f"{seed}:{value}".encode())
        base -= base % per_hash
        ids.extend(range(base, base + per_hash))
    return tuple(ids[: num_tokens // BLOCK_TOKENS])
