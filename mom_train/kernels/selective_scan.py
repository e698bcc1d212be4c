"""The selective scan of Mamba-1 with document resets, modality-chosen dt bias, gate and carried state."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mom_train.kernels import native
from mom_train.kernels.native import integer, pointer, threads
from mom_train.layout import RowLayout

# Work buffers of one chunk in the PyTorch backend, sized to stay in the processor's cache.
_CHUNK_BYTES = 8 << 20
_C_CHUNK = 32
_C_RANGE = 256  # channels per work item of the C backend: fixed, so that sums do not depend on threads


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

    All row tensors are in row order and may be strided views along rows; A_DN <= 0, A, D, dt_bias and h0 are
    fp32. The recurrence runs in fp32 (float64 for float64 inputs) whatever the rows' dtype. The state is zeroed
    before the first token of a document. Returns y (T, D) in x's dtype and the last states (B, D, N) fp32;
    both carry gradients.

    backend: "torch" (any device), "c" (CPU with a compiler), None picks.
    """
    backend = backend or choose_backend(x_TD, A_DN.shape[1])
    inputs = (x_TD, dt_TD, A_DN, B_TN, C_TN, D_D, z_TD, dt_bias_MD)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (*inputs, h0_BDN) if t is not None)
    y, hT, _ = _scan(
        *inputs,
        h0_BDN,
        layout.order,
        layout.rows,
        layout.modality,
        layout.position,
        layout.batch,
        backend,
        keep,
    )
    return y, hT


def choose_backend(x_TD: Tensor, state: int) -> str:
    """The C kernels where they apply: CPU, not float64, channels in whole vectors, a compiler present."""
    if x_TD.device.type != "cpu" or x_TD.dtype == torch.float64 or x_TD.shape[1] % native.LANES:
        return "torch"
    return "c" if native.available(state) else "torch"


