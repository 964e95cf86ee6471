"""Engines that slow each other down, because they share something: the cores of one CPU its cache and memory."""

from collections.abc import Callable
from typing import Protocol

import msgspec


class Contention(msgspec.Struct, frozen=True):
    """By how much longer a step takes, as a share, for each other engine that computes meanwhile: `decode_by_prefill`
    a step of decodes while the other's step holds prompt tokens, and so on. Measured by `deepflow profile`.
    """

    decode_by_decode: float = 0.0
    decode_by_prefill: float = 0.0
    prefill_by_decode: float = 0.0
    prefill_by_prefill: float = 0.0

    def __post_init__(self) -> None:
        for field in self.__struct_fields__:
            if not getattr(self, field) >= 0:
                raise ValueError(f"contention.{field} is {getattr(self, field)}: allowed are 0 (none) and more")

    @classmethod
    def of(cls, value: "float | Contention") -> "Contention":
        """A single number is all four."""
        return value if isinstance(value, Contention) else cls(value, value, value, value)

    def __bool__(self) -> bool:
        return any(getattr(self, field) for field in self.__struct_fields__)

    def by(self, prefill: bool) -> tuple[float, float]:
        """What a step is slowed down by: (each decode, each prefill) of others."""
        if prefill:
            return self.prefill_by_decode, self.prefill_by_prefill
        return self.decode_by_decode, self.decode_by_prefill


class Computing(Protocol):
    """Whoever has a step under way, and can be told that it ends at another time."""

    def retime(self, end: int) -> None: ...


class _Step:
    """`left` ns of work, as if alone, at `since`; each ns takes `slowdown`."""

    __slots__ = ("left", "prefill", "since", "slowdown")

    def __init__(self, prefill: bool, left: float, since: int) -> None:
        self.prefill = prefill
        self.left = left
        self.since = since
        self.slowdown = 1.0

    @property
    def end(self) -> int:
        return self.since + max(0, round(self.left * self.slowdown))


class Shared:
    """What engines share. While others begin and end their steps, a step under way goes on slower or faster.

    `contention`: what each engine suffers, by itself.
    """

    def __init__(self, contention: Callable[[Computing], Contention]) -> None:
        self._contention = contention
        self._steps: dict[Computing, _Step] = {}
        self._count = [0, 0]

    def begin(self, engine: Computing, prefill: bool, now: int, work: int) -> int:
        """A step begins that would take `work` ns alone: when it ends, unless `retime` says otherwise."""
        before = self._steps.pop(engine, None)
        step = self._steps[engine] = _Step(prefill, work, now)
        if before is None or before.prefill is not prefill:
            if before is not None:
                self._count[before.prefill] -= 1
            self._count[prefill] += 1
            self._changed(engine, now)
        step.slowdown = self._slowdown(engine, step)
        return step.end

    def extend(self, engine: Computing, now: int, work: int) -> int:
        """The step under way has `work` ns more to do: when it ends now."""
        step = self._steps[engine]
        step.left += work - (now - step.since) / step.slowdown
        step.since = now
        return step.end

    def idle(self, engine: Computing, now: int) -> None:
        """It computes no more."""
        step = self._steps.pop(engine, None)
        if step is not None:
            self._count[step.prefill] -= 1
            self._changed(engine, now)

    def _changed(self, cause: Computing, now: int) -> None:
        for engine, step in self._steps.items():
            if engine is not cause:
                slowdown = self._slowdown(engine, step)
                if slowdown != step.slowdown:
                    step.left -= (now - step.since) / step.slowdown
                    step.since, step.slowdown = now, slowdown
                    engine.retime(step.end)

    def _slowdown(self, engine: Computing, step: _Step) -> float:
        others = list(self._count)
        others[step.prefill] -= 1
        by_decode, by_prefill = self._contention(engine).by(step.prefill)
        return 1 + by_decode * others[False] + by_prefill * others[True]
