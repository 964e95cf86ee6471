"""How many KV cache blocks an engine can have: what its largest step leaves of the device's memory.

Measured at start, with the model in place and one step of the full token budget behind it, instead of guessed
(DeepServe section 6 profiles it offline and stores it: that is `engine.kv_blocks`).
"""

from flowserve.ops.device import Memory


def blocks_that_fit(memory: Memory, allocated: int, peak: int, block_bytes: int, share: float) -> int:
    """Blocks of `block_bytes` in `share` of the device's memory, beside what others use and what a step needs.

    `memory`: of the whole device, now. `allocated`, `peak`: bytes of this process now, and at most, so that a step's
    activations count. Raises ValueError where not one block fits, with the numbers, and for a share outside (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"memory_share is {share}: allowed is a share of the device's memory above 0, up to 1")
    others = max(0, memory.total - memory.free - allocated)
    room = int(memory.total * share) - others - peak
    if room < block_bytes:
        uses = f"other processes use {others / 1e9:.2f} GB, weights and a step {peak / 1e9:.2f} GB"
        raise ValueError(
            f"no KV cache block of {block_bytes / 1e6:.1f} MB fits: of {memory.total / 1e9:.2f} GB, "
            f"memory_share {share} allows {memory.total * share / 1e9:.2f} GB, {uses}; "
            "raise memory_share, lower engine.token_budget, or take a smaller model"
        )
    return room // block_bytes
