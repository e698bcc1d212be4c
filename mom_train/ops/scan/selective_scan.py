"""The selective scan of Mamba-1 with resets at documents, a dt bias per modality, a gate and a carried state."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mom_train.ops import backends, mamba_ssm
from mom_train.ops.layout import RowLayout


def selective_scan(
    x_TD: Tensor,
    dt_TD: Tensor,
    A_DN: Tensor,
    B_TN: Tensor,
    C_TN: Tensor,
    D_D: Tensor,
    z_TD: Tensor,
    dt_bias_MD: Tensor,
    layout: RowLayout,
    h0_BDN: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """y = (C.h + D x) silu(z), with h = exp(Delta A) h + Delta B x and Delta = softplus(dt + dt_bias[modality]).

    All row tensors are in row order and may be strided views along rows. A_DN <= 0; A, D, dt_bias and h0 are fp32.
    The recurrence runs in fp32 (float64 for float64 inputs) whatever the dtype of the rows. The state is set to zero
    before the first token of a document. `h0_BDN` (B, D, N) is the state before each row, or zero if it is None.
    Returns y (T, D) in the dtype of x and the last states (B, D, N) in fp32; both carry gradients.

    backend: "torch" (any device), "c" (CPU with a compiler), "triton" (NVIDIA GPU) or "mamba_ssm" (the CUDA kernels of
    that package, if installed). None chooses one (see backends.py).
    """
    inputs = (x_TD, dt_TD, A_DN, B_TN, C_TN, D_D, z_TD, dt_bias_MD)
    if (backend or backends.forced) == "mamba_ssm":
        return mamba_ssm.selective_scan(*inputs, layout, h0_BDN)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (*inputs, h0_BDN) if t is not None)
    y, hT, _ = _scan(
        *inputs,
        h0_BDN,
        layout.order,
        layout.rows,
        layout.modality,
        layout.position,
        layout.batch,
        backend or "auto",
        keep,
    )
    return y, hT


def _module(backend: str, x: Tensor, A: Tensor) -> ModuleType:
    """The module of the backend, with `forward`, `backward` and `new_states` (what is kept for the backward pass).

    It is chosen inside the operator because torch.compile does not trace what happens there.
    """
    return backends.module("scan", backend, x, A.shape[1])


@torch.library.custom_op("mom::selective_scan", mutates_args=())
def _scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    dt_bias: Tensor,
    h0: Tensor | None,
    order: Tensor,
    rows: Tensor,
    modality: Tensor,
    position: Tensor,
    batch: int,
    backend: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _module(backend, x, A).forward(
        x, dt, A, B, C, D, z, dt_bias, h0, order, rows, modality, position, batch, keep
    )


@_scan.register_fake
def _(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    dt_bias: Tensor,
    h0: Tensor | None,
    order: Tensor,
    rows: Tensor,
    modality: Tensor,
    position: Tensor,
    batch: int,
    backend: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), A.new_empty(batch, *A.shape), _module(backend, x, A).new_states(x, A, batch, keep)


@torch.library.custom_op("mom::selective_scan_backward", mutates_args=())
def _scan_backward(
    grad_y: Tensor,
    grad_hT: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    dt_bias: Tensor,
    states: Tensor,
    order: Tensor,
    rows: Tensor,
    modality: Tensor,
    position: Tensor,
    batch: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    grads = _module(backend, x, A).backward(
        grad_y, grad_hT, x, dt, A, B, C, D, z, dt_bias, states, order, rows, modality, position, batch
    )
    like = (x, dt, A, B, C, D, z, dt_bias, A)
    return tuple(g.to(t.dtype) for g, t in zip(grads, like, strict=True))


@_scan_backward.register_fake
def _(
    grad_y: Tensor,
    grad_hT: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    dt_bias: Tensor,
    states: Tensor,
    order: Tensor,
    rows: Tensor,
    modality: Tensor,
    position: Tensor,
    batch: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    x_, dt_, A_, B_, C_, D_, z_, bias_ = (t.new_empty(t.shape) for t in (x, dt, A, B, C, D, z, dt_bias))
    return x_, dt_, A_, B_, C_, D_, z_, bias_, A.new_empty(batch, *A.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, h0, order, rows, modality, position, batch, backend, _ = inputs
    ctx.save_for_backward(*tensors, output[2], order, rows, modality, position)
    ctx.batch, ctx.backend, ctx.has_h0 = batch, backend, h0 is not None


def _backward(ctx: Any, grad_y: Tensor, grad_hT: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *grads, grad_h0 = _scan_backward(grad_y, grad_hT, *ctx.saved_tensors, ctx.batch, ctx.backend)
    return (*grads, grad_h0 if ctx.has_h0 else None, *[None] * 7)


_scan.register_autograd(_backward, setup_context=_setup_context)


# The convention of Mamba's authors (state-spaces/mamba issue 110): 9 operations per channel and state, and 2 per
# channel for D and the gate.
@register_flop_formula(torch.ops.mom.selective_scan)
def _flops(x_shape: Any, dt_shape: Any, A_shape: Any, *args: Any, **kwargs: Any) -> int:
    return x_shape[0] * A_shape[0] * (9 * A_shape[1] + 2)


@register_flop_formula(torch.ops.mom.selective_scan_backward)
def _backward_flops(gy: Any, ghT: Any, x_shape: Any, dt_shape: Any, A_shape: Any, *args: Any, **kw: Any) -> int:
    return 2 * x_shape[0] * A_shape[0] * (9 * A_shape[1] + 2)
