"""Links shared by max-min fairness: conservation, fairness, nothing idle, every byte; and a slow reference."""

import pickle
from collections.abc import Sequence
from fractions import Fraction
from functools import partial
from math import ceil
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.vocabulary import NS_PER_S, to_ns
from sim.clock import Clock
from sim.network import BYTE, UNIT, Filling, Flow, Link, Network, Path
from tests.builders import run_out

RATES = (1e6, 3e6, 7e5, 1e9)
MS = 1_000_000


class Asked(NamedTuple):
    """One transfer: when, over which links (a broadcast: some of them twice), bytes, calls, and latency."""

    at: int
    crosses: list[int]
    num_bytes: int
    calls: int
    latency_s: float
    party: str


class Pace(NamedTuple):
    """A transfer's source has all but `behind` bytes of it in `ns` from `at` on."""

    at: int
    behind: int
    ns: int


class Net:
    """A network with numbered links and a log of what ended when: (number, ns, success)."""

    def __init__(self, rates: Sequence[float]) -> None:
        self.clock = Clock()
        self.network = Network(self.clock)
        self.links = [Link(f"link {number}", rate) for number, rate in enumerate(rates)]
        self.ended: list[tuple[int, int, bool]] = []

    def start(
        self,
        number: int,
        asked: Asked,
        call_s: float = 1e-4,
        least: int = 0,
        lift: int | None = None,
        pace: Pace | None = None,
    ) -> None:
        """`least`: ns that it takes at least, or what `pace` says from then on; `lift`: until so many ns from now."""
        path = Path([self.links[link] for link in asked.crosses], asked.latency_s, call_s)
        end = partial(self.end, number)
        flow = self.network.start(path, asked.num_bytes, asked.calls, end, (asked.party,), least)
        if lift is not None:
            self.at(lift, partial(self.network.lift, flow))
        if pace is not None:
            self.at(pace.at, partial(self.network.pace, flow, pace.behind, pace.ns))

    def end(self, number: int, success: bool) -> None:
        self.ended.append((number, self.clock.now, success))

    def at(self, time: int, action: partial[None]) -> None:
        self.clock.alarm(time, action)

    @property
    def flows(self) -> dict[Flow, dict[Link, int]]:
        """Those that still send, with what they cross."""
        now = self.clock.now
        return {
            flow: dict(flow.links)
            for link in self.network.links
            for flow in link.flows
            if flow.finish > now and flow.rate
        }


@st.composite
def loads(draw: st.DrawFn) -> tuple[list[float], list[Asked]]:
    rates = draw(st.lists(st.sampled_from(RATES), min_size=1, max_size=5))
    asked, at = [], 0
    for number in range(draw(st.integers(1, 12))):
        at += draw(st.sampled_from([0, 0, 1, MS, 17 * MS, 250 * MS]))
        crosses = draw(st.lists(st.integers(0, len(rates) - 1), min_size=1, max_size=4))
        num_bytes, calls = draw(st.sampled_from([0, 1, 999, 10**5, 123_457])), draw(st.sampled_from([0, 1, 300]))
        asked.append(Asked(at, crosses, num_bytes, calls, draw(st.sampled_from([0.0, 0.003])), f"p{number % 3}"))
    return rates, asked


def check_rates(net: Net) -> None:
    """No link above its capacity; every flow is at its top, or meets a full link on which none is faster."""
    flows = net.flows
    used = {
        link: sum(flow.rate * crossed[link] for flow, crossed in flows.items() if link in crossed) for link in net.links
    }
    assert all(used[link] <= link.capacity for link in net.links)
    for flow, crossed in flows.items():
        assert 0 < flow.rate <= flow.top
        if flow.rate == flow.top:
            continue
        assert any(
            used[link] + sum(times for other in flows for at, times in other.links if at is link) > link.capacity
            and all(other.rate <= flow.rate for other in flows if link in flows[other])
            for link in crossed
        ), "somebody could be faster without anybody slower"


