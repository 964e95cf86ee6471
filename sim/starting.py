"""Starting executors: a place, the stages one after the other, and weights over the simulated network."""

from collections.abc import Callable, Sequence
from functools import partial

from cluster.actions import LaunchExecutor
from cluster.vocabulary import Stage, to_ns
from sim.clock import Clock
from sim.coldstart import Load
from sim.network import Network
from sim.node import Node, WorkNode
from sim.topology import Host, HostShape, Topology

Key = tuple[str, int, int, int]
"""Executors whose NPUs hold the same shards: model, NPUs, pipeline stages, bytes."""


class _Start:
    """One executor on its way. `stage`: place of the one it is in, begun at `since`; `source`: of its weights."""

    __slots__ = ("action", "node", "since", "source", "stage")

    def __init__(self, action: LaunchExecutor, node: Node | WorkNode, now: int) -> None:
        self.action = action
        self.node = node
        self.stage = 0
        self.since = now
        self.source = ""


class _Broadcast:
    """Weights on their way from `source` to executors, each over a hop of the same number."""

    __slots__ = ("began", "hops", "load", "share")

    def __init__(self, began: int, hops: list[tuple[str, str]], load: Load, share: float) -> None:
        self.began = began
        self.hops = hops
        self.load = load
        self.share = share
        """Of the bytes that an NPU gets, those in one chunk."""


