"""The shape of a model: what its weights, its KV cache and a step's work follow from."""

import msgspec


class ModelShape(msgspec.Struct, frozen=True):
    """A decoder of the Llama kind. `bytes_per_value`: of weights and, unless `kv_bytes_per_value` says otherwise, KV
    cache (2: bf16, 1: int8 or fp8). `family`: Hugging Face's name of the model type, for random weights.

    `sparse_layers` of the layers, the last ones, have in place of an MLP of `intermediate` a router and `experts` of
    `expert_intermediate`, of which each token takes `experts_per_token`, beside `shared_experts` that all take.

    `kv_rank` above 0: multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1). Cached per token and
    layer are the latent of `kv_rank` and a key of `rope_dim`; queries come through a latent of `q_rank`; heads are
    `head_dim` wide, and their queries and keys `rope_dim` more.

    How an executor of several NPUs spreads it: `pipeline_stages` have a share of the layers each. The NPUs of a stage
    form `attention_groups`, each of which serves its share of the sequences with a copy of the dense weights, split
    over its NPUs. `expert_parallel`: experts are spread over all NPUs of a stage, tokens are sent to them and return,
    and there is an attention group per NPU unless `attention_groups` says otherwise; else there is one group by
    default, and experts are split and copied like all other weights.
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
    shared_experts: int = 0
    kv_rank: int = 0
    q_rank: int = 0
    rope_dim: int = 0
    kv_bytes_per_value: int | None = None
    expert_parallel: bool = False
    pipeline_stages: int = 1
    attention_groups: int | None = None

    def __post_init__(self) -> None:
        if self.sparse_layers and not 0 < self.experts_per_token <= self.experts:
            raise ValueError(
                f"model {self.name}: experts_per_token is {self.experts_per_token}: allowed are 1 to {self.experts}, "
                "all experts of a layer"
            )
        if not 0 <= self.sparse_layers <= self.layers:
            raise ValueError(f"model {self.name}: sparse_layers is {self.sparse_layers}, of {self.layers} layers")
        if self.kv_rank and not (self.q_rank and self.rope_dim):
            raise ValueError(
                f"model {self.name}: kv_rank is {self.kv_rank}: latent attention needs q_rank and rope_dim above 0"
            )
        if self.expert_parallel and not self.sparse_layers:
            raise ValueError(f"model {self.name}: expert_parallel is true, but there are no experts to spread")

        if not 1 <= self.pipeline_stages <= self.layers:
            raise ValueError(
                f"model {self.name}: pipeline_stages is {self.pipeline_stages}: allowed are 1 to {self.layers}, all "
                "its layers"
            )
        if self.attention_groups is not None and self.attention_groups < 1:
            raise ValueError(
                f"model {self.name}: attention_groups is {self.attention_groups}: allowed are 1 and more, or null"
            )

    # -- spread over NPUs -----------------------------------------------------------------------------------------

    def groups(self, npus: int) -> int:
        """Attention groups of a pipeline stage."""
        if self.attention_groups is not None:
            return self.attention_groups
        return npus // self.pipeline_stages if self.expert_parallel else 1

    def split(self, npus: int) -> int:
        """NPUs that a dense matrix is split over: tensor parallelism."""
        return npus // (self.pipeline_stages * self.groups(npus))

    def check_split(self, npus: int) -> None:
        """ValueError: so many NPUs cannot serve the model as it is to be spread."""
        stages, groups = self.pipeline_stages, self.groups(npus)
        if npus < stages * groups or npus % (stages * groups):
            raise ValueError(
                f"model {self.name} on {npus} NPUs per executor: {stages} pipeline stages of {groups} attention groups "
                f"need a multiple of {stages * groups} NPUs"
            )
        split = self.split(npus)
        if self.heads % split or (not self.kv_rank and self.kv_heads % split and split % self.kv_heads):
            raise ValueError(
                f"model {self.name} on {npus} NPUs per executor: its {self.heads} heads ({self.kv_heads} of the KV "
                f"cache) cannot be split over {split} NPUs; take a number that divides them, or pipeline stages"
            )

    # -- sizes ----------------------------------------------------------------------------------------------------

    @property
    def attention_parameters(self) -> int:
        """Of one layer."""
        if not self.kv_rank:
            return self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        queries = self.q_rank * (self.hidden + self.heads * (self.head_dim + self.rope_dim))
        keys_and_values = self.hidden * (self.kv_rank + self.rope_dim) + self.kv_rank * self.heads * 2 * self.head_dim
        return queries + keys_and_values + self.heads * self.head_dim * self.hidden

    @property
    def dense_parameters(self) -> int:
        """Of the layers, what every token takes part in."""
        mlps = 3 * self.hidden * self.intermediate * (self.layers - self.sparse_layers)
        shared = 3 * self.hidden * self.expert_intermediate * self.shared_experts
        routers = self.hidden * self.experts
        return self.layers * self.attention_parameters + mlps + self.sparse_layers * (routers + shared)

    @property
    def expert_parameters(self) -> int:
        """Of one expert in each sparse layer."""
        return 3 * self.hidden * self.expert_intermediate * self.sparse_layers

    @property
    def embeddings(self) -> int:
        """Parameters of the embedding and of the head."""
        return self.vocab * self.hidden * (1 if self.tied_embeddings else 2)

    @property
    def parameters(self) -> int:
        """All weights, norms and biases left out (less than a thousandth)."""
        return self.dense_parameters + self.experts * self.expert_parameters + self.embeddings

    @property
    def active_parameters(self) -> int:
        """Those that one token computes with, embeddings included as publications count them."""
        return self.dense_parameters + self.experts_per_token * self.expert_parameters + self.embeddings

    @property
    def weight_bytes(self) -> int:
        return self.parameters * self.bytes_per_value

    def weight_bytes_on(self, npus: int) -> int:
        """On all NPUs of an executor together."""
        experts = self.experts * self.expert_parameters * self.bytes_per_value
        copied = self.weight_bytes - experts if self.expert_parallel else self.weight_bytes
        return self.weight_bytes + (self.groups(npus) - 1) * copied

    @property
    def kv_bytes_per_token(self) -> int:
        width = self.kv_rank + self.rope_dim if self.kv_rank else 2 * self.kv_heads * self.head_dim
        return self.layers * width * (self.kv_bytes_per_value or self.bytes_per_value)

    def kv_copies(self, npus: int) -> float:
        """How often an executor's NPUs keep the KV cache of a token: where fewer heads than NPUs can be split, and a
        latent cannot, each has its own; a sequence is in one attention group only.
        """
        return max(1.0, self.split(npus) / (1 if self.kv_rank else self.kv_heads))

    @property
    def flops_per_pair(self) -> int:
        """Of all layers, per query and key of a prompt."""
        return 2 * self.layers * self.heads * (2 * self.head_dim + self.rope_dim)

    @property
    def flops_per_key(self) -> int:
        """The same in a decode; latent attention then works on the latent itself (queries absorb the key matrix)."""
        width = 2 * self.kv_rank + self.rope_dim if self.kv_rank else 2 * self.head_dim
        return 2 * self.layers * self.heads * width

    @property
    def activation_bytes_per_token(self) -> tuple[int, int, int]:
        """What the small kernels of all layers read and write per token in 16 bit: what every NPU of a group does as a
        whole, what is split with the matrices, and what is done where the experts are.

        Whole: two norms with the residual (read both, write both), and routing to k experts and back. Split: rope of
        queries and keys, the cache write, the activation of an MLP (two in, one out). At experts: their activation.
        """
        sparse, dense = self.sparse_layers, self.layers - self.sparse_layers
        routing = 2 * (self.experts_per_token + 1) * self.hidden
        whole = self.layers * 2 * 4 * self.hidden + sparse * routing
        turned = (self.heads + 1) * self.rope_dim if self.kv_rank else (self.heads + self.kv_heads) * self.head_dim
        cached = self.kv_rank + self.rope_dim if self.kv_rank else 2 * self.kv_heads * self.head_dim
        mlps = dense * self.intermediate + sparse * self.shared_experts * self.expert_intermediate
        shared = self.layers * 2 * (turned + cached) + 3 * mlps
        return 2 * whole, 2 * shared, 2 * 3 * sparse * self.experts_per_token * self.expert_intermediate
