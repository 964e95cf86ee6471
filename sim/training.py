"""How long the tasks of work other than serving take on simulated workers, from model shape and hardware alone."""

from collections.abc import Callable

from cluster.vocabulary import NS_PER_S, ExecutorSpec
from cluster.work import Operation, Preprocess, RunTool, Train
from sim.hardware import Hardware
from sim.model_shape import ModelShape

WEIGHT_BYTES = 2
STATE_BYTES = 12
"""Per trained parameter of mixed-precision Adam: weights, momentum and variance in 32 bit. With weights and gradients
in 16 bit that makes 16 bytes per parameter (ZeRO, arXiv 1910.02054, section 3.1)."""
GRADIENT_BYTES = 2
COLLECTIVES_PER_LAYER = 3
"""Two all-gathers of weights and one reduce-scatter of gradients."""


class Training:
    """Training of one model on one executor: data parallel over its NPUs, all state spread over them (ZeRO stage 3).

    A step of T tokens in sequences of s, of a model with P parameters, of which a share r is trained, on n NPUs:

    * compute: (4 + 2 r) P' T FLOPs, the 6 P T of Kaplan et al. (arXiv 2001.08361, section 2.1; 2 forward, 2 for the
      gradients of activations, 2 for those of weights, which frozen ones do without) where r is 1. P' are the
      parameters that a token computes with, less the embedding, which is a look-up. Attention comes on top with three
      times the forward pass over T (s + 1) / 2 causal pairs. All at `efficiency_training` of n x `flops`.
    * communication, per NPU: (n - 1) / n x (2 x 2 P + 2 r P) bytes: weights are gathered forward and backward,
      gradients scattered (ZeRO, section 7.2.2), over the collectives that serving uses, their latency three times a
      layer. No overlap with compute is assumed, as in serving.
    * optimiser: 2 + 2 x 12 + 2 bytes read and written per trained parameter, each NPU its part.

    Saving writes what is trained and its state to the executor's disk, restoring reads all weights and that. Raises
    ValueError where the state does not fit.
    """

    def __init__(self, hardware: Hardware, shape: ModelShape, npus: int) -> None:
        self._hardware = hardware
        self._shape = shape
        self._npus = npus

    def step_ns(self, batch_sequences: int, sequence_tokens: int, trainable: float) -> int:
        """One step."""
        return round(
            NS_PER_S
            * (
                self._compute_s(batch_sequences, sequence_tokens, trainable)
                + self._communication_s(trainable)
                + self._optimiser_s(trainable)
            )
        )

    def _compute_s(self, sequences: int, tokens: int, trainable: float) -> float:
        shape, hardware = self._shape, self._hardware
        parameters = shape.active_parameters - (0 if shape.tied_embeddings else shape.vocab * shape.hidden)
        flops = (4 + 2 * trainable) * parameters * sequences * tokens
        flops += 3 * shape.flops_per_pair * sequences * tokens * (tokens + 1) / 2
        return float(flops / (self._npus * hardware.flops * hardware.efficiency_training))

    def _communication_s(self, trainable: float) -> float:
        if self._npus == 1:
            return 0.0
        rate, latency = self._hardware.collective(self._npus)
        sent = self._shape.parameters * (2 * WEIGHT_BYTES + GRADIENT_BYTES * trainable)
        sent *= (self._npus - 1) / self._npus
        return sent / rate + COLLECTIVES_PER_LAYER * self._shape.layers * latency

    def _optimiser_s(self, trainable: float) -> float:
        moved = trainable * self._shape.parameters * (GRADIENT_BYTES + 2 * STATE_BYTES + WEIGHT_BYTES)
        bandwidth = self._hardware.hbm_bytes_per_s * self._hardware.efficiency_bandwidth
        return moved / (self._npus * bandwidth)

    def restore_ns(self, trainable: float) -> int:
        """Reading weights and state from the disk."""
        state = trainable * self._shape.parameters * STATE_BYTES
        return self._disk_ns(self._shape.parameters * WEIGHT_BYTES + state)

    def save_ns(self, trainable: float) -> int:
        """Writing what training changes."""
        return self._disk_ns(trainable * self._shape.parameters * (WEIGHT_BYTES + STATE_BYTES))

    def _disk_ns(self, num_bytes: float) -> int:
        return round(NS_PER_S * (self._hardware.ssd_latency_s + num_bytes / self._hardware.ssd_bytes_per_s))

    def check_fits(self, trainable: float) -> None:
        """ValueError: weights, gradients and optimiser state need more memory than the NPUs have together.

        Activations are left out: recomputed layer by layer, they are a batch's to fit.
        """
        need = self._shape.parameters * (WEIGHT_BYTES + trainable * (GRADIENT_BYTES + STATE_BYTES))
        have = self._npus * self._hardware.hbm_bytes * self._hardware.usable_hbm
        if need > have:
            raise ValueError(
                f"training {trainable:.3g} of {self._shape.name} takes {need / 1e9:.1f} GB of weights and state, "
                f"{self._npus} x {self._hardware.name} have {have / 1e9:.1f} GB: give the training group more npus, or "
                "train a smaller share (adapters: some 0.001)"
            )


class WorkTimes:
    """The time of each operation on one kind of worker. `shape_of`: the sizes of a model by its name."""

    def __init__(self, hardware: Hardware, shape_of: Callable[[str], ModelShape]) -> None:
        self._hardware = hardware
        self._shape_of = shape_of

    def __call__(self, spec: ExecutorSpec, operation: Operation) -> int:
        """ns. ValueError: the model does not fit the worker's NPUs."""
        match operation:
            case Preprocess():
                return round(operation.tokens * NS_PER_S / self._hardware.preprocess_tokens_per_s)
            case Train():
                training = Training(self._hardware, self._shape_of(operation.model), spec.npus)
                training.check_fits(operation.trainable)
                step = training.step_ns(operation.batch_sequences, operation.sequence_tokens, operation.trainable)
                restore = training.restore_ns(operation.trainable) if operation.restore else 0
                return restore + operation.steps * step + training.save_ns(operation.trainable)
            case RunTool():
                raise AssertionError("how long a tool takes is in the workload")
