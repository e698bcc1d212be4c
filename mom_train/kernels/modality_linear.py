"""Linear maps whose weights are chosen by each row's modality."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


def modality_linear(x_TK: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None = None) -> Tensor:
    """y[t] = W_m x[t] + b_m, m the modality of row t (Algorithm 1 of the paper).

    x_TK (T, K), rows sorted by modality; weight (M*O, K); bias (M*O,) or None; offsets (M+1,) int64 on the CPU.
    Returns (T, O). Under autocast x and the weights are cast first, as for F.linear.

    One matmul per modality on a contiguous segment: no gather, no mask, no host sync. An empty modality keeps
    its (zero) gradient, so that every rank makes the same collectives whatever its data.
    """
    device = x_TK.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x_TK, weight = x_TK.to(dtype), weight.to(dtype)
        bias = bias if bias is None else bias.to(dtype)
    return _modality_linear(x_TK, weight, bias, offsets)


@torch.library.custom_op("mom::modality_linear", mutates_args=())
def _modality_linear(x_TK: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
    bounds = offsets.tolist()
    M = len(bounds) - 1
    weight_MOK = weight.view(M, -1, weight.shape[1])
    y_TO = x_TK.new_empty(x_TK.shape[0], weight_MOK.shape[1])
    for m in range(M):
        s, e = bounds[m], bounds[m + 1]
        if e == s:
            continue
        if bias is None:
            torch.mm(x_TK[s:e], weight_MOK[m].t(), out=y_TO[s:e])
        else:
            torch.addmm(bias.view(M, -1)[m], x_TK[s:e], weight_MOK[m].t(), out=y_TO[s:e])
    return y_TO


@_modality_linear.register_fake
def _(x_TK: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
    return x_TK.new_empty(x_TK.shape[0], weight.shape[0] // (offsets.shape[0] - 1))


@torch.library.custom_op("mom::modality_linear_backward", mutates_args=())
def _modality_linear_backward(
    grad_TO: Tensor, x_TK: Tensor, weight: Tensor, offsets: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    bounds = offsets.tolist()
    M = len(bounds) - 1
    weight_MOK = weight.view(M, -1, weight.shape[1])
    grad_TO = grad_TO.contiguous()
    grad_x = x_TK.new_empty(x_TK.shape)
    grad_weight = weight.new_empty(weight.shape)
    grad_MOK = grad_weight.view_as(weight_MOK)
    grad_bias = weight.new_zeros(weight.shape[0] if has_bias else 0)
    for m in range(M):
        s, e = bounds[m], bounds[m + 1]
        if e == s:
            grad_MOK[m].zero_()
            continue
        torch.mm(grad_TO[s:e], weight_MOK[m], out=grad_x[s:e])
        torch.mm(grad_TO[s:e].t(), x_TK[s:e], out=grad_MOK[m])
        if has_bias:
            grad_bias.view(M, -1)[m] = grad_TO[s:e].sum(0)
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
