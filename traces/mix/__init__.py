"""Which model each request of a workload asks for, where a cluster serves several."""
