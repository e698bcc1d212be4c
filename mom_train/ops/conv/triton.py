"""The causal convolution in Triton, for NVIDIA GPUs. `backends` imports this module only if triton is installed.

One program goes through a span of one batch row with the last K inputs of a block of channels in registers, so that
every row is read once. Gradients of the weight are added up from one partial sum per span, without atomic additions.
"""

# The kernels are in Triton's own Python, which is untyped and in which tuples grow by `+`.
# mypy: allow-untyped-defs, disable-error-code="assignment,var-annotated,operator"
# ruff: noqa: RUF005

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mom_train.ops.scan.triton import OPTIONS, _alive, _is_wide, _on, _row, _rows, _sigmoid, why_no_device

SPAN = 64  # steps per program: few enough to fill the device, many compared with the K-1 that are read twice
_STEPS = 4  # number of steps loaded ahead


def why_not(x: Tensor, taps: int) -> str | None:
    """The reason why these kernels cannot run on rows like x (T, D), or None if they can."""
    if obstacle := why_no_device(x):
        return obstacle
    if x.dtype == torch.float64:
        return "they compute in fp32, not float64"
    if x.shape[1] % 32:
        return f"{x.shape[1]} channels are not a multiple of 32"
    return None if taps <= 8 else f"{taps} taps are more than 8"


def channel_block(channels: int) -> int:
    """Number of channels per program."""
    return math.gcd(channels, 128)


@triton.jit
def _input(X, INITIAL, ORDER, b, t, L, d, D, sx, K: tl.constexpr, HAS_INITIAL: tl.constexpr, WIDE: tl.constexpr):
    """The input at time t >= -(K-1) of row b. Before the row, it is the input that was carried in, or 0."""
    row = _row(ORDER, b * L + tl.minimum(tl.maximum(t, 0), L - 1), WIDE)
    now = t + 0 * d >= 0
    x = tl.load(X + row * sx + d, mask=now, other=0.0).to(tl.float32)
    if HAS_INITIAL:
        before = tl.load(INITIAL + (b * (K - 1) + K - 1 + t) * D + d, mask=t + 0 * d < 0, other=0.0)
        x = tl.where(now, x, before.to(tl.float32))
    return x


@triton.jit
def _taps(W, d, D, K: tl.constexpr):
    taps = ()
    for k in tl.static_range(K):
        taps = taps + (tl.load(W + (K - 1 - k) * D + d),)
    return taps


@triton.jit
def _reach(window, position, K: tl.constexpr):
    """The inputs 0 to K-1 steps back, with 0 for those before the document."""
    reached = (window[0],)
    for k in tl.static_range(1, K):
        reached = reached + (tl.where(position >= k, window[k], 0.0),)
    return reached


@triton.jit
def _preactivation(reached, taps, bias, K: tl.constexpr):
    pre = bias
    for k in tl.static_range(K):
        pre += taps[k] * reached[k]
    return pre


