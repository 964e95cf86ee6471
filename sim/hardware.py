"""What a simulated node is made of."""

from typing import Literal

import msgspec

from cluster.cost import Rates
from sim.contention import Contention
from sim.model_shape import ModelShape
from sim.topology import HostShape, Wire


class AllToAll(msgspec.Struct, frozen=True):
    """Rates that the two halves of an expert-parallel layer reach per NPU at a degree of expert parallelism."""

    degree: int
    dispatch_bytes_per_s: float
    combine_bytes_per_s: float


class Hardware(msgspec.Struct, frozen=True):
    """One NPU and its share of the node. Rates per second and one way, sizes in bytes; sources stand in the YAML.

    `flops`: dense 16-bit peak; `flops_8bit`: the same for 8-bit weights, 0 where there is no such unit. `efficiency_*`:
    share of the peak that real kernels and collectives reach. `step_overhead_s`: host time per step, graph launch
    included; `kernel_launch_s`: of each kernel launched by itself, where no graph is replayed; `kernel_fixed_s`: what a
    small kernel takes on the device beside moving its bytes, in graphs too.

    `price_per_hour`, `busy_w`, `idle_w`: see `cluster.cost.Rates`.

    `node_npus` are joined by `peer_*`: a mesh (each pair has its own link, together `peer_bytes_per_s` per NPU), a
    switch (all of it to anyone) or a ring; `peer_latency_s` per phase of a collective. Beyond the node, collectives go
    over `kv_link_*`. `all_to_all`: measured rates of expert parallelism, by degree.

    A host is `host_npus` of them (None: all of the node; where a node is a super-pod, hosts are what has memory and
    disk of its own); `package_npus` of a host are dies of one package, joined by `package_bytes_per_s`.

    `kv_link_*`: the NIC of each NPU, beyond the node, with `kv_call_overhead_s` per contiguous segment there and on
    every other wire. `pcie_*`: between HBM and host memory; `dram_bytes_per_s`: what a host's memory gives or takes of
    all its NPUs together (None: what PCIe does); `dram_bytes`: its page cache and all else that lies there (None: no
    end). `ssd_*`: between host memory and the disk of a host, shared by its NPUs. `rack_hosts` hosts share an uplink
    with `oversubscription` times less than their NICs could send (None: no racks).

    `usable_hbm`: share of HBM for weights, activations and KV cache. `contention`: by how much longer a step takes
    for each other executor that computes meanwhile, as a share, or one for each pair of kinds of steps (engines on
    the cores of one CPU share its memory bandwidth; NPUs do not: 0). `kv_host_s`: for how long each hand-over keeps
    the engine that fetches from computing (on a CPU it copies by itself; NPUs do not: 0). `host_step_s`: what the
    host needs for a step; the device waits for it unless plans are in flight (`engine.max_in_flight` above 1). Step
    times of a profile contain it.

    `efficiency_training`: share of `flops` that training steps reach in compute (model FLOPs utilisation); assumed
    where the YAML does not say: published runs on GPUs and NPUs reach 0.38 to 0.54. `preprocess_tokens_per_s`: what
    one slot of a CPU worker tokenises; derived: 6.5 MB of English in 1.80 s with Llama 3's tokenizer on one Xeon core
    (Hugging Face tokenizers, pull request 1967), at 4.3 bytes per token.
    """

    name: str
    flops: float
    hbm_bytes: float
    hbm_bytes_per_s: float
    efficiency_gemm: float
    efficiency_attention: float
    efficiency_bandwidth: float
    step_overhead_s: float
    kv_link_bytes_per_s: float
    kv_link_latency_s: float
    kv_call_overhead_s: float
    pcie_bytes_per_s: float
    pcie_latency_s: float
    ssd_bytes_per_s: float
    ssd_latency_s: float
    price_per_hour: float | None = None
    busy_w: float | None = None
    idle_w: float | None = None
    flops_8bit: float = 0.0
    kernel_launch_s: float = 0.0
    kernel_fixed_s: float = 0.0
    node_npus: int = 1
    topology: Literal["mesh", "switch", "ring"] = "switch"
    peer_bytes_per_s: float = 0.0
    peer_latency_s: float = 0.0
    efficiency_link: float = 1.0
    all_to_all: tuple[AllToAll, ...] = ()
    host_npus: int | None = None
    package_npus: int = 1
    package_bytes_per_s: float = 0.0
    dram_bytes: float | None = None
    dram_bytes_per_s: float | None = None
    rack_hosts: int | None = None
    oversubscription: float = 1.0
    usable_hbm: float = 0.9
    contention: float | Contention = 0.0
    host_step_s: float = 0.0
    kv_host_s: float = 0.0
    efficiency_training: float = 0.4
    preprocess_tokens_per_s: float = 0.84e6

    def __post_init__(self) -> None:
        for field in ("price_per_hour", "busy_w", "idle_w"):
            if (getattr(self, field) or 0) < 0:
                raise ValueError(f"hardware.{field} is {getattr(self, field)}: allowed are 0 and more, or null")
        for field in ("host_step_s", "kv_host_s"):
            if getattr(self, field) < 0:
                raise ValueError(f"hardware.{field} is {getattr(self, field)}: allowed are 0 (none) and more")
        if not isinstance(self.contention, Contention) and self.contention < 0:
            raise ValueError(f"hardware.contention is {self.contention}: allowed are 0 (none) and more")
        if self.node_npus > 1 and not self.peer_bytes_per_s > 0:
            raise ValueError(
                f"hardware.peer_bytes_per_s is {self.peer_bytes_per_s}: the {self.node_npus} NPUs of a node need a link"
            )

    def host(self) -> HostShape:
        """One of its hosts. Between two NPUs of a node a transfer reaches what a collective does."""
        call_s, npus = self.kv_call_overhead_s, self.host_npus or self.node_npus
        rate, latency = self.peer_bytes_per_s * self.efficiency_link, self.peer_latency_s
        joined, mesh = self.node_npus > 1, self.topology == "mesh"
        dies = self.package_bytes_per_s * self.efficiency_link
        return HostShape(
            nic=Wire(self.kv_link_bytes_per_s, self.kv_link_latency_s, call_s),
            npus=npus,
            domain_npus=self.node_npus,
            peer=Wire(rate, latency, call_s) if joined else None,
            pair=Wire(rate / (self.node_npus - 1), latency, call_s) if joined and mesh else None,
            package_npus=self.package_npus,
            package=Wire(dies, latency, call_s) if self.package_npus > 1 else None,
            pcie=Wire(self.pcie_bytes_per_s, self.pcie_latency_s, call_s),
            ssd=Wire(self.ssd_bytes_per_s, self.ssd_latency_s, call_s),
            memory_bytes=self.dram_bytes,
            memory_bytes_per_s=self.dram_bytes_per_s,
            rack_hosts=self.rack_hosts,
            oversubscription=self.oversubscription,
            name=self.name,
        )

    @property
    def rates(self) -> Rates:
        return Rates(self.price_per_hour, self.busy_w, self.idle_w)

    def collective(self, npus: int) -> tuple[float, float]:
        """(bytes/s, s) of what joins so many NPUs: the rate at which each sends, and the latency of one phase in which
        each sends something to each.
        """
        if npus > self.node_npus:
            rate, latency = self.kv_link_bytes_per_s, self.kv_link_latency_s
        else:
            rate, latency = self.peer_bytes_per_s * self.efficiency_link, self.peer_latency_s
            if self.topology == "mesh":
                rate *= (npus - 1) / (self.node_npus - 1)
            elif self.topology == "ring":
                latency *= npus - 1
        return rate, latency

    def all_to_all_rates(self, npus: int) -> tuple[float, float]:
        """(dispatch, combine) bytes/s per NPU, in a straight line between the measured degrees."""
        known = sorted(self.all_to_all, key=lambda entry: entry.degree)
        if not known or npus > self.node_npus:
            rate, _ = self.collective(npus)
            return rate, rate
        if npus <= known[0].degree or npus >= known[-1].degree:
            end = known[0] if npus <= known[0].degree else known[-1]
            return end.dispatch_bytes_per_s, end.combine_bytes_per_s
        above = next(number for number, entry in enumerate(known) if entry.degree > npus)
        low, high = known[above - 1], known[above]
        share = (npus - low.degree) / (high.degree - low.degree)
        return (
            low.dispatch_bytes_per_s + share * (high.dispatch_bytes_per_s - low.dispatch_bytes_per_s),
            low.combine_bytes_per_s + share * (high.combine_bytes_per_s - low.combine_bytes_per_s),
        )


