"""The Mamba-1 block, in which any of the projections can be decoupled by modality."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mom_train.config.model import ModelConfig
from mom_train.model.context_scan import inputs_before, state_before
from mom_train.model.routed import Norm, Projection, projection
from mom_train.ops.conv.causal_conv import causal_conv
from mom_train.ops.layout import RowLayout
from mom_train.ops.scan.selective_scan import selective_scan


@dataclass
class MambaState:
    """The state that a block carries from one chunk of a sequence to the next."""

    conv_BKD: Tensor
    """The last K-1 inputs of the convolution."""
    ssm_BDN: Tensor
    """The state of the scan, in fp32."""


def normalised(x_TW: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) of each row (T, W), computed in fp32 (float64 for float64 rows), in the dtype of x."""
    wide_TW = x_TW.to(torch.promote_types(x_TW.dtype, torch.float32))
    return F.rms_norm(wide_TW, (x_TW.shape[1],), None, eps).to(x_TW.dtype)


class MambaMixer(nn.Module):
    """The inner part of a Mamba-1 block (Algorithm 2 of the paper). Any subset of its four projections can be
    decoupled.

    The convolution, A and D are shared by all modalities. The bias of the time step is always added in fp32. With
    `model.normalise`, the three parts of the output of x_proj pass an RMSNorm without weights, as in FalconMamba (arXiv
    2410.05355): dt before dt_proj, B and C before the scan.
    """

    def __init__(self, config: ModelConfig, modalities: int):
        super().__init__()
        D, N, R = config.inner, config.state, config.rank
        self.modalities, self.inner, self.state, self.rank = modalities, D, N, R
        self.normalise_eps = config.normalise_eps if config.normalise else None
        self.in_proj = projection(config, "in_proj", config.dim, 2 * D, modalities)
        self.conv_weight = nn.Parameter(torch.empty(D, config.conv))
        self.conv_bias = nn.Parameter(torch.empty(D))
        self.x_proj = projection(config, "x_proj", D, R + 2 * N, modalities)
        self.dt_proj = projection(config, "dt_proj", R, D, modalities)
        # one per modality if dt_proj is decoupled, even if a router chooses the matrix of dt_proj
        self.dt_bias = nn.Parameter(torch.empty(modalities if "dt_proj" in config.decoupled else 1, D))
        self.A_log = nn.Parameter(torch.empty(D, N))
        self.D = nn.Parameter(torch.empty(D))
        self.out_proj = projection(config, "out_proj", D, config.dim, modalities)

    def forward(self, x_Td: Tensor, layout: RowLayout, state: MambaState | None = None) -> Tensor:
        """Output (T, dim) for rows x (T, dim) in row order. A `state` is read and replaced by the one after these
        rows."""
        return self.out_proj(self.gated(x_Td, layout, state), layout)

    def gated(self, x_Td: Tensor, layout: RowLayout, state: MambaState | None = None) -> Tensor:
        """The input of out_proj (T, inner)."""
        x_TD, z_TD = self.in_proj(x_Td, layout).split(self.inner, dim=1)
        conv_BKD, ssm_BDN = (None, None) if state is None else (state.conv_BKD, state.ssm_BDN)
        context = layout.context
        if context is not None:
            assert state is None, "rows are generated on one rank"
            conv_BKD = inputs_before(context, x_TD, layout, self.conv_weight.shape[1] - 1)
        x_TD, conv_BKD = causal_conv(x_TD, self.conv_weight, self.conv_bias, layout, conv_BKD)
        dt_TR, B_TN, C_TN = self.x_proj(x_TD, layout).split([self.rank, self.state, self.state], dim=1)
        if (eps := self.normalise_eps) is not None:
            dt_TR, B_TN, C_TN = normalised(dt_TR, eps), normalised(B_TN, eps), normalised(C_TN, eps)
        dt_TD = self.dt_proj(dt_TR, layout)
        A_DN = -torch.exp(self.A_log.float())
        dt_bias_MD = self.dt_bias.float().expand(self.modalities, -1)
        scanned = (x_TD, dt_TD, A_DN, B_TN, C_TN, self.D.float(), z_TD, dt_bias_MD, layout)
        if context is not None:
            ssm_BDN = state_before(context, *scanned)
        y_TD, ssm_BDN = selective_scan(*scanned, ssm_BDN)
        if state is not None:
            state.conv_BKD, state.ssm_BDN = conv_BKD, ssm_BDN
        return y_TD

    def empty_state(self, batch: int) -> MambaState:
        """The state at the beginning of `batch` sequences."""
        device = self.A_log.device
        return MambaState(
            torch.zeros(batch, self.conv_weight.shape[1] - 1, self.inner, device=device),
            torch.zeros(batch, self.inner, self.state, device=device),
        )


class MambaBlock(nn.Module):
    """x + mixer(norm(x)). All modalities share the norm, as in the published model, unless `norm` is decoupled."""

    def __init__(self, config: ModelConfig, modalities: int):
        super().__init__()
        self.norm = Norm(config.dim, modalities if "norm" in config.decoupled else 1, config.norm_eps)
        self.mixer = MambaMixer(config, modalities)
        self.norm.before_product = isinstance(self.mixer.in_proj, Projection)

    def forward(self, x_Td: Tensor, layout: RowLayout, state: MambaState | None = None) -> Tensor:
        x_Td, branch_Td = self.terms(x_Td, None, layout, state)
        return x_Td + branch_Td

    def terms(
        self, x_Td: Tensor, branch_Td: Tensor | None, layout: RowLayout, state: MambaState | None = None
    ) -> tuple[Tensor, Tensor]:
        """The two terms whose sum is the output, for rows that are themselves the sum x + branch."""
        x_Td, normed_Td = self.norm.of_sum(x_Td, branch_Td, layout)
        return x_Td, self.mixer(normed_Td, layout, state)

    def gated(self, x_Td: Tensor, layout: RowLayout, state: MambaState | None = None) -> Tensor:
        """The input of the mixer's out_proj (T, inner)."""
        return self.mixer.gated(self.norm(x_Td, layout), layout, state)

    def empty_state(self, batch: int) -> MambaState:
        """The state at the beginning of `batch` sequences."""
        return self.mixer.empty_state(batch)