@given(
    load=loads(),
    paces=st.lists(
        st.tuples(
            st.sampled_from([0, 0, 5 * MS, 300 * MS]),
            st.sampled_from([None, 0, 1, 90 * MS]),
            st.sampled_from(
                [None, Pace(0, 0, 1), Pace(1, 0, 250 * MS), Pace(40 * MS, 500, 3 * MS), Pace(MS, 10**5, MS)]
            ),
        )
    ),
)
@settings(max_examples=250)
def test_rates_are_max_min_fair_at_every_moment(
    load: tuple[list[float], list[Asked]], paces: list[tuple[int, int | None, Pace | None]]
) -> None:
    """Conservation, fairness and work conservation after every event; in the end all has arrived. Some come no faster
    than their sources have the bytes, for a while or to the end, and the sources may get faster or slower.
    """
    rates, asked = load
    net = Net(rates)
    for number, each in enumerate(asked):
        least, lift, pace = paces[number] if number < len(paces) else (0, None, None)
        net.at(each.at, partial(net.start, number, each, least=least, lift=lift, pace=pace))
    while net.clock.next_ns is not None:
        now = net.clock.next_ns
        while net.clock.next_ns == now:
            net.clock.step()
        check_rates(net)
    assert sorted(number for number, _, _ in net.ended) == list(range(len(asked)))
    assert all(success for _, _, success in net.ended)
    assert not net.network.links and all(link.asked == 0 and not link.flows for link in net.links)


def reference(rates: Sequence[float], asked: Sequence[Asked], call_s: float = 1e-4) -> list[float]:
    """When each ends, by fractions and by filling all flows again whenever one comes or goes."""
    capacity = [Fraction(rate) / NS_PER_S for rate in rates]
    left = {number: Fraction(each.num_bytes) for number, each in enumerate(asked)}
    ends: dict[int, Fraction] = {}
    tops = {}
    for number, each in enumerate(asked):
        alone = each.calls * Fraction(call_s) * NS_PER_S
        alone += max(each.num_bytes / capacity[link] * each.crosses.count(link) for link in each.crosses)
        tops[number] = each.num_bytes / alone if each.num_bytes else Fraction(0)
        if not each.num_bytes:
            ends[number] = each.at + alone
    now = Fraction(0)
    while len(ends) < len(asked):
        active = [number for number, each in enumerate(asked) if each.at <= now and number not in ends]
        speed: dict[int, Fraction] = {}
        while len(speed) < len(active):
            rising = [number for number in active if number not in speed]
            shares = {}
            for link, total in enumerate(capacity):
                crossings = sum(asked[number].crosses.count(link) for number in rising)
                taken = sum(rate * asked[number].crosses.count(link) for number, rate in speed.items())
                if crossings:
                    shares[link] = (total - taken) / crossings
            level = min([*shares.values(), *(tops[number] for number in rising)])
            for number in rising:
                if tops[number] <= level or any(shares[link] <= level for link in asked[number].crosses):
                    speed[number] = level
        coming = [Fraction(each.at) for each in asked if each.at > now]
        done = [now + left[number] / speed[number] for number in active]
        following = min([*coming, *done])
        for number in active:
            left[number] -= speed[number] * (following - now)
            if left[number] <= 0:
                ends[number] = following
        now = following
    return [float(ends[number]) + to_ns(each.latency_s) for number, each in enumerate(asked)]


@given(load=loads())
@settings(max_examples=150)
def test_transfers_end_when_a_reference_says(load: tuple[list[float], list[Asked]]) -> None:
    """To a few ns: each change of rates may round up once."""
    rates, asked = load
    net = Net(rates)
    for number, each in enumerate(asked):
        net.at(each.at, partial(net.start, number, each))
    run_out(net.clock)
    found = {number: at for number, at, _ in net.ended}
    for number, expected in enumerate(reference(rates, asked)):
        assert found[number] == pytest.approx(expected, abs=40)


@given(load=loads(), data=st.data())
def test_the_order_of_what_happens_at_one_time_makes_no_difference(
    load: tuple[list[float], list[Asked]], data: st.DataObject
) -> None:
    """Transfers that begin together in another order end when they did."""
    rates, asked = load
    order = sorted(data.draw(st.permutations(range(len(asked)))), key=lambda number: asked[number].at)
    ends = []
    for numbers in (range(len(asked)), order):
        net = Net(rates)
        for number in numbers:
            net.at(asked[number].at, partial(net.start, number, asked[number]))
        run_out(net.clock)
        ends.append(sorted(net.ended))
    assert ends[0] == ends[1]


