"""Speculation in simulated runs: what guesses are worth, and what they cost."""

from statistics import mean

import pytest

from cluster.acceptance import Acceptance
from cluster.metrics import Slo, summarise
from cluster.vocabulary import Outcome
from flowserve.core.config import EngineConfig
from sim.latency import Constant
from tests.builders import Run, disaggregated, make_arrival, run_sim


def serve(guesses: int, acceptance: float = 0.0, guess_s: float = 0.0, groups: bool = False, **limits: float) -> Run:
    config = {"kv_blocks": 1000, "token_budget": 512, "max_sequences": 64, **limits}
    run = run_sim(
        [make_arrival(n, at_s=0.03 * n, prompt=40, output=80 + n % 7, limit=200) for n in range(40)],
        engine=EngineConfig(**config, speculative_tokens=guesses),  # type: ignore[arg-type]
        groups=disaggregated() if groups else None,
        latency=lambda: Constant(0.01, guess_s),
        acceptance=acceptance,
    )
    assert set(run.recorder.outcomes) == {Outcome.FINISHED}
    return run


def tpot(run: Run) -> float:
    """Mean over requests, in seconds."""
    return mean(
        (row["last_token_ns"] - row["first_token_ns"]) / 1e9 / (row["output_tokens"] - 1) for row in run.rows.values()
    )


def test_time_per_output_token_falls_with_acceptance() -> None:
    """By as much as the mean number of tokens per verification says; outputs are as long as they were."""
    plain = serve(0)
    lengths = [row["output_tokens"] for row in plain.rows.values()]
    times = []
    for rate in (0.0, 0.5, 0.8):
        run = serve(3, rate)
        assert sorted(row["output_tokens"] for row in run.rows.values()) == sorted(lengths)
        expected = sum(rate**n for n in range(4))  # (1 - rate^4) / (1 - rate)
        assert tpot(run) == pytest.approx(tpot(plain) / expected, rel=0.05)
        summary = summarise(run.recorder, Slo())
        assert summary["draft_acceptance"] == pytest.approx(rate, abs=0.02)
        assert summary["accepted_tokens"] <= summary["draft_tokens"]
        times.append(tpot(run))
    assert times[0] > 1.5 * times[1] > 2 * times[2]


def test_guesses_cost_time() -> None:
    """Where tokens cost time and hardly a guess is right, speculating is slower than not."""
    assert tpot(serve(3, 0.1, guess_s=0.001)) > 1.2 * tpot(serve(0, guess_s=0.001))


def test_speculation_on_the_decode_side() -> None:
    """Disaggregated, the decode executor alone guesses; nothing is left over on either side."""
    run = serve(3, 0.7, groups=True)
    assert tpot(run) < 0.6 * tpot(serve(0, groups=True))
    for executor in run.executors.values():
        executor.shell.core.check_integrity()
        assert executor.shell.core.idle


def test_speculation_under_preemption() -> None:
    """With too few blocks, sequences lose their places and come back; every output is complete."""
    run = serve(3, 0.7, kv_blocks=40, watermark=0.0)
    assert sum(row["preemptions"] for row in run.rows.values()) > 0
    assert [run.rows[n]["output_tokens"] for n in range(40)] == [80 + n % 7 for n in range(40)]


def test_what_is_right_does_not_hang_on_the_schedule() -> None:
    """Which guesses are right is a matter of request and place: however many are made at once, the same ones are."""
    acceptance = Acceptance(0.6, seed=5)
    right = [acceptance.tokens(7, index, 1) == 2 for index in range(200)]
    assert 90 < sum(right) < 150
    for start in range(150):
        run = next(n for n in range(50) if not right[start + n])
        assert acceptance.tokens(7, start, 50) == run + 1
        assert acceptance.tokens(7, start, 2) == min(run, 2) + 1
    assert right != [acceptance.tokens(8, index, 1) == 2 for index in range(200)]
    with pytest.raises(ValueError, match=r"acceptance rate is 1\.5"):
        Acceptance(1.5)
