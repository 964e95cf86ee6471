"""Latency models that rest on measured steps: pieces in batch size, tables, and counting what lies beyond them."""

from pathlib import Path

import numpy as np
import pytest

from cluster.latency import StepShape
from experiments import compose, run
from experiments.outputs import read_summary
from sim.latency import Fitted
from sim.profile import features_of, fit, held_out, knots_of
from sim.table import load_table


def decodes(sequences: int, context: int = 100) -> StepShape:
    return StepShape(0, 0, 0, sequences, sequences * context)


def engine(noise: float = 0.0) -> list[tuple[StepShape, int]]:
    """Steps whose time per row falls at 4 and rises at 16, as kernels for other sizes take over."""
    rng = np.random.default_rng(1)
    steps = []
    for _ in range(3000):
        sequences, prefill = int(rng.integers(1, 33)), int(rng.integers(0, 2)) * int(rng.integers(1, 65))
        rows = sequences + prefill
        slow = 100_000 * min(rows, 4) + 10_000 * max(0, min(rows, 16) - 4) + 60_000 * max(0, rows - 16)
        took = 1_000_000 + slow + 20_000 * prefill + 300 * sequences * 100
        shape = StepShape(prefill, prefill * (prefill + 1) // 2, int(prefill > 0), sequences, sequences * 100)
        steps.append((shape, round(took * (1 + noise * float(rng.standard_normal())))))
    return steps


def test_rows_are_fitted_piece_by_piece() -> None:
    """Where a straight line is far off, pieces are not: held-out error within noise, single sizes within 2 %."""
    steps = engine(0.02)
    error, residuals = held_out(steps)
    assert error.median < 0.02
    assert abs(error.total) < 0.002
    assert len(residuals) == len(steps)
    assert np.std(residuals) == pytest.approx(0.02, abs=0.002)
    model, exact = fit(steps), dict(engine())
    assert {4, 16} < set(knots_of(steps))
    assert max(abs(model.step_ns(shape) / took - 1) for shape, took in exact.items()) < 0.02
    small = [(shape, took) for shape, took in steps if not shape.prefill_tokens]
    line = np.polyfit([shape.decode_sequences for shape, _ in small], [took for _, took in small], 1)
    assert max(abs(np.polyval(line, shape.decode_sequences) / took - 1) for shape, took in small) > 0.1


def test_few_steps_get_few_pieces() -> None:
    """A segment without measured steps would be a guess."""
    assert knots_of(engine()[:40]) == []
    assert knots_of([(decodes(number % 3 + 1), 1) for number in range(600)]) == [1, 2]


def test_pieces_are_what_their_features_say() -> None:
    """The time of a step is the sum of coefficients times features, below, between and beyond the knots."""
    model = Fitted([1, 10, 2, 3, 4, 100, 5, 6, 50, 7], (2, 5))
    for sequences in range(9):
        for tokens in (0, 1, 7):
            shape = StepShape(tokens, 8 * tokens, tokens, sequences, 11 * sequences, 3 if sequences else 0)
            terms = zip(model.coefficients_ns, Fitted.features(shape, model.knots), strict=True)
            assert model.step_ns(shape) == max(1, sum(coefficient * feature for coefficient, feature in terms))
            assert features_of([shape], model.knots)[0].tolist() == list(Fitted.features(shape, model.knots))
    assert model.step_ns(decodes(6, 0)) == 1 + 100 + 6 * 5 + 3 * 50 + 7
    with pytest.raises(ValueError, match=r"needs 10 coefficients .*rows > 5.*, not 8"):
        Fitted([1] * 8, (2, 5))
    with pytest.raises(ValueError, match=r"knots of a fitted latency model are \[5, 2\]"):
        Fitted([1] * 10, (5, 2))


def test_steps_beyond_the_profile_are_counted() -> None:
    """Each step larger in some part than any that was measured counts once."""
    model = fit(engine())
    for sequences in (1, 32, 33, 200):
        model.step_ns(decodes(sequences))
    model.step_ns(StepShape(1000, 500_500, 1, 0, 0))
    assert (model.asked, model.outside) == (5, 3)


TABLE = """kind,tokens,context,duration_s
prefill,100,0,0.01
prefill,1000,0,0.1
prefill,100,1000,0.02
prefill,1000,1000,0.2
decode,1,100,0.01
decode,9,100,0.02
decode,1,1100,0.02
decode,9,1100,0.06
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "table.csv"
    path.write_text(text)
    return path


def test_a_table_is_interpolated(tmp_path: Path) -> None:
    """As measured at its points, in straight lines between them, and beyond them as in the last cell, counted."""
    table = load_table(write(tmp_path, TABLE))
    ms = {
        StepShape(100, 5050, 1, 0, 0): 10,
        StepShape(1000, 1000 * 1000 + 500_500, 1, 0, 0): 200,
        StepShape(550, 550 * 500 + 550 * 551 // 2, 1, 0, 0): 82.5,
        decodes(5, 600): (15 + 40) / 2,
        StepShape(95, 95 * 96 // 2, 1, 5, 5 * 600): 10 + (27.5 - 15),
    }
    for shape, expected in ms.items():
        assert table.step_ns(shape) == pytest.approx(expected * 1e6)
    assert (table.asked, table.outside) == (5, 0)
    assert table.step_ns(decodes(17, 100)) == pytest.approx(30e6)
    assert (table.asked, table.outside) == (6, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TABLE.replace("prefill,1000,1000,0.2\n", ""), "no prefill of 1000 tokens with a context of 1000"),
        (TABLE + "decode,1,100,0.01\n", "line 10: .* each tokens and context once"),
        (TABLE + "decode,two,100,0.01\n", "line 10: .* three numbers"),
        (TABLE.partition("decode")[0], "no row of kind decode"),
    ],
)
def test_broken_tables_are_refused(text: str, message: str, tmp_path: Path) -> None:
    """By file and line, or by what is missing."""
    with pytest.raises(ValueError, match=message):
        load_table(write(tmp_path, text))


def test_a_run_says_what_it_extrapolated(tmp_path: Path) -> None:
    """The summary of a run notes how many step times lay beyond what its table measured, and none where none did."""
    notes = []
    for scale in (1.0, 0.001):
        path = write(tmp_path, TABLE)
        cfg = compose(
            [
                "latency=table",
                f"latency.path={path}",
                "trace=synthetic",
                "trace.limit=20",
                "trace.max_prompt_tokens=900",
                f"trace.output_scale={scale}",
                "coldstart=none",
                "report=false",
                "progress=false",
            ]
        )
        summary = read_summary(run(cfg, tmp_path / str(scale)).folder)
        assert summary.provenance["basis"] == f"calibrated: step times interpolated in {path}"
        notes.append(summary.provenance["notes"])
    assert len(notes[0]) == 1
    assert "are extrapolated" in notes[0][0]
    assert notes[1] == []
