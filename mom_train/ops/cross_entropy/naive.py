"""The definition of softmax cross-entropy with a z-loss, one row at a time, in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def softmax_cross_entropy(logits_CV: Tensor, target_C: Tensor, z_loss: float) -> tuple[Tensor, Tensor, Tensor]:
    """(losses (C,), logsums (C,), gradients (C, V)), all float64; everything is 0 in rows whose target is negative.

    loss = -log p[target] with p = softmax(logits), and logsum = log sum_v exp(logits[v]). The gradient is that of
    loss + z_loss * logsum^2, which is p (1 + 2 z_loss logsum) less 1 at the target.
    """
    C, V = logits_CV.shape
    losses, logsums = torch.zeros(C, dtype=torch.float64), torch.zeros(C, dtype=torch.float64)
    gradients = torch.zeros(C, V, dtype=torch.float64)
    for row, (logits, target) in enumerate(zip(logits_CV.tolist(), target_C.tolist(), strict=True)):
        if target < 0:
            continue
        largest = max(logits)
        logsum = largest + math.log(math.fsum(math.exp(value - largest) for value in logits))
        losses[row], logsums[row] = logsum - logits[target], logsum
        for v, value in enumerate(logits):
            gradients[row, v] = math.exp(value - logsum) * (1 + 2 * z_loss * logsum) - (v == target)
    return losses, logsums, gradients
