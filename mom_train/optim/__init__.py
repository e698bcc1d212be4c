"""The optimiser, its learning rate, and the moving average of the weights."""
