"""How fast the simulator is: requests simulated per second of wall time, from the first event to the last.

Lengths of the Azure 2023 conversation trace in file order, Poisson arrivals, an 8B model on engines with chunked
prefill and prefix cache: w1 has one executor, w16 has 16 of them. Pure Python and the core compiled by mypyc, beside
other simulators, each of a server of its own, on the same requests, all in turns. The mocker of NVIDIA Dynamo (Rust) is
installed into an environment of its own in the user's cache folder; dynamo=no leaves it out. BLIS, DistServe's
simulator, splitwise-sim and Vidur run from checkouts of the user's, as in vidur=CHECKOUT or vidur=CHECKOUT:PYTHON.
"""

import subprocess
import sys
from statistics import median

import msgspec

from experiments import compiled
from experiments.bench.harness import checkouts, dynamo
from experiments.bench.harness.result import Options as CommonOptions
from experiments.bench.harness.result import Row, median_row
from experiments.bench.harness.sim_case import CASES, TRACE, Measured
from experiments.bench.harness.simulators import Peer, PeerError
from traces.catalog import find

SCALE = ("10 executors", "100 executors", "1024 executors")
SHORT_RUNS = 3
"""Before a long run, and as many after it."""


class Options(CommonOptions, frozen=True, kw_only=True):
    """`requests`: of w16; w1 has an eighth of them. `dynamo`: no, or its peer's part is measured too. `blis` to
    `vidur`: checkouts of further peers, CHECKOUT[:PYTHON]. `each`: requests per executor where numbers of executors are
    compared. `large`: requests of the long run on 10 executors, whose time per request is held against that of 10,000.
    """

    requests: int = 16_000
    dynamo: bool = True
    blis: str | None = None
    distserve: str | None = None
    splitwise: str | None = None
    vidur: str | None = None
    each: int = 200
    large: int = 200_000


def missing(options: Options) -> str | None:
    """Why it cannot run here. Raises ValueError: a peer's checkout is none."""
    _given(options)
    return None if find(TRACE) is not None else f"there is no trace {TRACE}: deepflow traces list says where it belongs"


def run(options: Options) -> list[Row]:
    peers = _given(options)
    if options.dynamo:
        peers.insert(0, dynamo.peer())
    compiled_too, why_not = compiled.try_build()
    rows: list[Row] = []
    for name in ("w1", "w16", "w16, 6 prefill and 10 decode executors", "w16, prefix-aware"):
        rows += compared(name, options, peers, compiled_too, why_not)
    for fast in (False, True) if compiled_too else (False,):
        rows += _scaling(options, fast)
    return rows


def _given(options: Options) -> list[Peer]:
    return [checkouts.peer(name, getattr(options, name)) for name in checkouts.SOURCES]


def compared(name: str, options: Options, peers: list[Peer], compiled_too: bool, why_not: str) -> list[Row]:
    """One workload, pure, compiled and by the peers that can simulate it, in turns."""
    count = options.requests // 8 if name == "w1" else options.requests
    taking = [peer for peer in peers if peer.takes(CASES[name])]
    failed = {peer.name: peer.why for peer in taking if peer.rate is None}
    theirs: dict[str, list[float]] = {peer.name: [] for peer in taking}
    pure, fast = list[Measured](), list[Measured]()
    for _ in range(options.repeats):
        for peer in taking:
            if peer.rate is not None and peer.name not in failed:
                try:
                    theirs[peer.name].append(peer.rate(count, CASES[name]))
                except PeerError as error:
                    failed[peer.name] = str(error)
        if compiled_too:
            fast.append(_measure(name, count, True))
        pure.append(_measure(name, count, False))
    last = pure[-1]
    said = f"{count} requests, {last.steps} steps, {last.simulated_s:.0f} s simulated"
    rows = [median_row(f"{name}: pure Python", _rates(pure, count), "requests/s", f"{said}, {last.peak_mib:.0f} MiB")]
    if compiled_too:
        times = last.simulated_s / fast[-1].wall_s
        rows.append(median_row(f"{name}: compiled", _rates(fast, count), "requests/s", f"{times:.0f} times real time"))
    else:
        rows.append(Row(name=f"{name}: compiled", value=None, unit="", detail=why_not))
    for peer in taking:
        if peer.name in failed:
            rows.append(Row(name=f"{name}: {peer.name}", value=None, unit="", detail=failed[peer.name]))
            continue
        rates = theirs[peer.name]
        rows.append(median_row(f"{name}: {peer.name}", rates, "requests/s", peer.about))
        if compiled_too:
            rows.append(_ratio(f"{name}: compiled / {peer.name}", _rates(fast, count), rates, 1.0))
        rows.append(_ratio(f"{name}: pure Python / {peer.name}", _rates(pure, count), rates))
    return rows


def _ratio(name: str, ours: list[float], theirs: list[float], at_least: float | None = None) -> Row:
    return median_row(name, [a / b for a, b in zip(ours, theirs, strict=True)], "x", at_least=at_least)


def _rates(measured: list[Measured], requests: int) -> list[float]:
    return [requests / each.wall_s for each in measured]


def _scaling(options: Options, fast: bool) -> list[Row]:
    """Time per request with more executors, each with the same load for the same time (of a shorter run more is filling
    and emptying, in smaller batches), and with more requests. CPU time: it is compared with itself, measured right
    before and after.
    """
    build = "compiled" if fast else "pure Python"
    few, rows = SCALE[0], list[Row]()
    for name in SCALE[1:]:
        requests, shorter = CASES[name].executors * options.each, CASES[few].executors * options.each
        ratio, took, said = _growth((few, shorter), (name, requests), fast)
        rows.append(Row(name=f"{build}: {name}, by load and prefix", value=took, unit="us/request", detail=said))
    rows.append(Row(name=f"{build}: 1024 / 10 executors, time per request", value=ratio, unit="x", at_most=1.5))
    ratio, took, said = _growth((few, 10_000), (few, options.large), fast)
    detail = f"on 10 executors, {took:.0f} us, {said}"
    name = f"{build}: {options.large} / 10000 requests, time per request"
    return [*rows, Row(name=name, value=ratio, unit="x", detail=detail)]


def _growth(short: tuple[str, int], long: tuple[str, int], fast: bool) -> tuple[float, float, str]:
    """How many times as long a request takes in the long run as in the short ones around it, us in the long one, and
    about it.
    """
    before = [_measure(*short, fast) for _ in range(SHORT_RUNS)]
    measured = _measure(*long, fast)
    after = [_measure(*short, fast) for _ in range(SHORT_RUNS)]
    took, usual = measured.cpu_s / long[1], median(each.cpu_s / short[1] for each in before + after)
    said = f"{long[1]} requests, {measured.steps} steps, {measured.peak_mib:.0f} MiB, {1e6 * usual:.0f} us when short"
    return took / usual, 1e6 * took, said


def _measure(name: str, requests: int, fast: bool) -> Measured:
    """CalledProcessError: it fails."""
    command = [sys.executable, "-m", "experiments.bench.harness.sim_case", name, str(requests)]
    environment = compiled.environment(fast)
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment, cwd=compiled.ROOT)
    return msgspec.json.decode(done.stdout, type=Measured)
