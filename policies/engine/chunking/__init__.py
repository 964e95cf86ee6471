"""Chunk sizes: how many prompt tokens a step takes beside its decodes."""
