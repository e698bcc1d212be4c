"""Tokenizers on plain values: str, PIL image, float waveform. Knows no documents and no model."""

import os

# Every program of ours imports this package, and does so before torch, whose OpenMP runtime reads the variable once.
# Threads that spin while they wait take the cores of other processes: on a busy machine that is many times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
