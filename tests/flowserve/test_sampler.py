"""The sampler against numpy and the logits processors of transformers, alone and in mixed batches."""

import math
from collections.abc import Sequence

import msgspec
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from flowserve import ops
from flowserve.ops.noise import gumbel, gumbel_on_device, row_keys
from flowserve.runtime.sampler import MAX_TOP_K, Sampled, Sampler
from flowserve.runtime.sampling import Sampling

VOCAB = 211
PROMPT, OUTPUT = [3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9]
CPU = torch.device("cpu")


def sampler(vocab: int = VOCAB) -> Sampler:
    return Sampler(vocab, CPU, ops.load("cpu"))


def logits_of(rows: int, seed: int = 0, vocab: int = VOCAB) -> Tensor:
    return 3 * torch.randn((rows, vocab), generator=torch.Generator().manual_seed(seed))


def sample(each: Sequence[Sampling], logits: Tensor, indices: Sequence[int] | None = None) -> Sampled:
    """One step of rows that have all seen the same prompt and output."""
    made = sampler(logits.shape[1])
    for row, sampling in enumerate(each):
        made.add(row, sampling, PROMPT, OUTPUT, ends=[*sampling.stop_token_ids])
    return made.sample(logits, list(range(len(each))), indices or [len(OUTPUT)] * len(each))


def reference_scores(sampling: Sampling, logits: Tensor) -> Tensor:
    """[V] after all that a setting does, by the processors of transformers and OpenAI's formula."""
    scores = logits[None].double()
    context = torch.tensor([PROMPT + OUTPUT])
    if sampling.repetition_penalty != 1:
        scores = transformers.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(context, scores)
    counts = torch.bincount(torch.tensor(OUTPUT), minlength=logits.shape[0])
    scores = scores - sampling.frequency_penalty * counts - sampling.presence_penalty * (counts > 0)
    if sampling.logit_bias:
        bias = {(token,): float(value) for token, value in sampling.logit_bias.items()}
        scores = transformers.SequenceBiasLogitsProcessor(bias)(context, scores)
    if len(OUTPUT) < sampling.min_tokens:
        scores = transformers.SuppressTokensLogitsProcessor(list(sampling.stop_token_ids))(context, scores)
    if sampling.temperature:
        scores = transformers.TemperatureLogitsWarper(float(sampling.temperature))(context, scores)
    if sampling.top_k:
        scores = transformers.TopKLogitsWarper(sampling.top_k)(context, scores)
    if sampling.top_p < 1:
        scores = transformers.TopPLogitsWarper(sampling.top_p)(context, scores)
    if sampling.min_p:
        scores = transformers.MinPLogitsWarper(sampling.min_p)(context, scores)
    return scores[0]


def reference_token(sampling: Sampling, logits: Tensor, index: int = len(OUTPUT)) -> int:
    scores = reference_scores(sampling, logits)
    if sampling.temperature:
        noise = gumbel(row_keys([sampling.seed], [index]), np.arange(len(scores)))[0]
        scores = scores + torch.from_numpy(noise).double()
    return int(scores.argmax())


DRAWN = Sampling(temperature=1.0, seed=5)
FEATURES = {
    "greedy": Sampling(),
    "temperature": Sampling(temperature=0.7, seed=1),
    "hot": Sampling(temperature=5.0, seed=1),
    "top_k": Sampling(temperature=2.0, top_k=5, seed=2),
    "top_k of one": Sampling(temperature=2.0, top_k=1, seed=2),
    "top_k beyond the vocabulary": Sampling(temperature=2.0, top_k=10**6, seed=2),
    "top_p": Sampling(temperature=2.0, top_p=0.6, seed=3),
    "tiny top_p": Sampling(temperature=2.0, top_p=1e-6, seed=3),
    "min_p": Sampling(temperature=2.0, min_p=0.2, seed=4),
    "min_p of one": Sampling(temperature=2.0, min_p=1.0, seed=4),
    "top_k and top_p and min_p": Sampling(temperature=3.0, top_k=20, top_p=0.8, min_p=0.05, seed=5),
    "repetition": Sampling(repetition_penalty=3.0),
    "repetition encouraged": Sampling(repetition_penalty=0.3, temperature=1.0),
    "presence": Sampling(presence_penalty=2.0, temperature=1.0),
    "frequency": Sampling(frequency_penalty=-2.0),
    "bias": Sampling(logit_bias={7: 100.0, 8: -100.0}),
    "bias of a draw": Sampling(logit_bias={7: 3.0, 8: 3.0, 9: 3.0}, temperature=1.0),
    "min_tokens": Sampling(min_tokens=len(OUTPUT) + 1, stop_token_ids=tuple(range(0, VOCAB, 2))),
    "min_tokens reached": Sampling(min_tokens=len(OUTPUT), stop_token_ids=tuple(range(0, VOCAB, 2))),
    "all": Sampling(
        temperature=1.5,
        top_k=40,
        top_p=0.9,
        min_p=0.02,
        repetition_penalty=1.3,
        presence_penalty=0.5,
        frequency_penalty=0.4,
        logit_bias={3: 2.0, 5: -1.0},
        logprobs=2,
        stop_token_ids=(17, 18),
        min_tokens=50,
    ),
}


