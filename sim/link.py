"""Links that move KV cache between simulated executors."""

from cluster.vocabulary import NS_PER_S, to_ns


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

    def transfer(self, now: int, num_bytes: int, segments: int) -> int:
        """When a transfer asked for now is complete, in ns."""
        busy = round(segments * self._call_ns + num_bytes * self._ns_per_byte)
        self._free_at = max(now, self._free_at) + busy
        return self._free_at + self._latency_ns
