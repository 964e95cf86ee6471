"""Latency models: how long a simulated step takes, from what it consists of."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import ClassVar

from cluster.latency import LatencyModel, StepShape
from cluster.vocabulary import NS_PER_S
from sim.noise import Noise


class Measured:
    """What latency models share that rest on measured steps: they count what they are asked beyond those.

    `asked`: step times so far, `outside` of them of a step larger in some part than any that was measured.
    """

    asked = 0
    outside = 0


class Fitted(Measured, LatencyModel):
    """Linear in the features of a step, with non-negative coefficients in ns fitted to a profile (see `features`).

    In its rows, the tokens that go through the matrices together, a step is piecewise linear: one more coefficient
    between each of `knots` and the next, because the kernels for so many rows are not those for more. A prompt token
    is a row, and so is a decoding sequence, in one step or in two. `ranges`: what was measured of each part of a step,
    by its name. `noise`: what an executor's steps have besides (see `sim.noise`). A guess to be verified counts as one
    more prompt token: derived, the profiled engines do not speculate. `reshape_ns`: see `LatencyModel`.
    """

    FEATURES: ClassVar[tuple[str, ...]] = (
        "step",
        "prefill_step",
        "prefill_tokens",
        "prefill_attention",
        "prefill_chunks",
        "decode_step",
        "decode_sequences",
        "decode_context",
    )

    def __init__(
        self,
        coefficients_ns: Sequence[float],
        knots: Sequence[int] = (),
        ranges: Mapping[str, tuple[float, float]] | None = None,
        noise: Noise | None = None,
        reshape_ns: int = 0,
    ) -> None:
        names = self.names(knots)
        if len(coefficients_ns) != len(names):
            raise ValueError(
                f"a fitted latency model needs {len(names)} coefficients ({', '.join(names)}), "
                f"not {len(coefficients_ns)}"
            )
        if list(knots) != sorted(set(knots)) or (knots and knots[0] < 1):
            raise ValueError(f"knots of a fitted latency model are {list(knots)}: allowed are rising numbers from 1 up")
        self.coefficients_ns = tuple(float(value) for value in coefficients_ns)
        self.knots = tuple(knots)
        self.noise = noise
        self.reshape_ns = reshape_ns
        self._step, self._prefill, self._token, self._pair, self._chunk, self._decode, self._sequence, self._key = (
            self.coefficients_ns[: len(self.FEATURES)]
        )
        slopes = self.coefficients_ns[len(self.FEATURES) :]
        self._rows = [self._step] * (self.knots[0] + 1 if self.knots else 1)  # ns of so many rows, up to the last knot
        for (start, end), slope in zip(pairwise(self.knots), slopes, strict=False):
            self._rows += [self._rows[-1] + slope * more for more in range(1, end - start + 1)]
        self._slope = slopes[-1] if slopes else 0.0
        most = {name: high for name, (_, high) in (ranges or {}).items()}
        self._most = tuple(most.get(name, float("inf")) for name in StepShape._fields[:5])

    @classmethod
    def names(cls, knots: Sequence[int]) -> tuple[str, ...]:
        """What each coefficient is of."""
        return (*cls.FEATURES, *(f"rows > {knot}" for knot in knots))

    @staticmethod
    def features(shape: StepShape, knots: Sequence[int] = ()) -> tuple[float, ...]:
        """The regressors of a step, in the order of `names`."""
        sequences, tokens = shape.decode_sequences, shape.prefill_tokens + shape.draft_tokens
        return (
            1.0,
            float(shape.prefill_tokens > 0),
            float(tokens),
            float(shape.prefill_attention),
            float(shape.prefill_chunks),
            float(sequences > 0),
            float(sequences),
            float(shape.decode_context),
            *(
                float(min(max(sequences + tokens - low, 0), high - low))
                for low, high in pairwise((*knots, float("inf")))
            ),
        )

    def step_ns(self, shape: StepShape) -> int:
        tokens, attention, chunks, sequences, context, drafts = shape
        self.asked += 1
        most = self._most
        if tokens > most[0] or attention > most[1] or chunks > most[2] or sequences > most[3] or context > most[4]:
            self.outside += 1
        more = tokens + drafts
        time = self._of_rows(sequences + more) + more * self._token + context * self._key
        if tokens:
            time += self._prefill + attention * self._pair + chunks * self._chunk
        if sequences:
            time += self._decode + sequences * self._sequence
        return max(1, int(time + 0.5))

    def decode_ns(self, sequences: int, context: int, steps: int) -> list[int]:
        self.asked += steps
        most = self._most
        if sequences > most[3]:
            self.outside += steps
        elif context + (steps - 1) * sequences > most[4]:
            self.outside += sum(context + step * sequences > most[4] for step in range(steps))
        rows, key, own = self._of_rows(sequences), self._key, self._decode + sequences * self._sequence
        return [max(1, int(rows + (context + step * sequences) * key + own + 0.5)) for step in range(steps)]

    def _of_rows(self, rows: int) -> float:
        """ns of a step of so many rows, whatever they are."""
        behind = rows - len(self._rows) + 1
        return self._rows[rows] if behind <= 0 else self._rows[-1] + behind * self._slope


class Constant(LatencyModel):
    """Every step takes the same time, plus so much per prompt token or guess: for tests and queueing theory."""

    def __init__(self, step_s: float, prefill_token_s: float = 0.0) -> None:
        if step_s < 0 or prefill_token_s < 0 or step_s + prefill_token_s <= 0:
            raise ValueError(
                f"constant latency: step_s {step_s}, prefill_token_s {prefill_token_s}: give positive times"
            )
        self._step = step_s * NS_PER_S
        self._token = prefill_token_s * NS_PER_S

    def step_ns(self, shape: StepShape) -> int:
        return max(1, int(self._step + self._token * (shape.prefill_tokens + shape.draft_tokens) + 0.5))

    def decode_ns(self, sequences: int, context: int, steps: int) -> list[int]:
        return [max(1, int(self._step + 0.5))] * steps