class Starter:
    """All executors that are starting, and where the running ones sit.

    `finished`: told of each stage (executor, stage, ns, source of weights); `ready`: of an executor that has none left.
    """

    def __init__(
        self,
        clock: Clock,
        topology: Topology,
        network: Network,
        finished: Callable[[str, Stage, int, str], None],
        ready: Callable[[LaunchExecutor, Node | WorkNode], None],
    ) -> None:
        self._clock = clock
        self._topology = topology
        self._network = network
        self._finished = finished
        self._ready = ready
        self._starts: dict[str, _Start] = {}
        self._unplaced: dict[str, _Start] = {}
        self._pinned: dict[str, int] = {}
        self._running: dict[Key, dict[str, int]] = {}  # executors, and how many broadcasts each is sending
        self._gathering: dict[Key, list[str]] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._starts

    def close(self) -> None:
        """Nobody starts any more."""
        self._starts.clear()
        self._unplaced.clear()

    def launch(self, action: LaunchExecutor, node: Node | WorkNode) -> None:
        """Start an executor; one that fits nowhere waits until it does."""
        start = _Start(action, node, self._clock.now)
        self._starts[action.executor] = start
        self._place(start)

    def stop(self, name: str) -> None:
        """It is gone, starting or running: its NPUs and links are free, and who waited for them gets them."""
        self._starts.pop(name, None)
        self._unplaced.pop(name, None)
        for running in self._running.values():
            running.pop(name, None)
        self._network.drop(name)
        seat = self._topology.seats.get(name)
        if seat is None:
            return
        pinned = self._pinned.pop(name, 0)
        for part in seat.parts:
            part.host.cache.pin(-pinned)
        self._topology.leave(name)
        for start in list(self._unplaced.values()):
            self._place(start)

    # -- stages ---------------------------------------------------------------------------------------------------

    def _place(self, start: _Start) -> None:
        name, host = start.action.executor, start.node.host
        if host is not None and not self._seat(start, host):
            self._unplaced[name] = start
            return
        self._unplaced.pop(name, None)
        self._clock.alarm(0, partial(self._begin, start))

    def _seat(self, start: _Start, host: HostShape) -> bool:
        """Whether there was room."""
        action, tier_bytes = start.action, start.node.dram_bytes
        seat = self._topology.place(action.executor, host, action.spec.npus)
        if seat is None:
            return False
        if tier_bytes:
            self._pinned[action.executor] = pinned = round(tier_bytes * seat.share)
            for part in seat.parts:
                part.host.cache.pin(pinned)
        return True

    def _begin(self, start: _Start) -> None:
        if self._gone(start):
            return
        stages = start.node.stages
        if start.stage == len(stages):
            self._started(start)
            return
        stage, took = stages[start.stage]
        load = start.node.load
        after = partial(self._load if stage is Stage.TE_LOAD and load is not None else self._next, start)
        self._clock.alarm(took, after)

    def _next(self, start: _Start) -> None:
        """A stage is over."""
        if self._gone(start):
            return
        now = self._clock.now
        stage, _ = start.node.stages[start.stage]
        source = start.source if stage is Stage.TE_LOAD else ""
        self._finished(start.action.executor, stage, now - start.since, source)
        start.stage, start.since = start.stage + 1, now
        self._begin(start)

    def _started(self, start: _Start) -> None:
        name = start.action.executor
        del self._starts[name]
        if start.node.load is not None:
            self._running.setdefault(_key(start), {})[name] = 0
        self._ready(start.action, start.node)

    def _gone(self, start: _Start) -> bool:
        return self._starts.get(start.action.executor) is not start

    # -- weights from the host ------------------------------------------------------------------------------------

    def _load(self, start: _Start) -> None:
        """Get the weights: from a running executor where that is asked for and there is one, else from the host."""
        load = start.node.load
        if self._gone(start) or load is None:
            return
        if load.fork and self._running.get(_key(start)):
            self._clock.alarm(to_ns(load.fork_setup_s), partial(self._gather, start))
        else:
            self._clock.alarm(to_ns(load.setup_s), partial(self._local, start))

    def _local(self, start: _Start) -> None:
        load, name = start.node.load, start.action.executor
        if self._gone(start) or load is None:
            return
        seat = self._topology.seats[name]
        hits: list[bool] = []
        for number, part in enumerate(seat.parts):
            file = _file(start.action.spec.model, number, len(seat.parts))
            if not part.host.cache.touch(file) and file in part.host.reading:
                part.host.reading[file].append(name)  # somebody reads it already: take it from DRAM then
                return
            hits.append(file in part.host.cache)
        for number, part in enumerate(seat.parts):
            if not hits[number]:
                part.host.reading[_file(start.action.spec.model, number, len(seat.parts))] = []
        start.source = "dram" if all(hits) else "ssd"
        path = self._topology.loading(name, [not hit for hit in hits])
        done = partial(self._loaded, start, tuple(part.host for part in seat.parts), tuple(hits))
        self._network.start(path, round(load.device_bytes * seat.share), 1, done, (name,))

    def _loaded(self, start: _Start, hosts: Sequence[Host], hits: Sequence[bool], success: bool) -> None:
        """What was read from the disk is in the page cache now; who waited for it goes on, or reads it itself."""
        load = start.node.load
        assert load is not None
        for number, (host, hit) in enumerate(zip(hosts, hits, strict=True)):
            if hit:
                continue
            file = _file(start.action.spec.model, number, len(hosts))
            waiting = host.reading.pop(file)
            if success:
                host.cache.insert(file, -(-load.file_bytes // len(hosts)))
            for name in waiting:
                if name in self._starts:
                    self._clock.alarm(0, partial(self._local, self._starts[name]))
        if success:
            self._next(start)

    # -- weights from other executors -------------------------------------------------------------------------------

    def _gather(self, start: _Start) -> None:
        """Those that are ready for weights at the same time get them in one broadcast."""
        if self._gone(start):
            return
        key = _key(start)
        if key not in self._gathering:
            self._gathering[key] = []
            self._clock.alarm(0, partial(self._fork, key))
        self._gathering[key].append(start.action.executor)

    def _fork(self, key: Key) -> None:
        """One broadcast in each domain that has a source, one for all others; the source that sends least elsewhere."""
        targets = [name for name in self._gathering.pop(key) if name in self._starts]
        seats, running = self._topology.seats, self._running.get(key, {})
        if not running:  # the last one died meanwhile
            for name in targets:
                self._load(self._starts[name])
            return
        groups: dict[tuple[int, int] | None, list[str]] = {}
        sources: dict[tuple[int, int] | None, list[str]] = {None: list(running)}
        for name in running:
            sources.setdefault(_domain(seats[name].kind, seats[name].domain), []).append(name)
        for name in targets:
            domain = _domain(seats[name].kind, seats[name].domain)
            groups.setdefault(domain if domain in sources else None, []).append(name)
        for domain, group in groups.items():
            source = min(sources[domain], key=running.__getitem__)
            self._broadcast(key, source, sorted(group, key=lambda name: seats[name].parts[0].host.number))

    def _broadcast(self, key: Key, source: str, targets: list[str]) -> None:
        load = self._starts[targets[0]].node.load
        assert load is not None
        members = [source, *targets]
        hops = [(members[(place - 1) // load.fanout], members[place]) for place in range(1, len(members))]
        words = {"package": "die to die", "peer": "peer links", "network": "network"}
        for sender, target in hops:
            self._starts[target].source = f"{source}, {words[self._topology.joined_by(sender, target)]}"
        self._running[key][source] += 1
        chunk = min(1.0, load.chunk_bytes * key[1] / load.device_bytes)
        broadcast = _Broadcast(self._clock.now, hops, load, chunk)
        done = partial(self._forked, key, broadcast)
        path = self._topology.broadcast(hops)
        self._network.start(path, load.device_bytes, round(1 / chunk), done, (source, *targets))

    def _forked(self, key: Key, broadcast: _Broadcast, success: bool) -> None:
        """The first to receive have all; those behind them get the last chunk so many hops later. Where any of them
        died, the others begin anew.
        """
        source = broadcast.hops[0][0]
        if source in self._running.get(key, {}):
            self._running[key][source] -= 1
        took = self._clock.now - broadcast.began
        depths = {source: 0}
        for sender, target in broadcast.hops:
            depths[target] = depths[sender] + 1
            start = self._starts.get(target)
            if start is None:
                continue
            if success:
                self._clock.alarm(round((depths[target] - 1) * took * broadcast.share), partial(self._next, start))
            else:
                self._clock.alarm(0, partial(self._load, start))


def _key(start: _Start) -> Key:
    load = start.node.load
    assert load is not None
    spec = start.action.spec
    return spec.model, spec.npus, load.pipeline_stages, load.device_bytes


def _domain(kind: int, domain: int | None) -> tuple[int, int] | None:
    return None if domain is None else (kind, domain)


def _file(model: str, number: int, parts: int) -> str:
    """What a host reads of a model: all of it, or the shards of its NPUs."""
    return model if parts == 1 else f"{model} {number}/{parts}"
