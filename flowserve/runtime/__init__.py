"""Running plans on devices: the engine loop of a process, runners, the KV cache pool, weights."""
