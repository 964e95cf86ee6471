"""Links that move KV cache between simulated executors, and between the tiers of one."""

from collections.abc import Callable

from cluster.vocabulary import NS_PER_S, to_ns
from flowserve.core.fetch_cost import TierRate
from flowserve.core.tiers import Tier


class Link:
    """One executor's way out: transfers queue up; each pays a latency, an overhead per segment, and its bytes."""

    def __init__(self, bytes_per_s: float, latency_s: float, call_overhead_s: float) -> None:
        if bytes_per_s <= 0 or latency_s < 0 or call_overhead_s < 0:
            raise ValueError(
                f"link: {bytes_per_s} bytes/s, latency {latency_s} s, per-call overhead {call_overhead_s} s: "
                "the rate must be above 0, the others 0 or more"
            )
        self._ns_per_byte = NS_PER_S / bytes_per_s
        self._latency_ns = to_ns(latency_s)
        self._call_ns = call_overhead_s * NS_PER_S
        self._free_at = 0

    def rate(self, bytes_per_block: int, segments: int) -> TierRate:
        """What blocks take that lie in one contiguous run of so many segments, with the link to themselves."""
        return TierRate(self._latency_ns + segments * self._call_ns, bytes_per_block * self._ns_per_byte)

    def transfer(self, now: int, num_bytes: int, segments: int) -> int:
        """When a transfer asked for now is complete, in ns."""
        busy = round(segments * self._call_ns + num_bytes * self._ns_per_byte)
        self._free_at = max(now, self._free_at) + busy
        return self._free_at + self._latency_ns


class TierLinks:
    """An executor's ways between its tiers: PCIe between HBM and host memory, the disk behind that, both full duplex.

    Between HBM and disk a move is staged in host memory: it goes over one link after the other.
    """

    def __init__(self, pcie: Callable[[], Link], ssd: Callable[[], Link]) -> None:
        out, into, read, write = pcie(), pcie(), ssd(), ssd()
        self._routes = {
            (Tier.HBM, Tier.DRAM): (out,),
            (Tier.HBM, Tier.SSD): (out, write),
            (Tier.DRAM, Tier.SSD): (write,),
            (Tier.DRAM, Tier.HBM): (into,),
            (Tier.SSD, Tier.HBM): (read, into),
        }

    def transfer(self, now: int, source: Tier, target: Tier, num_bytes: int, segments: int) -> int:
        """When a move asked for now is complete, in ns."""
        for link in self._routes[source, target]:
            now = link.transfer(now, num_bytes, segments)
        return now

    def rates(self, bytes_per_block: int, segments: int) -> dict[Tier, TierRate]:
        """From each lower tier into HBM, as a cost model may expect it."""
        rates: dict[Tier, TierRate] = {}
        for tier in (Tier.DRAM, Tier.SSD):
            hops = [link.rate(bytes_per_block, segments) for link in self._routes[tier, Tier.HBM]]
            rates[tier] = TierRate(sum(hop.latency_ns for hop in hops), sum(hop.block_ns for hop in hops))
        return rates
