"""Weights on their way into new executors: from where, how long, together with whom, and what happens when one dies."""

from collections.abc import Sequence

import pytest

from cluster import events as ev
from cluster.actions import Action, LaunchExecutor, RetireExecutor
from cluster.manager import GroupPlan
from cluster.policy import GroupLoad, ScalingPolicy
from cluster.vocabulary import Role, Stage, to_ns, to_s
from flowserve.core.config import EngineConfig
from flowserve.core.tiers import TierConfig
from sim.cluster import SimCluster
from sim.coldstart import ColdStart, Load
from sim.latency import Constant
from sim.node import Node
from sim.topology import Hosts, HostShape, Wire
from tests.builders import disaggregated, make_arrival, make_spec, run_sim

GB = 10**9
HOST = HostShape(Wire(20e9), 4, 4, Wire(100e9), pcie=Wire(20e9), ssd=Wire(5e9), memory_bytes_per_s=50e9)
LOAD = Load(20 * GB, 20 * GB)
FORK = Load(20 * GB, 20 * GB, fork=True, chunk_bytes=0.2 * GB)
STAGES = ColdStart(scaler_pre_s=1.0, te_post_load_s=0.5, load="local").stages()


class Starts:
    """A cluster in which executors are launched and die at given times, without anything else."""

    def __init__(self, load: Load, host: HostShape = HOST, hosts: Hosts | None = None, tiers: TierConfig | None = None):
        engine = EngineConfig(kv_blocks=100, tiers=tiers or TierConfig())
        self.node = Node(engine, lambda: Constant(0.01), STAGES, 1_000_000, 1, host, load=load)
        self.cluster = SimCluster(["cm"], lambda spec: self.node, hosts=hosts)
        self.events: list[ev.Event] = []

    def run(self, *script: tuple[float, Action | str], npus: int = 1) -> None:
        """Actions at times; a name: that executor dies. Then on until nothing happens any more."""
        for at_s, what in script:
            self.until(to_ns(at_s))
            if isinstance(what, str):
                self.cluster.kill(what)
            else:
                self.cluster._perform(what)
        self.until(None)
        self.events += self.cluster._events

    def until(self, time: int | None) -> None:
        clock = self.cluster.clock
        while (due := clock.next_ns) is not None and (time is None or due <= time):
            clock.step()
        if time is not None and time > clock.now:
            clock.run_until(time)

    def loads(self) -> dict[str, tuple[float, str]]:
        """Seconds of TE-Load and the source, of each executor that got through it."""
        return {
            event.executor: (round(to_s(event.took_ns), 6), event.source)
            for event in self.events
            if isinstance(event, ev.StageFinished) and event.stage is Stage.TE_LOAD
        }

    @property
    def ready(self) -> dict[str, float]:
        return {event.executor: to_s(event.occurred) for event in self.events if isinstance(event, ev.ExecutorReady)}


def launch(number: int, npus: int = 1) -> LaunchExecutor:
    return LaunchExecutor(f"te-{number}", make_spec(npus=npus))


def test_copies_of_a_model_have_weights_of_their_own() -> None:
    """Executors of one node, but of models with different names, find nothing of each other's in cache or HBM."""
    for load in (LOAD, FORK):
        starts = Starts(load)
        models = ("m-0", "m-1", "m-0")
        launches = [LaunchExecutor(f"te-{number}", make_spec(model=model)) for number, model in enumerate(models)]
        starts.run(*((10 * number, action) for number, action in enumerate(launches)))
        sources = [source for _, source in starts.loads().values()]
        assert sources == ["ssd", "ssd", "te-0, peer links" if load.fork else "dram"]


def test_the_first_reads_the_disk_and_the_next_finds_the_page_cache() -> None:
    """20 GB at 5 GB/s, then at PCIe's 20; four at once share what memory gives; a second host has read nothing."""
    starts = Starts(LOAD)
    starts.run((0, launch(0)), (10, launch(1)), (20, launch(2)), (20, launch(3)), (30, launch(4)))
    assert starts.loads() == {
        "te-0": (4.0, "ssd"),
        "te-1": (1.0, "dram"),
        "te-2": (1.0, "dram"),
        "te-3": (1.0, "dram"),
        "te-4": (4.0, "ssd"),
    }
    assert starts.ready["te-0"] == 1.0 + 4.0 + 0.5
    crowded = Starts(LOAD, hosts=Hosts(preloaded=(("m", 20 * GB),)))
    crowded.run(*((0.0, launch(number)) for number in range(4)))
    assert set(crowded.loads().values()) == {(1.6, "dram")}


