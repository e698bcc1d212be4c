"""Benchmarks: kernels, training steps, loading and tokenizing, beside other programs."""
