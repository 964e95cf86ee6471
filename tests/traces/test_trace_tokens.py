"""Tokens behind block ids: equal ids, equal tokens; turns fit together."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster import identity
from cluster.request import Answer, Request
from cluster.tokens import answer_tokens_of, prompt_tokens_of

VOCAB = 32_000
IDS = st.lists(st.integers(-(1 << 63), (1 << 64) - 1), max_size=12).map(tuple)


def prompt(number: int, tokens: int, ids: tuple[int, ...] | None = None) -> Request:
    return Request(number, tokens, 99, "m", ids)


@given(ids=IDS, tail=st.integers(0, 15), number=st.integers(0, 10**9), vocab=st.integers(5, 200_000))
def test_deterministic_and_in_range(ids: tuple[int, ...], tail: int, number: int, vocab: int) -> None:
    """Equal requests give equal tokens, as many as the prompt has, none of them special."""
    request = prompt(number, max(1, 16 * len(ids) + tail), ids)
    tokens = prompt_tokens_of(request, vocab)
    assert tokens == prompt_tokens_of(request, vocab)
    assert len(tokens) == request.prompt_tokens
    assert all(4 <= token < vocab for token in tokens)


@given(ids=st.lists(st.integers(0, (1 << 64) - 1), min_size=2, max_size=12, unique=True))
def test_tokens_are_the_ids(ids: list[int]) -> None:
    """A block's tokens depend on its id alone; different ids, also neighbours, have different tokens."""
    tokens = prompt_tokens_of(prompt(1, 16 * len(ids), tuple(ids)), VOCAB)
    blocks = [tuple(tokens[i : i + 16]) for i in range(0, len(tokens), 16)]
    assert len(set(blocks)) == len(ids)
    assert prompt_tokens_of(prompt(2, 16 * len(ids), tuple(reversed(ids))), VOCAB)[:16] == list(blocks[-1])
    neighbours = prompt_tokens_of(prompt(1, 32, (ids[0] >> 1, (ids[0] >> 1) + 1)), VOCAB)
    assert sum(a == b for a, b in zip(neighbours[:16], neighbours[16:], strict=True)) < 4


def test_unique_content() -> None:
    """Requests without ids share nothing, nor do partial last blocks of requests that share the rest."""
    one, two = (prompt_tokens_of(prompt(i, 100), VOCAB) for i in (1, 2))
    assert sum(a == b for a, b in zip(one, two, strict=True)) < 5
    ids = (7, 8)
    one, two = (prompt_tokens_of(prompt(i, 40, ids), VOCAB) for i in (1, 2))
    assert one[:32] == two[:32]
    assert one[32:] != two[32:]


def test_unique_content_has_its_own_identity() -> None:
    """The tokens of a context without ids are those of the ids that engines give it."""
    request = prompt(3, 64)
    assert prompt_tokens_of(request, VOCAB) == prompt_tokens_of(prompt(9, 64, tuple(request.prompt_ids[:4])), VOCAB)


@given(first=st.integers(1, 100), output=st.integers(1, 100), more=st.integers(1, 60))
def test_next_turn_presents_the_answer(first: int, output: int, more: int) -> None:
    """Prompt and output of a turn begin the next turn's prompt, up to the last full block."""
    ids = tuple(range(500, 500 + (first + output + more) // 16))
    full = (first + output) // 16
    request, answer = prompt(1, first, ids[: first // 16]), Answer(output, ids[:full])
    produced = answer_tokens_of(request, answer, VOCAB)
    assert produced is not None
    assert len(produced) == output
    context = prompt_tokens_of(request, VOCAB, answer) + produced
    following = prompt_tokens_of(prompt(2, first + output + more, ids), VOCAB)
    assert context[: 16 * full] == following[: 16 * full]
    assert prompt_tokens_of(request, VOCAB)[: first // 16 * 16] == context[: first // 16 * 16]


def test_unnamed_answers() -> None:
    """Where the trace does not name the output, nothing is forced."""
    assert answer_tokens_of(prompt(1, 40), Answer(9), VOCAB) is None


def test_identity_of_tokens() -> None:
    """Different tokens hash to different blocks and equal ones to equal blocks, as a frontend would compute them."""
    one, two = (identity.from_tokens(prompt_tokens_of(prompt(i, 48, (7, 8, i)), VOCAB), 0) for i in (1, 2))
    assert one[:2] == two[:2]
    assert one[2] != two[2]


@pytest.mark.parametrize("vocab", [4, 0, -1])
def test_vocabulary_too_small(vocab: int) -> None:
    """A vocabulary of special tokens alone is refused."""
    with pytest.raises(ValueError, match=f"vocab_size is {vocab}: allowed is more than 4, .*; use the model's"):
        prompt_tokens_of(prompt(1, 1), vocab)
