"""Latency models: how long a simulated step takes, from what it consists of."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

from cluster.latency import LatencyModel, StepShape
from cluster.vocabulary import NS_PER_S
from sim.hardware import Hardware
from sim.model_shape import ModelShape
from sim.noise import Noise

KERNELS_PER_LAYER = 10
"""Norm, QKV, rope, cache write, attention, output, norm, gate and up, activation, down: with fused operators."""
KERNELS_PER_SPARSE_LAYER = 13
"""Gating, routing and its undoing in addition."""


class Roofline(LatencyModel):
    """Compute or memory bound, whichever is longer, per part of the step; for hardware nobody has profiled.

    Linear layers: 2 x parameters FLOPs per token against reading all weights once; of E experts, a token computes with
    its k, and n tokens that choose alike and independently read E x (1 - (1 - k / E)^n). Attention of prompts:
    `flops_per_pair`. Attention of decodes: reading the KV cache once, or `flops_per_key` for each token that a sequence
    computes or verifies, whichever is longer. All of it split evenly over `npus`, plus what joins them and a fixed
    overhead.

    Split matrices: two all-reduces of 16-bit activations per layer, each a reduce-scatter and an all-gather in which an
    NPU sends (n - 1) / n of the bytes. Spread experts: each token's activations to and from k experts per sparse
    layer, dispatched in the weights' precision and combined in 16 bit.

    `graph`: steps of decodes alone are one launch. Other steps, and all without it, take at least `kernel_launch_s` per
    kernel; the host launches while the device computes.
    """

    def __init__(self, hardware: Hardware, shape: ModelShape, npus: int, graph: bool = True) -> None:
        peak = hardware.flops_8bit if shape.bytes_per_value == 1 and hardware.flops_8bit else hardware.flops
        gemm = npus * peak * hardware.efficiency_gemm / NS_PER_S
        attention = npus * hardware.flops * hardware.efficiency_attention / NS_PER_S
        bandwidth = npus * hardware.hbm_bytes_per_s * hardware.efficiency_bandwidth / NS_PER_S
        head = shape.vocab * shape.hidden
        copies = npus if shape.expert_parallel else 1
        dense = copies * (shape.dense_parameters + head)
        active = shape.dense_parameters + shape.experts_per_token * shape.expert_parameters
        self._overhead = hardware.step_overhead_s * NS_PER_S
        self._weights = dense * shape.bytes_per_value / bandwidth
        self._experts = shape.experts * shape.expert_parameters * shape.bytes_per_value / bandwidth
        self._passed_over = 1 - shape.experts_per_token / max(shape.experts, 1)
        self._per_token = 2 * active / gemm
        self._per_sample = 2 * head / gemm
        self._per_pair = shape.flops_per_pair / attention
        self._key_read = shape.kv_bytes_per_token * shape.kv_copies(npus) / bandwidth
        self._key_compute = shape.flops_per_key / attention
        self._per_key = max(self._key_read, self._key_compute)
        self._joined, self._joined_per_token = _communication(hardware, shape, npus)
        dense_layers = shape.layers - shape.sparse_layers
        kernels = KERNELS_PER_LAYER * dense_layers + KERNELS_PER_SPARSE_LAYER * shape.sparse_layers
        self._launches = kernels * hardware.kernel_launch_s * NS_PER_S
        self._graph = graph

    def step_ns(self, shape: StepShape) -> int:
        prefill, decodes, drafts = shape.prefill_tokens, shape.decode_sequences, shape.draft_tokens
        tokens = prefill + decodes + drafts
        linear = self._linear(tokens, shape.prefill_chunks + decodes + drafts)
        per_key = self._per_key
        if drafts and decodes:
            per_key = max(self._key_read, self._key_compute * (1 + drafts / decodes))
        device = linear + shape.prefill_attention * self._per_pair + shape.decode_context * per_key
        device += self._joined + tokens * self._joined_per_token
        if device < self._launches and (prefill or not self._graph):
            device = self._launches
        return max(1, round(self._overhead + device))

    def decode_ns(self, sequences: int, context: int, steps: int) -> list[int]:
        linear, per_key, overhead = self._linear(sequences, sequences), self._per_key, self._overhead
        joined = self._joined + sequences * self._joined_per_token
        least = 0.0 if self._graph else self._launches
        contexts = range(context, context + steps * sequences, sequences)
        return [max(1, round(overhead + max(linear + each * per_key + joined, least))) for each in contexts]

    def _linear(self, tokens: int, samples: int) -> float:
        """ns of the linear layers."""
        weights = self._weights
        if self._experts:
            weights += self._experts * (1 - self._passed_over**tokens)
        return max(weights, tokens * self._per_token + samples * self._per_sample)


def _communication(hardware: Hardware, shape: ModelShape, npus: int) -> tuple[float, float]:
    """(ns per step, ns per token of the step) that the NPUs of an executor spend on sending."""
    if npus == 1:
        return 0.0, 0.0
    rate, latency = hardware.collective(npus)
    if not shape.expert_parallel:
        per_token = 2 * 2 * (npus - 1) / npus * 2 * shape.hidden / rate
        return shape.layers * 4 * latency * NS_PER_S, shape.layers * per_token * NS_PER_S
    dispatch, combine = hardware.all_to_all_rates(npus)
    sent = shape.experts_per_token * shape.hidden / npus
    per_token = sent * min(shape.bytes_per_value, 2) / dispatch + sent * 2 / combine
    return shape.sparse_layers * 2 * latency * NS_PER_S, shape.sparse_layers * per_token * NS_PER_S


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
    more prompt token: derived, the profiled engines do not speculate.
    """

    FEATURES = (
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
        return max(1, round(time))

    def decode_ns(self, sequences: int, context: int, steps: int) -> list[int]:
        contexts = range(context, context + steps * sequences, sequences)
        self.asked += steps
        most = self._most
        if sequences > most[3]:
            self.outside += steps
        elif contexts[-1] > most[4]:
            self.outside += sum(each > most[4] for each in contexts)
        rows, key, own = self._of_rows(sequences), self._key, self._decode + sequences * self._sequence
        return [max(1, round(rows + each * key + own)) for each in contexts]

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
        return max(1, round(self._step + self._token * (shape.prefill_tokens + shape.draft_tokens)))

    def decode_ns(self, sequences: int, context: int, steps: int) -> list[int]:
        return [max(1, round(self._step))] * steps
