"""Hosts, what joins their NPUs, and which executor sits where.

Executors are placed as the infrastructure below the testbed (Kubernetes and its device plugin) would: first fit, in the
order in which they are launched; what fits nowhere waits.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import msgspec

from flowserve.core.fetch_cost import TierRate
from flowserve.core.tiers import Tier
from sim.network import Link, Path
from sim.page_cache import PageCache


class Wire(msgspec.Struct, frozen=True):
    """One way of a connection: bytes/s, latency of a transfer, and overhead of each call."""

    bytes_per_s: float
    latency_s: float = 0.0
    call_s: float = 0.0

    def __post_init__(self) -> None:
        if not self.bytes_per_s > 0 or self.latency_s < 0 or self.call_s < 0:
            raise ValueError(
                f"wire: {self.bytes_per_s} bytes/s, latency {self.latency_s} s, overhead per call {self.call_s} s: "
                "the rate must be above 0, the others 0 or more"
            )


class HostShape(msgspec.Struct, frozen=True):
    """One kind of host. Wires are per NPU and one way, unless they say otherwise.

    `npus` of a host share its DRAM (`memory_bytes`, None: no end; `memory_bytes_per_s` to or from all of them together,
    None: what their PCIe takes) and its disk (`ssd`, per host). `domain_npus` (0: those of a host) are joined by
    `peer`, in a `mesh` by a wire of `pair` between each two beside; the NPUs of a `package` by a wire of its own.
    Everything else goes over `nic`, and from one rack of `rack_hosts` to another through `oversubscription` times less
    than their NICs can send (None: no racks). `name`: of the hardware; hosts of another name are other hosts.
    """

    nic: Wire
    npus: int = 1
    domain_npus: int = 0
    peer: Wire | None = None
    pair: Wire | None = None
    package_npus: int = 1
    package: Wire | None = None
    pcie: Wire | None = None
    ssd: Wire | None = None
    memory_bytes: float | None = None
    memory_bytes_per_s: float | None = None
    rack_hosts: int | None = None
    oversubscription: float = 1.0
    name: str = ""

    def __post_init__(self) -> None:
        if self.npus < 1 or self.domain_hosts * self.npus != max(self.domain_npus, self.npus):
            raise ValueError(
                f"a host has {self.npus} NPUs and {self.domain_npus} are joined: allowed are 1 and more, and a multiple"
            )
        if self.package_npus < 1 or self.npus % self.package_npus:
            raise ValueError(f"packages of {self.package_npus} NPUs do not make up the {self.npus} of a host")
        if self.rack_hosts is not None and self.rack_hosts < 1:
            raise ValueError(f"rack_hosts is {self.rack_hosts}: allowed are 1 and more, or none for no racks")
        if self.oversubscription < 1:
            raise ValueError(f"oversubscription is {self.oversubscription}: allowed are 1 (none) and more")

    @property
    def domain_hosts(self) -> int:
        return max(1, self.domain_npus // self.npus)


class Hosts(msgspec.Struct, frozen=True):
    """`count` hosts of each kind (None: as many as needed), with the weights `preloaded` (name, bytes) in DRAM."""

    count: int | None = None
    preloaded: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        if self.count is not None and self.count < 1:
            raise ValueError(f"hosts is {self.count}: allowed are 1 and more, or null for as many as needed")


class Host:
    """One host: its free NPUs, and what they share. `reading`: who waits for which file to come from the disk."""

    def __init__(self, shape: HostShape, name: str, number: int, hosts: Hosts) -> None:
        self.shape = shape
        self.number = number
        self.free = list(range(shape.npus))
        self.cache = PageCache(shape.memory_bytes)
        for model, num_bytes in hosts.preloaded:
            self.cache.insert(model, num_bytes)
        self.reading: dict[str, list[str]] = {}
        memory, ssd = shape.memory_bytes_per_s, shape.ssd
        self.load = None if memory is None else Link(f"{name} memory out", memory)
        self.store = None if memory is None else Link(f"{name} memory in", memory)
        self.read = None if ssd is None else Link(f"{name} disk out", ssd.bytes_per_s)
        self.write = None if ssd is None else Link(f"{name} disk in", ssd.bytes_per_s)

    @property
    def domain(self) -> int:
        return self.number // self.shape.domain_hosts

    @property
    def rack(self) -> int | None:
        return None if self.shape.rack_hosts is None else self.number // self.shape.rack_hosts


class Part(NamedTuple):
    """An executor's NPUs on one host, and what they have to and from its memory."""

    host: Host
    npus: list[int]
    into: Link | None
    out: Link | None


