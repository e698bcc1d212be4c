"""Parameters chosen by modality: linear maps and norms, shared or one per modality."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mom_train.kernels import modality_linear
from mom_train.layout import RowLayout


class Projection(nn.Module):
    """A linear map without bias, shared or with one matrix per modality.

    The weight is one 2-D parameter [modalities * out, in], so that FSDP2 shards it evenly and a rank without a
    modality still has its gradient.
    """

    def __init__(self, inputs: int, outputs: int, modalities: int):
        super().__init__()
        self.modalities = modalities
        self.weight = nn.Parameter(torch.empty(modalities * outputs, inputs))

    def forward(self, x_TK: Tensor, layout: RowLayout) -> Tensor:
        if self.modalities == 1:
            return F.linear(x_TK, self.weight)
        return modality_linear(x_TK, self.weight, layout.offsets)


class Norm(nn.Module):
    """RMSNorm, its scale shared or one per modality (weight [modalities * dim])."""

    def __init__(self, dim: int, modalities: int, eps: float):
        super().__init__()
        self.dim, self.modalities, self.eps = dim, modalities, eps
        self.weight = nn.Parameter(torch.empty(modalities * dim))

    def forward(self, x_Td: Tensor, layout: RowLayout) -> Tensor:
        if self.modalities == 1:
            return F.rms_norm(x_Td, (self.dim,), self.weight, self.eps)
        normed_Td = F.rms_norm(x_Td, (self.dim,), None, self.eps)
        segments = normed_Td.split((layout.offsets[1:] - layout.offsets[:-1]).tolist())
        scales = self.weight.view(self.modalities, self.dim)
        return torch.cat([segment * scale for segment, scale in zip(segments, scales, strict=True)])
