"""Latency models: how long a simulated step takes, from what it consists of."""

from collections.abc import Sequence

from cluster.latency import StepShape
from cluster.vocabulary import NS_PER_S
from sim.hardware import Hardware, ModelShape


class Roofline:
    """Compute or memory bound, whichever is longer, per part of the step; for hardware nobody has profiled.

    Linear layers: 2 x parameters FLOPs per token against reading all weights once; of E experts, a token computes with
    its k, and n tokens that choose alike and independently read E x (1 - (1 - k / E)^n). Attention of prompts: 4 x
    layers x heads x head_dim FLOPs per query-key pair. Attention of decodes: reading the KV cache. Plus a fixed
    overhead. Split evenly over `npus`; collectives are not modelled, so it is optimistic for more than one.
    """

    def __init__(self, hardware: Hardware, shape: ModelShape, npus: int) -> None:
        flops = npus * hardware.flops / NS_PER_S
        bandwidth = npus * hardware.hbm_bytes_per_s * hardware.efficiency_bandwidth / NS_PER_S
        head = shape.vocab * shape.hidden
        self._overhead = hardware.step_overhead_s * NS_PER_S
        active = shape.dense_parameters + shape.experts_per_token * shape.expert_parameters
        self._weights = (shape.dense_parameters + head) * shape.bytes_per_value / bandwidth
        self._experts = shape.experts * shape.expert_parameters * shape.bytes_per_value / bandwidth
        self._passed_over = 1 - shape.experts_per_token / max(shape.experts, 1)
        self._per_token = 2 * active / (flops * hardware.efficiency_gemm)
        self._per_sample = 2 * head / (flops * hardware.efficiency_gemm)
        self._per_pair = 4 * shape.layers * shape.heads * shape.head_dim / (flops * hardware.efficiency_attention)
        self._per_key = shape.kv_bytes_per_token / bandwidth

    def step_ns(self, shape: StepShape) -> int:
        tokens = shape.prefill_tokens + shape.decode_sequences + shape.draft_tokens
        samples = shape.prefill_chunks + shape.decode_sequences + shape.draft_tokens
        weights = self._weights
        if self._experts:
            weights += self._experts * (1 - self._passed_over**tokens)
        linear = max(weights, tokens * self._per_token + samples * self._per_sample)
        attention = shape.prefill_attention * self._per_pair + shape.decode_context * self._per_key
        return max(1, round(self._overhead + linear + attention))


class Fitted:
    """Linear in the features of a step, with non-negative coefficients in ns fitted to a profile (see `features`).

    A guess to be verified counts as one more prompt token: derived, the profiled engines do not speculate.
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

    def __init__(self, coefficients_ns: Sequence[float]) -> None:
        if len(coefficients_ns) != len(self.FEATURES):
            raise ValueError(
                f"a fitted latency model needs {len(self.FEATURES)} coefficients ({', '.join(self.FEATURES)}), "
                f"not {len(coefficients_ns)}"
            )
        self.coefficients_ns = tuple(float(value) for value in coefficients_ns)

    @staticmethod
    def features(shape: StepShape) -> tuple[float, ...]:
        """The regressors of a step, in the order of `FEATURES`."""
        return (
            1.0,
            float(shape.prefill_tokens > 0),
            float(shape.prefill_tokens + shape.draft_tokens),
            float(shape.prefill_attention),
            float(shape.prefill_chunks),
            float(shape.decode_sequences > 0),
            float(shape.decode_sequences),
            float(shape.decode_context),
        )

    def step_ns(self, shape: StepShape) -> int:
        terms = zip(self.coefficients_ns, self.features(shape), strict=True)
        return max(1, round(sum(coefficient * feature for coefficient, feature in terms)))


class Constant:
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
