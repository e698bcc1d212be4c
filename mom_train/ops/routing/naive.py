"""The definition of the linear map by modality: every row is multiplied by the matrix of its own modality."""

from __future__ import annotations

import torch
from torch import Tensor


def modality_linear(x_TK: Tensor, weight_MOK: Tensor, modality_T: Tensor) -> Tensor:
    """y (T, O) with y[t] = weight[modality[t]] @ x[t], for rows in any order; differentiable."""
    return torch.einsum("tok,tk->to", weight_MOK[modality_T.long()], x_TK)