@triton.jit(do_not_specialize=["L"])
def _forward(
    X, W, BIAS, INITIAL, ORDER, POSITION, Y, L, D, sx,
    K: tl.constexpr, BD: tl.constexpr, SPAN: tl.constexpr, S: tl.constexpr, HAS_INITIAL: tl.constexpr,
    WIDE: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    b, first = tl.program_id(2), tl.program_id(1) * SPAN
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    taps, bias = _taps(W, d, D, K), tl.load(BIAS + d)
    past = ()
    for k in tl.static_range(1, K):
        t = first - k
        past = past + (_input(X, INITIAL, ORDER, b, t, L, d, D, sx, K, HAS_INITIAL, WIDE),)
    for t0 in range(first, first + SPAN, S):
        now = ()
        for s in tl.static_range(S):
            t = b * L + tl.minimum(t0 + s, L - 1)
            row = _row(ORDER, t, WIDE)
            now = now + ((row, tl.load(X + row * sx + d), tl.load(POSITION + t)),)
        for s in tl.static_range(S):
            row, x, position = now[s]
            window = (x.to(tl.float32),) + past
            pre = _preactivation(_reach(window, position, K), taps, bias, K)
            y = (pre * _sigmoid(pre)).to(Y.dtype.element_ty)
            tl.store(Y + row * D + d, y, mask=_alive(t0 + s, d, L, EVEN))
            past = window[: K - 1]


@triton.jit(do_not_specialize=["L"])
def _backward(
    X, W, BIAS, INITIAL, ORDER, POSITION, GY, GX, GW, GBIAS, GINITIAL, L, D, sx, sgy,
    K: tl.constexpr, BD: tl.constexpr, SPAN: tl.constexpr, S: tl.constexpr, HAS_INITIAL: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Processes the steps of the span and K-1 more, whose gradients reach the inputs of the span.

    GW is (B x spans, K, D) and GBIAS (B x spans, D).
    """
    b, span = tl.program_id(2), tl.program_id(1)
    first, last = span * SPAN, tl.minimum((span + 1) * SPAN, L)
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    taps, bias = _taps(W, d, D, K), tl.load(BIAS + d)
    gbias = tl.full([BD], 0.0, tl.float32)
    past, pending, gtaps = (), (), (gbias,)  # pending[k] is the gradient so far of the input k+1 steps back
    for k in tl.static_range(1, K):
        t = first - k
        past = past + (_input(X, INITIAL, ORDER, b, t, L, d, D, sx, K, HAS_INITIAL, WIDE),)
        pending, gtaps = pending + (gbias,), gtaps + (gbias,)
    for t0 in range(first, last + K - 1, S):
        now = ()
        for s in tl.static_range(S):
            t = b * L + tl.minimum(t0 + s, L - 1)
            row = _row(ORDER, t, WIDE)
            emitted = _row(ORDER, b * L + tl.minimum(tl.maximum(t0 + s - (K - 1), 0), L - 1), WIDE)
            now = now + ((emitted, tl.load(X + row * sx + d), tl.load(GY + row * sgy + d), tl.load(POSITION + t)),)
        for s in tl.static_range(S):
            emitted, x, gy, position = now[s]
            window = (x.to(tl.float32),) + past
            reached = _reach(window, position, K)
            pre = _preactivation(reached, taps, bias, K)
            sigmoid = _sigmoid(pre)
            g = tl.where(t0 + s + 0 * d < L, gy.to(tl.float32) * sigmoid * (1.0 + pre * (1.0 - sigmoid)), 0.0)
            own = tl.where(t0 + s + 0 * d < last, g, 0.0)  # later steps belong to the sums of the next span
            gbias += own
            sums, owed = (), (g * taps[0],)
            for k in tl.static_range(K):
                sums = sums + (gtaps[k] + own * reached[k],)
            for k in tl.static_range(1, K):
                owed = owed + (pending[k - 1] + tl.where(position >= k, g * taps[k], 0.0),)
            gtaps = sums
            e = t0 + s - (K - 1)  # no later step reaches this input
            mine = (e + 0 * d >= first) & (e + 0 * d < last)
            tl.store(GX + emitted * D + d, owed[K - 1].to(GX.dtype.element_ty), mask=mine)
            if HAS_INITIAL:
                carried = (b * (K - 1) + K - 1 + e) * D + d
                tl.store(GINITIAL + carried, owed[K - 1].to(GINITIAL.dtype.element_ty), mask=e + 0 * d < 0)
            past, pending = window[: K - 1], owed[: K - 1]
    flat = b * tl.num_programs(1) + span
    for k in tl.static_range(K):
        tl.store(GW + (flat * K + (K - 1 - k)) * D + d, gtaps[k])
    tl.store(GBIAS + flat * D + d, gbias)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, initial: Tensor | None,
    order: Tensor, rows: Tensor, position: Tensor, batch: int,
) -> Tensor:  # fmt: skip
    """See `causal_conv`."""
    (T, D), K = x.shape, weight.shape[1]
    L, BD = T // batch, channel_block(D)
    (x,) = _rows(x)
    y = x.new_empty(T, D)
    initial = initial if initial is None else initial.contiguous()
    with _on(x):
        _forward[D // BD, -(-L // SPAN), batch](
            x, weight.float().t().contiguous(), bias.float().contiguous(), x if initial is None else initial, order,
            position, y, L, D, x.stride(0), K=K, BD=BD, SPAN=SPAN, S=_STEPS, HAS_INITIAL=initial is not None,
            WIDE=_is_wide(x, y), EVEN=L % SPAN == 0, **OPTIONS,
        )  # fmt: skip
    return y


def backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, initial: Tensor | None,
    order: Tensor, rows: Tensor, position: Tensor, batch: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    (T, D), K = x.shape, weight.shape[1]
    L, BD = T // batch, channel_block(D)
    x, gy = _rows(x, grad_y)
    spans = -(-L // SPAN)
    gx, ginitial = x.new_empty(T, D), x.new_empty(batch, K - 1, D)
    gweight = torch.empty(batch * spans, K, D, device=x.device)
    gbias = torch.empty(batch * spans, D, device=x.device)
    initial = initial if initial is None else initial.contiguous()
    with _on(x):
        _backward[D // BD, spans, batch](
            x, weight.float().t().contiguous(), bias.float().contiguous(), x if initial is None else initial, order,
            position, gy, gx, gweight, gbias, ginitial, L, D, x.stride(0), gy.stride(0), K=K, BD=BD, SPAN=SPAN,
            S=_STEPS, HAS_INITIAL=initial is not None, WIDE=_is_wide(x, gy, gx), **OPTIONS,
        )  # fmt: skip
    return gx, gweight.sum(0).t().contiguous().to(weight.dtype), gbias.sum(0).to(bias.dtype), ginitial
