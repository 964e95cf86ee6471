"""A latency model from peaks and sizes alone, for hardware that nobody has profiled."""

import math
from bisect import bisect_left
from collections.abc import Sequence

from cluster.latency import LatencyModel, StepShape
from cluster.vocabulary import NS_PER_S
from sim.hardware import Hardware
from sim.model_shape import ModelShape

KERNELS_PER_LAYER = 10
"""Norm, QKV, rope, cache write, attention, output, norm, gate and up, activation, down: with fused operators."""
KERNELS_PER_SPARSE_LAYER = 13
"""Gating, routing and its undoing in addition."""
SMALL_KERNELS_PER_LAYER = 5
"""Of these, those that only move activations: two norms, rope, cache write, activation."""
SMALL_KERNELS_PER_SPARSE_LAYER = 8


class Roofline(LatencyModel):
    """Compute or memory bound, whichever is longer, of each kind of operator, one after the other.

    Dense matrices, head and experts: 2 x parameters FLOPs per token against reading the weights once; of E experts, a
    token computes with its k, and n tokens that choose alike and independently read E x (1 - (1 - k / E)^n). Attention
    of prompts: `flops_per_pair`. Attention of decodes: reading the KV cache once, or `flops_per_key` for each token
    that a sequence computes or verifies. Small kernels (norms, rope, cache write, activation, and around experts
    gating, routing and its undoing): what they read and write of activations, and `kernel_fixed_s` each. All of it
    as the shape is spread over `npus`, plus what joins them and a fixed overhead.

    Split matrices: two all-reduces of 16-bit activations per layer, each a reduce-scatter and an all-gather in which an
    NPU sends (n - 1) / n of the bytes. Spread experts: each token's activations to and from k experts per sparse
    layer, dispatched in the weights' precision and combined in 16 bit; all wait for the NPU whose experts were chosen
    most, with n k / N choices on average of N NPUs (1 + sqrt(2 ln N / (n k / N))) times as many.

    Attention groups (`shape.groups`): the sequences of the fullest count. Pipeline stages: a step is a round of as many
    micro-batches, among which sequences and the chunks of prompts are dealt out evenly (DeepServe section 4.3: one
    scheduler, consecutive chunks in consecutive micro-batches); rounds on end take a micro-batch's way through all
    stages each, and the first one `fill_ns` more. Without `spread_chunks`, prompts stay in one micro-batch.

    `graph`: steps of decodes alone are one launch, padded to the next of `graph_sizes` (none: any size is captured);
    beyond the largest, and all other steps, take at least `kernel_launch_s` per kernel, as the host launches while the
    device computes.
    """

    def __init__(
        self,
        hardware: Hardware,
        shape: ModelShape,
        npus: int,
        graph: bool = True,
        graph_sizes: Sequence[int] = (),
        spread_chunks: bool = True,
    ) -> None:
        shape.check_split(npus)
        if any(size < 1 for size in graph_sizes):
            raise ValueError(f"latency.graph_sizes are {list(graph_sizes)}: allowed are numbers of sequences from 1 up")
        self.stages = shape.pipeline_stages
        self._groups = shape.groups(npus)
        split = shape.split(npus)
        stage = npus // self.stages
        peak = hardware.flops_8bit if shape.bytes_per_value == 1 and hardware.flops_8bit else hardware.flops
        gemm = peak * hardware.efficiency_gemm / NS_PER_S
        attention = split * hardware.flops * hardware.efficiency_attention / NS_PER_S
        bandwidth = hardware.hbm_bytes_per_s * hardware.efficiency_bandwidth / NS_PER_S
        among = stage if shape.expert_parallel else split  # NPUs that share the experts
        head = shape.vocab * shape.hidden
        self._overhead = hardware.step_overhead_s * NS_PER_S
        self._dense = shape.dense_parameters * shape.bytes_per_value / (split * bandwidth)
        self._dense_token = 2 * shape.dense_parameters / (split * gemm)
        self._head = head * shape.bytes_per_value / (split * bandwidth)
        self._head_token = 2 * head / (split * gemm)
        self._experts = shape.experts * shape.expert_parameters * shape.bytes_per_value / (among * bandwidth)
        self._experts_token = 2 * shape.experts_per_token * shape.expert_parameters / (among * gemm)
        self._passed_over = 1 - shape.experts_per_token / max(shape.experts, 1)
        self._per_pair = shape.flops_per_pair / attention
        self._key_read = shape.kv_bytes_per_token * shape.kv_copies(npus) / (split * bandwidth)
        self._key_compute = shape.flops_per_key / attention

        sparse, dense = shape.sparse_layers, shape.layers - shape.sparse_layers
        small = SMALL_KERNELS_PER_LAYER * dense + SMALL_KERNELS_PER_SPARSE_LAYER * sparse
        # Of every micro-batch, and of each token through the dense part: small kernels, all-reduces and hops.
        self._fixed = small * hardware.kernel_fixed_s * NS_PER_S
        whole, shared, by_experts = shape.activation_bytes_per_token
        self._token = (whole + shared / split) / bandwidth
        self._routed_token = by_experts / (among * bandwidth)
        self._launches = (
            (KERNELS_PER_LAYER * dense + KERNELS_PER_SPARSE_LAYER * sparse) * hardware.kernel_launch_s * NS_PER_S
        )

        self._all_to_all = self._all_to_all_token = 0.0
        if split > 1:
            rate, latency = hardware.collective(split)
            self._fixed += shape.layers * 4 * latency * NS_PER_S
            self._token += shape.layers * 2 * 2 * (split - 1) / split * 2 * shape.hidden / rate * NS_PER_S
        self._sharing = among if shape.expert_parallel else 1
        self._chosen_per_token = shape.experts_per_token / max(among, 1)
        if shape.expert_parallel and stage > 1:
            _, latency = hardware.collective(stage)
            dispatch, combine = hardware.all_to_all_rates(stage)
            sent = shape.experts_per_token * shape.hidden / stage
            per_token = sent * min(shape.bytes_per_value, 2) / dispatch + sent * 2 / combine
            self._all_to_all = sparse * 2 * latency * NS_PER_S
            self._all_to_all_token = sparse * per_token * NS_PER_S
        if self.stages > 1:
            rate, latency = hardware.collective(2 if npus <= hardware.node_npus else npus)
            self._fixed += self.stages * latency * NS_PER_S  # the last sends the token back
            self._token += (self.stages - 1) * 2 * shape.hidden / rate * NS_PER_S
        self._alone = self.stages == self._groups == 1

        self._graph = graph
        self._graph_sizes = sorted(graph_sizes)
        self._spread = spread_chunks
        self._known: dict[int, tuple[float, float, float]] = {}

    # -- the interface --------------------------------------------------------------------------------------------

    def step_ns(self, shape: StepShape) -> int:
        prefill, _, _, sequences, context, drafts = shape
        if not prefill and not drafts:
            fixed, per_key, least = self._decode(sequences)
            return max(1, int(self._overhead + max(fixed + context * per_key, least) + 0.5))
        device = self._device(shape)
        if prefill and not self._spread and self.stages > 1:
            # The others wait for the micro-batch that has the prompts, or for their turns behind it.
            light = self._device(StepShape(0, 0, 0, sequences, context, drafts))
            device = max(device, (device + (self._micro_batches(shape) - 1) * light) / self.stages)
        least = self._launches if prefill or not self._graph else 0.0
        return max(1, int(self._overhead + max(device, least) + 0.5))

    def decode_ns(self, sequences: int, context: int, steps: int) -> list[int]:
        fixed, per_key, least = self._decode(sequences)
        overhead = self._overhead
        return [
            max(1, int(overhead + max(fixed + (context + step * sequences) * per_key, least) + 0.5))
            for step in range(steps)
        ]

    def fill_ns(self, shape: StepShape) -> int:
        if self.stages == 1:
            return 0
        prefill, _, _, sequences, context, drafts = shape
        if not self._spread and prefill:
            shape = StepShape(0, 0, 0, sequences, context, drafts)
        return round((self._micro_batches(shape) - 1) / self.stages * self._device(shape))

    # -- one micro-batch on its way through all stages ------------------------------------------------------------

    def _micro_batches(self, shape: StepShape) -> int:
        """How many of a round's micro-batches have anything to compute."""
        return max(1, min(self.stages, shape.prefill_tokens + shape.decode_sequences))

    def _decode(self, sequences: int) -> tuple[float, float, float]:
        """(ns of a step that only decodes but for its context, ns per key of its context, least ns)."""
        known = self._known.get(sequences)
        if known is None:
            captured, places = self._graph, sequences
            if captured and self._graph_sizes:
                share = self.stages * self._groups
                mine = -(-sequences // share)
                captured = mine <= self._graph_sizes[-1]
                if captured:
                    places = self._graph_sizes[bisect_left(self._graph_sizes, mine)] * share
            fixed = self._work(*self._parts(0, 0, places, 0))
            known = self._known[sequences] = (fixed, self._per_key(sequences, 0), 0.0 if captured else self._launches)
        return known

    def _device(self, shape: StepShape) -> float:
        prefill, attention, chunks, sequences, context, drafts = shape
        if self._alone:
            tokens = prefill + sequences + drafts
            ns = self._work(tokens, chunks + sequences + drafts, tokens) + attention * self._per_pair
        else:
            ns = self._work(*self._parts(prefill, chunks, sequences, drafts))
            ns += attention * self._per_pair * self._prompt_share(chunks)
        return ns + context * self._per_key(sequences, drafts)

    def _prompt_share(self, chunks: int) -> float:
        """Of a step's prompt tokens, those of the fullest group in a micro-batch."""
        if not chunks:
            return 1.0
        return math.ceil(chunks / self._groups) / chunks / (self.stages if self._spread else 1)

    def _parts(self, prefill: int, chunks: int, sequences: int, drafts: int) -> tuple[float, float, float]:
        """What one NPU computes of a micro-batch: tokens through dense matrices, samples through the head, and tokens
        that all NPUs of its stage together send through the experts.
        """
        stages, groups = self.stages, self._groups
        wide = 1 + drafts / sequences if sequences else 1.0
        mine = -(-sequences // (stages * groups)) * wide
        prompts = prefill * self._prompt_share(chunks)
        spread = stages if self._spread else 1
        together = prefill / spread + -(-sequences // stages) * wide
        return prompts + mine, math.ceil(chunks / (spread * groups)) + mine, together

    def _per_key(self, sequences: int, drafts: int) -> float:
        """ns per key of the context of all decoding sequences."""
        if not sequences:
            return 0.0
        key = self._key_compute * (1 + drafts / sequences) if drafts else self._key_compute
        if key < self._key_read:
            key = self._key_read
        if self._alone:
            return key
        return key * -(-sequences // (self.stages * self._groups)) / sequences

    def _work(self, tokens: float, samples: float, together: float) -> float:
        """ns of everything but attention."""
        dense, head = tokens * self._dense_token, samples * self._head_token
        ns = dense if dense > self._dense else self._dense
        ns += head if head > self._head else self._head
        ns += self._fixed + tokens * self._token
        if self._experts and together:
            uneven = self._unevenness(together)
            read = self._experts * (1 - self._passed_over**together)
            ns += max(read, together * self._experts_token * uneven) + together * self._routed_token * uneven
            ns += self._all_to_all + together * self._all_to_all_token * uneven
        return ns

    def _unevenness(self, tokens: float) -> float:
        """How many more choices than the average fall to the NPU of the most: the largest of N Poisson numbers of mean
        m is about m + sqrt(2 m ln N) where m is not small; at most all fall to one.
        """
        if self._sharing == 1:
            return 1.0
        mean = tokens * self._chosen_per_token
        return min(self._sharing, 1 + math.sqrt(2 * math.log(self._sharing) / mean))
