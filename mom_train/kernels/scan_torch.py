"""The selective scan in PyTorch, on any device: sequential within a chunk, all channels and states at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK_BYTES = 8 << 20  # work buffers of one chunk, sized to stay in the processor's cache


def chunk_length(batch: int, length: int, channels: int, state: int) -> int:
    return max(1, min(length, max(8, _CHUNK_BYTES // (batch * channels * state * 4))))


def new_states(x: Tensor, A: Tensor, batch: int, keep: bool) -> Tensor:
    """The states before each chunk (chunks, B, N, D), all that the backward needs beside its inputs."""
    if not keep:
        return A.new_empty(0)
    length = x.shape[0] // batch
    return A.new_empty(-(-length // chunk_length(batch, length, *A.shape)), batch, A.shape[1], A.shape[0])


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


def forward(
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
    step = chunk_length(batch, L, Dn, N)
    states = new_states(x, A, batch, keep).to(dtype)
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


def backward(
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
    step = chunk_length(batch, L, Dn, N)
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
