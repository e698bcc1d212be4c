"""What changes the weights: the optimiser, its learning rate, and the average of the weights."""