class Seat:
    """Where an executor sits, and the links that are its own: traffic spreads evenly over its NPUs."""

    def __init__(self, name: str, kind: int, shape: HostShape, taken: Sequence[tuple[Host, list[int]]]) -> None:
        npus = sum(len(numbers) for _, numbers in taken)
        self.name = name
        self.kind = kind
        self.shape = shape
        self.npus = npus
        self.out = Link(f"{name} NIC out", npus * shape.nic.bytes_per_s)
        self.into = Link(f"{name} NIC in", npus * shape.nic.bytes_per_s)
        self.peer_out = self.peer_into = None
        if shape.peer is not None:
            self.peer_out = Link(f"{name} peers out", npus * shape.peer.bytes_per_s)
            self.peer_into = Link(f"{name} peers in", npus * shape.peer.bytes_per_s)
        self.parts: list[Part] = []
        for number, (host, numbers) in enumerate(taken):
            rate = 0.0 if shape.pcie is None else len(numbers) * shape.pcie.bytes_per_s
            into = Link(f"{name} PCIe {number} in", rate) if rate else None
            out = Link(f"{name} PCIe {number} out", rate) if rate else None
            self.parts.append(Part(host, numbers, into, out))
        self.share = max(len(part.npus) for part in self.parts) / npus
        """Of what is spread over all NPUs, the most that one host has."""

    @property
    def domain(self) -> int | None:
        """The scale-up domain that all of it is in."""
        domains = {part.host.domain for part in self.parts}
        return domains.pop() if len(domains) == 1 else None

    @property
    def package(self) -> tuple[int, int] | None:
        """The package that all of it is in."""
        size, part = self.shape.package_npus, self.parts[0]
        packages = {npu // size for npu in part.npus}
        return (part.host.number, packages.pop()) if len(self.parts) == len(packages) == 1 else None


Kind = Literal["package", "peer", "network"]


class Topology:
    """All hosts and who sits on them. Hosts come into being when they are first needed."""

    def __init__(self, hosts: Hosts) -> None:
        self.hosts = hosts
        self.seats: dict[str, Seat] = {}
        self._kinds: dict[HostShape, int] = {}
        self._of: list[list[Host]] = []
        self._open: list[int] = []  # below this place of a kind's hosts nothing is free
        self._racks: dict[tuple[int, int, bool], Link] = {}
        self._paths: dict[str, dict[str, Path]] = {}

    # -- placement ------------------------------------------------------------------------------------------------

    def place(self, name: str, shape: HostShape, npus: int) -> Seat | None:
        """The first host with room; an executor larger than a host takes whole ones, of one domain where it fits into
        one. A multiple of a package takes whole packages (as MindCluster's scheduler on A3). None: there is no room.
        """
        kind = self._kinds.setdefault(shape, len(self._kinds))
        if kind == len(self._of):
            self._of.append([])
            self._open.append(0)
        taken = self._alone(kind, shape, npus) if npus <= shape.npus else self._several(kind, shape, npus)
        if taken is None:
            return None
        for host, numbers in taken:
            for number in numbers:
                host.free.remove(number)
        hosts = self._of[kind]
        while self._open[kind] < len(hosts) and not hosts[self._open[kind]].free:
            self._open[kind] += 1
        seat = self.seats[name] = Seat(name, kind, shape, taken)
        return seat

    def leave(self, name: str) -> None:
        """Its NPUs are free."""
        seat = self.seats.pop(name)
        for part in seat.parts:
            part.host.free = sorted([*part.host.free, *part.npus])
            self._open[seat.kind] = min(self._open[seat.kind], part.host.number)
        self._paths.pop(name, None)
        for paths in self._paths.values():
            paths.pop(name, None)

    def _host(self, kind: int, shape: HostShape, number: int) -> Host | None:
        hosts = self._of[kind]
        while number >= len(hosts):
            if self.hosts.count is not None and len(hosts) >= self.hosts.count:
                return None
            hosts.append(Host(shape, f"host {kind}.{len(hosts)}", len(hosts), self.hosts))
        return hosts[number]

    def _alone(self, kind: int, shape: HostShape, npus: int) -> list[tuple[Host, list[int]]] | None:
        number = self._open[kind]
        while (host := self._host(kind, shape, number)) is not None:
            if (numbers := _fit(host.free, npus, shape.package_npus)) is not None:
                return [(host, numbers)]
            number += 1
        return None

    def _several(self, kind: int, shape: HostShape, npus: int) -> list[tuple[Host, list[int]]] | None:
        needed = -(-npus // shape.npus)
        together = needed <= shape.domain_hosts
        chosen: list[Host] = []
        number = 0
        while len(chosen) < needed:
            host = self._host(kind, shape, number)
            if host is None:
                return None
            number += 1
            if together and chosen and chosen[0].domain != host.domain:
                chosen = []
            if len(host.free) == shape.npus:
                chosen.append(host)
        sizes = [shape.npus] * (needed - 1) + [npus - (needed - 1) * shape.npus]
        return [(host, host.free[:size]) for host, size in zip(chosen, sizes, strict=True)]

    # -- between executors ----------------------------------------------------------------------------------------

    def joined_by(self, source: str, target: str) -> Kind:
        """What joins the NPUs of two executors."""
        one, other = self.seats[source], self.seats[target]
        if one.kind != other.kind or one.domain is None or one.domain != other.domain or one.shape.peer is None:
            return "network"
        same = one.package is not None and one.package == other.package and one.shape.package is not None
        return "package" if same else "peer"

    def path(self, source: str, target: str) -> Path:
        """From one executor's HBM to another's."""
        paths = self._paths.setdefault(source, {})
        if target not in paths:
            links, wires = self._way(source, target)
            paths[target] = Path(links, max(wire.latency_s for wire in wires), max(wire.call_s for wire in wires))
        return paths[target]

    def broadcast(self, hops: Sequence[tuple[str, str]]) -> Path:
        """All of these hops at once: whoever receives sends on what it has."""
        paths = [self.path(source, target) for source, target in hops]
        links = [link for path in paths for link, times in path.links for _ in range(times)]
        latency_ns, call_ns = max(path.latency_ns for path in paths), max(path.call_ns for path in paths)
        return Path(links, latency_ns / 1e9, call_ns / 1e9)

    def _way(self, source: str, target: str) -> tuple[list[Link], list[Wire]]:
        one, other, kind = self.seats[source], self.seats[target], self.joined_by(source, target)
        shape = one.shape
        if kind == "package":
            assert shape.package is not None
            rate = min(one.npus, other.npus) * shape.package.bytes_per_s
            return [Link(f"{source} to {target} in package", rate)], [shape.package]
        if kind == "peer":
            assert shape.peer is not None and one.peer_out is not None and other.peer_into is not None
            links = [one.peer_out, other.peer_into]
            if shape.pair is not None:  # each NPU of the larger one talks to one of the smaller one
                rate = max(one.npus, other.npus) * shape.pair.bytes_per_s
                links.insert(1, Link(f"{source} to {target} in mesh", rate))
            return links, [shape.peer]
        links = [one.out, other.into]
        racks = [(seat.kind, seat.parts[0].host.rack) for seat in (one, other)]
        if racks[0] != racks[1]:
            ends = zip((one, other), racks, (True, False), strict=True)
            links[1:1] = [self._rack(seat.shape, kind, rack, up) for seat, (kind, rack), up in ends if rack is not None]
        return links, [one.shape.nic, other.shape.nic]

    def _rack(self, shape: HostShape, kind: int, rack: int, up: bool) -> Link:
        key = (kind, rack, up)
        if key not in self._racks:
            assert shape.rack_hosts is not None
            rate = shape.rack_hosts * shape.npus * shape.nic.bytes_per_s / shape.oversubscription
            self._racks[key] = Link(f"rack {kind}.{rack} {'up' if up else 'down'}", rate)
        return self._racks[key]

    # -- between an executor and its hosts ------------------------------------------------------------------------

    def loading(self, name: str, from_disk: Sequence[bool]) -> Path:
        """From host memory into the NPUs, on all hosts of the executor at once; `from_disk`: which read it first."""
        seat = self.seats[name]
        links: list[Link | None] = []
        for part, reads in zip(seat.parts, from_disk, strict=True):
            links += [part.host.read if reads else None, part.host.load, part.into]
        assert seat.shape.pcie is not None
        return Path([link for link in links if link is not None], seat.shape.pcie.latency_s)

    def moving(self, name: str, source: Tier, target: Tier) -> list[Path]:
        """Between tiers of an executor's cache, one path after the other: what goes to or from the disk is staged in
        host memory. Each host moves its share of every block.
        """
        seat = self.seats[name]
        pcie, ssd = seat.shape.pcie, seat.shape.ssd
        assert pcie is not None
        out = [link for part in seat.parts for link in (part.out, part.host.store) if link is not None]
        into = [link for part in seat.parts for link in (part.host.load, part.into) if link is not None]
        hops: list[Path] = []
        if source is Tier.HBM:
            hops.append(Path(out, pcie.latency_s, pcie.call_s))
        if Tier.SSD in (source, target):
            assert ssd is not None
            disks = [part.host.read if source is Tier.SSD else part.host.write for part in seat.parts]
            hops.append(Path([disk for disk in disks if disk is not None], ssd.latency_s, ssd.call_s))
        if target is Tier.HBM:
            hops.append(Path(into, pcie.latency_s, pcie.call_s))
        return hops

    def tier_rates(self, name: str, block_bytes: int, pieces: int) -> dict[Tier, TierRate]:
        """From each lower tier into HBM, as a cost model may expect it: nobody else moves anything."""
        share, rates = self.seats[name].share, {}
        for tier in (Tier.DRAM, Tier.SSD):
            if tier is Tier.SSD and self.seats[name].shape.ssd is None:
                continue
            hops = self.moving(name, tier, Tier.HBM)
            latency = sum(hop.latency_ns + pieces * hop.call_ns for hop in hops)
            rates[tier] = TierRate(latency, sum(block_bytes * share * 1e9 / hop.bytes_per_s for hop in hops))
        return rates


def _fit(free: Sequence[int], npus: int, package: int) -> list[int] | None:
    """The first free NPUs; whole packages where the executor is a multiple of one."""
    if package > 1 and npus % package == 0:
        there = set(free)
        free = [npu for npu in free if all(npu // package * package + other in there for other in range(package))]
    return list(free[:npus]) if len(free) >= npus else None
