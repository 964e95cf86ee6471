"""The simulated backend: SimPy moves time, the engine core and the control plane are the real ones."""
