"""Peers of the simulator that run from a checkout: small programs stand in for them, called as they are."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from experiments.bench import sim
from experiments.bench.harness import checkouts
from experiments.bench.harness.sim_case import CASES, colocated
from experiments.bench.harness.simulators import Peer, PeerError
from experiments.cli import main
from traces.catalog import find

pytestmark = pytest.mark.skipif(find("azure2023_conv") is None, reason="needs the real trace azure2023_conv")

PD = "w16, 6 prefill and 10 decode executors"

READ_CSV = """
import csv
def read(path):
    with open(path) as file:
        return list(csv.DictReader(file))
"""

VIDUR = {
    "vidur/__init__.py": "",
    "vidur/simulator.py": """
class Simulator:
    def __init__(self, rows): self.rows = rows
    def run(self): print("simulating", len(self.rows))
""",
    "vidur/main.py": READ_CSV
    + """
import argparse
from vidur.simulator import Simulator
parser = argparse.ArgumentParser()
for name in ("replica_config_model_name", "replica_config_device", "cluster_config_num_replicas",
             "global_scheduler_config_type", "replica_scheduler_config_type", "sarathi_scheduler_config_chunk_size",
             "request_generator_config_type", "trace_request_generator_config_trace_file",
             "trace_request_generator_config_max_tokens", "metrics_config_output_dir",
             "random_forrest_execution_time_predictor_config_prediction_max_tokens_per_request"):
    parser.add_argument("--" + name, required=True)
for name in ("metrics_config_store_plots", "metrics_config_enable_chrome_trace"):
    parser.add_argument("--" + name, action=argparse.BooleanOptionalAction, default=True)
given = parser.parse_args()
rows = read(given.trace_request_generator_config_trace_file)
assert len(rows) == 20 and given.cluster_config_num_replicas == "1" and not given.metrics_config_store_plots
assert all(float(row["arrived_at"]) > 0 and int(row["num_prefill_tokens"]) > 0 for row in rows)
assert all(int(row["num_decode_tokens"]) > 0 for row in rows)
if __name__ == "__main__":
    Simulator(rows).run()
""",
}

SPLITWISE = {
    "simulator.py": """
class Simulator:
    def run(self): pass
class TraceSimulator(Simulator):
    def run(self): super().run()
""",
    "configs/config.yaml": """
defaults:
  - cluster: dgx-h100
  - start_state: baseline
  - performance_model: constant
  - override hydra/launcher: ray
  - _self_
applications: [{model_architecture: bloom-176b, model_size: bloom-176b-fp16, scheduler: round_robin}]
trace: {path: none}
output_dir: none
hydra: {run: {dir: "${output_dir}"}, job: {chdir: true}, launcher: {ray: {init: {address: "10.0.0.9:6379"}}}}
""",
    "configs/cluster/dgx-h100.yaml": "servers: [{sku: dgx-a100, count: 0}, {sku: dgx-h100, count: 40}]",
    "configs/start_state/baseline.yaml": "state_type: baseline",
    "configs/start_state/splitwise.yaml": """
state_type: splitwise
prompt: {num_instances: 1}
token: {num_instances: 1}
""",
    "configs/performance_model/constant.yaml": "name: constant",
    "configs/performance_model/db.yaml": "name: db",
    "run.py": READ_CSV
    + """
import hydra
from simulator import TraceSimulator
@hydra.main(config_path="configs", config_name="config", version_base=None)
def run(cfg):
    rows = read(cfg.trace.path)
    assert len(rows) == 20 and {row["request_type"] for row in rows} == {"2"} and int(rows[3]["prompt_size"]) > 0
    split = cfg.start_state.state_type == "splitwise"
    assert cfg.cluster.servers[1].count == 16 if split else cfg.cluster.servers[1].count == 1
    assert not split or (cfg.start_state.prompt.num_instances, cfg.start_state.token.num_instances) == (6, 10)
    assert cfg.performance_model.name == "db" and cfg.applications[0].model_size == "llama2-70b-fp16"
    TraceSimulator().run()
if __name__ == "__main__":
    run()
""",
}

DISTSERVE = {
    "simdistserve/benchmarks/simulate_dist.py": """
import argparse, json
import simpy
class VLLMCluster:
    def __init__(self, env, N_instance=1, PP=1): self.instances = N_instance, 0
class DisaggCluster:
    def __init__(self, env, N_prefill_instance=1, N_decode_instance=1):
        self.instances = N_prefill_instance, N_decode_instance
def parse_args(args_=None):
    parser = argparse.ArgumentParser()
    for name in ("--backend", "--model", "--arrival", "--workload"):
        parser.add_argument(name, required=True)
    parser.add_argument("--N", type=int)
    return parser.parse_args(args=args_)
def main(args):
    requests = json.load(open(args.workload))
    assert len(requests) == args.N == 20 and args.arrival == "custom"
    assert all(set(request) == {"start_time", "prompt_len", "output_len"} for request in requests)
    env = simpy.Environment()
    cluster = VLLMCluster(env=env, PP=1) if args.backend == "vllm" else DisaggCluster(env=env)
    assert cluster.instances == ((1, 0) if args.backend == "vllm" else (6, 10))
    env.timeout(5)
    env.run()
    print("### Prefill queue is not empty.")
""",
}

BLIS = {
    "blis": f"""#!{sys.executable}
