"""Golden decision logs: a refactor that changes no decision leaves their digests as they are.

After a change that is meant to change decisions: `python tests/golden/test_golden.py` writes them anew, and the diff of
digests.json says which kinds of run it touched.
"""

import hashlib
import json
import tempfile
from pathlib import Path

import pytest

from experiments import compose, run

HERE = Path(__file__).resolve().parent
DIGESTS = HERE / "digests.json"

RUNS = {
    "colocated": ["dispatch=least_outstanding"],
    "deepflow_mixed": ["dispatch=deepflow", "fleet=mixed"],
    "disaggregated": ["dispatch=round_robin", "fleet=pd_1p1d"],
    "preempting": ["dispatch=least_outstanding", "engine.kv_blocks=40", "engine.max_in_flight=2"],
    "autoscaled": [
        "scaling=target_utilisation",
        "scaling.target=0.2",
        "scaling.period_s=1",
        "scaling.down_delay_s=2",
        "engine.max_sequences=16",
        "fleet.groups.0.executors=1",
    ],
    "failing": ["dispatch=round_robin", "backend.failures=[{at_s: 5.2, executor: te-1}]", "job_executors=2"],
}


def digest(overrides: list[str], folder: Path) -> dict[str, int | str]:
    """Number of decisions of a run, and a hash of them all."""
    base = [
        "trace=deepflow",
        f"trace.reader.path={HERE / 'workload.jsonl'}",
        "coldstart=prewarmed",
        "report=false",
        "progress=false",
    ]
    run(compose([*base, *overrides]), folder)
    log = (folder / "decisions.jsonl").read_bytes()
    return {"decisions": log.count(b"\n") - 1, "sha256": hashlib.sha256(log).hexdigest()}


@pytest.mark.parametrize("name", RUNS)
def test_decisions_are_the_golden_ones(name: str, tmp_path: Path) -> None:
    """The control plane decides what it decided when the digests were written, event by event."""
    assert digest(RUNS[name], tmp_path) == json.loads(DIGESTS.read_text())[name]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        found = {name: digest(overrides, Path(scratch) / name) for name, overrides in RUNS.items()}
    DIGESTS.write_text(json.dumps(found, indent=1) + "\n")
