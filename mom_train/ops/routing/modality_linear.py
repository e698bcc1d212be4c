"""Linear maps whose weights are chosen by the modality of each row."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


def modality_linear(x_TK: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None = None) -> Tensor:
    """y[t] = W_m x[t] + b_m, where m is the modality of row t (Algorithm 1 of the paper).

    x_TK is (T, K) with rows sorted by modality; weight (M*O, K); bias (M*O,) or None; offsets (M+1,) int64 on the CPU.
    Returns (T, O). Under autocast, x and the weights are cast first, as for F.linear.

    There is one matrix product per modality on a contiguous segment (two on a CPU in bf16), without gathering, masking
    or waiting for the device. An empty modality gets a zero gradient, so that every rank does the same collective
    operations whatever its data.
    """
    device = x_TK.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x_TK, weight = x_TK.to(dtype), weight.to(dtype)
        bias = bias if bias is None else bias.to(dtype)
    return _modality_linear(x_TK, weight, bias, offsets)


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


@torch.library.custom_op("mom::modality_linear", mutates_args=())
def _modality_linear(x_TK: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
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


@_modality_linear.register_fake
def _(x_TK: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
    return x_TK.new_empty(x_TK.shape[0], weight.shape[0] // (offsets.shape[0] - 1))


@torch.library.custom_op("mom::modality_linear_backward", mutates_args=())
def _modality_linear_backward(
    grad_TO: Tensor, x_TK: Tensor, weight: Tensor, offsets: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
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


@_modality_linear_backward.register_fake
def _(grad_TO: Tensor, x_TK: Tensor, weight: Tensor, offsets: Tensor, has_bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x_TK.new_empty(x_TK.shape),
        weight.new_empty(weight.shape),
        weight.new_empty(weight.shape[0] if has_bias else 0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_TK, weight, bias, offsets = inputs
    ctx.save_for_backward(x_TK, weight, offsets)
    ctx.has_bias = bias is not None


def _backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor | None, ...]:
    x_TK, weight, offsets = ctx.saved_tensors
    grad_x, grad_weight, grad_bias = _modality_linear_backward(grad_TO, x_TK, weight, offsets, ctx.has_bias)
    return grad_x, grad_weight, (grad_bias if ctx.has_bias else None), None


_modality_linear.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.mom.modality_linear)
def _flops(x_shape: Any, weight_shape: Any, bias: Any, offsets: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * x_shape[0] * weight_shape[1] * (weight_shape[0] // (offsets[0] - 1))


@register_flop_formula(torch.ops.mom.modality_linear_backward)
def _backward_flops(grad_shape: Any, x_shape: Any, *args: Any, **kwargs: Any) -> int:
    return 4 * grad_shape[0] * grad_shape[1] * x_shape[1]
