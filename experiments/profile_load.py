"""The load that a profile is measured under: a probe of what engines do to each other, then light to full batches."""

from collections.abc import Mapping

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


class Load:
    """The arrivals of the whole load. `probe`: request numbers below it are the probe's, which comes first.

    Lengths are log-uniform: 8 to `max_prompt` tokens in, 8 to `LONGEST_OUTPUT` out. Each phase begins when the last has
    ended; in it each engine has as many users as said, who send one request after the other.
    """

    def __init__(self, model: str, engines: int, max_sequences: int, max_prompt: int, seed: int) -> None:
        self._model, self._engines, self._max_sequences = model, engines, max_sequences
        self._max_prompt = max_prompt
        self._rng = stream(seed, "profiling load")
        self._number = -1
        self.arrivals: list[Arrival] = []
        for phase in PROBE if engines > 1 else ():
            self._probe(phase)
        self.probe = self._number + 1
        for users, turns in CONCURRENCY:
            self._steady(min(users, max_sequences), turns)

    def _probe(self, phase: Mapping[int, str]) -> None:
        begin = Trigger("ended", count=len(self.arrivals))
        for engine, kind in phase.items():
            if kind == "decode":
                for _ in range(min(DECODES, self._max_sequences)):
                    self._add(engine, 16, DECODE_TOKENS, begin)
            else:
                for _ in range(PROMPTS):
                    self._add(engine, self._max_prompt // 2, 1, begin)

    def _steady(self, users: int, turns: int) -> None:
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
        self._number += 1 + (engine - self._number - 1) % self._engines
        request = Request(self._number, prompt, 2 * max(output, LONGEST_OUTPUT), self._model)
        self.arrivals.append(Arrival(request, Answer(output), after=after))
        return self._number
