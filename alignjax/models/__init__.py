"""The networks: one transformer for all families, its sharding axes, and its checkpoints."""
