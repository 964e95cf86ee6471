"""Who sits where, what joins two executors, and what lies in a host's memory."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowserve.core.tiers import Tier
from sim.page_cache import PageCache
from sim.topology import Hosts, HostShape, Seat, Topology, Wire

NIC, PEER, PCIE, SSD = Wire(20e9, 2e-5, 1e-5), Wire(140e9, 1e-5), Wire(25e9), Wire(5e9, 1e-4)
SERVER = HostShape(NIC, 8, 8, PEER, Wire(20e9), pcie=PCIE, ssd=SSD, memory_bytes_per_s=50e9)
POD = HostShape(NIC, 4, 8, PEER, package_npus=2, package=Wire(200e9), pcie=PCIE, ssd=SSD)


def topology(*places: tuple[str, HostShape, int], count: int | None = None) -> Topology:
    made = Topology(Hosts(count))
    for name, shape, npus in places:
        assert made.place(name, shape, npus) is not None
    return made


def npus(seat: Seat | None) -> list[tuple[int, list[int]]]:
    assert seat is not None
    return [(part.host.number, part.npus) for part in seat.parts]


# -- placement --------------------------------------------------------------------------------------------------------


def test_first_fit() -> None:
    """The first host with room, also where somebody has left; a kind of hardware has hosts of its own."""
    made = topology(("a", SERVER, 4), ("b", SERVER, 6), ("c", SERVER, 4), ("d", POD, 1))
    assert [npus(made.seats[name]) for name in "abcd"] == [
        [(0, [0, 1, 2, 3])],
        [(1, [0, 1, 2, 3, 4, 5])],
        [(0, [4, 5, 6, 7])],
        [(0, [0])],
    ]
    made.leave("a")
    assert npus(made.place("e", SERVER, 3)) == [(0, [0, 1, 2])]
    assert npus(made.place("f", SERVER, 2)) == [(1, [6, 7])]


def test_another_kind_of_hardware_sits_on_other_hosts() -> None:
    """Also where the two have the same wires."""
    made = topology(("a", SERVER, 1), ("b", msgspec.structs.replace(SERVER, name="other"), 1))
    assert npus(made.seats["a"]) == npus(made.seats["b"]) == [(0, [0])]
    assert made.joined_by("a", "b") == "network"


def test_even_numbers_of_dies_take_whole_packages() -> None:
    """As on A3: one die is put anywhere, two are a package."""
    made = topology(("a", POD, 1))
    assert npus(made.place("b", POD, 2)) == [(0, [2, 3])]
    assert npus(made.place("c", POD, 1)) == [(0, [1])]


def test_what_is_larger_than_a_host_takes_whole_ones_of_one_domain() -> None:
    """Two hosts of a domain of two; where the first domain is not free, the next; more than a domain takes any."""
    made = topology(("a", POD, 1))
    assert npus(made.place("b", POD, 6)) == [(2, [0, 1, 2, 3]), (3, [0, 1])]
    assert npus(made.place("c", POD, 12)) == [(1, [0, 1, 2, 3]), (4, [0, 1, 2, 3]), (5, [0, 1, 2, 3])]
    assert made.seats["b"].share == pytest.approx(4 / 6)
    assert made.joined_by("b", "c") == "network"


def test_hosts_may_be_few() -> None:
    """Nothing is placed beyond their number, and what leaves makes room."""
    made = topology(("a", SERVER, 8), count=1)
    assert made.place("b", SERVER, 1) is None
    assert made.place("b", SERVER, 16) is None
    made.leave("a")
    assert made.place("b", SERVER, 1) is not None


@given(steps=st.lists(st.tuples(st.integers(1, 9), st.booleans()), max_size=40), count=st.sampled_from([2, 4, None]))
def test_no_npu_is_taken_twice(steps: list[tuple[int, bool]], count: int | None) -> None:
    """Whoever comes and goes: each NPU is free or one executor's, and sizes are what was asked for."""
    made, there = Topology(Hosts(count)), []
    for number, (size, leaves) in enumerate(steps):
        if leaves and there:
            made.leave(there.pop(size % len(there)))
        elif made.place(str(number), POD, size) is not None:
            there.append(str(number))
            assert sum(len(part.npus) for part in made.seats[str(number)].parts) == size
        taken = [(part.host.number, npu) for seat in made.seats.values() for part in seat.parts for npu in part.npus]
        hosts = {part.host for seat in made.seats.values() for part in seat.parts}
        free = [(host.number, npu) for host in hosts for npu in host.free]
        assert len(set(taken)) == len(taken)
        assert sorted(taken + free) == [
            (number, npu) for number in sorted({h.number for h in hosts}) for npu in range(4)
        ]


def test_shapes_that_cannot_be_are_refused() -> None:
    """With the numbers."""
    for arguments, said in (
        ({"npus": 3, "domain_npus": 4}, "a host has 3 NPUs and 4 are joined"),
        ({"npus": 3, "package_npus": 2}, "packages of 2 NPUs do not make up the 3"),
        ({"rack_hosts": 0}, "rack_hosts is 0"),
        ({"oversubscription": 0.5}, r"oversubscription is 0\.5"),
    ):
        with pytest.raises(ValueError, match=said):
            HostShape(NIC, **arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="hosts is 0"):
        Hosts(0)
    with pytest.raises(ValueError, match=r"wire: 0\.0 bytes/s"):
        Wire(0.0)


