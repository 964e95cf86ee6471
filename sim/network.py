"""The simulated network: flows over links, which share them by max-min fairness (progressive filling).

Rates are whole numbers of a very small unit and progress is a whole number of rate times ns, so sums are exact, and
what was asked for is delivered to the last byte.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from heapq import heapify, heappop, heapreplace

from cluster.vocabulary import NS_PER_S, to_ns
from sim.clock import Alarm, Clock

_GRAIN = 720_720**2
UNIT = 1024 * _GRAIN
"""Rates are counted in bytes per second divided by this. Any number up to 16 divides 720,720: shares of shares come out
even, so that the order of what happens at one time makes no difference.
"""
BYTE = UNIT * NS_PER_S
"""Progress of one byte: a rate times the ns that it lasts."""


def units(bytes_per_s: float) -> int:
    """A rate as it is counted inside."""
    return max(1, round(bytes_per_s * 1024)) * _GRAIN


class Link:
    """One way of a wire. `flows`: what crosses it, and how often; `asked`: what they would take without each other."""

    __slots__ = ("asked", "bytes_per_s", "capacity", "flows", "name")

    def __init__(self, name: str, bytes_per_s: float) -> None:
        if not bytes_per_s > 0:
            raise ValueError(f"link {name}: {bytes_per_s} bytes/s: the rate must be above 0")
        self.name = name
        self.bytes_per_s = bytes_per_s
        self.capacity = units(bytes_per_s)
        self.flows: dict[Flow, int] = {}
        self.asked = 0


class Path:
    """The links that a flow crosses, a broadcast some of them several times.

    A transfer takes `latency_s`, `call_s` for each piece of memory, and its bytes at the rate of the narrowest link, or
    at `limit_bytes_per_s` of its own. The latency comes behind the bytes and takes nothing of the links; calls and
    bytes take turns, so others can use a link in the meantime.
    """

    __slots__ = ("bytes_per_s", "call_ns", "latency_ns", "links", "top")

    def __init__(
        self,
        links: Sequence[Link],
        latency_s: float = 0.0,
        call_s: float = 0.0,
        limit_bytes_per_s: float = float("inf"),
    ) -> None:
        times: dict[Link, int] = {}
        for link in links:
            times[link] = times.get(link, 0) + 1
        self.links = tuple(times.items())
        self.latency_ns = to_ns(latency_s)
        self.call_ns = call_s * NS_PER_S
        rates = [link.bytes_per_s / count for link, count in self.links]
        self.bytes_per_s = min([*rates, limit_bytes_per_s])
        self.top = min([link.capacity // count for link, count in self.links] + [units(self.bytes_per_s)])

    def alone_ns(self, num_bytes: int, calls: int) -> int:
        """How long such a flow needs the path that it has to itself; the latency is not in it."""
        return round(calls * self.call_ns + num_bytes * NS_PER_S / self.bytes_per_s)


class Flow:
    """A transfer under way. `top`: its rate where nobody is in its way, and `most` where its source has all of it;
    `full`: the link that is in its way, full and with nobody faster on it; `left` when it was last looked at, `since`;
    `finish`: when the last byte is sent if nothing changes; `due`: when its timer rings, `finish` or later.
    """

    __slots__ = (
        "due",
        "finish",
        "full",
        "latency_ns",
        "left",
        "links",
        "most",
        "on_end",
        "parties",
        "rate",
        "since",
        "timer",
        "top",
    )

    def __init__(
        self,
        path: Path,
        num_bytes: int,
        calls: int,
        now: int,
        on_end: Callable[[bool], None],
        parties: tuple[str, ...],
        least_ns: int,
    ) -> None:
        alone = path.alone_ns(num_bytes, calls)
        if num_bytes:
            alone = max(1, alone)
        self.left = num_bytes * BYTE
        self.top = self.most = min(path.top, -(-self.left // alone)) if num_bytes else 0
        if alone < least_ns:
            alone = least_ns
            self.top = -(-self.left // alone)
        self.rate = self.top
        self.full: Link | None = None
        self.links = path.links if num_bytes else ()
        self.latency_ns = path.latency_ns
        self.since = now
        self.finish = now + alone
        self.due: int | None = None
        self.timer: Alarm | None = None
        self.on_end = on_end
        self.parties = parties


class Network:
    """All flows, in simulated time.

    A flow that has its links to itself, or shares them with room to spare, is one event. Where links are short, those
    flows alone are looked at that share one with a flow whose rate changes.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._of: dict[str, dict[Flow, None]] = {}

    def start(
        self,
        path: Path,
        num_bytes: int,
        calls: int,
        on_end: Callable[[bool], None],
        parties: tuple[str, ...] = (),
        least_ns: int = 0,
    ) -> Flow:
        """Begin a transfer now, in so many calls. `on_end(True)` when all has arrived, `on_end(False)` if one of the
        `parties` is dropped before. `least_ns`: for how long it takes at least, because its source has the bytes no
        sooner, until `lift`.
        """
        now = self._clock.now
        flow = Flow(path, num_bytes, calls, now, on_end, parties, least_ns)
        for party in parties:
            self._of.setdefault(party, {})[flow] = None
        links, top, short = flow.links, flow.top, False
        for link, times in links:
            if link.flows and link.asked + times * top > link.capacity:
                self._clear(link, now)
        for link, times in links:
            link.flows[flow] = times
            link.asked += times * top
            short = short or link.asked > link.capacity
        if short:
            flow.rate = 0
            changed = {flow: None}
            for link, _ in links:
                if link.asked > link.capacity:
                    changed.update(dict.fromkeys(link.flows))
            self._share(changed)
        else:
            self._set(flow, flow.finish + flow.latency_ns)
        return flow

    def lift(self, flow: Flow) -> None:
        """The source of this flow has all of its bytes: it is as fast as its path lets it be from now on."""
        self._limit(flow, flow.most)

    def pace(self, flow: Flow, behind: int, ns: int) -> None:
        """The source of this flow has all but the last `behind` of its bytes in `ns` from now on, evenly, so it is no
        faster than that.
        """
        left = flow.left - flow.rate * (self._clock.now - flow.since) - behind * BYTE
        self._limit(flow, min(flow.most, max(1, -(-left // ns))))

    def _limit(self, flow: Flow, top: int) -> None:
        """Another rate that it has where nobody is in its way."""
        now, more = self._clock.now, top - flow.top
        if not flow.links or flow.finish <= now or not more:
            return
        for link, times in flow.links:
            if link.asked + times * more > link.capacity:
                self._clear(link, now)
        flow.top = top
        changed = {flow: None}
        for link, times in flow.links:
            short = link.asked > link.capacity
            link.asked += times * more
            if short or link.asked > link.capacity:
                changed.update(dict.fromkeys(link.flows))
        self._share(changed)

    def drop(self, party: str) -> None:
        """Somebody is gone: what came from there or went there has failed, and its links are free."""
        for flow in self._of.pop(party, ()):
            if flow.timer is not None:
                flow.timer.cancel()
            for other in flow.parties:
                if other != party:
                    del self._of[other][flow]
            self._leave(flow)
            flow.on_end(False)

    @property
    def links(self) -> list[Link]:
        """Those that anything crosses."""
        return list(dict.fromkeys(link for flows in self._of.values() for flow in flows for link, _ in flow.links))

    # -- the life of a flow ---------------------------------------------------------------------------------------

    def _clear(self, link: Link, now: int) -> None:
        """Flows of which all is sent, and only the latency is left, leave this link."""
        for other in [other for other in link.flows if other.finish <= now]:
            self._leave(other)

    def _set(self, flow: Flow, due: int) -> None:
        flow.due = due
        if flow.timer is not None:
            flow.timer.cancel()
        flow.timer = self._clock.alarm(due - self._clock.now, partial(self._ring, flow))

    def _ring(self, flow: Flow) -> None:
        now = self._clock.now
        if now < flow.finish:  # others came, and it is later than when the timer was set
            self._set(flow, flow.finish)
            return
        self._leave(flow)
        if now < flow.finish + flow.latency_ns:
            self._set(flow, flow.finish + flow.latency_ns)
            return
        for party in flow.parties:
            del self._of[party][flow]
        flow.on_end(True)

    def _leave(self, flow: Flow) -> None:
        """Free its links, and share out what others can use of them."""
        links, flow.links = flow.links, ()
        gainers: dict[Flow, None] = {}
        for link, times in links:
            short = link.asked > link.capacity
            del link.flows[flow]
            link.asked -= times * flow.top
            if short:
                gainers.update(dict.fromkeys(link.flows))
        if gainers:
            self._share(gainers)

    def _share(self, flows: dict[Flow, None]) -> None:
        """New rates for these flows, and for those that they make faster or slower."""
        while True:
            filled = Filling(flows)
            joined = filled.joined()
            if not joined:
                break
            flows.update(joined)
        now = self._clock.now
        for flow, rate in filled.rates.items():
            flow.full = filled.full.get(flow)
            if rate != flow.rate:
                flow.left -= flow.rate * (now - flow.since)
                flow.since, flow.rate = now, rate
                flow.finish = now - (-max(0, flow.left) // rate)
            if flow.due is None or flow.finish < flow.due:  # else the timer rings early, and is set again
                self._set(flow, flow.finish)


class Filling:
    """Rates of some flows while all others keep theirs: they grow together until a link is full, or a flow at its top.

    Links are taken by what they have left for each flow, then by name, so that the order of flows makes no difference.
    """

    def __init__(self, flows: Mapping[Flow, None]) -> None:
        self.rates: dict[Flow, int] = {}
        self.full: dict[Flow, Link] = {}
        self._levels: dict[Link, int] = {}  # of those that are full, the rate of the flows that wait for them
        self._spare, self._crossings = {}, {}
        for link in dict.fromkeys(link for flow in flows for link, _ in flow.links):
            if link.asked > link.capacity:
                spare, crossings = link.capacity, 0
                for flow, times in link.flows.items():
                    if flow in flows:
                        crossings += times
                    else:
                        spare -= flow.rate * times
                self._spare[link], self._crossings[link] = spare, crossings
        self._fill(flows)

    def _fill(self, flows: Mapping[Flow, None]) -> None:
        spare, crossings, rates = self._spare, self._crossings, self.rates
        heap = [(spare[link] // count, link.name, link) for link, count in crossings.items()]
        heapify(heap)
        by_top = sorted(flows, key=_top)
        place = 0
        while heap:
            share, name, link = heap[0]
            if not crossings[link]:
                heappop(heap)
                continue
            if (risen := spare[link] // crossings[link]) > share:
                heapreplace(heap, (risen, name, link))
                continue
            while place < len(by_top) and by_top[place].top <= share:
                if by_top[place] not in rates:
                    self._fix(by_top[place], by_top[place].top)
                place += 1
            if crossings[link] and spare[link] // crossings[link] == share:
                heappop(heap)
                self._levels[link] = share
                for flow in link.flows:
                    if flow in flows and flow not in rates:
                        self._fix(flow, share)
                        self.full[flow] = link
        for flow in by_top[place:]:
            if flow not in rates:
                rates[flow] = flow.top

    def _fix(self, flow: Flow, rate: int) -> None:
        self.rates[flow] = rate
        for link, times in flow.links:
            if link in self._spare:
                self._spare[link] -= rate * times
                self._crossings[link] -= times

    def joined(self) -> dict[Flow, None]:
        """Flows that cannot keep their rates: they wait for a link that is not full any more, or has a faster flow on
        it now; or they are faster on a full link than flows which wait for that.
        """
        rates = self.rates
        found: dict[Flow, None] = {}
        for link, spare in self._spare.items():
            fastest = max((rates[flow] for flow in link.flows if flow in rates), default=0)
            level = self._levels.get(link)
            full = spare < sum(link.flows.values())
            for flow in link.flows:
                if flow in rates:
                    continue
                freed = flow.full is link and (not full or fastest > flow.rate)
                if freed or (level is not None and flow.rate > level):
                    found[flow] = None
        return found


def _top(flow: Flow) -> int:
    return flow.top
