"""What joins the NPUs of an executor: links of a node, all-reduces, launches, and mixed fleets."""

from pathlib import Path

import msgspec
import pytest

from cluster.latency import StepShape
from cluster.recorder import Recorder
from experiments import build, compose
from sim.hardware import AllToAll, Hardware
from sim.model_shape import ModelShape
from sim.roofline import Roofline
from tests.builders import NPU

MODEL = ModelShape("toy", 10, 4096, 32, 8, 128, 14336, 1000)


@pytest.mark.parametrize(
    ("topology", "npus", "rate", "latency"),
    [
        ("mesh", 8, 70e9, 1e-5),
        ("mesh", 2, 10e9, 1e-5),
        ("switch", 2, 70e9, 1e-5),
        ("ring", 4, 70e9, 3e-5),
        ("mesh", 16, 1e10, 5e-5),
    ],
)
def test_what_joins_some_npus(topology: str, npus: int, rate: float, latency: float) -> None:
    """A mesh gives each pair its own link, a switch all to anyone; a ring takes a turn per NPU; nodes are far apart."""
    found = msgspec.convert(msgspec.to_builtins(NPU) | {"topology": topology}, Hardware).collective(npus)
    assert found == pytest.approx((rate, latency))


def test_an_all_reduce_takes_two_phases_twice_per_layer() -> None:
    """Each sends (n - 1) / n of the 16-bit activations in either phase, and waits for the slowest each time."""
    step, still = StepShape(0, 0, 0, 64, 0), msgspec.structs.replace(NPU, peer_bytes_per_s=1e30, peer_latency_s=0.0)
    took = Roofline(NPU, MODEL, 4).step_ns(step) - Roofline(still, MODEL, 4).step_ns(step)
    rate = 140e9 * 0.5 * 3 / 7
    assert took == pytest.approx(10 * 2 * 2 * (1e-5 + 3 / 4 * 64 * 4096 * 2 / rate) * 1e9, abs=2)


def test_rates_of_spread_experts_lie_between_the_measured_ones() -> None:
    """In a straight line between two degrees, at the ends as measured there, over links where nothing was measured."""
    measured = msgspec.structs.replace(NPU, all_to_all=(AllToAll(4, 80e9, 60e9), AllToAll(8, 40e9, 50e9)), node_npus=32)
    assert measured.all_to_all_rates(2) == (80e9, 60e9)
    assert measured.all_to_all_rates(6) == (60e9, 55e9)
    assert measured.all_to_all_rates(32) == (40e9, 50e9)
    assert NPU.all_to_all_rates(8) == pytest.approx((70e9, 70e9))
    assert NPU.all_to_all_rates(16) == (1e10, 1e10)


def test_launches_one_by_one_are_a_floor() -> None:
    """Without a graph a small step takes ten launches per layer; with one only steps with prompts do."""
    eager = msgspec.structs.replace(NPU, kernel_launch_s=1e-4)
    decode, prompt = StepShape(0, 0, 0, 1, 10), StepShape(4, 10, 1, 1, 10)
    floor = round((0.001 + 10 * 10 * 1e-4) * 1e9)
    assert Roofline(eager, MODEL, 1, graph=False).step_ns(decode) == floor
    assert Roofline(eager, MODEL, 1).step_ns(decode) == Roofline(NPU, MODEL, 1).step_ns(decode) < floor
    assert Roofline(eager, MODEL, 1).step_ns(prompt) == floor
    large = StepShape(100_000, 0, 1, 0, 0)
    assert Roofline(eager, MODEL, 1).step_ns(large) == Roofline(NPU, MODEL, 1).step_ns(large)


def test_a_node_without_links_is_refused() -> None:
    """Several NPUs per node need something between them."""
    with pytest.raises(ValueError, match="the 8 NPUs of a node need a link"):
        msgspec.structs.replace(NPU, peer_bytes_per_s=0.0)


def run_pd(prefill: str, decode: str) -> Recorder:
    cfg = compose(
        [
            "fleet=pd_910c_910b4",
            f"fleet.groups.0.hardware={prefill}",
            f"fleet.groups.1.hardware={decode}",
            "trace=synthetic",
            "trace.limit=20",
            "coldstart=none",
            "dispatch=round_robin",
        ]
    )
    recorder = Recorder()
    control = build.control_plane(cfg, build.workload(cfg).arrivals, recorder)
    with build.cluster(cfg, None) as cluster:
        control.drive(cluster)
    return recorder


def test_a_fleet_of_two_kinds() -> None:
    """Prefill on one kind and decode on another: the slower memory is felt in token gaps, the other way in neither."""
    mixed, swapped = run_pd("ascend910c", "ascend910b4"), run_pd("ascend910b4", "ascend910c")
    assert set(mixed.outcomes) == set(swapped.outcomes) == {"finished"}
    gap = {kind: sum(run.gaps) / len(run.gaps) for kind, run in (("b4", mixed), ("c", swapped))}
    assert 1.5 < gap["b4"] / gap["c"] < 2.1


def test_a_group_may_bring_its_own_file(tmp_path: Path) -> None:
    """A YAML file serves like an option; what is neither is refused with the options."""
    file = tmp_path / "fast.yaml"
    file.write_bytes(msgspec.json.encode(msgspec.structs.replace(NPU, name="fast")))
    cfg = compose([f"fleet.groups=[{{role: colocated, executors: 1, hardware: {file}}}]"])
    (group,) = build.groups(cfg)
    assert build.hardware_of(cfg, group.spec).name == "fast"
    cfg = compose(["fleet=pd_910c_910b4", "fleet.groups.0.hardware=abacus"])
    with pytest.raises(ValueError, match=r"'abacus' is not one of a100, ascend310p.* nor a YAML file"):
        build.sim_node(cfg)
