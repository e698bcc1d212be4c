"""The linear map by modality as one grouped product in Triton, for NVIDIA GPUs. It is imported only if triton is there.

There is one kernel for products of rows (the output and the gradient of x) and one for sums over rows (the gradients of
weights and bias). Each is launched once, whatever the number of modalities. The bounds of the segments are read on the
device, so the grid and all shapes follow from T, the widths and M alone. Sums are in fp32, in a fixed order and without
atomic additions; so are block sizes, which no timing chooses. A modality without rows gets a gradient of zeros.
"""

# The kernels are in Triton's own Python, which is untyped.
# mypy: allow-untyped-defs, disable-error-code="attr-defined"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mom_train.ops.scan.triton import _on, _sum

_GROUP = 8  # row tiles that run before the next column of tiles begins, so that both operands stay in the L2 cache
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def blocks(dtype: torch.dtype, columns: int) -> dict[str, Any]:
    """The compile-time sizes of a kernel whose tiles have (ROWS, COLUMNS) elements and sum over REDUCED at a time.

    In 16 bits a tile of 128 x 128 keeps 96 KiB in three stages of shared memory, which fits each device from compute
    capability 8.0 on (the least is 99 KiB, on 8.6 and 12.0). A narrow output takes narrower tiles. In fp32 without
    tf32 the products are multiply-adds of single threads, for which smaller tiles fit the registers.
    """
    if dtype == torch.float32:
        return {"ROWS": 64, "COLUMNS": 64, "REDUCED": 32, "num_warps": 4, "num_stages": 2}
    wide = 128 if columns % 128 == 0 or columns > 512 else 64
    return {"ROWS": 128, "COLUMNS": wide, "REDUCED": 64, "num_warps": 8 if wide == 128 else 4, "num_stages": 3}


