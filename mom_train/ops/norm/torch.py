"""RMSNorm after an addition in PyTorch's own operations, for every device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def forward(
    x: Tensor, branch: Tensor | None, weight: Tensor, modality: Tensor, rows: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """See `add_norm`. Without a branch, the first result is empty."""
    residual = x if branch is None else x + branch
    scale = weight if len(weight) == 1 else weight[modality[rows].long()]
    normed = F.rms_norm(residual, residual.shape[1:], None, eps) * scale
    return x.new_empty(0) if branch is None else residual, normed.to(dtype)


def backward(
    grad_residual: Tensor, grad_normed: Tensor, residual: Tensor, weight: Tensor, modality: Tensor, rows: Tensor,
    eps: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of x, of the branch in `dtype` (empty if x has this dtype), and of the weight."""
    M = len(weight)
    wide = torch.promote_types(residual.dtype, torch.float32)
    r, g = residual.to(wide), grad_normed.to(wide)
    root = (r.square().mean(1, keepdim=True) + eps).rsqrt()
    modality_T = modality[rows].long() if M > 1 else modality.new_zeros(len(r), dtype=torch.long)
    scaled = g * weight[modality_T]
    grad_x = root * (scaled - r * (scaled * r).mean(1, keepdim=True) * root.square())
    if grad_residual.numel():
        grad_x = grad_x + grad_residual
    grad_weight = torch.stack([(g * r * root * (modality_T == m).unsqueeze(1)).sum(0) for m in range(M)])
    grad_x = grad_x.to(residual.dtype)
    of_branch = grad_x.to(dtype) if dtype != residual.dtype else grad_x.new_empty(0)
    return grad_x, of_branch, grad_weight.to(weight.dtype)
