"""The load that a profile is measured under: a probe of what engines do to each other, then light to full batches."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from cluster.fleet import Fleet
from cluster.policy import DispatchPolicy
from cluster.request import Answer, Arrival, Request, Task, Trigger
from cluster.streams import stream

CONCURRENCY = ((1, 6), (2, 6), (3, 4), (4, 4), (6, 3), (8, 3), (12, 2), (16, 2), (24, 2), (32, 2))
"""(requests at a time per engine, requests one after the other), a phase each."""

DECODES, DECODE_TOKENS = 8, 64
PROMPTS = 16
"""What an engine does in a phase of the probe: decode so many sequences for so long, or compute so many prompts."""

LONGEST_OUTPUT = 64

HANDED_OVER = (4, 20)
"""(requests at a time, one after the other) of an engine that prefills for one that decodes."""

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
    """Arrivals in order. `probe`: those with lower request numbers are the probe's, which comes first."""

    arrivals: list[Arrival]
    probe: int


def load(model: str, engines: int, max_sequences: int, max_prompt: int, seed: int) -> Load:
    """The whole load for engines that serve alone: the probe, where there are two to look at, then more and more
    requests at a time.
    """
    phases = _Phases(model, engines, max_prompt, seed)
    for each in PROBE if engines > 1 else ():
        phases.probe(each, min(DECODES, max_sequences))
    probe = phases.number + 1
    for users, turns in CONCURRENCY:
        phases.steady(min(users, max_sequences), turns)
    return Load(phases.arrivals, probe)


def handovers(model: str, max_prompt: int, seed: int) -> list[Arrival]:
    """The load for an engine that prefills and one that decodes: a few requests at a time."""
    phases = _Phases(model, 1, max_prompt, seed)
    phases.steady(*HANDED_OVER)
    return phases.arrivals


class _Phases:
    """Writes down phase after phase; each begins when the last has ended.

    Lengths are log-uniform: 8 to `max_prompt` tokens in, 8 to `LONGEST_OUTPUT` out.
    """

    def __init__(self, model: str, engines: int, max_prompt: int, seed: int) -> None:
        self.arrivals: list[Arrival] = []
        self.number = -1
        self._model, self._engines, self._max_prompt = model, engines, max_prompt
        self._rng = stream(seed, "profiling load")

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

    def steady(self, users: int, turns: int) -> None:
        """So many users of each engine send so many requests one after the other."""
        begin = Trigger("ended", count=len(self.arrivals))
        last: dict[tuple[int, int], int] = {}
        for _ in range(turns):
            for user in range(users):
                for engine in range(self._engines):
                    before = last.get((engine, user))
                    after = begin if before is None else Trigger("ended", request_id=before)
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