@triton.jit
def _dot(a, b, total, PRECISION: tl.constexpr):
    if _INTERPRETED:  # whose product takes the bits of bf16 for integers
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def _tile(pid, rows, width, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """The row and column of the tile that a program computes: GROUP rows of tiles at a time, column by column."""
    columns = (width + COLUMNS - 1) // COLUMNS  # tl.cdiv itself is compiled in the same case as tl.sum
    group = pid // (GROUP * columns)
    tall = tl.minimum(rows - group * GROUP, GROUP)
    within = pid - group * GROUP * columns
    return group * GROUP + within % tall, within // tall


@triton.jit
def _rows(
    X, W, BIAS, OFFSETS, Y, slots, outs, ins, sx, sy, sm, so, si,
    M: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, REDUCED: tl.constexpr, GROUP: tl.constexpr,
    EVEN: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Y[t, o] = sum over i of X[t, i] W[m, o, i] + BIAS[m, o], where m is the modality of row t. W has the strides sm,
    so and si, and `slots` row tiles cover the segments. EVEN says that `ins` is a multiple of REDUCED."""
    slot, column = _tile(tl.program_id(0), slots, outs, COLUMNS, GROUP)
    m, first, last, before = 0, 0, 0, 0
    for segment in tl.static_range(M):  # finds the one that this row tile belongs to
        start, end = tl.load(OFFSETS + segment), tl.load(OFFSETS + segment + 1)
        tiles = (end - start + ROWS - 1) // ROWS
        here = (slot >= before) & (slot < before + tiles)
        m = tl.where(here, segment, m)
        first = tl.where(here, start + (slot - before) * ROWS, first)
        last = tl.where(here, end, last)
        before += tiles
    if first < last:
        t, o, i = first + tl.arange(0, ROWS), column * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, REDUCED)
        x = X + t.to(tl.int64)[:, None] * sx + i[None, :]
        w = W + m.to(tl.int64) * sm + o.to(tl.int64)[None, :] * so + i[:, None] * si
        total = tl.full([ROWS, COLUMNS], 0.0, tl.float32)
        for k in range(0, ins, REDUCED):
            if EVEN:
                x_tile = tl.load(x, mask=t[:, None] < last, other=0.0)
                w_tile = tl.load(w, mask=o[None, :] < outs, other=0.0)
            else:
                x_tile = tl.load(x, mask=(t[:, None] < last) & (k + i[None, :] < ins), other=0.0)
                w_tile = tl.load(w, mask=(o[None, :] < outs) & (k + i[:, None] < ins), other=0.0)
            total = _dot(x_tile, w_tile, total, PRECISION)
            x += REDUCED
            w += REDUCED * si
        if HAS_BIAS:
            total += tl.load(BIAS + m * outs + o, mask=o < outs, other=0.0).to(tl.float32)[None, :]
        y = Y + t.to(tl.int64)[:, None] * sy + o[None, :]
        tl.store(y, total.to(Y.dtype.element_ty), mask=(t[:, None] < last) & (o[None, :] < outs))


@triton.jit
def _sums(
    GY, X, OFFSETS, GW, GBIAS, outs, ins, sgy, sx,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, REDUCED: tl.constexpr, GROUP: tl.constexpr, HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """GW[m, o, i] = sum of GY[t, o] X[t, i], and GBIAS[m, o] = sum of GY[t, o], over the rows t of modality m."""
    m = tl.program_id(1)
    down, column = _tile(tl.program_id(0), (outs + ROWS - 1) // ROWS, ins, COLUMNS, GROUP)
    o, i, r = down * ROWS + tl.arange(0, ROWS), column * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, REDUCED)
    first, last = tl.load(OFFSETS + m), tl.load(OFFSETS + m + 1)
    total, of_bias = tl.full([ROWS, COLUMNS], 0.0, tl.float32), tl.full([ROWS], 0.0, tl.float32)
    for t in range(first, last, REDUCED):
        row, alive = (t + r).to(tl.int64), t + r < last
        gy = tl.load(GY + row[None, :] * sgy + o[:, None], mask=alive[None, :] & (o[:, None] < outs), other=0.0)
        x = tl.load(X + row[:, None] * sx + i[None, :], mask=alive[:, None] & (i[None, :] < ins), other=0.0)
        total = _dot(gy, x, total, PRECISION)
        if HAS_BIAS:
            of_bias += _sum(gy.to(tl.float32), 1)
    place = (m.to(tl.int64) * outs + o) * ins
    tl.store(GW + place[:, None] + i[None, :], total.to(GW.dtype.element_ty),
             mask=(o[:, None] < outs) & (i[None, :] < ins))  # fmt: skip
    if HAS_BIAS:  # noqa: SIM102
        if column == 0:
            tl.store(GBIAS + m * outs + o, of_bias.to(GBIAS.dtype.element_ty), mask=o < outs)


def forward(x_TK: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
    """y (T, O), from the arguments of `mom::modality_linear`."""
    weight_MOK = weight.view(len(offsets) - 1, -1, weight.shape[1])
    return _product(x_TK, weight_MOK, bias, offsets)


def backward(
    grad_TO: Tensor, x_TK: Tensor, weight: Tensor, offsets: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias, from the arguments of `mom::modality_linear_backward`."""
    M = len(offsets) - 1
    weight_MOK = weight.view(M, -1, weight.shape[1])
    grad_TO, x_TK = _rows_together(grad_TO), _rows_together(x_TK)
    grad_x = _product(grad_TO, weight_MOK.transpose(1, 2), None, offsets)
    grad_weight = weight.new_empty(weight.shape)
    grad_bias = weight.new_empty(weight.shape[0] if has_bias else 0)
    O, K = weight_MOK.shape[1:]
    sizes = blocks(x_TK.dtype, K)
    grid = (triton.cdiv(O, sizes["ROWS"]) * triton.cdiv(K, sizes["COLUMNS"]), M)
    with _on(x_TK):
        _sums[grid](
            grad_TO, x_TK, offsets, grad_weight, grad_bias, O, K, grad_TO.stride(0), x_TK.stride(0),
            GROUP=_GROUP, HAS_BIAS=has_bias, PRECISION=_precision(), **sizes,
        )  # fmt: skip
    return grad_x, grad_weight, grad_bias


def _product(x_TI: Tensor, weight_MOI: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
    M, O, I = weight_MOI.shape
    x_TI = _rows_together(x_TI)
    y_TO = x_TI.new_empty(x_TI.shape[0], O)
    sizes = blocks(x_TI.dtype, O)
    tiles = triton.cdiv(x_TI.shape[0], sizes["ROWS"]) + M - 1  # the most that segments of T rows in all can have
    with _on(x_TI):
        _rows[(tiles * triton.cdiv(O, sizes["COLUMNS"]),)](
            x_TI, weight_MOI, x_TI if bias is None else bias, offsets, y_TO, tiles, O, I, x_TI.stride(0), O,
            *weight_MOI.stride(), M=M, GROUP=_GROUP, EVEN=I % sizes["REDUCED"] == 0, HAS_BIAS=bias is not None,
            PRECISION=_precision(), **sizes,
        )  # fmt: skip
    return y_TO


def _rows_together(t_TC: Tensor) -> Tensor:
    return t_TC if t_TC.stride(1) == 1 else t_TC.contiguous()


def _precision() -> str:
    """How fp32 is multiplied: as PyTorch's own products are, in tf32 where the user allows it."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