def test_a_file_is_read_once_by_all_who_wait_for_it() -> None:
    """Of three at once one reads, and the others take it from DRAM when it is there; if it dies, the next one reads."""
    starts = Starts(LOAD)
    starts.run((0, launch(0)), (0, launch(1)), (0, launch(2)))
    assert starts.loads() == {"te-0": (4.0, "ssd"), "te-1": (5.0, "dram"), "te-2": (5.0, "dram")}
    starts = Starts(LOAD)
    starts.run((0, launch(0)), (0, launch(1)), (0, launch(2)), (3.0, "te-0"))
    assert starts.loads() == {"te-1": (6.0, "ssd"), "te-2": (7.0, "dram")}


def test_tiers_take_the_memory_that_a_page_cache_has() -> None:
    """With DRAM blocks for KV cache pinned, weights do not fit any more, until the executor is gone."""
    small = HostShape(HOST.nic, 4, pcie=HOST.pcie, ssd=HOST.ssd, memory_bytes=30 * GB)
    tiers = TierConfig(dram_blocks=1000)  # of 16 MB
    starts = Starts(LOAD, small, tiers=tiers)
    starts.run((0, launch(0)), (10, launch(1)), (20, RetireExecutor("te-0")), (20, RetireExecutor("te-1")))
    assert [source for _, source in starts.loads().values()] == ["ssd", "ssd"]
    starts = Starts(LOAD, small)
    starts.run((0, launch(0)), (10, launch(1)))
    assert [source for _, source in starts.loads().values()] == ["ssd", "dram"]


def test_a_fork_needs_a_running_executor_of_the_same_model_and_size() -> None:
    """The first loads from the host and says so; then peers send, and over the network where they are elsewhere."""
    starts = Starts(FORK)
    starts.run((0, launch(0)), (10, launch(1)), *((20, launch(number)) for number in range(2, 5)), (30, launch(5, 2)))
    assert starts.loads() == {
        "te-0": (4.0, "ssd"),
        "te-1": (0.2, "te-0, peer links"),
        "te-2": (0.2, "te-0, peer links"),
        "te-3": (0.202, "te-0, peer links"),
        "te-4": (1.0, "te-1, network"),  # te-0 sends to the others
        "te-5": (4.0, "ssd"),
    }


@pytest.mark.parametrize(("fanout", "longest"), [(1, 1.3), (2, 2.04), (4, 4.02)])
def test_one_broadcast_serves_many(fanout: int, longest: float) -> None:
    """31 targets: a chain takes one chunk longer per hop, a tree is shallow, but its source sends everything twice."""
    host = HostShape(Wire(20e9), 1, pcie=Wire(20e9), ssd=Wire(5e9))
    load = Load(20 * GB, 20 * GB, fork=True, fanout=fanout, chunk_bytes=0.2 * GB)
    starts = Starts(load, host)
    starts.run((0, launch(0)), *((10, launch(number)) for number in range(1, 32)))
    took = [seconds for name, (seconds, _) in starts.loads().items() if name != "te-0"]
    assert len(took) == 31 and max(took) == pytest.approx(longest, rel=0.03)
    assert all(source == "te-0, network" for name, (_, source) in starts.loads().items() if name != "te-0")


def test_who_receives_and_dies_costs_the_others_their_start() -> None:
    """The broadcast fails with it: the others begin anew, and are no worse off than that."""
    starts = Starts(FORK)
    starts.run((0, launch(0)), *((10, launch(number)) for number in (1, 2)), (11.1, "te-1"))
    assert starts.loads()["te-2"] == (0.3, "te-0, peer links")
    assert "te-1" not in starts.ready and not starts.cluster.network.links


def test_who_sends_and_dies_leaves_them_the_host() -> None:
    """No executor of the model runs any more: weights come from the page cache then."""
    starts = Starts(FORK)
    starts.run((0, launch(0)), *((10, launch(number)) for number in (1, 2)), (11.1, "te-0"))
    assert starts.loads()["te-1"] == starts.loads()["te-2"] == (1.1, "dram")


