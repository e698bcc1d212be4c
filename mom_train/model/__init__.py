"""The model: its blocks, their sharding over ranks, its losses, and how a batch becomes the input of the model."""