def activation_bytes(shape: ModelShape, npus: int, token_budget: int, max_sequences: int) -> int:
    """Per NPU, what the largest step needs beside weights and KV cache: derived from the shape, not measured.

    All at once: of `token_budget` tokens the residual and a layer's input (16 bit, whole on every NPU), and the larger
    of that layer's attention (queries, keys, values and output) and its MLP (gate, up, and their product; of experts,
    those of a token), which the NPUs of an attention group share (all tokens may be of one group); of `max_sequences`
    tokens the logits in 32 bit, and, to draw from them, their values sorted and where they stood (64 bit) and
    cumulated: 20 bytes per entry.
    """
    width = shape.heads * (shape.head_dim + shape.rope_dim) + 2 * shape.kv_heads * shape.head_dim
    attention = width + shape.heads * shape.head_dim
    sparse = (shape.experts_per_token + shape.shared_experts) * shape.expert_intermediate
    mlp = 3 * max(shape.intermediate if shape.sparse_layers < shape.layers else 0, sparse)
    tokens = token_budget * 2 * (2 * shape.hidden + max(attention, mlp) / shape.split(npus))
    return round(tokens + max_sequences * shape.vocab * 20)


def kv_blocks(
    hardware: Hardware, shape: ModelShape, npus: int, block_tokens: int, token_budget: int, max_sequences: int
) -> int:
    """KV cache blocks that fit beside weights and activations. Raises ValueError where they leave no room.

    usable_hbm x HBM = weights + activations + KV cache, the sum that vLLM's memory profiling makes, too; what is
    not usable is for the runtime: contexts, buffers of collectives, graphs, fragments.
    """
    budget = npus * hardware.hbm_bytes * hardware.usable_hbm
    weights = shape.weight_bytes_on(npus)
    activations = npus * activation_bytes(shape, npus, token_budget, max_sequences)
    blocks = int((budget - weights - activations) // (shape.kv_bytes_per_token * shape.kv_copies(npus) * block_tokens))
    if blocks < 1:
        raise ValueError(
            f"model {shape.name} does not fit {npus} x {hardware.name}: its weights take "
            f"{weights / 1e9:.1f} GB and the activations of {token_budget} tokens {activations / 1e9:.1f} GB of "
            f"{budget / 1e9:.1f} GB usable HBM; give each executor more NPUs, or take a smaller model"
        )
    return blocks
