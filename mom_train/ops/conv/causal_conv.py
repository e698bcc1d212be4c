"""Depthwise causal convolution with SiLU that does not reach across document boundaries."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mom_train.ops import backends, mamba_ssm
from mom_train.ops.layout import RowLayout


def causal_conv(
    x_TD: Tensor,
    weight_DK: Tensor,
    bias_D: Tensor,
    layout: RowLayout,
    initial_BKD: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """y[t] = silu(bias + sum_k weight[:, K-1-k] x[t-k]), summed over those k for which t-k is in the document of t.

    x_TD is (T, D) in row order and may be a strided view; weight (D, K) and bias (D,) are fp32. `initial_BKD`
    (B, K-1, D) are the inputs just before each batch row, for documents that continue. The computation is in fp32
    (float64 for float64 inputs). Returns y (T, D) in the dtype of x, and the last K-1 inputs (B, K-1, D), which the
    next chunk of the row needs.

    backend: "torch", "c", "triton" or "mamba_ssm" (its `causal_conv1d_fn`). None chooses one (see backends.py).
    """
    if (backend or backends.forced) == "mamba_ssm":
        y_TD = mamba_ssm.causal_conv(x_TD, weight_DK, bias_D, layout, initial_BKD)
    else:
        y_TD = _conv(
            x_TD,
            weight_DK,
            bias_D,
            initial_BKD,
            layout.order,
            layout.rows,
            layout.position,
            layout.batch,
            backend or "auto",
        )
    K = weight_DK.shape[1]
    last = layout.order.view(layout.batch, -1)[:, max(0, layout.length - (K - 1)) :]  # empty if K is 1
    final_BKD = x_TD.detach()[last.long()]
    if layout.length < K - 1:
        before = x_TD.new_zeros(layout.batch, K - 1, x_TD.shape[1]) if initial_BKD is None else initial_BKD
        final_BKD = torch.cat([before[:, layout.length :], final_BKD], 1)
    return y_TD, final_BKD


def _module(backend: str, x: Tensor, weight: Tensor) -> ModuleType:
    """The module of the backend, with `forward` and `backward`."""
    return backends.module("conv", backend, x, weight.shape[1])


@torch.library.custom_op("mom::causal_conv", mutates_args=())
def _conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    initial: Tensor | None,
    order: Tensor,
    rows: Tensor,
    position: Tensor,
    batch: int,
    backend: str,
) -> Tensor:
    return _module(backend, x, weight).forward(x, weight, bias, initial, order, rows, position, batch)


@_conv.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    initial: Tensor | None,
    order: Tensor,
    rows: Tensor,
    position: Tensor,
    batch: int,
    backend: str,
) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("mom::causal_conv_backward", mutates_args=())
def _conv_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    initial: Tensor | None,
    order: Tensor,
    rows: Tensor,
    position: Tensor,
    batch: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _module(backend, x, weight).backward(grad_y, x, weight, bias, initial, order, rows, position, batch)


@_conv_backward.register_fake
def _(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    initial: Tensor | None,
    order: Tensor,
    rows: Tensor,
    position: Tensor,
    batch: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gx, gweight, gbias = (t.new_empty(t.shape) for t in (x, weight, bias))
    return gx, gweight, gbias, x.new_empty(batch, weight.shape[1] - 1, x.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, initial, order, rows, position, batch, backend = inputs
    ctx.save_for_backward(x, weight, bias, initial, order, rows, position)
    ctx.batch, ctx.backend = batch, backend


def _backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # read only once: a second time is an error under activation checkpointing
    gx, gweight, gbias, ginitial = _conv_backward(grad_y, *saved, ctx.batch, ctx.backend)
    return gx, gweight, gbias, None if saved[3] is None else ginitial, *[None] * 5


_conv.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.mom.causal_conv)
def _flops(x_shape: Any, weight_shape: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * x_shape[0] * x_shape[1] * weight_shape[1]


@register_flop_formula(torch.ops.mom.causal_conv_backward)
def _backward_flops(grad_shape: Any, x_shape: Any, weight_shape: Any, *args: Any, **kwargs: Any) -> int:
    return 4 * x_shape[0] * x_shape[1] * weight_shape[1]