def test_forks_are_spread_over_sources() -> None:
    """With one fork still under way, the next comes from another executor, and neither slows the other down."""
    host = HostShape(Wire(20e9), 1, pcie=Wire(20e9), ssd=Wire(5e9))
    starts = Starts(FORK, host)
    starts.run((0, launch(0)), (10, launch(1)), (20, launch(2)), (20.5, launch(3)))
    assert starts.loads()["te-2"] == (1.0, "te-0, network")
    assert starts.loads()["te-3"] == (1.0, "te-1, network")


def test_an_executor_larger_than_a_host_loads_on_all_of_them() -> None:
    """Eight NPUs on two hosts: each reads its half from its own disk."""
    starts = Starts(LOAD)
    starts.run((0, launch(0, 8)), (10, launch(1, 8)))
    assert starts.loads() == {"te-0": (2.0, "ssd"), "te-1": (2.0, "ssd")}
    starts = Starts(LOAD, hosts=Hosts(2))
    starts.run((0, launch(0, 8)), (10, RetireExecutor("te-0")), (11, launch(1, 8)))
    assert starts.loads() == {"te-0": (2.0, "ssd"), "te-1": (0.2, "dram")}


def test_what_has_no_room_waits_for_it() -> None:
    """The time until NPUs are free is part of the first stage; who is smaller does not wait behind who is not."""
    starts = Starts(LOAD, hosts=Hosts(1))
    starts.run((0, launch(0, 3)), (5, launch(1, 2)), (6, launch(2)), (20, RetireExecutor("te-0")))
    waited = [event for event in starts.events if isinstance(event, ev.StageFinished) and event.executor == "te-1"]
    assert to_s(waited[0].took_ns) == 15.0 + 1.0
    assert starts.ready["te-2"] == 6 + 1.0 + 1.0 + 0.5
    gone = Starts(LOAD, hosts=Hosts(1))
    gone.run((0, launch(0, 3)), (5, launch(1, 2)), (6, "te-1"), (20, RetireExecutor("te-0")))
    assert "te-1" not in gone.ready


# -- together with everything else ------------------------------------------------------------------------------------


class OneMore(ScalingPolicy):
    """Another prefill executor after a second."""

    period_s = 0.5

    def desired(self, load: GroupLoad, now_ns: int) -> int:
        return load.initial + (load.role is Role.PREFILL and now_ns > to_ns(1.0))


def test_a_fork_and_kv_cache_share_the_links() -> None:
    """While a prefill executor sends its weights, requests wait longer for their KV cache, and the fork is slower."""
    waits = []
    for scaling in (None, OneMore()):
        run = run_sim(
            [make_arrival(number, at_s=0.05 * number, prompt=64, output=3) for number in range(80)],
            groups=[GroupPlan(group.spec, 1, 1, 2) for group in disaggregated()],
            engine=EngineConfig(kv_blocks=200),
            host=HostShape(Wire(1e9), pcie=Wire(20e9), ssd=Wire(5e9)),
            kv_bytes_per_token=500_000,
            load=Load(GB, GB, fork=True),
            scaling=scaling,
        )
        waits.append(sum(run.recorder.gaps))
    assert waits[1] > 1.1 * waits[0]
    [fork] = [event for event in run.of(ev.StageFinished) if event.source.startswith("te-")]
    assert to_s(fork.took_ns) > 1.1


def test_who_dies_in_mid_transfer_frees_the_links() -> None:
    """Of two decode executors one dies while KV cache comes to it: what goes to the other is faster from there on."""
    ends = []
    for failures in ((), ("te-1",)):
        cluster = run_sim(
            [make_arrival(number, prompt=64, output=2) for number in range(2)],
            groups=disaggregated(1, 2),
            kv_bytes_per_token=10**7,
            watch=_killer(failures),
        )
        first = cluster.of(ev.TaskFinished)
        ends.append(min(event.time for event in first if event.executor == "te-2"))
        assert not cluster.cluster.network.links
    together, alone = (to_s(end) for end in ends)
    assert together == pytest.approx(0.01 + 2 * 0.64 + 0.01, abs=0.02)
    assert alone == pytest.approx(0.01 + 0.2 * 2 - 0.2 + 0.64, abs=0.15)


def _killer(names: Sequence[str]) -> object:
    done: list[str] = []

    def watch(event: ev.Event, actions: list[Action], cluster: SimCluster) -> None:
        if isinstance(event, ev.TaskFinished) and not done:
            done.append("once")
            for name in names:
                cluster._at(to_ns(0.2), lambda name=name: cluster.kill(name))  # type: ignore[misc]

    return watch
