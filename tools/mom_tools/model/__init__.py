"""Commands about one model: its cost, its checkpoints, its losses, its samples."""
