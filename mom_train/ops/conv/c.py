"""The causal convolution in the C kernels of scan.c."""

from __future__ import annotations

from torch import Tensor

from mom_train.ops import native
from mom_train.ops.chunks import SCAN_CHANNELS
from mom_train.ops.native import integer, pointer, threads

LONGEST = 8
"""Largest number of taps that the kernels have room for."""


def why_not(x: Tensor, taps: int) -> str | None:
    """The reason why these kernels cannot run on rows like x (T, D), or None if they can."""
    # A library is built for each state size, and the convolution is the same in all of them.
    return native.why_not(x, 16) or (None if taps <= LONGEST else f"{taps} taps are more than {LONGEST}")


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, initial: Tensor | None,
    order: Tensor, rows: Tensor, position: Tensor, batch: int,
) -> Tensor:  # fmt: skip
    library = native.library(16)
    assert library is not None
    D, K = weight.shape
    (xr,), half = native.row_tensors(x)
    taps, bias = weight.float().t().contiguous(), bias.float().contiguous()
    initial = initial if initial is None else initial.to(xr.dtype).contiguous()
    y = xr.new_empty(x.shape)
    library.mom_conv_forward(
        integer(batch), integer(x.shape[0] // batch), integer(D), integer(K), integer(-(-D // SCAN_CHANNELS)),
        int(half), pointer(xr), integer(xr.stride(0)), pointer(taps), pointer(bias), pointer(initial), pointer(order),
        pointer(position), pointer(y), threads(),
    )  # fmt: skip
    return y.to(x.dtype)


def backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, initial: Tensor | None,
    order: Tensor, rows: Tensor, position: Tensor, batch: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    library = native.library(16)
    assert library is not None
    D, K = weight.shape
    (xr, gy), half = native.row_tensors(x, grad_y)
    taps, bias_c = weight.float().t().contiguous(), bias.float().contiguous()
    initial = initial if initial is None else initial.to(xr.dtype).contiguous()
    gx, ginitial = xr.new_empty(x.shape), xr.new_empty(batch, K - 1, D)
    gweight, gbias = taps.new_empty(batch, K, D), taps.new_empty(batch, D)
    library.mom_conv_backward(
        integer(batch), integer(x.shape[0] // batch), integer(D), integer(K), integer(-(-D // SCAN_CHANNELS)),
        int(half), pointer(xr), integer(xr.stride(0)), pointer(taps), pointer(bias_c), pointer(initial), pointer(order),
        pointer(position), pointer(gy), integer(gy.stride(0)), pointer(gx), pointer(gweight), pointer(gbias),
        pointer(None if initial is None else ginitial), threads(),
    )  # fmt: skip
    gweight_DK = gweight.sum(0).t().contiguous().to(weight.dtype)
    return gx.to(x.dtype), gweight_DK, gbias.sum(0).to(bias.dtype), ginitial.to(x.dtype)