@given(load=loads(), at=st.sampled_from([0, 5 * MS, 100 * MS]))
def test_who_is_gone_frees_the_links(load: tuple[list[float], list[Asked]], at: int) -> None:
    """Its transfers fail at once, each once, those of others end well and no later than with it."""
    rates, asked = load
    ends = []
    for drop in (False, True):
        net = Net(rates)
        for number, each in enumerate(asked):
            if each.at <= at or each.party != "p0":
                net.at(each.at, partial(net.start, number, each))
        if drop:
            net.at(at, partial(net.network.drop, "p0"))
        run_out(net.clock)
        ends.append({number: (time, success) for number, time, success in net.ended})
    for number, (time, success) in ends[1].items():
        if not success:
            assert asked[number].party == "p0" and time == at <= ends[0][number][0]
    others = [number for number in ends[1] if asked[number].party != "p0"]
    assert all(ends[1][number][1] for number in others)
    # With max-min fairness one who leaves may make another slower, but what they moved together is not less.
    assert not net.network.links


def test_a_flow_alone_is_one_event_and_exact() -> None:
    """Calls, bytes and latency to the ns; nobody's rate is looked at again, also where there is room for two."""
    net = Net([1e9, 25e9])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Network, "_share", lambda *_: pytest.fail("rates were shared out"))
        net.start(0, Asked(0, [0, 1], 131_072_007, 64, 0.002, "p"), 2e-5)
        net.start(1, Asked(0, [1], 131_072_007, 64, 0.002, "q"), 2e-5)  # its calls leave room for the other
        before = next(net.clock.env._eid)
        run_out(net.clock)
    assert next(net.clock.env._eid) == before + 1
    assert net.ended[1] == (0, round(64 * 20_000 + 131_072_007 / 1e9 * 1e9) + 2_000_000, True)


def test_two_share_and_one_alone_takes_over() -> None:
    """Half the rate while there are two, all of it behind: 1.5 s for the short one twice, 2 s for all."""
    net = Net([1e6])
    net.start(0, Asked(0, [0], 10**6, 0, 0.0, "p"))
    net.at(to_ns(0.5), partial(net.start, 1, Asked(0, [0], 500_000, 0, 0.0, "q")))
    run_out(net.clock)
    assert sorted(net.ended) == [(0, to_ns(1.5), True), (1, to_ns(1.5), True)]


