"""The linear map by modality as one product of PyTorch per modality: what a CPU runs, and what any other device falls
back to.

The bounds of the segments are read on the host. On a GPU this waits for the device, so `modality_linear.backend` takes
it there only where nothing else can run.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor


def forward(x_TK: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
    """y (T, O), from the arguments of `mom::modality_linear`."""
    M = len(offsets) - 1
    weight_MOK = weight.view(M, -1, weight.shape[1])
    y_TO = x_TK.new_empty(x_TK.shape[0], weight_MOK.shape[1])
    unit = _unit(x_TK)
    for m, start, middle, end in _segments(offsets, unit):
        W_KO = weight_MOK[m].t()
        product = torch.mm if bias is None else partial(torch.addmm, bias.view(M, -1)[m])
        if middle > start:
            product(x_TK[start:middle], W_KO, out=y_TO[start:middle])
        if end > middle:
            y_TO[middle:end] = product(_padded(x_TK[middle:end], unit), W_KO)[: end - middle]
    return y_TO


def backward(
    grad_TO: Tensor, x_TK: Tensor, weight: Tensor, offsets: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias, from the arguments of `mom::modality_linear_backward`."""
    M = len(offsets) - 1
    weight_MOK = weight.view(M, -1, weight.shape[1])
    grad_TO = grad_TO.contiguous()
    grad_x = x_TK.new_empty(x_TK.shape)
    grad_weight = weight.new_empty(weight.shape)
    grad_MOK = grad_weight.view_as(weight_MOK)
    grad_bias = weight.new_zeros(weight.shape[0] if has_bias else 0)
    unit = _unit(x_TK)
    for m, start, middle, end in _segments(offsets, unit):
        if middle > start:
            torch.mm(grad_TO[start:middle], weight_MOK[m], out=grad_x[start:middle])
            torch.mm(grad_TO[start:middle].t(), x_TK[start:middle], out=grad_MOK[m])
        else:
            grad_MOK[m].zero_()
        if end > middle:
            rest = _padded(grad_TO[middle:end], unit)
            grad_x[middle:end] = torch.mm(rest, weight_MOK[m])[: end - middle]
            grad_MOK[m].addmm_(rest.t(), _padded(x_TK[middle:end], unit))
        if has_bias:
            grad_bias.view(M, -1)[m] = grad_TO[start:end].sum(0)
    return grad_x, grad_weight, grad_bias


def _unit(x_TK: Tensor) -> int:
    """The number whose multiples are the numbers of rows that a product is computed for.

    On a CPU in bf16, oneDNN compiles a program for every number of rows that it has not met yet. This takes 4 to 6 ms,
    while the product itself takes one, and it would happen for each modality and product in every step, because the
    lengths of segments differ from batch to batch. With at most 128 different lengths, all of them are soon known and
    stay in its cache. MKL (fp32) does not have this problem.
    """
    if x_TK.device.type != "cpu" or x_TK.dtype != torch.bfloat16:
        return 1
    return 64 * max(1, x_TK.shape[0] // 4096)


def _segments(offsets: Tensor, unit: int) -> Iterator[tuple[int, int, int, int]]:
    """Yields (modality, start, middle, end). The rows up to the middle are a multiple of `unit`; the rest must be
    padded."""
    for m, (start, end) in enumerate(pairwise(offsets.tolist())):
        yield m, start, end - (end - start) % unit, end


def _padded(rest_TC: Tensor, rows: int) -> Tensor:
    """`rest_TC` with zeros appended, as (rows, C)."""
    padded = rest_TC.new_zeros(rows, rest_TC.shape[1])
    padded[: len(rest_TC)] = rest_TC
    return padded
