"""What an engine lets be chosen from outside: queue order, preemption victim, cache eviction, prompt tokens per step.

Like every policy these decide and do nothing else; they see plain data and keep no clock. One object serves one engine.
Each base class is the default. An engine is told of another one by import path and arguments, so that the same object
decides in the simulator and, in another process, in a real engine.
"""

import heapq
from collections.abc import Iterator
from importlib import import_module
from typing import Protocol, TypeVar

import msgspec

from cluster.request import Task

T = TypeVar("T")
Key = tuple[float, ...]


class PolicySpec(msgspec.Struct, frozen=True):
    """A policy by the import path of its class, and the arguments that make it."""

    target: str
    arguments: dict[str, bool | int | float | str | None] = {}

    def build(self, kind: type[T]) -> T:
        """A new object. ValueError: there is no such class, it is no `kind`, or it refuses the arguments."""
        module, _, name = self.target.rpartition(".")
        try:
            found = getattr(import_module(module), name) if module else None
        except (ImportError, AttributeError) as error:
            raise ValueError(f"{self.target} cannot be imported: {error}") from error
        if not (isinstance(found, type) and issubclass(found, kind)):
            raise ValueError(f"{self.target} is not a {kind.__module__}.{kind.__name__}")
        try:
            return found(**self.arguments)
        except TypeError as error:
            raise ValueError(f"{self.target}: {error}") from error


class EngineSequence(Protocol):
    """A request inside an engine, as a policy may see it. To be read only.

    `arrival`: its number in order of arrival at this engine. `position`: tokens of its context that are computed or
    being computed. `generated`: tokens of the request so far. `preemptions`: how often it lost its blocks.
    """

    @property
    def task(self) -> Task: ...
    @property
    def arrival(self) -> int: ...
    @property
    def position(self) -> int: ...
    @property
    def generated(self) -> int: ...
    @property
    def preemptions(self) -> int: ...


class CachedRun(Protocol):
    """Consecutive cached blocks that nobody uses now. `last_use`: a count, larger is later. `hits`: uses by others than
    the sequence that computed them.
    """

    @property
    def last_use(self) -> int: ...
    @property
    def hits(self) -> int: ...
    @property
    def blocks(self) -> list[int]: ...


class QueueOrder:
    """The queue of one engine: which sequence is admitted next. The base serves in order of arrival.

    Most orders only override `key`. `steps` is a count of decode steps: every sequence that decodes gets one token per
    step, so an order that accounts for service needs to hear of a sequence only when it joins and leaves. The head
    waits for room and is not overtaken meanwhile, but by decode tasks while KV cache is held here for other engines:
    after a role switch, one could otherwise wait for the other. A decode task whose KV cache is here already waits in
    no queue, and is never pushed.
    """

    moves_with_service = False
    """True where `head` may change although nothing arrives or leaves."""

    def __init__(self) -> None:
        self._heap: list[tuple[Key, int, EngineSequence]] = []

    def key(self, sequence: EngineSequence) -> Key:
        """Smaller is sooner; ties go by arrival. A preempted sequence is asked about again."""
        return ()

    def push(self, sequence: EngineSequence, steps: int) -> None:
        """A sequence waits: it came, or was preempted."""
        heapq.heappush(self._heap, (self.key(sequence), sequence.arrival, sequence))

    def head(self, steps: int) -> EngineSequence | None:
        """Who is next; asked every step, and safe until the next call of anything else."""
        return self._heap[0][2] if self._heap else None

    def pop(self) -> None:
        """The head leaves the queue: it is admitted, or was aborted or went ahead of the queue some time ago."""
        heapq.heappop(self._heap)

    def admitted(self, sequence: EngineSequence, tokens: int) -> None:
        """It was admitted, and `tokens` of its context are to be computed."""

    def joined(self, sequence: EngineSequence, steps: int) -> None:
        """It decodes from here on."""

    def left(self, sequence: EngineSequence, steps: int) -> None:
        """It decodes no more."""

    def verified(self, sequence: EngineSequence, tokens: int) -> None:
        """It speculates, and got so many tokens from one step; such a sequence never joins or leaves."""


class VictimPolicy:
    """Who is preempted when a decoding sequence finds no block. The base takes the one admitted last."""

    def choose(self, newest_first: Iterator[EngineSequence]) -> EngineSequence:
        """One of the sequences that compute, which come in the reverse order of admission; there is at least one."""
        return next(newest_first)


class EvictionPolicy:
    """Which cached blocks go first. The base evicts the least recently used."""

    def key(self, run: CachedRun) -> float:
        """Smaller goes sooner. Asked when nobody uses the run any more; blocks go from the end of a prefix."""
        return run.last_use


class ChunkPolicy:
    """How many prompt tokens a step takes beside its decodes. The base takes what the budget leaves."""

    def prompt_tokens(self, budget: int, decodes: int, decode_context: int) -> int:
        """Up to `budget` tokens, where `decodes` sequences with `decode_context` tokens together decode in the step.

        Less than 1 counts as 1: prompts always move.
        """
        return budget