def _chunk(backend: str, B: int, L: int, D: int, N: int) -> int:
    if backend == "c":
        return min(L, _C_CHUNK)
    return max(1, min(L, max(8, _CHUNK_BYTES // (B * D * N * 4))))


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
    forward = _c_forward if backend == "c" else _torch_forward
    return forward(x, dt, A, B, C, D, z, dt_bias, h0, order, rows, modality, position, batch, keep)


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
    return x.new_empty(x.shape), A.new_empty(batch, *A.shape), _new_states(x, A, batch, backend, keep)


def _new_states(x: Tensor, A: Tensor, batch: int, backend: str, keep: bool) -> Tensor:
    """The states before each chunk, all that the backward needs beside its inputs; layout is the backend's own."""
    if not keep:
        return A.new_empty(0)
    length = x.shape[0] // batch
    chunks = -(-length // _chunk(backend, batch, length, *A.shape))
    return A.new_empty(chunks, batch, A.shape[1], A.shape[0])


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
    backward = _c_backward if backend == "c" else _torch_backward
    grads = backward(grad_y, grad_hT, x, dt, A, B, C, D, z, dt_bias, states, order, rows, modality, position, batch)
    like = (x, dt, A, B, C, D, z, dt_bias, A)
    return tuple(g.to(t.dtype) for g, t in zip(grads, like, strict=True))  # type: ignore[return-value]


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


# The authors' convention (state-spaces/mamba issue 110): 9 operations per channel and state, and 2 for D and gate.
@register_flop_formula(torch.ops.mom.selective_scan)
def _flops(x_shape: Any, dt_shape: Any, A_shape: Any, *args: Any, **kwargs: Any) -> int:
    return x_shape[0] * A_shape[0] * (9 * A_shape[1] + 2)


@register_flop_formula(torch.ops.mom.selective_scan_backward)
def _backward_flops(gy: Any, ghT: Any, x_shape: Any, dt_shape: Any, A_shape: Any, *args: Any, **kw: Any) -> int:
    return 2 * x_shape[0] * A_shape[0] * (9 * A_shape[1] + 2)


# ---- PyTorch: sequential within a chunk, all channels and states at once; states recomputed in the backward ----


def _in_time(t: Tensor, order: Tensor, batch: int, dtype: torch.dtype) -> Tensor:
    return t.index_select(0, order).to(dtype).view(batch, order.shape[0] // batch, -1)


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _chunk_states(
    delta: Tensor,
    du: Tensor,
    A_ND: Tensor,
    B: Tensor,
    first: Tensor,
    h: Tensor,
    decay: Tensor,
    states: Tensor,
) -> Tensor:
    """Fill decay and states (B, t, N, D) of one chunk that starts from h (B, N, D); return the last state."""
    torch.mul(delta.unsqueeze(2), A_ND, out=decay).exp_()
    if first.device.type != "cpu" or bool(first.any()):  # on the CPU a look is cheaper than the pass
        decay.masked_fill_(first[:, :, None, None], 0)
    torch.mul(du.unsqueeze(2), B.unsqueeze(3), out=states)
    for a, s in zip(decay.unbind(1), states.unbind(1), strict=True):
        s.addcmul_(a, h)
        h = s
    return h


def _contract(weights: Tensor, states: Tensor) -> Tensor:
    """Sum over n of weights (B, t, N) times states (B, t, N, D)."""
    B, t, N, D = states.shape
    return torch.bmm(weights.reshape(B * t, 1, N), states.reshape(B * t, N, D)).view(B, t, D)


def _contract_channels(states: Tensor, channels: Tensor) -> Tensor:
    """Sum over d of states (B, t, N, D) times channels (B, t, D)."""
    B, t, N, D = states.shape
    return torch.bmm(states.reshape(B * t, N, D), channels.reshape(B * t, D, 1)).view(B, t, N)


def _torch_forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor,
    h0: Tensor | None, order: Tensor, rows: Tensor, modality: Tensor, position: Tensor, batch: int, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dtype = _compute_dtype(x)
    xt, dtt, Bt, Ct, zt = (_in_time(t, order, batch, dtype) for t in (x, dt, B, C, z))
    _, L, Dn = xt.shape
    N = A.shape[1]
    delta = F.softplus(dtt.add_(dt_bias.to(dtype)[modality.long()].view(batch, L, Dn)))
    first = (position == 0).view(batch, L)
    A_ND = A.to(dtype).t().contiguous()
    step = _chunk("torch", batch, L, Dn, N)
    states = _new_states(x, A, batch, "torch", keep).to(dtype)
    du = delta * xt
    y = xt * D.to(dtype)
    h = xt.new_zeros(batch, N, Dn) if h0 is None else h0.to(dtype).transpose(1, 2).contiguous()
    buffers = [xt.new_empty(batch * min(step, L), N, Dn) for _ in range(2)]  # reused: fresh pages cost more than exp
    for c, s in enumerate(range(0, L, step)):
        e = min(s + step, L)
        if keep:
            states[c].copy_(h)
        decay, chunk = (b[: batch * (e - s)].view(batch, e - s, N, Dn) for b in buffers)
        h = _chunk_states(delta[:, s:e], du[:, s:e], A_ND, Bt[:, s:e], first[:, s:e], h, decay, chunk)
        y[:, s:e] += _contract(Ct[:, s:e], chunk)
        h = h.clone()  # out of the buffer that the next chunk overwrites
    y *= F.silu(zt)
    hT = h.transpose(1, 2).contiguous().to(A.dtype)
    return y.view(-1, Dn).index_select(0, rows).to(x.dtype), hT, states.to(A.dtype)


def _torch_backward(
    grad_y: Tensor, grad_hT: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor,
    dt_bias: Tensor, states: Tensor, order: Tensor, rows: Tensor, modality: Tensor, position: Tensor, batch: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    dtype = _compute_dtype(x)
    gy, xt, raw, Bt, Ct, zt = (_in_time(t, order, batch, dtype) for t in (grad_y, x, dt, B, C, z))
    _, L, Dn = xt.shape
    N = A.shape[1]
    raw = raw.add_(dt_bias.to(dtype)[modality.long()].view(batch, L, Dn))
    delta = F.softplus(raw)
    first = (position == 0).view(batch, L)
    A_ND = A.to(dtype).t().contiguous()
    step = _chunk("torch", batch, L, Dn, N)
    du = delta * xt

    sg = torch.sigmoid(zt)
    silu = zt * sg
    y = xt * D.to(dtype)  # becomes the output before the gate, chunk by chunk
    g = gy * silu
    gD = (g * xt).sum((0, 1))
    gx = g * D.to(dtype)
    gdelta = torch.empty_like(delta)
    gB, gC = torch.empty_like(Bt), torch.empty_like(Ct)
    gA_ND = torch.zeros_like(A_ND)
    carry = grad_hT.to(dtype).transpose(1, 2).contiguous()
    buffers = [xt.new_empty(batch * min(step, L), N, Dn) for _ in range(3)]
    for c in range(states.shape[0] - 1, -1, -1):
        s, e = c * step, min((c + 1) * step, L)
        h = states[c].to(dtype)
        decay, chunk, gh = (b[: batch * (e - s)].view(batch, e - s, N, Dn) for b in buffers)
        _chunk_states(delta[:, s:e], du[:, s:e], A_ND, Bt[:, s:e], first[:, s:e], h, decay, chunk)
        y[:, s:e] += _contract(Ct[:, s:e], chunk)
        torch.mul(g[:, s:e].unsqueeze(2), Ct[:, s:e].unsqueeze(3), out=gh)
        decays, ghs = decay.unbind(1), gh.unbind(1)
        ghs[-1].add_(carry)
        for t in range(e - s - 2, -1, -1):
            ghs[t].addcmul_(decays[t + 1], ghs[t + 1])
        carry = decays[0] * ghs[0]
        gC[:, s:e] = _contract_channels(chunk, g[:, s:e])
        gB[:, s:e] = _contract_channels(gh, du[:, s:e])
        gdu = _contract(Bt[:, s:e], gh)
        # d(decay) * decay = gh * decay * h_before, the gradient of Delta*A
        decay.mul_(gh)
        decay[:, 1:].mul_(chunk[:, :-1])
        decay[:, 0].mul_(h)
        gdelta[:, s:e] = torch.mul(decay, A_ND, out=chunk).sum(2).addcmul_(gdu, xt[:, s:e])
        gA_ND += decay.mul_(delta[:, s:e].unsqueeze(2)).sum((0, 1))
        gx[:, s:e].addcmul_(gdu, delta[:, s:e])
    gz = gy * y * (sg + silu * (1 - sg))
    graw = gdelta.mul_(torch.sigmoid(raw))
    # one-hot matmul instead of index_add_: the same result on every run, on any device
    chosen = F.one_hot(modality.long(), dt_bias.shape[0]).to(dtype)
    gbias = chosen.t() @ graw.view(-1, Dn)
    in_rows = [t.reshape(batch * L, -1).index_select(0, rows) for t in (gx, graw, gB, gC, gz)]
    return (in_rows[0], in_rows[1], gA_ND.t().contiguous(), in_rows[2], in_rows[3], gD, in_rows[4], gbias,
            carry.transpose(1, 2).contiguous())  # fmt: skip


# ---- C -----------------------------------------------------------------------------------------------------


def _c_inputs(x: Tensor, dt: Tensor, B: Tensor, C: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    B, C = native.rows(B), native.rows(C)
    if B.stride(0) != C.stride(0):
        B, C = B.contiguous(), C.contiguous()
    return x.float().contiguous(), dt.float().contiguous(), B, C, native.rows(z)


def _c_forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor,
    h0: Tensor | None, order: Tensor, rows: Tensor, modality: Tensor, position: Tensor, batch: int, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    Dn, N = A.shape
    L = x.shape[0] // batch
    library = native.library(N)
    assert library is not None
    xc, dtc, Bc, Cc, zc = _c_inputs(x, dt, B, C, z)
    A, D, dt_bias = A.contiguous(), D.contiguous(), dt_bias.contiguous()
    h0 = h0 if h0 is None else h0.contiguous()
    y, hT, states = torch.empty_like(xc), A.new_empty(batch, Dn, N), _new_states(x, A, batch, "c", keep)
    library.mom_scan_forward(
        integer(batch), integer(L), integer(Dn), integer(_chunk("c", batch, L, Dn, N)),
        integer(-(-Dn // _C_RANGE)), pointer(dtc), pointer(xc), pointer(A), pointer(Bc), pointer(Cc),
        integer(Bc.stride(0)), pointer(D), pointer(zc), integer(zc.stride(0)), pointer(dt_bias), pointer(order),
        pointer(modality), pointer(position), pointer(h0), pointer(y), pointer(hT),
        pointer(states if keep else None), threads(),
    )  # fmt: skip
    return y.to(x.dtype), hT, states


def _c_backward(
    grad_y: Tensor, grad_hT: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor,
    dt_bias: Tensor, states: Tensor, order: Tensor, rows: Tensor, modality: Tensor, position: Tensor, batch: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    Dn, N = A.shape
    T, M = x.shape[0], dt_bias.shape[0]
    L, ranges = T // batch, -(-Dn // _C_RANGE)
    library = native.library(N)
    assert library is not None
    xc, dtc, Bc, Cc, zc = _c_inputs(x, dt, B, C, z)
    A, D, dt_bias = A.contiguous(), D.contiguous(), dt_bias.contiguous()
    gy, ghT = grad_y.float().contiguous(), grad_hT.float().contiguous()
    gdt, gx, gz = (torch.empty_like(xc) for _ in range(3))
    gA, gh0 = A.new_empty(batch, Dn, N), A.new_empty(batch, Dn, N)
    gB, gC = A.new_empty(ranges, T, N), A.new_empty(ranges, T, N)
    gD, gbias = A.new_empty(batch, Dn), A.new_empty(batch, M, Dn)
    library.mom_scan_backward(
        integer(batch), integer(L), integer(Dn), integer(_chunk("c", batch, L, Dn, N)), integer(ranges), integer(M),
        pointer(dtc), pointer(xc), pointer(A), pointer(Bc), pointer(Cc), integer(Bc.stride(0)), pointer(D),
        pointer(zc), integer(zc.stride(0)), pointer(dt_bias), pointer(order), pointer(modality), pointer(position),
        pointer(states), pointer(gy), pointer(ghT), pointer(gdt), pointer(gx), pointer(gz), pointer(gA), pointer(gB),
        pointer(gC), pointer(gD), pointer(gbias), pointer(gh0), threads(),
    )  # fmt: skip
    return gx, gdt, gA.sum(0), gB.sum(0), gC.sum(0), gD.sum(0), gz, gbias.sum(0), gh0
