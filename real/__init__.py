"""The real backend: one process per executor, behind the same seam as the simulated cluster."""
