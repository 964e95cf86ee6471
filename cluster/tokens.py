"""Real tokens behind block identities: equal ids give equal tokens, so engines share what a trace says is shared.

A block's 16 tokens are a function of its id alone. Positions that no known id covers (content shared with nobody, and
a partly filled last block) take the ids of `identity.unique(request_id)`, which are this request's own.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cluster import identity
from cluster.request import Answer, Request
from cluster.vocabulary import BLOCK_TOKENS

FIRST_TOKEN = 4
"""Token ids below it are never produced: vocabularies keep padding, start, end and unknown there."""

_MASK = (1 << 64) - 1
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def prompt_tokens_of(request: Request, vocab_size: int, answer: Answer | None = None) -> list[int]:
    """The prompt's token ids, each in `[FIRST_TOKEN, vocab_size)`.

    Pass the answer where its `block_ids` are known: the prompt's end and the output's start then share one block, and
    its id dictates the tokens of both. ValueError: a vocabulary without room above `FIRST_TOKEN`.
    """
    return _positions(request, answer, vocab_size, 0, request.prompt_tokens)


def answer_tokens_of(request: Request, answer: Answer, vocab_size: int) -> list[int] | None:
    """The output's token ids that a later turn presents in its prompt; None where the trace does not name them.

    The full blocks of prompt and output are those of the next prompt. A partly filled last block is this request's
    own, because the next turn's id of that block also covers what the user adds. ValueError: as above.
    """
    if answer.block_ids is None:
        return None
    return _positions(request, answer, vocab_size, request.prompt_tokens, answer.output_tokens)


def _positions(request: Request, answer: Answer | None, vocab_size: int, start: int, count: int) -> list[int]:
    """Tokens at positions `[start, start + count)` of the request's context (prompt, then output)."""
    first, behind = start // BLOCK_TOKENS, -(-(start + count) // BLOCK_TOKENS)
    known: Sequence[int] = (answer and answer.block_ids) or request.block_ids or ()
    ids = [*known[first:behind], *identity.unique(request.request_id)[max(first, len(known)) : behind]]
    skip = start - first * BLOCK_TOKENS
    tokens: list[int] = _tokens(ids, vocab_size)[skip : skip + count].tolist()
    return tokens


def _tokens(ids: Sequence[int], vocab_size: int) -> NDArray[np.uint64]:
    """Tokens of consecutive blocks, shape (16 * len(ids),): a hash of the id and the place in the block."""
    if vocab_size <= FIRST_TOKEN:
        raise ValueError(
            f"vocab_size is {vocab_size}: allowed is more than {FIRST_TOKEN}, the ids kept for special tokens; "
            "use the model's vocabulary size"
        )
    keys = _mix(np.array([block_id & _MASK for block_id in ids], dtype=np.uint64))
    places = np.arange(1, BLOCK_TOKENS + 1, dtype=np.uint64) * _GOLDEN
    hashes = _mix(keys[:, None] + places[None, :])
    return (hashes % np.uint64(vocab_size - FIRST_TOKEN) + np.uint64(FIRST_TOKEN)).ravel()


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Finaliser of SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
