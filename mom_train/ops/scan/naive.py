"""The definition of the selective scan: one token at a time, in the dtype of the arguments, such as float64.

Backends are tested against it, and benchmarks use it to check that what they time is right.
"""

from __future__ import annotations

import torch
from torch import Tensor


def selective_scan(
    x_BLD: Tensor,
    dt_BLD: Tensor,
    A_DN: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor,
    D_D: Tensor,
    z_BLD: Tensor,
    dt_bias_MD: Tensor,
    modality_BL: Tensor,
    document_BL: Tensor,
    h0_BDN: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns y (B, L, D) and the state after the last token (B, D, N). Everything is in time order, and
    differentiable.

        delta = softplus(dt + dt_bias[modality])
        h     = exp(delta * A) * h + (delta * x) outer B        where h is zero before the first token of a document
        y     = (h . C + D * x) * silu(z)

    With `h0`, the first document of each row continues from that state (Mamba, arXiv 2312.00752, Algorithm 2).
    """
    outputs, finals = [], []
    for b in range(len(x_BLD)):
        h_DN = torch.zeros_like(A_DN) if h0_BDN is None else h0_BDN[b]
        for t in range(x_BLD.shape[1]):
            if t > 0 and document_BL[b, t] != document_BL[b, t - 1]:
                h_DN = torch.zeros_like(A_DN)
            raw_D = dt_BLD[b, t] + dt_bias_MD[modality_BL[b, t].long()]
            delta_D = torch.log1p(torch.exp(raw_D))
            x_D, z_D = x_BLD[b, t], z_BLD[b, t]
            h_DN = torch.exp(delta_D[:, None] * A_DN) * h_DN + (delta_D * x_D)[:, None] * B_BLN[b, t][None, :]
            y_D = h_DN @ C_BLN[b, t] + D_D * x_D
            outputs.append(y_D * z_D / (1 + torch.exp(-z_D)))
        finals.append(h_DN)
    return torch.stack(outputs).view_as(x_BLD), torch.stack(finals)
