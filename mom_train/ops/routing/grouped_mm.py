"""The linear map by modality through `torch.nn.functional.grouped_mm`: CUTLASS's grouped product, on Hopper in bf16.

It launches one kernel for the output and two for the gradients, whatever the number of modalities, and reads the bounds
of the segments on the device. `why_not` has its contract.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_ALIGNMENT = 8  # elements of bf16 in the 16 bytes that the stride of every row must be a multiple of


def why_not(dtype: torch.dtype, inputs: int, outputs: int, has_bias: bool, capability: tuple[int, int]) -> str | None:
    """The reason why grouped_mm cannot compute y = x W_m^T + b_m (x (T, inputs), W_m (outputs, inputs)) and its
    gradients, or None if it can.

    On devices of another compute capability than 9 it copies the offsets to the host and makes one product per group
    (8 and 12), or gives groups without rows a gradient that is not zero (10: pytorch issue 172439).
    """
    if capability[0] != 9:
        return f"grouped_mm is right and fast only on compute capability 9, not {capability[0]}.{capability[1]}"
    if dtype != torch.bfloat16:
        return f"grouped_mm takes bf16, not {str(dtype)[6:]}"
    if inputs % _ALIGNMENT or outputs % _ALIGNMENT:
        return f"grouped_mm takes widths in multiples of {_ALIGNMENT}, not {inputs} and {outputs}"
    return "grouped_mm adds no bias" if has_bias else None


def forward(x_TK: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
    """y (T, O), from the arguments of `mom::modality_linear`, without a bias."""
    assert bias is None
    return F.grouped_mm(_aligned(x_TK), _by_modality(weight, offsets).transpose(1, 2), offs=_ends(offsets))


def backward(
    grad_TO: Tensor, x_TK: Tensor, weight: Tensor, offsets: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x and weight, and an empty one, from the arguments of `mom::modality_linear_backward`."""
    assert not has_bias
    grad_TO, ends = _aligned(grad_TO), _ends(offsets)
    grad_x = F.grouped_mm(grad_TO, _by_modality(weight, offsets), offs=ends)
    grad_MOK = F.grouped_mm(grad_TO.t(), _aligned(x_TK), offs=ends)  # an empty segment sums nothing: zero
    return grad_x, grad_MOK.view(weight.shape), weight.new_empty(0)


def _by_modality(weight: Tensor, offsets: Tensor) -> Tensor:
    return weight.view(len(offsets) - 1, -1, weight.shape[1])


def _ends(offsets: Tensor) -> Tensor:
    return offsets[1:].to(torch.int32)


def _aligned(t_TC: Tensor) -> Tensor:
    """The rows themselves, or a copy of them where they do not begin at multiples of 16 bytes."""
    aligned = t_TC.stride(1) == 1 and t_TC.stride(0) % _ALIGNMENT == 0 and t_TC.storage_offset() % _ALIGNMENT == 0
    return t_TC if aligned else t_TC.contiguous()
