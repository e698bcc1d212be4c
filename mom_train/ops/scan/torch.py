"""The selective scan in PyTorch, on any device. It is sequential in time and takes all channels and states at once.

The steps are processed in chunks, so that tensors with an element for each token and channel are small and short-lived.
Tensors with an element for each token, channel and state are made in smaller tiles, which nearly fit the second-level
cache, because every operation passes over its whole operands. The state before each chunk is stored; the backward pass
computes the other states again.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_STEP, _TILE, _CHUNK = 1 << 16, 1 << 18, 1 << 22
"""Number of elements (rows x channels x states) of one step, of a tile and of a chunk. Smaller tiles would fit the
cache better, but then a call would cost as much as its work. The sizes do not depend on the number of threads, so that
sums keep their order."""


def why_not(x: Tensor, state: int) -> str | None:
    """Returns None: this backend can always run."""
    return None


def _sizes(x: Tensor, A: Tensor, batch: int) -> tuple[int, int, int]:
    """Returns (rows, steps of a chunk, steps of a tile). On a GPU, where calls are expensive, a tile is a whole
    chunk."""
    rows = batch if x.device.type != "cpu" else min(batch, max(1, _STEP // A.numel()))
    chunk = min(max(8, _CHUNK // (rows * A.numel())), x.shape[0] // batch)
    return rows, chunk, chunk if x.device.type != "cpu" else min(chunk, max(1, _TILE // (rows * A.numel())))


def new_states(x: Tensor, A: Tensor, batch: int, keep: bool) -> Tensor:
    """An empty tensor for the states before each chunk (chunks, B, N, D), which the backward pass needs."""
    if not keep:
        return A.new_empty(0)
    return A.new_empty(-(-x.shape[0] // batch // _sizes(x, A, batch)[1]), batch, A.shape[1], A.shape[0])


def _time_major(t: Tensor, batch: int) -> Tensor:
    """Turns (batch * L,), row after row, into (L, batch)."""
    return t.view(batch, -1).t()


def _take(t: Tensor, where_K: Tensor, dtype: torch.dtype) -> Tensor:
    return t.index_select(0, where_K).to(dtype)


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _slices(start: int, stop: int, step: int) -> list[slice]:
    return [slice(i, min(i + step, stop)) for i in range(start, stop, step)]


def _decay(delta_KD: Tensor, A_ND: Tensor, first_K: Tensor, out: Tensor) -> Tensor:
    """exp(Delta A), with zero at the first token of a document, as (K, N, D) at the beginning of `out`."""
    out = torch.mul(delta_KD.unsqueeze(1), A_ND, out=out[: len(delta_KD)]).exp_()
    if out.device.type == "cpu":  # masked_fill_ passes over all elements and takes three times as long as exp_
        return out.index_fill_(0, first_K.nonzero().flatten(), 0)
    return out.masked_fill_(first_K[:, None, None], 0)


def _states(decay: Tensor, du_KD: Tensor, B_KN: Tensor, h_RND: Tensor, out: Tensor) -> Tensor:
    """Writes the states after each step of a tile that starts from h into `out` (K, N, D). Returns the last state."""
    torch.mul(du_KD.unsqueeze(1), B_KN.unsqueeze(2), out=out)
    steps = (-1, *h_RND.shape)
    for a, s in zip(decay.view(steps).unbind(), out.view(steps).unbind(), strict=True):
        s.addcmul_(a, h_RND)
        h_RND = s
    return h_RND


def _over_states(weights_KN: Tensor, states: Tensor) -> Tensor:
    """Sums weights times states (K, N, D) over n."""
    return torch.bmm(weights_KN.unsqueeze(1), states).squeeze(1)


def _over_channels(states: Tensor, channels_KD: Tensor, out_KN: Tensor) -> None:
    """Sums states (K, N, D) times channels over d into `out_KN`."""
    torch.bmm(states, channels_KD.unsqueeze(2), out=out_KN.unsqueeze(2))


def forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor,
    h0: Tensor | None, order: Tensor, rows: Tensor, modality: Tensor, position: Tensor, batch: int, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dtype = _compute_dtype(x)
    A_ND, bias = A.to(dtype).t().contiguous(), dt_bias.to(dtype)
    order_LB, modality_LB, position_LB = (_time_major(t, batch) for t in (order, modality, position))
    states = new_states(x, A, batch, keep).to(dtype)
    y = x.new_empty(x.shape)
    hT = A_ND.new_zeros(batch, *A_ND.shape)  # written in place, so it must not be the caller's h0 itself
    if h0 is not None:
        hT.copy_(h0.transpose(1, 2))
    at_once, chunk, steps = _sizes(x, A, batch)
    # The buffers are reused, because touching new memory pages takes more time than exp.
    buffers = [A_ND.new_empty(steps * at_once, *A_ND.shape) for _ in range(2)]
    for r in _slices(0, batch, at_once):
        h = hT[r]
        for i, c in enumerate(_slices(0, len(order_LB), chunk)):
            if keep:
                states[i, r] = h
            where, first = order_LB[c, r].flatten().long(), (position_LB[c, r] == 0).flatten()
            x_c, B_c, C_c, z_c = (_take(t, where, dtype) for t in (x, B, C, z))
            delta = F.softplus(_take(dt, where, dtype) + bias[modality_LB[c, r].flatten().long()])
            du = delta * x_c
            y_c = x_c * D.to(dtype)
            for t in _slices(0, len(where), steps * len(h)):
                decay = _decay(delta[t], A_ND, first[t], buffers[0])
                tile = buffers[1][: len(decay)]
                h.copy_(_states(decay, du[t], B_c[t], h, tile))
                y_c[t].add_(_over_states(C_c[t], tile))
            y.index_copy_(0, where, y_c.mul_(F.silu(z_c)).to(y.dtype))
    return y, hT.transpose(1, 2).contiguous().to(A.dtype), states.to(A.dtype)


def backward(
    grad_y: Tensor, grad_hT: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor,
    dt_bias: Tensor, states: Tensor, order: Tensor, rows: Tensor, modality: Tensor, position: Tensor, batch: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    dtype = _compute_dtype(x)
    A_ND, bias = A.to(dtype).t().contiguous(), dt_bias.to(dtype)
    order_LB, modality_LB, position_LB = (_time_major(t, batch) for t in (order, modality, position))
    gx, gdt, gB, gC, gz = (t.new_empty(t.shape) for t in (x, dt, B, C, z))
    gA_ND, gD, gbias = torch.zeros_like(A_ND), torch.zeros_like(D, dtype=dtype), torch.zeros_like(bias)
    gh0 = A_ND.new_empty(batch, *A_ND.shape).copy_(grad_hT.transpose(1, 2))  # written in place
    at_once, chunk, steps = _sizes(x, A, batch)
    all_states = A_ND.new_empty(chunk * at_once, *A_ND.shape)
    buffers = [A_ND.new_empty(steps * at_once, *A_ND.shape) for _ in range(2)]
    for r in _slices(0, batch, at_once):
        carry = gh0[r]  # gradient of the state before the steps processed last
        R = len(carry)
        for i, c in reversed(list(enumerate(_slices(0, len(order_LB), chunk)))):
            where, first = order_LB[c, r].flatten().long(), (position_LB[c, r] == 0).flatten()
            modality_K = modality_LB[c, r].flatten().long()
            x_c, B_c, C_c, z_c, gy = (_take(t, where, dtype) for t in (x, B, C, z, grad_y))
            raw = _take(dt, where, dtype) + bias[modality_K]
            delta = F.softplus(raw)
            du = delta * x_c
            gate = torch.sigmoid(z_c)
            g = gy * z_c * gate  # gradient of y_c, the output before the gate
            y_c = x_c * D.to(dtype)
            gC_c, gB_c, gdelta = torch.empty_like(C_c), torch.empty_like(B_c), torch.empty_like(delta)
            gx_c = g * D.to(dtype)
            before = states[i, r].to(dtype)
            h, h_c = before, all_states[: len(where)]
            tiles = _slices(0, len(where), steps * R)
            for t in tiles:
                decay = _decay(delta[t], A_ND, first[t], buffers[0])
                h = _states(decay, du[t], B_c[t], h, h_c[t])
                y_c[t].add_(_over_states(C_c[t], h_c[t]))
                _over_channels(h_c[t], g[t], gC_c[t])
            for t in reversed(tiles):
                decay = _decay(delta[t], A_ND, first[t], buffers[0])
                gh = torch.mul(g[t].unsqueeze(1), C_c[t].unsqueeze(2), out=buffers[1][: len(decay)])
                by_step = [b.view(-1, R, *A_ND.shape).unbind() for b in (decay, gh)]
                for a, gh_t in reversed(list(zip(*by_step, strict=True))):
                    gh_t.add_(carry)
                    carry = a.mul_(gh_t)
                carry = gh0[r].copy_(carry)  # copied, because it lies in a buffer
                _over_channels(gh, du[t], gB_c[t])
                gdu = _over_states(B_c[t], gh)
                # `decay` now holds gh * decay. Multiplied by the state before, it is the gradient of Delta * A.
                decay[:R].mul_(h_c[t.start - R : t.start] if t.start else before)
                decay[R:].mul_(h_c[t.start : t.stop - R])
                torch.sum(torch.mul(decay, A_ND, out=gh), 1, out=gdelta[t])
                gdelta[t].addcmul_(gdu, x_c[t])
                gA_ND.add_(decay.mul_(delta[t].unsqueeze(1)).sum(0))
                gx_c[t].addcmul_(gdu, delta[t])
            gdt_c = gdelta.mul_(torch.sigmoid(raw))
            gD.add_((g * x_c).sum(0))
            # A product with one-hot vectors, unlike index_add_, gives the same result on every run, on any device.
            gbias.addmm_(F.one_hot(modality_K, len(bias)).to(dtype).t(), gdt_c)
            gz_c = gy.mul_(y_c).mul_(gate * (1 + z_c * (1 - gate)))
            for part, whole in ((gx_c, gx), (gdt_c, gdt), (gB_c, gB), (gC_c, gC), (gz_c, gz)):
                whole.index_copy_(0, where, part.to(whole.dtype))
    return gx, gdt, gA_ND.t().contiguous(), gB, gC, gD, gz, gbias, gh0.transpose(1, 2).contiguous()
