"""Sizes of the pieces that operators process at a time. Memory is predicted from them, so torch is not imported
here."""

SCAN_STEPS = 32
"""Number of positions per state that the scan in C keeps."""
CUDA_SCAN_STEPS = 16
"""The same of the scan in CUDA C++."""
SCAN_CHANNELS = 256
"""Channels per work item of the C kernels. It is fixed, so that sums do not depend on the number of threads."""
LOGITS = 1 << 24
"""Smallest number of logits that the head computes at a time, if the batch has that many."""
