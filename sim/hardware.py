"""What a simulated node is made of, and the shape of a model that runs on it."""

import msgspec


class Hardware(msgspec.Struct, frozen=True):
    """One NPU and its share of the node. Rates per second, sizes in bytes; sources stand in the YAML.

    `flops`: dense 16-bit peak. `efficiency_*`: share of the peak that real kernels reach. `step_overhead_s`: host and
    launch time per step. `kv_link_*`: what moves KV cache between executors, with `kv_call_overhead_s` per contiguous
    segment. `pcie_*`: between HBM and host memory, each way; `ssd_*`: between host memory and disk; moves over them
    pay the same overhead per segment. `usable_hbm`: share of HBM for weights, activations and KV cache. `contention`:
    by how much longer a step takes for each other executor that computes meanwhile, as a share (engines on the cores of
    one CPU share its memory bandwidth; NPUs do not: 0). `host_step_s`: what the host needs for a step; the device waits
    for it unless plans are in flight (`engine.max_in_flight` above 1). Step times of a profile contain it.
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
    usable_hbm: float = 0.9
    contention: float = 0.0
    host_step_s: float = 0.0

    def __post_init__(self) -> None:
        if self.host_step_s < 0:
            raise ValueError(f"hardware.host_step_s is {self.host_step_s}: allowed are 0 (none) and more")
        if self.contention < 0:
            raise ValueError(f"hardware.contention is {self.contention}: allowed are 0 (none) and more")


class ModelShape(msgspec.Struct, frozen=True):
    """A decoder of the Llama kind. `bytes_per_value`: of weights and KV cache (2: bf16). `family`: Hugging Face's name
    of the model type, for random weights. `sparse_layers` of the layers have, in place of an MLP of `intermediate`, a
    router and `experts` of `expert_intermediate`, of which each token takes `experts_per_token`.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    bytes_per_value: int = 2
    tied_embeddings: bool = False
    family: str = "llama"
    sparse_layers: int = 0
    experts: int = 0
    experts_per_token: int = 0
    expert_intermediate: int = 0

    def __post_init__(self) -> None:
        if self.sparse_layers and not 0 < self.experts_per_token <= self.experts:
            raise ValueError(
                f"model {self.name}: experts_per_token is {self.experts_per_token}: allowed are 1 to {self.experts}, "
                "all experts of a layer"
            )
        if not 0 <= self.sparse_layers <= self.layers:
            raise ValueError(f"model {self.name}: sparse_layers is {self.sparse_layers}, of {self.layers} layers")

    @property
    def dense_parameters(self) -> int:
        """Of the layers, what every token takes part in."""
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        mlps = 3 * self.hidden * self.intermediate * (self.layers - self.sparse_layers)
        return self.layers * attention + mlps + self.sparse_layers * self.hidden * self.experts

    @property
    def expert_parameters(self) -> int:
        """Of one expert in each sparse layer."""
        return 3 * self.hidden * self.expert_intermediate * self.sparse_layers

    @property
    def parameters(self) -> int:
        """All weights, norms and biases left out (less than a thousandth)."""
        embeddings = self.vocab * self.hidden * (1 if self.tied_embeddings else 2)
        return self.dense_parameters + self.experts * self.expert_parameters + embeddings

    @property
    def weight_bytes(self) -> int:
        return self.parameters * self.bytes_per_value

    @property
    def kv_bytes_per_token(self) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim * self.bytes_per_value


def kv_blocks(hardware: Hardware, shape: ModelShape, npus: int, block_tokens: int) -> int:
    """KV cache blocks that fit beside the weights. Raises ValueError where the model leaves no room."""
    budget = npus * hardware.hbm_bytes * hardware.usable_hbm
    blocks = int((budget - shape.weight_bytes) // (shape.kv_bytes_per_token * block_tokens))
    if blocks < 1:
        raise ValueError(
            f"model {shape.name} does not fit {npus} x {hardware.name}: its weights take "
            f"{shape.weight_bytes / 1e9:.1f} GB of {budget / 1e9:.1f} GB usable HBM; give each executor more NPUs, "
            "or take a smaller model"
        )
    return blocks