@pytest.mark.pure
def test_only_what_a_full_link_joins_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand flows elsewhere, and a link with room for all: the work is that of the two who compete."""
    sizes: list[int] = []

    class Counted(Filling):
        def __init__(self, flows: dict[Flow, None]) -> None:
            sizes.append(len(flows))
            super().__init__(flows)

    monkeypatch.setattr("sim.network.Filling", Counted)
    net = Net([1e6] * 1001 + [1e12])
    for number in range(1000):
        net.start(number, Asked(0, [number, 1001], 10**6, 0, 0.0, "p"))
    assert sizes == []
    net.start(1000, Asked(0, [7, 1001], 10**6, 0, 0.0, "q"))
    assert sizes == [2]


def test_a_change_goes_no_further_than_it_is_felt() -> None:
    """In a row of links of which each two have a flow in common, one at the end is nothing to those far away."""
    net = Net([1e6] * 400)
    for number in range(399):
        net.start(number, Asked(0, [number, number + 1], 10**6, 0, 0.0, "p"))
    rates = {flow: flow.rate for flow in net.flows}
    for number in range(3):
        net.start(1000 + number, Asked(0, [0], 10**6, 0, 0.0, "q"))
    changed = [flow for flow, rate in rates.items() if flow.rate != rate]
    check_rates(net)
    assert 0 < len(changed) < 20


def test_crossing_a_link_twice_takes_twice() -> None:
    """A source that sends to two at once gives each half of its way out, and the path knows its rate."""
    net = Net([1e6, 1e6])
    path = Path([net.links[0], net.links[0], net.links[1]])
    assert path.alone_ns(10**6, 0) == to_ns(2.0)
    net.start(0, Asked(0, [0, 0, 1], 10**6, 0, 0.0, "p"))
    net.start(1, Asked(0, [0], 10**6, 0, 0.0, "q"))
    net.clock.run_until(1)
    assert net.links[0].asked > net.links[0].capacity
    assert [flow.rate for flow in net.flows] == [net.links[0].capacity // 3] * 2


def test_a_flow_that_its_source_holds_back() -> None:
    """It goes at the pace of its source, then at that of the link: 3 of 4 layers of a kB in 30 ms, and one in 1 ms."""
    net = Net([1e6])
    net.start(0, Asked(0, [0], 4000, 0, 0.0, "p"), least=40 * MS, lift=30 * MS)
    run_out(net.clock)
    assert net.ended == [(0, 31 * MS, True)]


@pytest.mark.parametrize(("ns", "lift"), [(10 * MS, 20 * MS), (90 * MS, 100 * MS)])
def test_a_source_that_gets_faster_or_slower(ns: int, lift: int) -> None:
    """Of 4 layers of a kB, one is sent in the first 10 ms of what was to be 30; two more while its source computes
    them, in `ns`; and the last one behind that, in 1 ms.
    """
    net = Net([1e6])
    net.start(0, Asked(0, [0], 4000, 0, 0.0, "p"), least=40 * MS, lift=lift, pace=Pace(10 * MS, 1000, ns))
    net.clock.run_until(11 * MS)
    [flow] = net.flows
    assert flow.rate == pytest.approx(2000 * BYTE / ns)
    run_out(net.clock)
    assert net.ended == [(0, lift + MS, True)]


def test_what_a_held_back_flow_leaves_is_others() -> None:
    """Beside a fifth of the link for one, the other has four; from the lift on each has half."""
    net = Net([1e6])
    net.start(0, Asked(0, [0], 4000, 0, 0.0, "p"), least=20 * MS, lift=10 * MS)
    net.start(1, Asked(0, [0], 10**6, 0, 0.0, "q"))
    net.clock.run_until(5 * MS)
    assert [round(flow.rate / UNIT) for flow in net.flows] == [200_000, 800_000]
    net.clock.run_until(12 * MS)
    assert [round(flow.rate / UNIT) for flow in net.flows] == [500_000] * 2
    run_out(net.clock)
    assert net.ended[0] == (0, 14 * MS, True)  # 2000 bytes were left
    assert net.ended[1] == (1, 1004 * MS, True)


def test_lifting_what_is_over_changes_nothing() -> None:
    """A flow that has ended, or was dropped, stays as it is; so does one that nothing holds back."""
    net = Net([1e6])
    net.start(0, Asked(0, [0], 1000, 0, 0.002, "p"), least=5 * MS, lift=6 * MS)
    net.start(1, Asked(0, [0], 9000, 0, 0.0, "q"), least=50 * MS, lift=10 * MS)
    net.at(8 * MS, partial(net.network.drop, "q"))
    run_out(net.clock)
    assert net.ended == [(0, 7 * MS, True), (1, 8 * MS, False)]
    since = net.clock.now
    net.start(2, Asked(0, [0], 1000, 0, 0.0, "r"), lift=0)
    run_out(net.clock)
    assert net.ended[2] == (2, since + MS, True)
    assert not net.links[0].flows and net.links[0].asked == 0


@pytest.mark.pure
def test_a_network_with_transfers_under_way_can_be_pickled() -> None:
    """A copy goes on and ends as the first does."""
    net = Net([1e6, 2e6])
    for number in range(5):
        net.start(number, Asked(0, [number % 2, 0], 10**5 * (number + 1), 2, 0.001, "p"))
    net.clock.run_until(50 * MS)
    copy = pickle.loads(pickle.dumps(net))
    for each in (net, copy):
        run_out(each.clock)
    assert copy.ended == net.ended and len(net.ended) == 5


def test_bad_rates_are_refused() -> None:
    """With the link's name."""
    with pytest.raises(ValueError, match=r"link out: 0\.0 bytes/s: the rate must be above 0"):
        Link("out", 0.0)


def test_units_hold_the_fastest_link_and_the_slowest() -> None:
    """A rate is a whole number of units, a byte a whole number of rate times ns."""
    assert BYTE == UNIT * NS_PER_S
    assert Link("slow", 1.0).capacity == UNIT
    assert ceil(Link("fast", 392e9).capacity / UNIT) == 392e9
