"""The causal convolution in PyTorch, on any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK = 128  # positions at a time, so that the several passes over them find them in the cache


def why_not(x: Tensor, taps: int) -> str | None:
    """Returns None: this backend can always run."""
    return None


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, initial: Tensor | None,
    order: Tensor, rows: Tensor, position: Tensor, batch: int,
) -> Tensor:  # fmt: skip
    padded, taps, masks = _inputs(x, weight, initial, order, position, batch)
    L = order.shape[0] // batch
    y = padded.new_empty(batch, L, x.shape[1])
    for s in range(0, L, _CHUNK):
        e = min(s + _CHUNK, L)
        y[:, s:e] = F.silu(_preactivation(padded, taps, bias, masks, s, e))
    return y.view(-1, x.shape[1]).index_select(0, rows).to(x.dtype)


def backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, initial: Tensor | None,
    order: Tensor, rows: Tensor, position: Tensor, batch: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    K, L, D = weight.shape[1], order.shape[0] // batch, x.shape[1]
    padded, taps, masks = _inputs(x, weight, initial, order, position, batch)
    gy = grad_y.index_select(0, order).to(padded.dtype).view(batch, L, D)
    gpadded = torch.zeros_like(padded)
    gtaps, gbias = torch.zeros_like(taps), torch.zeros_like(bias, dtype=padded.dtype)
    for s in range(0, L, _CHUNK):
        e = min(s + _CHUNK, L)
        pre = _preactivation(padded, taps, bias, masks, s, e)
        g = torch.ops.aten.silu_backward(gy[:, s:e].contiguous(), pre)
        gbias += g.sum((0, 1))
        for k in range(K):
            gk = g if k == 0 else g * masks[k][:, s:e]
            window = slice(K - 1 + s - k, K - 1 + e - k)
            gtaps[K - 1 - k] += (gk * padded[:, window]).sum((0, 1))
            gpadded[:, window].addcmul_(gk, taps[K - 1 - k])
    gx = gpadded[:, K - 1 :].reshape(-1, D).index_select(0, rows)
    ginitial = gpadded[:, : K - 1].to(x.dtype).contiguous()
    return gx.to(x.dtype), gtaps.t().contiguous().to(weight.dtype), gbias.to(bias.dtype), ginitial


def _inputs(
    x: Tensor, weight: Tensor, initial: Tensor | None, order: Tensor, position: Tensor, batch: int
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The rows in time order after the K-1 inputs before them (B, K-1+L, D), the taps (K, D), and for each lag k the
    mask (B, L, 1) of positions whose document reaches back that far."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    K, D = weight.shape[1], x.shape[1]
    L = order.shape[0] // batch
    padded = x.new_zeros(batch, K - 1 + L, D, dtype=dtype)
    if initial is not None:
        padded[:, : K - 1] = initial
    padded[:, K - 1 :] = x.index_select(0, order).view(batch, L, D)
    masks = [(position.view(batch, L, 1) >= k).to(dtype) for k in range(K)]
    return padded, weight.to(dtype).t().contiguous(), masks


def _preactivation(padded: Tensor, taps: Tensor, bias: Tensor, masks: list[Tensor], s: int, e: int) -> Tensor:
    K = taps.shape[0]
    y = torch.addcmul(bias.to(padded.dtype), padded[:, K - 1 + s : K - 1 + e], taps[K - 1])
    for k in range(1, K):
        y.addcmul_(padded[:, K - 1 + s - k : K - 1 + e - k] * masks[k][:, s:e], taps[K - 1 - k])
    return y
