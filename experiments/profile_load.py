"""The load that a profile is measured under: a probe of what engines do to each other, and idle to full batches.

Phases of all kinds come in random order: a machine's pace changes from second to second, and what is measured in one
stretch of time only would be taken for slow, or fast, by itself.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

import msgspec
import numpy as np

from cluster.fleet import Fleet
from cluster.policy import DispatchPolicy
from cluster.request import Answer, Arrival, Request, Task, Trigger
from cluster.streams import stream
from cluster.vocabulary import to_ns

Phase = TypeVar("Phase")


class Level(NamedTuple):
    """So many `users` of each engine send so many requests one after the other (`turns`), in `visits` phases.

    `think_s`: mean seconds that a user waits before the next request, so that engines idle now and then.
    """

    users: int
    turns: int
    visits: int = 1
    think_s: float = 0.0


LEVELS = (
    Level(2, 3, 2, 0.3),
    *(Level(users, 3) for users in (1, 2)),
    *(Level(users, 2) for users in (3, 4, 6, 8, 12, 16, 24, 32)),
)
"""Of engines that serve alone."""

HANDED_OVER = (Level(3, 5, 1, 0.3), Level(1, 4), Level(2, 4), Level(4, 4), Level(8, 3), Level(16, 2), Level(32, 2))
"""Of an engine that prefills for one that decodes."""

DECODES, DECODE_TOKENS = 8, 64
PROMPTS = 16
"""What an engine does in a phase of the probe: decode so many sequences for so long, or compute so many prompts."""

LONGEST_OUTPUT = 64

PROBE: tuple[Mapping[int, str], ...] = (
    {0: "decode"},
    {0: "decode", 1: "decode"},
    {0: "decode", 1: "prefill"},
    {1: "decode"},
    {0: "prefill"},
    {0: "prefill", 1: "prefill"},
    {0: "prefill", 1: "decode"},
    {1: "prefill"},
)
"""What the first two engines do, phase by phase: each kind of step alone, and beside each kind."""


class ByNumber(DispatchPolicy):
    """A request goes to the engine that its number says: request n to engine n mod the number of engines."""

    def place(self, task: Task, fleet: Fleet, now_ns: int) -> str | None:
        names = [name for group in fleet.candidates(task) for name in group.names]
        return names[task.request.request_id % len(names)] if names else None


class Load(NamedTuple):
    """Arrivals in order. `probe`: the first and last request numbers of each phase of the probe."""

    arrivals: list[Arrival]
    probe: list[tuple[int, int]]


def load(
    model: str, engines: int, max_sequences: int, max_prompt: int, seed: int, launch: int = 0, parts: int = 1
) -> Load:
    """For engines that serve alone, with the probe where there are two to look at. Each launch has an order and
    lengths of its own; so many launches in a row share the phases between them (`parts`).
    """
    phases = _Phases(model, engines, max_prompt, seed, f"profiling load {launch}")
    planned: list[Mapping[int, str] | Level] = [*_visits(LEVELS), *(PROBE if engines > 1 else ())]
    found = []
    for phase in phases.part(planned, launch, parts):
        first = phases.number + 1
        if isinstance(phase, Level):
            phases.steady(phase, max_sequences)
        else:
            phases.probe(phase, min(DECODES, max_sequences))
            found.append((first, phases.number))
    return Load(phases.arrivals, found)


def handovers(
    model: str, max_sequences: int, max_prompt: int, seed: int, launch: int = 0, parts: int = 1
) -> list[Arrival]:
    """For an engine that prefills and one that decodes."""
    phases = _Phases(model, 1, max_prompt, seed, f"handing over {launch}")
    for level in phases.part(_visits(HANDED_OVER), launch, parts):
        phases.steady(level, max_sequences)
    return phases.arrivals


def _visits(levels: Sequence[Level]) -> list[Level]:
    return [level for level in levels for _ in range(level.visits)]


class _Phases:
    """Writes down phase after phase; each begins when the last has ended.

    Lengths are log-uniform: 8 to `max_prompt` tokens in, 8 to `LONGEST_OUTPUT` out.
    """

    def __init__(self, model: str, engines: int, max_prompt: int, seed: int, name: str) -> None:
        self.arrivals: list[Arrival] = []
        self.number = -1
        self._model, self._engines, self._max_prompt = model, engines, max_prompt
        self._seed, self._rng = seed, stream(seed, name)

    def part(self, phases: Sequence[Phase], launch: int, parts: int) -> list[Phase]:
        """Its part of the phases, in random order."""
        order = stream(self._seed, f"profiling phases {launch // parts}").permutation(len(phases))
        return [phases[place] for place in order[launch % parts :: parts]]

    def probe(self, phase: Mapping[int, str], sequences: int) -> None:
        """Engines do what `phase` says."""
        begin = Trigger("ended", count=len(self.arrivals))
        for engine, kind in phase.items():
            if kind == "decode":
                for _ in range(sequences):
                    self._add(engine, 16, DECODE_TOKENS, begin)
            else:
                for _ in range(PROMPTS):
                    self._add(engine, self._max_prompt // 2, 1, begin)

    def steady(self, level: Level, max_sequences: int) -> None:
        """Users of each engine send requests as `level` says, no more at a time than the engine runs."""
        begin = Trigger("ended", count=len(self.arrivals))
        last: dict[tuple[int, int], int] = {}
        for _ in range(level.turns):
            for user in range(min(level.users, max_sequences)):
                for engine in range(self._engines):
                    before, pause = last.get((engine, user)), to_ns(self._rng.exponential(level.think_s))
                    after = begin if before is None else Trigger("ended", request_id=before)
                    after = msgspec.structs.replace(after, delay_ns=pause)
                    last[engine, user] = self._add(engine, *self._lengths(), after)

    def _lengths(self) -> tuple[int, int]:
        low, high = np.log(8), np.log((self._max_prompt, LONGEST_OUTPUT))
        prompt, output = np.exp(self._rng.uniform(low, high)).astype(int).tolist()
        return prompt, output

    def _add(self, engine: int, prompt: int, output: int, after: Trigger) -> int:
        """The next number of this engine's."""
        self.number += 1 + (engine - self.number - 1) % self._engines
        request = Request(self.number, prompt, 2 * max(output, LONGEST_OUTPUT), self._model)
        self.arrivals.append(Arrival(request, Answer(output), after=after))
        return self.number
