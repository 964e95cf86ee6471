"""What a client may ask of sampling, and how what it may not is refused."""

from typing import Any

import msgspec
import pytest

from cluster.request import Answer
from flowserve.runtime.runner import Payload
from flowserve.runtime.sampling import Sampling


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -0.1}, r"temperature is -0.1: allowed are 0 \(greedy\) to 100"),
        ({"temperature": float("nan")}, "temperature is nan: allowed are"),
        ({"top_k": -1}, r"top_k is -1: allowed are 0 \(all tokens\) or a number of tokens from 1 up"),
        ({"top_p": 0.0}, "top_p is 0.0: allowed are above 0 to 1"),
        ({"top_p": 1.1}, "top_p is 1.1: allowed are above 0 to 1"),
        ({"min_p": -0.5}, "min_p is -0.5: allowed are 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0: allowed are 0.01 to 100"),
        ({"presence_penalty": 2.5}, "presence_penalty is 2.5: allowed are -2 to 2"),
        ({"frequency_penalty": float("inf")}, "frequency_penalty is inf: allowed are -2 to 2"),
        ({"logit_bias": {5: 101.0}}, "logit_bias of token 5 is 101.0: allowed are -100 to 100"),
        ({"logit_bias": {-5: 1.0}}, "logit_bias of token -5 is 1.0: allowed are -100 to 100, for token ids from 0 up"),
        ({"seed": -1}, "seed is -1: allowed are 0 to 9223372036854775807"),
        ({"seed": 2**63}, "seed is 9223372036854775808: allowed are 0 to"),
        ({"logprobs": 21}, "logprobs is 21: allowed are null or 0 to 20"),
        ({"stop": ("a", "")}, "stop is .*: allowed are strings that are not empty"),
        ({"stop_token_ids": (3, -3)}, "stop_token_ids is .*: allowed are token ids from 0 up"),
        ({"min_tokens": -1}, "min_tokens is -1: allowed are 0 or more"),
    ],
)
def test_impossible_values_are_refused(values: dict[str, Any], message: str) -> None:
    """Every value out of range is an error that names it and the range, made directly or read from a message."""
    with pytest.raises(ValueError, match=message):
        Sampling(**values)
    if all(value == value for value in values.values()):  # NaN cannot be sent
        with pytest.raises(ValueError, match=message):
            msgspec.convert(values, Sampling)


def test_tokens_and_limits_are_checked_against_the_model() -> None:
    """Token ids beyond the vocabulary, and a minimum above the limit, are refused where both are known."""
    Sampling(stop_token_ids=(99,), logit_bias={99: 1.0}, min_tokens=5).check(100, 5)
    for sampling, message in (
        (Sampling(stop_token_ids=(1, 100)), "stop_token_ids has token 100: the model's vocabulary is 0 to 99"),
        (Sampling(logit_bias={300: 1.0}), "logit_bias has token 300: the model's vocabulary is 0 to 99"),
        (Sampling(min_tokens=6), "min_tokens is 6: allowed is at most max_tokens, 5"),
    ):
        with pytest.raises(ValueError, match=message):
            sampling.check(100, 5)


def test_settings_travel() -> None:
    """A message holds them whole; requests of one setting have seeds of their own, always within range."""
    sampling = Sampling(
        top_k=3, logit_bias={1: 2.0}, seed=2**63 - 1, logprobs=5, stop=("\n",), stop_token_ids=(4,), ignore_eos=True
    )
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(sampling), type=Sampling) == sampling
    assert [sampling.for_request(number).seed for number in (0, 1, 2)] == [2**63 - 1, 0, 1]
    assert Sampling(seed=3).for_request(4) == Sampling(seed=7)


def test_what_ends_an_output() -> None:
    """The model's end and the request's stop tokens; the latter alone with ignore_eos; in a replay the trace."""
    sampling = Sampling(stop_token_ids=(7,))
    assert Payload([1], sampling).ends((2, 3)) == {2, 3, 7}
    assert Payload([1], msgspec.structs.replace(sampling, ignore_eos=True)).ends((2, 3)) == {7}
    assert Payload([1], sampling, Answer(5)).ends((2, 3)) == frozenset()
