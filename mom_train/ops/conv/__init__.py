"""The causal convolution: its operator, its definition, and its backends."""