# -- what joins two of them -------------------------------------------------------------------------------------------


def test_paths_go_over_what_joins_the_npus() -> None:
    """In a mesh a wire per pair of NPUs, in a package its own, in a domain any, else NICs; each NPU adds its own."""
    mesh = topology(("a", SERVER, 1), ("b", SERVER, 1), ("c", SERVER, 4), ("d", SERVER, 8), ("e", SERVER, 4))
    assert mesh.path("a", "b").bytes_per_s == 20e9
    assert mesh.path("a", "c").bytes_per_s == 80e9  # each of the four sends to the one
    assert mesh.path("c", "d").bytes_per_s == 4 * 20e9 == mesh.path("d", "c").bytes_per_s
    assert (mesh.joined_by("a", "b"), mesh.joined_by("a", "d")) == ("peer", "network")
    pod = topology(*((name, POD, 1) for name in "abc"), ("d", POD, 4), ("e", POD, 4))
    assert pod.path("a", "b").bytes_per_s == 200e9
    assert pod.path("a", "c").bytes_per_s == pod.path("a", "d").bytes_per_s == 140e9
    assert pod.path("d", "e").bytes_per_s == 4 * 20e9
    kinds = [pod.joined_by("a", other) for other in "bcde"]
    assert kinds == ["package", "peer", "peer", "network"]


def test_two_ways_out_of_one_executor_share_its_links() -> None:
    """Paths from one source, and to one target, have its link in common; there and back have none."""
    made = topology(*((name, HostShape(NIC), 1) for name in "abc"))
    links = {pair: {link for link, _ in made.path(*pair).links} for pair in ("ab", "ac", "bc", "ba")}
    assert len(links["ab"] & links["ac"]) == len(links["ac"] & links["bc"]) == 1
    assert not links["ab"] & links["ba"]


def test_racks_are_as_narrow_as_they_are_oversubscribed() -> None:
    """Hosts of one rack do not notice; from rack to rack all share the uplink."""
    shape = HostShape(NIC, rack_hosts=2, oversubscription=4.0)
    made = topology(*((name, shape, 1) for name in "abcd"))
    assert made.path("a", "b").bytes_per_s == 20e9
    assert made.path("a", "c").bytes_per_s == 2 * 20e9 / 4
    shared = {link for link, _ in made.path("a", "c").links} & {link for link, _ in made.path("b", "d").links}
    assert sorted(link.name for link in shared) == ["rack 0.0 up", "rack 0.1 down"]


def test_a_broadcast_crosses_what_its_hops_cross() -> None:
    """A chain uses each way once, and is as fast as one hop; a source of two gives each half."""
    made = topology(*((name, HostShape(NIC), 1) for name in "abc"))
    assert made.broadcast([("a", "b"), ("b", "c")]).bytes_per_s == 20e9
    assert made.broadcast([("a", "b"), ("a", "c")]).bytes_per_s == 10e9


def test_memory_is_shared_by_the_npus_of_a_host() -> None:
    """Loading takes PCIe, or the memory of the host, or its disk, whichever is narrowest; tiers take the same ways."""
    made = topology(("a", SERVER, 1), ("b", SERVER, 4), ("c", SERVER, 12))
    assert made.loading("a", [False]).bytes_per_s == 25e9
    assert made.loading("b", [False]).bytes_per_s == 50e9
    assert made.loading("b", [True]).bytes_per_s == 5e9
    shared = {link for link, _ in made.loading("a", [True]).links} & {
        link for link, _ in made.loading("b", [True]).links
    }
    assert len(shared) == 2
    assert len(made.seats["c"].parts) == 2 and made.seats["c"].share == pytest.approx(2 / 3)
    assert len(made.moving("a", Tier.HBM, Tier.SSD)) == len(made.moving("a", Tier.SSD, Tier.HBM)) == 2
    assert [path.bytes_per_s for path in made.moving("a", Tier.SSD, Tier.HBM)] == [5e9, 25e9]
    assert made.tier_rates("a", 1000, 1)[Tier.DRAM].block_ns == pytest.approx(1000 / 25)


# -- what lies in memory ----------------------------------------------------------------------------------------------


def test_the_page_cache_forgets_what_was_used_longest_ago() -> None:
    """Reading and using both count; what does not fit is read past it; pinned memory takes room."""
    cache = PageCache(100)
    for name, size in (("a", 40), ("b", 40), ("huge", 101)):
        cache.insert(name, size)
    assert "huge" not in cache
    assert cache.touch("a") and not cache.touch("c")
    cache.insert("c", 40)
    assert ("a" in cache, "b" in cache, "c" in cache) == (True, False, True)
    cache.pin(30)
    assert ("a" in cache, "c" in cache, cache.used) == (False, True, 40)
    cache.pin(-30)
    cache.insert("a", 60)
    assert cache.used == 100


def test_a_host_begins_with_what_was_preloaded() -> None:
    """As far as it fits: what comes first leaves first (1.5 TB hold ten 70B or a hundred 7B models, DeepServe)."""
    for size, held in ((141e9, 10), (14e9, 107)):
        models = tuple((f"m{number}", int(size)) for number in range(200))
        made = Topology(Hosts(None, models))
        seat = made.place("a", HostShape(NIC, memory_bytes=1.5e12), 1)
        assert seat is not None
        assert sum(name in seat.parts[0].host.cache for name, _ in models) == held
