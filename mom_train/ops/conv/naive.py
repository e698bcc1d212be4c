"""The definition of the causal convolution: one token at a time, in the dtype of the arguments, such as float64.

Backends are tested against it, and benchmarks use it to check that what they time is right.
"""

from __future__ import annotations

import torch
from torch import Tensor


def causal_conv(
    x_BLD: Tensor, weight_DK: Tensor, bias_D: Tensor, document_BL: Tensor, initial_BKD: Tensor | None = None
) -> Tensor:
    """y[t] = silu(bias + sum over k of weight[K-1-k] * x[t-k]), as (B, L, D). Everything is in time order, and
    differentiable.

    Taps that reach into another document are left out. `initial` (B, K-1, D) has the inputs before the row, which
    belong to the first document of the row; without it they are zero.
    """
    (rows, length), K = document_BL.shape, weight_DK.shape[1]
    outputs = []
    for b in range(rows):
        for t in range(length):
            pre_D = bias_D
            for k in range(K):
                if t - k >= 0:
                    if document_BL[b, t - k] == document_BL[b, t]:
                        pre_D = pre_D + weight_DK[:, K - 1 - k] * x_BLD[b, t - k]
                elif initial_BKD is not None and document_BL[b, t] == document_BL[b, 0]:
                    pre_D = pre_D + weight_DK[:, K - 1 - k] * initial_BKD[b, K - 1 + t - k]
            outputs.append(pre_D / (1 + torch.exp(-pre_D)))
    return torch.stack(outputs).view_as(x_BLD)