# -- each feature --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FEATURES)
def test_features_are_those_of_transformers(name: str) -> None:
    """The token is the reference's for many logits and seeds."""
    logits = logits_of(64)
    each = [msgspec.structs.replace(FEATURES[name], seed=seed) for seed in range(64)]
    tokens = sample(each, logits).tokens
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == [reference_token(s, row) for s, row in zip(each, logits, strict=True)]


def test_all_features_in_one_batch() -> None:
    """A batch of everything at once: each row gets what it gets alone, in whatever order the rows come."""
    each = list(FEATURES.values()) * 3
    logits = logits_of(len(each), 1)
    tokens = sample(each, logits).tokens.tolist()
    assert tokens == [reference_token(s, row) for s, row in zip(each, logits, strict=True)]
    order = np.random.default_rng(0).permutation(len(each)).tolist()
    shuffled = sample([each[n] for n in order], logits[order]).tokens.tolist()
    assert shuffled == [tokens[n] for n in order]
    assert tokens == [sample([s], logits[n : n + 1]).tokens.item() for n, s in enumerate(each)]


SETTINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 4.0]),
    top_k=st.sampled_from([0, 1, 3, 50, VOCAB]),
    top_p=st.sampled_from([1.0, 0.9, 0.5]),
    min_p=st.sampled_from([0.0, 0.1]),
    repetition_penalty=st.sampled_from([1.0, 1.2]),
    presence_penalty=st.sampled_from([0.0, 0.6]),
    frequency_penalty=st.sampled_from([0.0, -0.3]),
    seed=st.integers(0, 2**63 - 1),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(SETTINGS, min_size=1, max_size=8), st.integers(0, 10**6))
def test_any_batch_of_settings(each: list[Sampling], seed: int) -> None:
    """Combinations of settings, together in one batch, all draw what the reference draws."""
    logits = logits_of(len(each), seed)
    expected = [reference_token(s, row) for s, row in zip(each, logits, strict=True)]
    assert sample(each, logits).tokens.tolist() == expected


def test_many_most_likely_tokens_are_sorted() -> None:
    """Limits beyond what is selected take the way over a sort, to the same effect."""
    vocab = 3 * MAX_TOP_K
    logits = logits_of(8, 2, vocab)
    each = [Sampling(temperature=30.0, top_k=MAX_TOP_K + 7 * n, seed=n) for n in range(8)]
    expected = [reference_token(s, row) for s, row in zip(each, logits, strict=True)]
    assert sample(each, logits).tokens.tolist() == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_equal_logits_are_chosen_alike_whatever_the_neighbours_want(dtype: torch.dtype) -> None:
    """Short floats are often equal: which of them top_k keeps does not depend on the largest top_k of the batch."""
    logits = logits_of(32, 3).to(dtype).round()  # a handful of different values
    mine = [Sampling(temperature=3.0, top_k=4, seed=seed) for seed in range(32)]
    alone = sample(mine, logits).tokens.tolist()
    crowd = sample([*mine, Sampling(temperature=1.0, top_k=100)], torch.cat((logits, logits[:1]))).tokens.tolist()
    assert crowd[:32] == alone
    for token, row in zip(alone, logits.float(), strict=True):
        assert token in row.sort(stable=True, descending=True).indices[:4]


def test_top_p_cuts_equal_logits_in_order() -> None:
    """Where the mark falls among equal logits, the lower ids stay, as few as it takes."""
    values = torch.tensor([0.0, 2.0, 2.0, 0.0, 2.0, 2.0, 0.0])  # 2.0: 22.7 % each
    for top_p, stay in ((0.2, {1}), (0.3, {1, 2}), (0.6, {1, 2, 4}), (0.8, {1, 2, 4, 5}), (0.92, {0, 1, 2, 4, 5})):
        each = [Sampling(temperature=1.0, top_p=top_p, seed=seed) for seed in range(300)]
        assert set(sample_small(each, values.expand(300, 7))) == stay


