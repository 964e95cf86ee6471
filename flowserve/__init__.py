"""FlowServe: the serving engine. `core` decides (no torch, no clock, no threads); the rest runs what it decided."""
