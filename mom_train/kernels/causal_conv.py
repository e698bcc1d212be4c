"""Depthwise causal convolution with SiLU, stopped at document boundaries."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mom_train.kernels import native
from mom_train.kernels.native import integer, pointer, threads
from mom_train.layout import RowLayout

_CHUNK = 128  # positions per pass of the PyTorch backend: a few passes over a piece that stays in cache
_C_RANGES = 4  # time ranges per batch row of the C backend: fixed, so that sums do not depend on threads


def causal_conv(
    x_TD: Tensor,
    weight_DK: Tensor,
    bias_D: Tensor,
    layout: RowLayout,
    initial_BKD: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """y[t] = silu(bias + sum_k weight[:, K-1-k] x[t-k]) over the k that stay within t's document.

    x_TD (T, D) in row order, possibly a strided view; weight (D, K), bias (D,) fp32. `initial_BKD`
    (B, K-1, D): the inputs just before each batch row, for documents that continue. Computed in fp32 (float64 for
    float64 inputs). Returns y (T, D) in x's dtype, and the last K-1 inputs (B, K-1, D) to carry on from.
    """
    if backend is None:
        native_fits = x_TD.device.type == "cpu" and x_TD.dtype != torch.float64 and initial_BKD is None
        native_fits = native_fits and x_TD.shape[1] % native.LANES == 0
        # the library is built per state size; the convolution is the same in all of them
        backend = "c" if native_fits and native.available(16) else "torch"
    y_TD = _conv(
        x_TD,
        weight_DK,
        bias_D,
        initial_BKD,
        layout.order,
        layout.rows,
        layout.position,
        layout.batch,
        backend,
    )
    K = weight_DK.shape[1]
    last = layout.order.view(layout.batch, -1)[:, -(K - 1) :]
    final_BKD = x_TD.detach()[last.long()]
    if layout.length < K - 1:
        before = x_TD.new_zeros(layout.batch, K - 1, x_TD.shape[1]) if initial_BKD is None else initial_BKD
        final_BKD = torch.cat([before[:, layout.length :], final_BKD], 1)
    return y_TD, final_BKD


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
    if backend == "c":
        return _c_forward(x, weight, bias, order, position, batch)
    padded, taps, masks = _torch_inputs(x, weight, initial, order, position, batch)
    L = order.shape[0] // batch
    y = padded.new_empty(batch, L, x.shape[1])
    for s in range(0, L, _CHUNK):
        e = min(s + _CHUNK, L)
        y[:, s:e] = F.silu(_preactivation(padded, taps, bias, masks, s, e))
    return y.view(-1, x.shape[1]).index_select(0, rows).to(x.dtype)


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
    K, L, D = weight.shape[1], order.shape[0] // batch, x.shape[1]
    if backend == "c":
        gx, gweight, gbias = _c_backward(grad_y, x, weight, bias, order, position, batch)
        return gx.to(x.dtype), gweight, gbias, x.new_empty(batch, K - 1, D)
    padded, taps, masks = _torch_inputs(x, weight, initial, order, position, batch)
    gy = grad_y.index_select(0, order).to(padded.dtype).view(batch, L, D)
    gpadded = torch.zeros_like(padded)
    gtaps, gbias = torch.zeros_like(taps), torch.zeros_like(bias, dtype=padded.dtype)
    for s in range(0, L, _CHUNK):
        e = min(s + _CHUNK, L)
        pre = _preactivation(padded, taps, bias, masks, s, e)
        g = torch.ops.aten.silu_backward(gy[:, s:e].contiguous(), pre)
        gbias += g.sum((0, 1))
        for k in range(K):
            gk = g if k == 0 else g * masks[k][:, s:e]
            window = slice(K - 1 + s - k, K - 1 + e - k)
            gtaps[K - 1 - k] += (gk * padded[:, window]).sum((0, 1))
            gpadded[:, window].addcmul_(gk, taps[K - 1 - k])
    gx = gpadded[:, K - 1 :].reshape(-1, D).index_select(0, rows)
    ginitial = gpadded[:, : K - 1].to(x.dtype).contiguous()
    return gx.to(x.dtype), gtaps.t().contiguous().to(weight.dtype), gbias.to(bias.dtype), ginitial


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
    saved = ctx.saved_tensors  # once: under activation checkpointing a second look is an error
    gx, gweight, gbias, ginitial = _conv_backward(grad_y, *saved, ctx.batch, ctx.backend)
    return gx, gweight, gbias, None if saved[3] is None else ginitial, *[None] * 5


_conv.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.mom.causal_conv)
def _flops(x_shape: Any, weight_shape: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * x_shape[0] * x_shape[1] * weight_shape[1]


@register_flop_formula(torch.ops.mom.causal_conv_backward)
def _backward_flops(grad_shape: Any, x_shape: Any, weight_shape: Any, *args: Any, **kwargs: Any) -> int:
    return 4 * x_shape[0] * x_shape[1] * weight_shape[1]


def _torch_inputs(
    x: Tensor, weight: Tensor, initial: Tensor | None, order: Tensor, position: Tensor, batch: int
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The rows in time order behind K-1 earlier ones (B, K-1+L, D), the taps (K, D), and for each lag k the mask
    (B, L, 1) of positions whose document reaches back that far."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    K, D = weight.shape[1], x.shape[1]
    L = order.shape[0] // batch
    padded = x.new_zeros(batch, K - 1 + L, D, dtype=dtype)
    if initial is not None:
        padded[:, : K - 1] = initial
    padded[:, K - 1 :] = x.index_select(0, order).view(batch, L, D)
    masks = [(position.view(batch, L, 1) >= k).to(dtype) for k in range(K)]
    return padded, weight.to(dtype).t().contiguous(), masks


def _preactivation(padded: Tensor, taps: Tensor, bias: Tensor, masks: list[Tensor], s: int, e: int) -> Tensor:
    K = taps.shape[0]
    y = torch.addcmul(bias.to(padded.dtype), padded[:, K - 1 + s : K - 1 + e], taps[K - 1])
    for k in range(1, K):
        y.addcmul_(padded[:, K - 1 + s - k : K - 1 + e - k] * masks[k][:, s:e], taps[K - 1 - k])
    return y


def _c_forward(x: Tensor, weight: Tensor, bias: Tensor, order: Tensor, position: Tensor, batch: int) -> Tensor:
    library = native.library(16)
    assert library is not None
    xr, taps, bias = native.rows(x), weight.float().t().contiguous(), bias.float().contiguous()
    y = xr.new_empty(xr.shape)
    library.mom_conv_forward(
        integer(batch), integer(x.shape[0] // batch), integer(x.shape[1]), integer(weight.shape[1]), pointer(xr),
        integer(xr.stride(0)), pointer(taps), pointer(bias), pointer(order), pointer(position), pointer(y), threads(),
    )  # fmt: skip
    return y.to(x.dtype)


def _c_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, order: Tensor, position: Tensor, batch: int
) -> tuple[Tensor, Tensor, Tensor]:
    library = native.library(16)
    assert library is not None
    D, K = weight.shape
    xr, taps, bias_c = native.rows(x), weight.float().t().contiguous(), bias.float().contiguous()
    gy = grad_y.float().contiguous()
    gpre, gx = torch.empty_like(gy), torch.empty_like(gy)
    gweight, gbias = gy.new_empty(batch, _C_RANGES, K, D), gy.new_empty(batch, _C_RANGES, D)
    library.mom_conv_backward(
        integer(batch), integer(x.shape[0] // batch), integer(D), integer(K), integer(_C_RANGES), pointer(xr),
        integer(xr.stride(0)), pointer(taps), pointer(bias_c), pointer(order), pointer(position), pointer(gy),
        pointer(gpre), pointer(gx), pointer(gweight), pointer(gbias), threads(),
    )  # fmt: skip
    return gx, gweight.sum((0, 1)).t().contiguous().to(weight.dtype), gbias.sum((0, 1)).to(bias.dtype)
