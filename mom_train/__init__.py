"""Model, objectives, optimiser, FSDP2, checkpoint, trainer."""
