"""Parameters chosen by modality or by a learned router: linear maps and norms."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mom_train.config.model import ModelConfig
from mom_train.ops.layout import RowLayout
from mom_train.ops.routing.modality_linear import modality_linear


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


class RoutedProjection(nn.Module):
    """A linear map whose matrix a learned router picks for each token: top-1, scaled by its probability (Switch
    Transformer, arXiv 2101.03961).

    `experts` matrices per modality. A token chooses among those of its own modality, or, with `among_all`, among all:
    the learned counterpart of the paper's rule. After `forward`, `balance` holds the load-balance loss times T.
    """

    balance: Tensor

    def __init__(self, inputs: int, outputs: int, modalities: int, experts: int, among_all: bool):
        super().__init__()
        self.modalities, self.experts, self.among_all = modalities, experts, among_all
        self.weight = nn.Parameter(torch.empty(modalities * experts * outputs, inputs))
        self.router = nn.Parameter(torch.empty(modalities * experts, inputs))

    def forward(self, x_TK: Tensor, layout: RowLayout) -> Tensor:
        T, M, E = x_TK.shape[0], self.modalities, self.experts
        sizes = layout.offsets[1:] - layout.offsets[:-1]
        logits_Tn = F.linear(x_TK.float(), self.router.float())
        group_M = torch.full((M,), float(T))  # how many tokens may choose each modality's experts
        if not self.among_all:
            modality_T = torch.arange(M).repeat_interleave(sizes).to(x_TK.device)
            foreign = torch.arange(M * E, device=x_TK.device) // E != modality_T[:, None]
            logits_Tn = logits_Tn.masked_fill(foreign, -torch.inf)
            group_M = sizes.float()
        p_Tn = logits_Tn.softmax(-1)
        gate_T, expert_T = p_Tn.max(-1)
        order_T = expert_T.argsort(stable=True)
        count_n = torch.bincount(expert_T, minlength=M * E)
        offsets = torch.zeros(M * E + 1, dtype=torch.int64)
        offsets[1:] = count_n.cumsum(0).cpu()  # a host sync per projection: the price of a choice made on the device
        y_TO = modality_linear(x_TK[order_T], self.weight, offsets)[order_T.argsort()]
        choices = M * E if self.among_all else E
        group_n = group_M.repeat_interleave(E).clamp_min(1).to(x_TK.device)
        self.balance = choices * (count_n / group_n * p_Tn.sum(0)).sum()
        return y_TO * gate_T.unsqueeze(1).to(y_TO.dtype)


def projection(config: ModelConfig, part: str, inputs: int, outputs: int, modalities: int) -> nn.Module:
    """The linear map of `part`: shared, chosen by modality, or chosen by a router."""
    if part not in config.decoupled:
        return Projection(inputs, outputs, 1)
    if config.router == "rule" and config.experts == 1:
        return Projection(inputs, outputs, modalities)
    return RoutedProjection(inputs, outputs, modalities, config.experts, config.router == "learned")


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
