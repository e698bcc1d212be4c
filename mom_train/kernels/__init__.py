"""Kernels behind three interfaces: routed linear maps, causal convolution, selective scan."""

from mom_train.kernels.causal_conv import causal_conv
from mom_train.kernels.modality_linear import modality_linear
from mom_train.kernels.selective_scan import selective_scan

__all__ = ["causal_conv", "modality_linear", "selective_scan"]
