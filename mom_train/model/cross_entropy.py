"""Computes the output embedding and its cross-entropy together, so that not all logits are in memory at once.

torch.nn.functional.linear_cross_entropy works in chunks too, but it either returns only the mean or sum, or does not
support autograd. We need the loss of each row (losses are logged by modality) besides a sum that carries the gradient.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mom_train.ops import chunks
from mom_train.ops.cross_entropy.softmax_cross_entropy import softmax_cross_entropy_
from mom_train.ops.routing.fp8 import Fp8, multiplied, quantized


def linear_cross_entropy(
    x_Td: Tensor, weight_Vd: Tensor, labels_T: Tensor, z_loss: float = 0.0, fp8: Fp8 | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The cross-entropy of softmax(x W^T) against labels: (sum over rows, loss of each row (T,) fp32 in nats, z-loss).

    Rows with a negative label have no loss. The sum, but not the loss of a row, includes the z-loss: z_loss *
    logsumexp^2 of every row with a label, also a sum over rows. Only the first carries a gradient. Products are in the
    autocast dtype, softmax and sums in fp32. The gradients are computed in the forward pass, chunk by chunk, with three
    matrix products in all and none repeated.

    With `fp8`, the logits are a product in FP8 and all others are in bf16: the gradients of a row of logits range from
    one to the probability of a rare id, which is more than the numbers of a row in e4m3 can hold.
    """
    device = x_Td.device.type
    if fp8 is not None or torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device) if fp8 is None else torch.bfloat16
        x_Td, weight_Vd = x_Td.to(dtype), weight_Vd.to(dtype)
    keep = torch.is_grad_enabled() and (x_Td.requires_grad or weight_Vd.requires_grad)
    return _LinearCrossEntropy.apply(x_Td, weight_Vd, labels_T, z_loss, fp8, keep)


def _product_in_fp8(weight: tuple[Tensor, Tensor], fp8: Fp8, x_Td: Tensor) -> Tensor:
    return multiplied(quantized(x_Td), weight, None, fp8)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, z_loss: float, fp8: Fp8 | None, keep: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        losses = x.new_zeros(x.shape[0], dtype=wide)
        total_z = losses.new_zeros(())
        grad_x = torch.empty_like(x) if keep else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if keep else None
        if fp8 is None:
            logits_of = partial(F.linear, weight=weight)
        else:
            logits_of = partial(_product_in_fp8, quantized(weight), fp8)
        # A chunk also has at least as many logits as there are weights, because it passes over the weight's gradient.
        rows = max(1, chunks.LOGITS // weight.shape[0], weight.shape[1])
        for s in range(0, x.shape[0], rows):
            e = min(s + rows, x.shape[0])
            of_rows = softmax_cross_entropy_(logits_of(x[s:e]), labels[s:e], z_loss, gradient=keep)
            losses[s:e], logsums, grad = of_rows
            total_z += logsums.square().sum()
            if grad_x is not None and grad_weight is not None:
                torch.mm(grad, weight, out=grad_x[s:e])
                grad_weight += grad.t() @ x[s:e]
            del of_rows, grad  # before the logits of the next chunk are made
        ctx.save_for_backward(*([grad_x, grad_weight] if keep else []))
        ctx.dtype = weight.dtype
        total_z *= z_loss
        ctx.mark_non_differentiable(losses, total_z)
        return losses.sum() + total_z, losses, total_z

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_weight = ctx.saved_tensors
        return grad_x * grad.to(grad_x.dtype), (grad_weight * grad).to(ctx.dtype), None, None, None, None
