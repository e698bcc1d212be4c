"""Linear maps and norms whose parameters are chosen by the modality of the token or by a learned router."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mom_train.config.model import ModelConfig
from mom_train.ops.layout import RowLayout
from mom_train.ops.norm.add_norm import add_norm
from mom_train.ops.routing.fp8 import Fp8, fp8_linear
from mom_train.ops.routing.modality_linear import modality_linear


class Projection(nn.Module):
    """A linear map without bias that is shared by all modalities or has one matrix per modality.

    The weight is one 2-D parameter [modalities * out, in], so that FSDP2 shards it evenly, and a rank that has no
    tokens of a modality still has a gradient for its matrix. With `fp8`, its products are in FP8 (`ops.routing.fp8`).
    """

    fp8: Fp8 | None = None

    def __init__(self, inputs: int, outputs: int, modalities: int):
        super().__init__()
        self.modalities = modalities
        self.weight = nn.Parameter(torch.empty(modalities * outputs, inputs))

    def forward(self, x_TK: Tensor, layout: RowLayout) -> Tensor:
        if self.fp8 is not None:
            return fp8_linear(x_TK, self.weight, None if self.modalities == 1 else layout.offsets, self.fp8)
        if self.modalities == 1:
            return F.linear(x_TK, self.weight)
        return modality_linear(x_TK, self.weight, layout.offsets)


class RoutedProjection(nn.Module):
    """A linear map whose matrix a learned router chooses for each token.

    The router takes the most probable matrix and scales the output by its probability (Switch Transformer, arXiv
    2101.03961). There are `experts` matrices per modality. A token chooses among those of its own modality or, with
    `among_all`, among all, which is the learned counterpart of the paper's rule. After `forward`, `balance` is the
    load-balance loss times T.
    """

    balance: Tensor
    fp8: Fp8 | None = None

    def __init__(self, inputs: int, outputs: int, modalities: int, experts: int, among_all: bool):
        super().__init__()
        self.modalities, self.experts, self.among_all = modalities, experts, among_all
        self.weight = nn.Parameter(torch.empty(modalities * experts * outputs, inputs))
        self.router = nn.Parameter(torch.empty(modalities * experts, inputs))

    def forward(self, x_TK: Tensor, layout: RowLayout) -> Tensor:
        T, M, E = x_TK.shape[0], self.modalities, self.experts
        device = x_TK.device
        logits_Tn = F.linear(x_TK.float(), self.router.float())
        group_M = torch.full((M,), float(T), device=device)  # tokens that may choose each modality's experts
        if not self.among_all:
            sizes = layout.offsets[1:] - layout.offsets[:-1]
            modality_T = torch.arange(M, device=device).repeat_interleave(sizes, output_size=T)
            foreign = torch.arange(M * E, device=device) // E != modality_T[:, None]
            logits_Tn = logits_Tn.masked_fill(foreign, -torch.inf)
            group_M = sizes.float()
        p_Tn = logits_Tn.softmax(-1)
        gate_T, expert_T = p_Tn.max(-1)
        order_T = expert_T.argsort(stable=True)
        offsets = (torch.arange(M * E + 1, device=device).unsqueeze(1) > expert_T).sum(1)
        count_n = offsets.diff()
        if self.fp8 is None:
            sorted_TO = modality_linear(x_TK[order_T], self.weight, offsets)
        else:
            sorted_TO = fp8_linear(x_TK[order_T], self.weight, offsets, self.fp8)
        y_TO = sorted_TO[order_T.argsort()]
        choices = M * E if self.among_all else E
        group_n = group_M.repeat_interleave(E).clamp_min(1)
        self.balance = choices * (count_n / group_n * p_Tn.sum(0)).sum()
        return y_TO * gate_T.unsqueeze(1).to(y_TO.dtype)


def projection(config: ModelConfig, part: str, inputs: int, outputs: int, modalities: int) -> nn.Module:
    """The linear map of `part`, whose matrix is shared, chosen by modality, or chosen by a router, as `config` says."""
    if part not in config.decoupled:
        return Projection(inputs, outputs, 1)
    if config.router == "rule" and config.experts == 1:
        return Projection(inputs, outputs, modalities)
    return RoutedProjection(inputs, outputs, modalities, config.experts, config.router == "learned")


def on_cuda(x_Td: Tensor) -> bool:
    """Whether norms are the joint operator of `ops.norm` instead of PyTorch's operations one by one."""
    return x_Td.device.type == "cuda"


class Norm(nn.Module):
    """RMSNorm with a scale that is shared or separate for each modality (weight [modalities * dim]).

    `before_product` says that only linear maps read the output, which cast it to the autocast dtype. On CUDA, it is
    then returned in that dtype, which saves a pass; the values that the products see are the same.
    """

    def __init__(self, dim: int, modalities: int, eps: float):
        super().__init__()
        self.dim, self.modalities, self.eps = dim, modalities, eps
        self.before_product = False
        self.weight = nn.Parameter(torch.empty(modalities * dim))

    def forward(self, x_Td: Tensor, layout: RowLayout) -> Tensor:
        if on_cuda(x_Td):
            return self._joint(x_Td, None, layout)[1]
        if self.modalities == 1:
            return F.rms_norm(x_Td, (self.dim,), self.weight, self.eps)
        normed_Td = F.rms_norm(x_Td, (self.dim,), None, self.eps)
        scales = self.weight.view(self.modalities, self.dim)
        if x_Td.device.type != "cpu" or torch.compiler.is_compiling():  # without bounds on the host
            row_T1 = torch.arange(len(x_Td), device=x_Td.device).unsqueeze(1)
            scale_Td = scales[:1]
            for m in range(1, self.modalities):
                scale_Td = torch.where(row_T1 >= layout.offsets[m], scales[m], scale_Td)
            return normed_Td * scale_Td
        segments = normed_Td.split(layout.offsets.diff().tolist())
        return torch.cat([segment * scale for segment, scale in zip(segments, scales, strict=True)])

    def of_sum(self, x_Td: Tensor, branch_Td: Tensor | None, layout: RowLayout) -> tuple[Tensor, Tensor]:
        """(x + branch, its norm), both (T, dim). Without a branch, the sum is x."""
        if on_cuda(x_Td):
            return self._joint(x_Td, branch_Td, layout)
        sum_Td = x_Td if branch_Td is None else x_Td + branch_Td
        return sum_Td, self(sum_Td, layout)

    def _joint(self, x_Td: Tensor, branch_Td: Tensor | None, layout: RowLayout) -> tuple[Tensor, Tensor]:
        dtype, device = None, x_Td.device.type
        if self.before_product and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        weight_Md = self.weight.view(self.modalities, self.dim)
        return add_norm(x_Td, branch_Td, weight_Md, layout, self.eps, dtype)