def sample_small(each: Sequence[Sampling], logits: Tensor) -> list[int]:
    """Draws for a vocabulary too small for the usual prompt."""
    made = sampler(logits.shape[1])
    for row, sampling in enumerate(each):
        made.add(row, sampling, [])
    tokens: list[int] = made.sample(logits, list(range(len(each))), [0] * len(each)).tokens.tolist()
    return tokens


# -- counts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(repetition_penalty=3.0),
        Sampling(presence_penalty=2.0),
        Sampling(frequency_penalty=1.0),
        FEATURES["all"],
    ],
    ids=["repetition", "presence", "frequency", "all"],
)
def test_counts_follow_the_output(sampling: Sampling) -> None:
    """A row that was told its output and one that sampled or was forced to it penalise alike, token after token."""
    pair, best = logits_of(1, 4).expand(2, VOCAB), int(logits_of(1, 4).argmax())
    running = sampler()
    running.add(3, sampling, PROMPT, forced=OUTPUT)
    running.add(0, Sampling(), PROMPT)
    output: list[int] = []
    for index in range(12):
        told = sampler()
        told.add(3, sampling, PROMPT, output, forced=OUTPUT)
        token = int(running.sample(pair, [0, 3], [index, index]).tokens[1])
        assert token == int(told.sample(pair[:1], [3], [index]).tokens[0])
        output.append(token)
    assert output[: len(OUTPUT)] == OUTPUT
    assert output[len(OUTPUT) :].count(best) < 5, "the same logits at every step, and yet no penalty showed"


def test_a_row_begins_without_its_predecessors_counts() -> None:
    """Rows and the places of their counts are used again, and are clean; more rows than places make room."""
    made, logits = sampler(), logits_of(1, 5)
    fresh = int(sample([FEATURES["repetition"]], logits).tokens)
    for turn in range(3):
        for row in range(9):
            made.add(row, FEATURES["repetition"], PROMPT, OUTPUT)
        tokens = made.sample(logits.expand(9, VOCAB), list(range(9)), [len(OUTPUT)] * 9).tokens
        assert tokens.tolist() == [fresh] * 9, turn
        for row in range(9):
            made.remove(row)
    assert len(made._counts) == 16


def test_forced_tokens_end_where_they_end() -> None:
    """Forced tokens come by output index, whatever the row's other settings; behind them the row samples."""
    made, logits = sampler(), logits_of(2, 6)
    made.add(0, DRAWN, PROMPT, forced=[10, 11])
    made.add(1, Sampling(), PROMPT)
    best = int(logits[1].argmax())
    found = [made.sample(logits, [0, 1], [index, index]).tokens.tolist() for index in range(3)]
    assert found == [[10, best], [11, best], [reference_token(DRAWN, logits[0], 2), best]]


# -- log probabilities ---------------------------------------------------------------------------------------------


def test_logprobs_are_the_models_own() -> None:
    """They are those of the logits, whatever is done to these; each row gets as many as it asked for."""
    each = [
        Sampling(logprobs=0),
        Sampling(),
        Sampling(temperature=3.0, seed=1, logprobs=4),
        Sampling(logit_bias={0: 100.0}, logprobs=2),
    ]
    logits = logits_of(4, 7)
    sampled = sample(each, logits)
    found = sampled.logprobs
    assert found is not None
    expected = logits.double().log_softmax(-1)
    assert (found.places, found.tops) == ([0, 2, 3], [0, 4, 2])
    for n, place in enumerate(found.places):
        top = expected[place].sort(descending=True)
        assert found.tokens[n].tolist() == top.indices[:4].tolist()
        np.testing.assert_allclose(found.values[n], top.values[:4], atol=1e-5)
        np.testing.assert_allclose(found.chosen[n], expected[place, sampled.tokens[place]], atol=1e-5)
    assert sampled.tokens[3] == 0
    assert sample(each[1:2], logits[:1]).logprobs is None


# -- what is not a number ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_rows_that_are_not_numbers_are_flagged_and_harm_nobody(poison: float) -> None:
    """A row with a NaN or an infinity is told apart; its neighbours draw as ever, in this step and the next."""
    each = list(FEATURES.values())
    logits = logits_of(len(each), 8)
    expected = sample(each, logits).tokens
    for bad in range(len(each)):
        broken = logits.clone()
        broken[bad, bad] = poison
        made = sampler()
        for row, sampling in enumerate(each):
            made.add(row, sampling, PROMPT, OUTPUT, ends=sampling.stop_token_ids)
        sampled = made.sample(broken, list(range(len(each))), [len(OUTPUT)] * len(each))
        assert (~sampled.finite).nonzero().flatten().tolist() == [bad]
        others = [row for row in range(len(each)) if row != bad]
        assert sampled.tokens[others].tolist() == expected[others].tolist()
        assert 0 <= sampled.tokens[bad] < VOCAB


