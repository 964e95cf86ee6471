"""Cache eviction: which cached blocks go first."""
