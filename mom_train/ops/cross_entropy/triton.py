"""Softmax cross-entropy in Triton, for NVIDIA GPUs. `backends` imports this module only if triton is installed.

One program processes one row. Its first pass over the logits keeps the largest one so far and the sum of exponentials
relative to it (the online softmax of Milakov and Gimelshein, arXiv 1805.02867); its second pass writes the gradient
over the logits. The rows of all running programs fit the L2 cache of large GPUs, so that memory is read about once.
"""

# The kernels are in Triton's own Python, which is untyped.
# mypy: allow-untyped-defs, disable-error-code="operator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mom_train.ops.scan.triton import _on, _sum, why_no_device

_BLOCK = 4096  # logits that a program loads at a time
OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}  # 16 logits per thread


def why_not(x: Tensor, size: int) -> str | None:
    """The reason why the kernel cannot run on logits like x (C, V), or None if it can. `size` is not used."""
    if obstacle := why_no_device(x):
        return obstacle
    return "it computes in fp32, not float64" if x.dtype == torch.float64 else None


def block(vocabulary: int) -> int:
    """Number of logits that a program loads at a time."""
    return min(_BLOCK, triton.next_power_of_2(vocabulary))


@triton.jit
def _max(v):
    # tl.max itself is compiled if triton was imported before TRITON_INTERPRET was set; this works in either case
    return tl.reduce(v, 0, tl.standard._elementwise_max)


@triton.jit
def _forward(LOGITS, TARGET, LOSS, LOGSUM, V, z_loss, BLOCK: tl.constexpr, GRADIENT: tl.constexpr):
    row = tl.program_id(0)
    logits = LOGITS + row.to(tl.int64) * V
    target = tl.load(TARGET + row)
    valid = target >= 0
    within = valid & (target < V)
    of_target = tl.load(logits + target, mask=within, other=float("nan")).to(tl.float32)  # no such id: the loss is NaN
    v = tl.arange(0, BLOCK)
    largest, total = tl.full([], float("-inf"), tl.float32), tl.full([], 0.0, tl.float32)
    for first in range(0, V, BLOCK):
        x = tl.load(logits + first + v, mask=first + v < V, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(largest, _max(x))
        base = tl.where(larger == float("-inf"), 0.0, larger)  # -inf so far: not NaN, as -inf - -inf would be
        total = total * tl.exp(largest - base) + _sum(tl.exp(x - base), 0)
        largest = larger
    logsum = largest + tl.log(total)
    tl.store(LOSS + row, tl.where(valid, logsum - of_target, 0.0))
    tl.store(LOGSUM + row, tl.where(valid, logsum, 0.0))
    if GRADIENT:
        factor = tl.where(valid, 1.0 + 2.0 * z_loss * logsum, 0.0) / total
        tl.debug_barrier()  # the target's logit has been read by all threads before one overwrites it
        for first in range(0, V, BLOCK):
            x = tl.load(logits + first + v, mask=first + v < V, other=float("-inf")).to(tl.float32)
            gradient = tl.exp(x - largest) * factor
            gradient -= tl.where(valid & (first + v == target), 1.0, 0.0)
            tl.store(logits + first + v, gradient.to(LOGITS.dtype.element_ty), mask=first + v < V)


def forward(logits: Tensor, target: Tensor, z_loss: float, gradient: bool) -> tuple[Tensor, Tensor]:
    """See `softmax_cross_entropy_`. The logits are contiguous and not float64."""
    (C, V), target = logits.shape, target.contiguous()
    assert logits.is_contiguous(), "the gradient takes the place of the logits"
    loss, logsum = torch.empty(2, C, device=logits.device)
    with _on(logits):
        _forward[C,](logits, target, loss, logsum, V, z_loss, BLOCK=block(V), GRADIENT=gradient, **OPTIONS)
    return loss, logsum