def test_impossible_tokens_are_no_failure() -> None:
    """Logits of minus infinity are a model's way to rule tokens out."""
    logits = logits_of(3, 9)
    logits[:, 10:] = -math.inf
    sampled = sample([Sampling(), DRAWN, Sampling(temperature=2.0, top_k=50, top_p=0.99)], logits)
    assert sampled.finite.all()
    assert (sampled.tokens < 10).all()


# -- distribution and noise ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.7),
        Sampling(temperature=1.0, top_k=4),
        Sampling(temperature=1.3, top_p=0.8),
        Sampling(temperature=1.0, min_p=0.1),
        Sampling(temperature=2.0, top_k=6, top_p=0.9, min_p=0.05, repetition_penalty=1.2, presence_penalty=0.1),
    ],
    ids=["temperature", "top_k", "top_p", "min_p", "together"],
)
def test_draws_follow_the_distribution(sampling: Sampling) -> None:
    """Over 20 000 seeds and output places, tokens come as often as the reference's probabilities say (chi-square)."""
    count, vocab = 20_000, 12
    row = logits_of(1, 10, vocab) / 2
    each = [msgspec.structs.replace(sampling, seed=seed) for seed in range(count // 4)]
    made = sampler(vocab)
    for number, setting in enumerate(each):
        made.add(number, setting, PROMPT, OUTPUT)
    rows = list(range(len(each)))
    observed = np.zeros(vocab)
    for index in range(4):
        if sampling.penalises:  # counts must be those of the reference
            for number, setting in enumerate(each):
                made.remove(number)
                made.add(number, setting, PROMPT, OUTPUT)
        tokens = made.sample(row.expand(len(each), vocab), rows, [index] * len(each)).tokens
        observed += np.bincount(tokens, minlength=vocab)
    expected = reference_scores(sampling, row[0]).softmax(-1).numpy() * count
    possible = expected > 0
    assert observed[~possible].sum() == 0
    assert stats.chisquare(observed[possible], expected[possible]).pvalue > 0.001


def test_noise_is_gumbel_and_depends_on_seed_place_and_token_alone() -> None:
    """Rows are the same in any batch, all different, and have the mean, variance and maximum draws of the law."""
    keys, tokens = row_keys([1, 2, 2, 2**63 - 1], [5, 5, 6, 0]), np.arange(200_000)
    noise = gumbel(keys, tokens)
    assert noise.dtype == np.float32
    assert np.array_equal(gumbel(keys[2:3], tokens)[0], noise[2])
    some = np.array([[7, 100, 3], [0, 1, 199_999]])
    assert np.array_equal(gumbel(keys[1:3], some), np.take_along_axis(noise[1:3], some, 1))
    assert np.isfinite(noise).all()
    assert np.abs(np.corrcoef(noise) - np.eye(4)).max() < 0.01
    assert abs(noise.mean() - np.euler_gamma) < 0.01
    assert abs(noise.var() - np.pi**2 / 6) < 0.02


def test_noise_on_a_device_is_the_hosts() -> None:
    """The torch form yields the same numbers; the logarithms may round differently in the last bits."""
    seeds = [0, 1, 2**62 + 12345, 2**63 - 1]
    keys, tokens = row_keys(seeds, [0, 1, 1000, 2**31]), np.arange(50_000)
    device = gumbel_on_device(torch.from_numpy(keys.view(np.int64)), torch.from_numpy(tokens))
    np.testing.assert_allclose(device.numpy(), gumbel(keys, tokens), rtol=1e-5, atol=1e-6)
    some = np.array([[5, 4, 3]] * 4)
    few = gumbel_on_device(torch.from_numpy(keys.view(np.int64)), torch.from_numpy(some))
    np.testing.assert_array_equal(few.numpy(), device[:, [5, 4, 3]].numpy())


def test_sampling_does_not_wait_for_the_device() -> None:
    """On a device whose tensors have no values to read, every step can be launched: the host never looks at one."""
    each, meta = list(FEATURES.values()), torch.device("meta")
    made = Sampler(VOCAB, meta, ops.load("cpu"))
    for row, sampling in enumerate(each):
        made.add(row, sampling, PROMPT, OUTPUT, forced=[1], ends=sampling.stop_token_ids)
    for index in range(3):
        batch = [row for row in range(len(each)) if row != index]
        sampled = made.sample(torch.empty((len(batch), VOCAB), device=meta), batch, [index] * len(batch))
        assert sampled.tokens.device == sampled.finite.device == meta
        assert sampled.tokens.shape == sampled.finite.shape == (len(batch),)
