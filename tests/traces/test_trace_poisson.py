"""Lengths of a file at Poisson arrivals: over again, at a rate that may swing like a day."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from cluster.vocabulary import NS_PER_S
from traces.poisson import PoissonTrace

FILE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,374,44
2023-11-16 18:17:04.0319600,396,109
2023-11-16 18:17:04.0781860,879,55
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "trace.csv"
    path.write_text(FILE)
    return path


def test_lengths_go_on_from_the_start_with_ids_of_their_own(file: Path) -> None:
    """Seven requests from a file of three."""
    arrivals = list(islice(PoissonTrace(file, "m", rate=5.0), 7))
    assert [each.request.prompt_tokens for each in arrivals] == [374, 396, 879, 374, 396, 879, 374]
    assert [each.answer.output_tokens for each in arrivals[:3]] == [44, 109, 55]
    assert [each.request.request_id for each in arrivals] == list(range(7))


def test_a_constant_rate_is_met_and_gaps_are_exponential(file: Path) -> None:
    """Mean and standard deviation of 20,000 gaps within 3 %."""
    times = np.array([each.at_ns for each in islice(PoissonTrace(file, "m", rate=8.0), 20_000)]) / NS_PER_S
    gaps = np.diff(times)
    assert gaps.mean() == pytest.approx(1 / 8, rel=0.03)
    assert gaps.std() == pytest.approx(1 / 8, rel=0.03)


def test_a_swinging_rate_has_its_night_at_0_and_its_noon_in_between(file: Path) -> None:
    """Of a period of 1,000 s, the hour around noon has (1 + swing) / (1 - swing) times the requests of the night's."""
    trace = PoissonTrace(file, "m", rate=20.0, swing=0.8, period_s=1000.0)
    times = np.array([each.at_ns for each in islice(trace, 21_000)]) / NS_PER_S
    assert (times < 1000).sum() == pytest.approx(20_000, rel=0.02)
    night, noon = (((times >= start) & (times < start + 100)).sum() for start in (0, 450))
    assert night == pytest.approx(100 * 20 * 0.25, rel=0.2)  # 0.2 at its start, 0.35 at its end
    assert noon == pytest.approx(100 * 20 * 1.8, rel=0.05)


def test_the_same_seed_gives_the_same_arrivals(file: Path) -> None:
    """And another one others."""
    first, again, other = (list(islice(PoissonTrace(file, "m", rate=1.0, seed=seed), 9)) for seed in (1, 1, 2))
    assert first == again
    assert first != other


@pytest.mark.parametrize(("argument", "value"), [("rate", 0.0), ("swing", 1.5), ("period_s", 0.0)])
def test_impossible_numbers_are_refused(file: Path, argument: str, value: float) -> None:
    """With the name of what is wrong."""
    with pytest.raises(ValueError, match=argument):
        PoissonTrace(file, "m", **{argument: value})
