"""Softmax cross-entropy and its gradient, which takes the place of the logits in memory."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from mom_train.ops import backends


def softmax_cross_entropy_(
    logits_CV: Tensor, target_C: Tensor, z_loss: float = 0.0, *, gradient: bool = True, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The cross-entropy of softmax(logits) against targets, in place.

    logits_CV is (C, V) in fp32, bf16, fp16 or float64, contiguous, and is overwritten; target_C (C,) int64. A row with
    a negative target has no loss and a gradient of 0. The computation is in fp32 (float64 for float64 logits).

    Returns (losses (C,) in nats, logsums (C,), gradients (C, V) in the dtype of the logits). A logsum is the logarithm
    of the sum of exponentials, 0 in rows without a target. The gradient is that of loss + z_loss * logsum^2. It has the
    memory of the logits (with PyTorch's operations only if they are fp32 or float64, because these first make an fp32
    copy of others). Without `gradient`, the third result holds nothing of use.

    backend: "torch" or "triton". None takes Triton on an NVIDIA GPU, where one kernel reads the logits twice and writes
    the gradient once, and PyTorch's operations elsewhere.
    """
    name = backend or backends.triton_or_torch("cross_entropy", logits_CV)
    module = backends.module("cross_entropy", name, logits_CV, 0)
    if name == "triton":
        return *cast(tuple[Tensor, Tensor], module.forward(logits_CV, target_C, z_loss, gradient)), logits_CV
    dtype = logits_CV.dtype
    logits_CV = logits_CV.to(torch.promote_types(dtype, torch.float32))
    losses_C, logsums_C = module.forward(logits_CV, target_C, z_loss, gradient)
    return losses_C, logsums_C, logits_CV.to(dtype) if gradient else logits_CV
