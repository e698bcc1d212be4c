"""Softmax cross-entropy in PyTorch's own operations, for every device."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(logits: Tensor, target: Tensor, z_loss: float, gradient: bool) -> tuple[Tensor, Tensor]:
    """See `softmax_cross_entropy_`. The logits are fp32 or float64."""
    valid = target >= 0
    index = target.clamp_min(0).unsqueeze(1)
    of_target = logits.gather(1, index).squeeze(1)
    largest = logits.amax(1)
    # In place, and one exponential for loss and gradient: a pass over the logits costs as much as a product.
    exponentials = logits.sub_(largest.unsqueeze(1)).exp_()
    total = exponentials.sum(1)
    logsum = largest + total.log()
    if gradient:
        factor = valid * (1 + 2 * z_loss * logsum)
        exponentials.mul_((factor / total).unsqueeze(1))
        exponentials.scatter_add_(1, index, -valid.to(logits.dtype).unsqueeze(1))
    return torch.where(valid, logsum - of_target, 0.0), torch.where(valid, logsum, 0.0)
