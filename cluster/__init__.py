"""The leaf everyone may import: vocabulary, the `Cluster` seam, the control plane written once for sim and real."""
