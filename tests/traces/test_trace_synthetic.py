"""The generator and the shared prefixes: reproducible, and like the traces they stand in for."""

from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from cluster.request import Arrival
from traces.errors import TraceError
from traces.formats import open_trace
from traces.sharing import PrefixSharing
from traces.stats import stats_of
from traces.synthetic import PROFILES, SyntheticTrace

HOUR_S = 3600


@pytest.mark.parametrize("profile", PROFILES)
def test_same_seed_same_workload(profile: str) -> None:
    """A seed fixes the workload; lengths and times stay in range."""
    trace = SyntheticTrace(profile, rate=5, duration_s=60, model="m", seed=7)
    arrivals = list(trace)
    assert arrivals == list(trace) == list(SyntheticTrace(profile, 5, 60, "m", 7))
    assert arrivals != list(SyntheticTrace(profile, 5, 60, "m", 8))
    assert [arrival.request.request_id for arrival in arrivals] == list(range(len(arrivals)))
    assert all(one.at_ns <= two.at_ns < 60 * 10**9 for one, two in pairwise(arrivals))
    for arrival in arrivals:
        assert 1 <= arrival.request.prompt_tokens <= PROFILES[profile].prompt.most
        assert 1 <= arrival.answer.output_tokens <= PROFILES[profile].output.most
        assert arrival.request.max_tokens == max(2048, arrival.answer.output_tokens)


def test_streams_are_separate() -> None:
    """Another rate gives other times but the same lengths in the same order."""
    slow, fast = (list(SyntheticTrace("azure2023_conv", rate, 60, "m")) for rate in (1, 4))
    assert len(slow) < len(fast)
    assert [a.request.prompt_tokens for a in slow] == [a.request.prompt_tokens for a in fast[: len(slow)]]


@pytest.mark.parametrize(("shape", "cv"), [(1.0, 1.0), (0.25, 2.0), (4.0, 0.5)])
def test_gaps_are_gamma(shape: float, cv: float) -> None:
    """The rate is the one asked for, and the gaps' CV is 1 / sqrt(shape)."""
    stats = stats_of(SyntheticTrace("azure2023_conv", 10, HOUR_S, "m", gamma_shape=shape))
    assert stats.mean_rps == pytest.approx(10, rel=0.03)
    assert stats.iat_cv == pytest.approx(cv, rel=0.05)


@pytest.mark.parametrize(
    ("name", "prompt_bound", "output_bound"),
    # the fits' own distances (.11/.05, .03/.03, .03/.02), and room for 18,000 draws and for rounded parameters
    [("azure2023_conv", 0.13, 0.07), ("azure2023_code", 0.04, 0.045), ("mooncake_conversation", 0.035, 0.03)],
)
def test_lengths_are_like_the_trace(
    real_trace: Callable[[str], Path], name: str, prompt_bound: float, output_bound: float
) -> None:
    """The Kolmogorov-Smirnov distance to the real lengths is below a stated bound."""
    real_trace(name)
    real, drawn = _lengths(open_trace(name, "m")), _lengths(SyntheticTrace(name, 5, HOUR_S, "m"))
    assert _distance(real[0], drawn[0]) < prompt_bound
    assert _distance(real[1], drawn[1]) < output_bound
    assert abs(np.corrcoef(*np.argsort(np.argsort(drawn)))[0, 1]) < 0.03


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"profile": "gpt"}, "profile is 'gpt': allowed is one of azure2023_code, azure2023_conv, .*; "),
        ({"rate": 0}, "rate is 0: allowed is more than 0 requests/s; "),
        ({"rate": -1}, "rate is -1"),
        ({"duration_s": 0}, "duration_s is 0: allowed is more than 0 s; "),
        ({"seed": -1}, "seed is -1: allowed is "),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"gamma_shape": 0}, "gamma_shape is 0: allowed is a number above 0; "),
    ],
)
def test_bad_arguments(change: dict[str, object], message: str) -> None:
    """Senseless arguments are refused when the generator is made."""
    arguments: dict[str, object] = {"profile": "azure2023_conv", "rate": 1, "duration_s": 1, "model": "m"}
    with pytest.raises(ValueError, match=message):
        SyntheticTrace(**(arguments | change))  # type: ignore[arg-type]


def test_no_arrival() -> None:
    """A workload without arrivals is an error."""
    with pytest.raises(TraceError, match=r"no request arrives in 0.001 s at 0.001 requests/s: .*; raise the rate"):
        list(SyntheticTrace("azure2023_conv", 0.001, 0.001, "m", gamma_shape=5))


def test_sharing_is_like_mooncake() -> None:
    """On the profile's lengths the reuse is that of the real trace, and lengths and times do not change."""
    plain = SyntheticTrace("mooncake_conversation", 3.4, HOUR_S, "m")
    stats = stats_of(PrefixSharing(plain))
    assert stats.reuse_tokens == pytest.approx(0.374, abs=0.03)
    without = stats_of(plain)
    assert (stats.prompt, stats.output, stats.span_s) == (without.prompt, without.output, without.span_s)


def test_shared_ids_are_consistent() -> None:
    """As many ids as full blocks, answers begin with their prompts, later turns begin with whole earlier answers."""
    sharing = PrefixSharing(SyntheticTrace("azure2023_conv", 10, 30, "m"), system_tokens=64, continue_share=0.5)
    arrivals = list(sharing)
    assert arrivals == list(sharing)
    contexts: list[tuple[int, ...]] = []
    continued = 0
    for arrival in arrivals:
        ids, context = arrival.request.block_ids, arrival.answer.block_ids
        assert ids is not None
        assert context is not None
        assert len(ids) == arrival.request.prompt_tokens // 16
        assert len(context) == (arrival.request.prompt_tokens + arrival.answer.output_tokens) // 16
        assert context[: len(ids)] == ids
        shared = max((_shared(ids, earlier) for earlier in contexts), default=0)
        if shared > 4:
            assert any(len(earlier) == shared for earlier in contexts)
            continued += 1
        contexts.append(context)
    assert continued > len(arrivals) / 5


@pytest.mark.parametrize("name", ["continue_share", "system_tokens", "sessions", "seed"])
def test_bad_sharing(name: str) -> None:
    """Senseless arguments are refused, and so are arrivals that have ids."""
    plain = SyntheticTrace("azure2023_conv", 1, 60, "m")
    with pytest.raises(ValueError, match=f"{name} is -1: allowed is "):
        PrefixSharing(plain, **{name: -1})
    with pytest.raises(TraceError, match="request 0 has block ids: allowed are requests without; leave out"):
        list(PrefixSharing(PrefixSharing(plain)))


def _lengths(arrivals: Iterable[Arrival]) -> np.ndarray:
    pairs = [(arrival.request.prompt_tokens, arrival.answer.output_tokens) for arrival in arrivals]
    return np.array(pairs).T


def _distance(one: np.ndarray, two: np.ndarray) -> float:
    """Largest difference of the two empirical distribution functions."""
    grid = np.unique(np.concatenate((one, two)))
    shares = (np.searchsorted(np.sort(sample), grid, side="right") / len(sample) for sample in (one, two))
    return float(np.max(np.abs(np.subtract(*shares))))


def _shared(one: tuple[int, ...], two: tuple[int, ...]) -> int:
    count = 0
    for a, b in zip(one, two, strict=False):
        if a != b:
            break
        count += 1
    return count
