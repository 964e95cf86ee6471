"""The simulator against what others measured: bounds that hold today, and the way there."""

import os
from pathlib import Path

import numpy as np
import pytest

from experiments import fidelity_published as fidelity
from tests.experiments.conftest import Command


def test_published_figures_of_ascend() -> None:
    """Without any fit to them, rooflines come within 30 % of published throughput and load times within 20 %."""
    figures = list(fidelity.published())
    assert len([figure for figure in figures if not figure.basis]) == 9
    for figure in figures:
        assert abs(figure.simulated / figure.published - 1) < (0.2 if figure.what.startswith("weights") else 0.3), (
            figure
        )


@pytest.fixture
def machine() -> fidelity.Machine:
    folder = os.environ.get("DEEPFLOW_GROUNDTRUTH", "/nowhere")
    path = Path(folder) / "vllm-rtx4090-llama-3.1-8b"
    if not path.is_dir():
        pytest.skip(f"no recorded engine in {path}: set DEEPFLOW_GROUNDTRUTH")
    return fidelity.read_machine(path, "rtx4090")


def test_a_real_engine_from_its_data_sheet(machine: fidelity.Machine) -> None:
    """vLLM on an RTX 4090, hardware as configured: means and medians of TTFT, TPOT and E2E within 10 %."""
    found = fidelity.errors(machine, fidelity.simulate(machine, {}), slice(150, None))
    assert max(abs(error) for (_, statistic), error in found.items() if statistic != "p99") < 0.1


@pytest.mark.slow
def test_a_fit_serves_requests_it_has_not_seen() -> None:
    """Of requests timed by the simulator itself with other terms, half are fitted: a third of the error is left."""
    rng = np.random.default_rng(2)
    prompts, outputs = rng.integers(100, 1500, 40), rng.integers(2, 60, 40)
    made = fidelity.Machine("made", ["hardware=rtx4090"], np.arange(40) * 0.1, prompts, outputs, {})
    truth = {"efficiency_gemm": 0.6, "efficiency_bandwidth": 0.7, "step_overhead_s": 0.003}
    made = made._replace(real=fidelity.simulate(made, truth))
    terms = fidelity.fit_terms(made, slice(0, 20))
    assert terms["efficiency_gemm"] == pytest.approx(0.6, rel=0.05)
    found = [
        np.mean(np.abs(list(fidelity.errors(made, fidelity.simulate(made, chosen), slice(20, None)).values())))
        for chosen in ({}, terms)
    ]
    assert found[1] < found[0] / 3


def test_what_is_no_recorded_engine_is_refused(tmp_path: Path) -> None:
    """With what was expected there."""
    with pytest.raises(ValueError, match=r"expected requests\.jsonl and meta\.json"):
        fidelity.read_machine(tmp_path, "rtx4090")


def test_the_table_of_published_figures(deepflow: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """`validate --published` prints every figure with its error, and says where timings would be found."""
    monkeypatch.delenv("DEEPFLOW_GROUNDTRUTH", raising=False)
    said = deepflow("validate", "--published")
    assert said.code == 0, said
    assert len([line for line in said.out.splitlines() if "%" in line]) == 10
    assert "DEEPFLOW_GROUNDTRUTH" in said.out
