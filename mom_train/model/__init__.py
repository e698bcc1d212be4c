"""The model: blocks, their sharding over ranks, the losses, and what turns a batch into the model's input."""
