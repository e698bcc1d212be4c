"""The definition of RMSNorm after an addition, for rows in any order; differentiable."""

from __future__ import annotations

import torch
from torch import Tensor


def add_norm(x_Td: Tensor, branch_Td: Tensor | None, weight_Md: Tensor, modality_T: Tensor, eps: float) -> Tensor:
    """y (T, d) with y[t] = r[t] / sqrt(mean(r[t]^2) + eps) * weight[modality[t]], where r = x + branch."""
    r_Td = x_Td if branch_Td is None else x_Td + branch_Td
    return r_Td / torch.sqrt((r_Td**2).sum(1, keepdim=True) / r_Td.shape[1] + eps) * weight_Md[modality_T.long()]