import csv, sys
assert sys.argv[1] == "replay", sys.argv
given = dict(zip(sys.argv[2::2], sys.argv[3::2]))
rows = list(csv.reader(open(given["--trace-data"])))
assert len(rows) == 21 and {{len(row) for row in rows}} == {{27}}
assert "trace_version" in open(given["--trace-header"]).read()
assert given["--num-instances"] == "1" and given["--cache-signal-delay"] == "0"
"""
}

PEERS = {"blis": BLIS, "distserve": DISTSERVE, "splitwise": SPLITWISE, "vidur": VIDUR}

Checkout = Callable[[str], str]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    """Writes the program that stands in for a peer and gives the option's value."""

    def write(option: str) -> str:
        for name, text in PEERS[option].items():
            path = tmp_path / option / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            path.chmod(0o755)
        return f"{tmp_path / option}:{sys.executable}"

    return write


@pytest.mark.parametrize("option", PEERS)
def test_a_peer_is_given_our_requests(option: str, checkout: Checkout) -> None:
    """It reads as many in its own format, with as many instances as we have executors, and its loop is timed."""
    peer = checkouts.peer(option, checkout(option))
    assert peer.rate is not None
    assert peer.rate(20, CASES["w1"]) > 0
    assert peer.takes(CASES[PD]) == (option in ("distserve", "splitwise"))
    if peer.takes(CASES[PD]):
        assert peer.rate(20, CASES[PD]) > 0
    assert not peer.takes(CASES["w16, prefix-aware"])


def test_rows_of_peers(checkout: Checkout) -> None:
    """One with its number and ratio, one that is not here says how to give it, one that fails says what it said."""
    peers = [
        checkouts.peer("vidur", checkout("vidur")),
        checkouts.peer("blis", None),
        Peer("Broken", "", checkouts.peer("vidur", checkout("vidur")).rate),
    ]
    Path(checkout("vidur").partition(":")[0], "vidur", "simulator.py").write_text("class Simulator:\n    pass\n")
    rows = {row.name: row for row in sim.compared("w1", sim.Options(requests=160, repeats=1), peers, False, "")}
    assert rows["w1: BLIS"].value is None
    assert "deepflow bench sim blis=CHECKOUT[:PYTHON]" in rows["w1: BLIS"].detail
    assert rows["w1: Vidur"].value is None
    assert "Simulator' has no attribute 'run'" in rows["w1: Vidur"].detail
    checkout("vidur")
    rows = {row.name: row for row in sim.compared("w1", sim.Options(requests=160, repeats=1), peers[:2], False, "")}
    assert rows["w1: Vidur"].value > 0
    assert rows["w1: pure Python / Vidur"].value > 0
    assert "w1: pure Python / BLIS" not in rows


def test_errors_of_peers(checkout: Checkout, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong path is refused before anything runs; a program that fails or is another version is told by its row."""
    with pytest.raises(
        ValueError, match=r"vidur=/nowhere: there is no vidur/main.py in /nowhere; give a checkout of Vi"
    ):
        checkouts.peer("vidur", "/nowhere")
    assert main(["bench", "sim", "vidur=/nowhere"]) == 2
    assert "there is no vidur/main.py in /nowhere" in capsys.readouterr().err
    place = checkout("distserve")
    Path(tmp_path, "distserve", "simdistserve", "benchmarks", "simulate_dist.py").write_text(
        "raise SystemExit('broken')"
    )
    peer = checkouts.peer("distserve", place)
    assert peer.rate is not None
    with pytest.raises(PeerError, match="it failed with 1: broken"):
        peer.rate(20, colocated(1))
    Path(tmp_path, "vidur", "vidur").mkdir(parents=True)
    Path(tmp_path, "vidur", "vidur", "main.py").write_text("")
    Path(tmp_path, "vidur", "vidur", "simulator.py").write_text("class Simulator:\n    def run(self): pass\n")
    peer = checkouts.peer("vidur", f"{tmp_path / 'vidur'}:{sys.executable}")
    assert peer.rate is not None
    with pytest.raises(PeerError, match=r"without a call of vidur.simulator:Simulator.run: is this another version"):
        peer.rate(20, colocated(1))
    peer = checkouts.peer("vidur", f"{tmp_path / 'vidur'}:/no/python")
    assert peer.rate is not None
    with pytest.raises(PeerError, match="/no/python cannot be run: No such file or directory"):
        peer.rate(20, colocated(1))


def test_what_a_peer_on_hydra_said(checkout: Checkout) -> None:
    """Hydra's advice at the end is left out: the row tells the error, and of a config what is wrong with it."""
    place = checkout("splitwise")
    peer = checkouts.peer("splitwise", place)
    assert peer.rate is not None
    folder = Path(place.partition(":")[0])
    run = folder / "run.py"
    run.write_text(run.read_text().replace("    rows =", "    raise RuntimeError('out of memory')\n    rows ="))
    with pytest.raises(PeerError, match=r"it failed with 1: RuntimeError: out of memory$"):
        peer.rate(20, CASES["w1"])
    (folder / "configs" / "cluster" / "dgx-h100.yaml").unlink()
    with pytest.raises(PeerError, match=r"it failed with 1: .*ould not find 'cluster/dgx-h100'"):
        peer.rate(20, CASES["w1"])
