"""Rounds rows to e4m3 with a scale for each, in one pass: a Triton kernel for NVIDIA GPUs with FP8."""

# The kernel is in Triton's own Python, which is untyped.
# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mom_train.ops.cross_entropy.triton import _max
from mom_train.ops.scan.triton import _on


def options(width: int) -> dict[str, Any]:
    """The launch options: 16 elements of a row per thread, as far as there are warps for it."""
    return {"num_warps": max(1, min(16, triton.next_power_of_2(width) // 512)), "enable_fp_fusion": True}


@triton.jit
def _quantize(X, Q, SCALE, C, sx, BLOCK: tl.constexpr):
    """The scale is 2^e for the smallest e with largest / 448 < 2^e, as by frexp, read from the bits of the number."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    x = tl.load(X + row * sx + i, mask=i < C, other=0.0).to(tl.float32)
    largest = _max(tl.abs(x)) / 448.0
    biased = (largest.to(tl.int32, bitcast=True) >> 23) + 1
    biased = tl.minimum(tl.maximum(biased, 27), 247)  # exponents of -100 to 120
    biased = tl.where(largest == 0.0, 127, biased)  # as frexp has it
    scale = (biased << 23).to(tl.float32, bitcast=True)
    q = x * ((254 - biased) << 23).to(tl.float32, bitcast=True)  # x / scale, exactly
    q = tl.where(tl.abs(q) <= 448.0, q, float("nan"))  # also infinity, which the conversion would make 448
    tl.store(Q + row * C + i, q.to(Q.dtype.element_ty), mask=i < C)
    tl.store(SCALE + row, scale)


def quantized(x_RC: Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> tuple[Tensor, Tensor]:
    """See `fp8.quantized`; rows of at most 16,384 elements. With another `dtype`, they are rounded to that."""
    R, C = x_RC.shape
    x_RC = x_RC if x_RC.stride(1) == 1 else x_RC.contiguous()
    q = torch.empty(R, C, dtype=dtype, device=x_RC.device)
    scale = torch.empty(R, device=x_RC.device)
    if R:
        with _on(x_RC):
            _quantize[R,](x_RC, q, scale, C, x_RC.stride(0), BLOCK=triton.next_power_of_2(C), **options(C))
    return q, scale
