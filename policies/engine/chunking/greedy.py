"""Prompts take all that the token budget leaves."""

from cluster.engine_policy import ChunkPolicy


class Greedy(ChunkPolicy):
    """As many prompt tokens as the budget leaves beside the decodes: what the base class does."""
