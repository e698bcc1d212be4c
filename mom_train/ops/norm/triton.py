"""RMSNorm after an addition in Triton, for NVIDIA GPUs. `backends` imports this module only if triton is installed.

A row is held in registers, so that everything is read once and written once. The forward program has one row. The
backward program has a span of rows and adds up the gradient of the weight over them; it writes one partial sum for
each modality that it meets. There are no atomic additions: the partial sums are added in a fixed order, and the spans
depend only on the number of rows.
"""

# The kernels are in Triton's own Python, which is untyped.
# mypy: allow-untyped-defs, disable-error-code="operator"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mom_train.ops.scan.triton import _on, _sum, why_no_device

SPAN = 16  # rows of a backward program: few enough to fill the device, many compared with one partial sum
_LARGEST = 16384  # widest row: 32 elements per thread of 16 warps


def why_not(x: Tensor, size: int) -> str | None:
    """The reason why these kernels cannot run on rows like x (T, d), or None if they can. `size` is d."""
    if obstacle := why_no_device(x):
        return obstacle
    if x.dtype == torch.float64:
        return "they compute in fp32, not float64"
    return None if size <= _LARGEST else f"rows of {size} are wider than {_LARGEST}"


def options(width: int) -> dict[str, Any]:
    """The launch options: 16 elements of a row per thread, as far as there are warps for it."""
    return {"num_warps": max(1, min(16, triton.next_power_of_2(width) // 512)), "enable_fp_fusion": True}


@triton.jit
def _inverse_root(r, d, eps):
    return 1.0 / tl.sqrt(_sum(r * r, 0) / d + eps)


@triton.jit(do_not_specialize=["eps"])
def _forward(
    X, BRANCH, WEIGHT, MODALITY, ROWS, RESIDUAL, NORMED, d, eps,
    BLOCK: tl.constexpr, ADDS: tl.constexpr, MODALITIES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < d
    r = tl.load(X + row * d + i, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        r += tl.load(BRANCH + row * d + i, mask=inside, other=0.0).to(tl.float32)
        rounded = r.to(RESIDUAL.dtype.element_ty)
        tl.store(RESIDUAL + row * d + i, rounded, mask=inside)
        r = rounded.to(tl.float32)
    m = 0
    if MODALITIES > 1:
        m = tl.load(MODALITY + tl.load(ROWS + row)).to(tl.int32)
    scale = tl.load(WEIGHT + m * d + i, mask=inside, other=0.0).to(tl.float32)
    normed = r * _inverse_root(r, d, eps) * scale
    tl.store(NORMED + row * d + i, normed.to(NORMED.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T", "eps"])
def _backward(
    GRESIDUAL, GNORMED, RESIDUAL, WEIGHT, MODALITY, ROWS, GX, GBRANCH, GWEIGHT, T, d, eps,
    BLOCK: tl.constexpr, SPAN: tl.constexpr, PASSES: tl.constexpr, BRANCHES: tl.constexpr, MODALITIES: tl.constexpr,
):  # fmt: skip
    """GWEIGHT is (spans, MODALITIES, d) and zero. Rows are sorted by modality, so that each sum is complete when the
    modality changes."""
    span = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < d
    own, sums = 0, tl.full([BLOCK], 0.0, tl.float32)
    if MODALITIES > 1:
        own = tl.load(MODALITY + tl.load(ROWS + span * SPAN)).to(tl.int32)
    scale = tl.load(WEIGHT + own * d + i, mask=inside, other=0.0).to(tl.float32)
    for row in range(span * SPAN, tl.minimum((span + 1) * SPAN, T)):
        r = tl.load(RESIDUAL + row * d + i, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(GNORMED + row * d + i, mask=inside, other=0.0).to(tl.float32)
        if MODALITIES > 1:
            m = tl.load(MODALITY + tl.load(ROWS + row)).to(tl.int32)
            tl.store(GWEIGHT + (span * MODALITIES + own) * d + i, sums, mask=inside & (m != own))
            sums = tl.where(m == own, sums, 0.0)
            own = m
            scale = tl.load(WEIGHT + m * d + i, mask=inside, other=0.0).to(tl.float32)
        root = _inverse_root(r, d, eps)
        sums += g * r * root
        scaled = g * scale
        gx = root * (scaled - r * (_sum(scaled * r, 0) / d) * root * root)
        if PASSES:
            gx += tl.load(GRESIDUAL + row * d + i, mask=inside, other=0.0).to(tl.float32)
        tl.store(GX + row * d + i, gx.to(GX.dtype.element_ty), mask=inside)
        if BRANCHES:
            tl.store(GBRANCH + row * d + i, gx.to(GBRANCH.dtype.element_ty), mask=inside)
    tl.store(GWEIGHT + (span * MODALITIES + own) * d + i, sums, mask=inside)


def forward(
    x: Tensor, branch: Tensor | None, weight: Tensor, modality: Tensor, rows: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """See `add_norm`. Without a branch, the first result is empty."""
    (T, d), x = x.shape, x.contiguous()
    branch = None if branch is None else branch.contiguous()
    residual = x.new_empty(0 if branch is None else (T, d), dtype=_residual_dtype(x, branch))
    normed = x.new_empty(T, d, dtype=dtype)
    if T:
        with _on(x):
            _forward[T,](
                x, x if branch is None else branch, weight.contiguous(), modality, rows, residual, normed, d, eps,
                BLOCK=triton.next_power_of_2(d), ADDS=branch is not None, MODALITIES=len(weight), **options(d),
            )  # fmt: skip
    return residual, normed


def _residual_dtype(x: Tensor, branch: Tensor | None) -> torch.dtype:
    return x.dtype if branch is None else torch.promote_types(x.dtype, branch.dtype)


def backward(
    grad_residual: Tensor, grad_normed: Tensor, residual: Tensor, weight: Tensor, modality: Tensor, rows: Tensor,
    eps: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of x, of the branch in `dtype` (empty if x has this dtype), and of the weight."""
    (T, d), M = residual.shape, len(weight)
    passes, branches = grad_residual.numel() > 0, dtype != residual.dtype
    spans = -(-T // SPAN)
    grad_x = torch.empty_like(residual, memory_format=torch.contiguous_format)
    of_branch = grad_x.new_empty((T, d) if branches else 0, dtype=dtype)
    partial = torch.zeros(spans, M, d, device=residual.device)
    if T:
        with _on(residual):
            _backward[spans,](
                grad_residual.contiguous(), grad_normed.contiguous(), residual.contiguous(), weight.contiguous(),
                modality, rows, grad_x, of_branch, partial, T, d, eps, BLOCK=triton.next_power_of_2(d), SPAN=SPAN,
                PASSES=passes, BRANCHES=branches, MODALITIES=M, **options(d),
            )  # fmt: skip
    return grad_x, of_branch, partial.sum(0).to(weight.dtype)
