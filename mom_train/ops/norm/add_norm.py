"""RMSNorm of a sum, with a scale for each modality: x + branch becomes the new residual and its norm in one pass."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mom_train.ops import backends
from mom_train.ops.layout import RowLayout


def add_norm(
    x_Td: Tensor,
    branch_Td: Tensor | None,
    weight_Md: Tensor,
    layout: RowLayout,
    eps: float,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """r = x + branch, and y[t] = r[t] / sqrt(mean(r[t]^2) + eps) * weight[m] with m the modality of row t.

    x_Td and branch_Td are (T, d) in row order; without a branch, r is x. weight_Md is (M, d) with M modalities, or
    (1, d) for a scale that all share. The computation is in fp32 (float64 for float64 rows). Returns (r, y): r in the
    dtype to which x and branch are promoted, y in `dtype`, or by default in the dtype of r.

    The kernel finds the modality of a row on the device, and the gradient of a modality without rows is 0.
    backend: "torch" or "triton". None takes Triton on an NVIDIA GPU and PyTorch's operations elsewhere.
    """
    wide = x_Td.dtype if branch_Td is None else torch.promote_types(x_Td.dtype, branch_Td.dtype)
    arguments = (x_Td, branch_Td, weight_Md, layout.modality, layout.rows, eps, dtype or wide, backend or "auto")
    residual_Td, y_Td = _add_norm(*arguments)
    return x_Td if branch_Td is None else residual_Td, y_Td


def _module(backend: str, x: Tensor) -> ModuleType:
    """The module of the backend, with `forward` and `backward`."""
    name = backends.triton_or_torch("norm", x) if backend == "auto" else backend
    return backends.module("norm", name, x, x.shape[1])


@torch.library.custom_op("mom::add_norm", mutates_args=())
def _add_norm(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    modality: Tensor,
    rows: Tensor,
    eps: float,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The first result is empty if there is no branch, because an operator's result is never one of its arguments."""
    return _module(backend, x).forward(x, branch, weight, modality, rows, eps, dtype)


@_add_norm.register_fake
def _(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    modality: Tensor,
    rows: Tensor,
    eps: float,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:
    wide = x.dtype if branch is None else torch.promote_types(x.dtype, branch.dtype)
    return x.new_empty(0 if branch is None else x.shape, dtype=wide), x.new_empty(x.shape, dtype=dtype)


@torch.library.custom_op("mom::add_norm_backward", mutates_args=())
def _add_norm_backward(
    grad_residual: Tensor,
    grad_normed: Tensor,
    residual: Tensor,
    weight: Tensor,
    modality: Tensor,
    rows: Tensor,
    eps: float,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, of the branch in `dtype` (empty if x has this dtype), and of the weight."""
    run = _module(backend, residual).backward
    return run(grad_residual, grad_normed, residual, weight, modality, rows, eps, dtype)


@_add_norm_backward.register_fake
def _(
    grad_residual: Tensor,
    grad_normed: Tensor,
    residual: Tensor,
    weight: Tensor,
    modality: Tensor,
    rows: Tensor,
    eps: float,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    of_branch = residual.new_empty(0 if dtype == residual.dtype else residual.shape, dtype=dtype)
    return residual.new_empty(residual.shape), of_branch, weight.new_empty(weight.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, branch, weight, modality, rows, eps, _, backend = inputs
    ctx.save_for_backward(x if branch is None else output[0], weight, modality, rows)
    ctx.dtypes = x.dtype, None if branch is None else branch.dtype
    ctx.eps, ctx.backend = eps, backend


def _backward(ctx: Any, grad_residual: Tensor, grad_normed: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # read only once: a second time is an error under activation checkpointing
    of_x, of_branch = ctx.dtypes
    wide = saved[0].dtype
    narrow = wide if of_branch is None or of_branch == wide else of_branch
    results = _add_norm_backward(grad_residual, grad_normed, *saved, ctx.eps, narrow, ctx.backend)
    grad_x, grad_branch, grad_weight = results
    if of_branch is None:
        return grad_x, None, grad_weight, *[None] * 5
    return grad_x.to(of_x), grad_x if narrow == wide else grad_branch, grad_weight, *[None] * 5


_add_norm.register_autograd(_backward, setup_context=_setup_context)
