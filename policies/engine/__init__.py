"""What happens inside an engine: queue order, preemption victim, cache eviction, prompt tokens per step."""
