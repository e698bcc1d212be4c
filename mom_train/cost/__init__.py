"""What a config costs, computed from the config alone: FLOPs, memory, time of a step. Nothing here imports torch."""
