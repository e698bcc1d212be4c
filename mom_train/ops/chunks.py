"""Sizes of the pieces in which operators work. Memory is predicted from them, so this file does not import torch."""

SCAN_STEPS = 32
"""The C scan keeps one state for so many positions."""
SCAN_CHANNELS = 256
"""Channels of one work item of the C kernels. The number is fixed, so that sums do not depend on the threads."""
LOGITS = 1 << 24
"""The head computes at least so many logits at a time, where a row of the batch has that many."""
