"""Limits and choices of one engine: plain data that its parts are made from."""

from typing import Literal

import msgspec

from cluster.engine_policy import PolicySpec
from cluster.vocabulary import BLOCK_TOKENS, Role
from flowserve.core.allocator import AllocatorKind
from flowserve.core.tiers import TierConfig
from flowserve.core.transfer import KvLayout, KvTransfer


class EngineConfig(msgspec.Struct, frozen=True):
    """Limits of one engine.

    `token_budget`: tokens per step, decode and prefill together; at least `max_sequences`, so that every decoding
    sequence is in every step. `watermark`: share of blocks kept free when another sequence is admitted beside running
    ones. `max_in_flight`: plans issued ahead of the oldest incomplete one, it included (1: synchronous). `allocator`:
    which free blocks a sequence gets, see `flowserve.core.allocator`. `evict_share`: share of blocks evicted from the
    prefix cache at a time, at least; where only as many as are short go, any allocator has to take just those.
    `kv_layout`: order of the KV cache in memory, which must be the same in engines that exchange it.
    `kv_transfer`: when a prefilled KV cache is sent, see `flowserve.core.transfer`; the same in such engines, too.
    `prefix_cache`: whether prompts find what others left; contexts with an ID are found also without.
    `tiers`: host memory and disk behind the KV cache. `preemption`: whether a preempted sequence is computed again, but
    for what the cache still has, or its KV cache is copied to the next tier at once, to be fetched back.

    `prefill_token_budget`, `decode_token_budget`: in place of `token_budget` where an executor has that role.

    `speculative_tokens`: guesses per sequence and step, 0 to decode without; then a step has room for the guesses of
    all, so the budgets must be larger. `drafter`: who guesses, on a real engine: prompt lookup or a small model.

    `order`, `victim`, `eviction`, `chunking`: policies of `cluster.engine_policy`, None for its base class.
    """

    kv_blocks: int
    block_tokens: int = 16
    token_budget: int = 512
    max_sequences: int = 256
    max_in_flight: int = 1
    watermark: float = 0.01
    prefix_cache: bool = True
    allocator: AllocatorKind = "segment"
    evict_share: float = 0.05
    kv_layout: KvLayout = "layer_major"
    kv_transfer: KvTransfer = "by_request"
    prefill_token_budget: int | None = None
    decode_token_budget: int | None = None
    speculative_tokens: int = 0
    drafter: Literal["ngram", "model"] = "ngram"
    tiers: TierConfig = TierConfig()
    preemption: Literal["recompute", "swap"] = "recompute"
    order: PolicySpec | None = None
    victim: PolicySpec | None = None
    eviction: PolicySpec | None = None
    chunking: PolicySpec | None = None

    def __post_init__(self) -> None:
        if self.kv_blocks < 1:
            raise ValueError(f"kv_blocks is {self.kv_blocks}: an engine needs at least one KV cache block")
        if self.block_tokens < BLOCK_TOKENS or self.block_tokens % BLOCK_TOKENS:
            raise ValueError(f"block_tokens is {self.block_tokens}: allowed are multiples of {BLOCK_TOKENS}")
        if self.speculative_tokens < 0:
            raise ValueError(f"speculative_tokens is {self.speculative_tokens}: allowed are 0 (none) and more")
        most = self.max_sequences * (1 + self.speculative_tokens)
        for name in ("token_budget", "prefill_token_budget", "decode_token_budget"):
            budget = getattr(self, name)
            if self.max_sequences < 1 or (budget is not None and budget < most):
                guesses = f" x (1 + {self.speculative_tokens} speculative_tokens)" if self.speculative_tokens else ""
                raise ValueError(
                    f"{name} {budget} is below max_sequences {self.max_sequences}{guesses}: every decoding sequence "
                    f"takes as much of each step, so raise {name} or lower max_sequences"
                )
        if self.max_in_flight < 1:
            raise ValueError(f"max_in_flight is {self.max_in_flight}: allowed are 1 (synchronous) and more")
        if not 0 <= self.watermark < 1:
            raise ValueError(f"watermark is {self.watermark}: allowed is a share from 0 up to 1")
        if not 0 <= self.evict_share < 1:
            raise ValueError(f"evict_share is {self.evict_share}: allowed is a share from 0 up to 1")
        if self.preemption == "swap" and not (self.tiers.blocks and self.prefix_cache):
            raise ValueError(
                f"preemption is swap with tiers.dram_blocks {self.tiers.dram_blocks}, tiers.ssd_blocks"
                f" {self.tiers.ssd_blocks}, prefix_cache {self.prefix_cache}: it needs room in a tier and the cache, so"
                " give it both, or set preemption to recompute"
            )

    def budget(self, role: Role) -> int:
        """Tokens per step of an executor of this role."""
        special = {Role.PREFILL: self.prefill_token_budget, Role.DECODE: self.decode_token_budget}.get(role)
        return self.token_budget if special is None else special
