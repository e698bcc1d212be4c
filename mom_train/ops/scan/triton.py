"""The selective scan in Triton, for NVIDIA GPUs. `backends` imports this module only if triton is installed.

One program processes one batch row and a block of channels. Its fp32 state is a tile (N, channels) that never leaves
the registers, and B and C are read once per block. The backward pass recomputes states one chunk at a time. If there
are too few rows to fill the device, each is cut into spans that run side by side (`span_count`): first the end state
and the decay of each span alone are computed, then these are combined sequentially over spans, then the outputs are
computed. There are no atomic additions: sums over channel blocks, rows and spans use partial sums in a fixed order.
"""

# The kernels are in Triton's own Python, which is untyped and in which tuples grow by `+`.
# mypy: allow-untyped-defs, disable-error-code="assignment,var-annotated,operator"
# ruff: noqa: RUF005

from __future__ import annotations

import contextlib
import itertools
import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 32  # steps between kept states; the scratch memory of all running programs then fits the L2 of an H200
_TILE = 512  # states per program: 16 per thread of its one warp, the most for which _backward fits 255 registers
_STEPS = 4  # steps loaded ahead in _forward, and steps per block in the first pass of _backward
_KEPT = 2  # steps whose states the second pass of _backward holds in registers
LENGTHS = ["T", "L", "SPAN", "CHUNKS"]  # arguments for whose values no separate kernels are compiled
OPTIONS = {"num_warps": 1, "enable_fp_fusion": True}  # the defaults depend on version and environment
_NO_RESET, _RESET = tl.constexpr(0.0), tl.constexpr(-1e30)  # added to the decay's exponent; exp2(-1e30) is 0
_LOG2E, _LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # the interpreter has no inline PTX


def channel_block(state: int) -> int:
    """Number of channels per program."""
    return min(32, _TILE // state)


def why_no_device(x: Tensor) -> str | None:
    """The reason why no Triton kernel can run on the device of x, or None. Triton's interpreter runs them on a CPU."""
    if x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if x.device.type != "cuda" or torch.version.hip:
        return "they need an NVIDIA GPU"
    capability = torch.cuda.get_device_capability(x.device)
    return None if capability >= (8, 0) else f"compute capability {capability[0]}.{capability[1]} is below 8.0"


def why_not(x: Tensor, state: int) -> str | None:
    """The reason why these kernels cannot run on rows like x (T, D), or None if they can."""
    if obstacle := why_no_device(x):
        return obstacle
    if x.dtype == torch.float64:
        return "they compute in fp32, not float64"
    if x.shape[1] % 32:
        return f"{x.shape[1]} channels are not a multiple of 32"
    return None if state in (4, 8, 16, 32) else f"an SSM state of {state} is not 4, 8, 16 or 32"


def new_states(x: Tensor, A: Tensor, batch: int, keep: bool) -> Tensor:
    """An empty tensor for the states before each chunk (B, chunks, N, D), which the backward pass needs."""
    if not keep:
        return A.new_empty(0)
    return A.new_empty(batch, -(-x.shape[0] // batch // CHUNK), A.shape[1], A.shape[0])


def span_count(batch: int, length: int, blocks: int, device: torch.device) -> int:
    """Number of spans per row: one if there are at least as many programs as warp schedulers (4 per SM), or else as
    many as fill the device with two programs per scheduler, and no more.

    About two programs per scheduler run at a time, and those that are left over run alone after them: at (2, 4096,
    4096) on an H100, five spans took 1.3 times as long as four. Spans cost one more pass without outputs in either
    direction, which is about 0.4 of the work.
    """
    if device.type != "cuda":
        return 1
    schedulers = 4 * torch.cuda.get_device_properties(device).multi_processor_count
    programs = batch * blocks
    return 1 if programs >= schedulers else min(2 * schedulers // programs, -(-length // CHUNK))


@triton.jit
def _sum(v, axis: tl.constexpr):
    if _INTERPRETED:  # tl.sum itself is compiled if triton was imported before TRITON_INTERPRET was set
        return tl.reduce(v, axis, tl.standard._sum_combine)
    return tl.sum(v, axis)


@triton.jit
def _log2(v):
    if _INTERPRETED:
        return tl.log2(v)
    return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [v], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _reciprocal(v):
    if _INTERPRETED:
        return 1.0 / v
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [v], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _sigmoid(v):
    return _reciprocal(1.0 + tl.exp2(v * -_LOG2E))


@triton.jit
def _softplus(v):
    """Returns softplus(v) and its derivative sigmoid(v).

    With e = exp(v), it is log(1 + e), or the series of this where the absolute error of the logarithm would matter.
    """
    e = tl.exp2(v * _LOG2E)
    series = e * (1.0 + e * (-0.5 + e * (0.33333333 + e * (-0.25 + e * 0.2))))
    soft = tl.where(e < 0.0625, series, _log2(1.0 + e) * _LN2)
    return tl.where(v <= 20.0, soft, v), tl.where(v <= 20.0, e * _reciprocal(1.0 + e), 1.0)


@triton.jit
def _bias(BIAS, MODALITY, t, d, D, M: tl.constexpr):
    if M == 1:
        return tl.load(BIAS + d)
    return tl.load(BIAS + tl.load(MODALITY + t).to(tl.int32) * D + d)


@triton.jit
def _row(ORDER, t, WIDE: tl.constexpr):
    r = tl.load(ORDER + t)
    return r.to(tl.int64) if WIDE else r


@triton.jit
def _alive(t, like, L, EVEN: tl.constexpr):
    """Whether t < L, for each element of `like` (the interpreter cannot broadcast a scalar mask).

    A chunk that reaches past the end of its row makes steps with Delta = 0 there, which leave the state and gradients
    unchanged. EVEN says that L is a multiple of the chunk, so that the compiler can drop all of this.
    """
    if EVEN:
        return like == like
    return t + 0 * like < L


@triton.jit
def _delta(dt, bias, alive):
    delta, slope = _softplus(dt.to(tl.float32) + bias)
    return tl.where(alive, delta, 0.0), slope


@triton.jit
def _reset(position, t, L, EVEN: tl.constexpr):
    """The number that a step adds to the exponent of its decay, to reset the state or not."""
    if EVEN:
        return tl.where(position == 0, _RESET, _NO_RESET)
    return tl.where((position == 0) & (t < L), _RESET, _NO_RESET)


@triton.jit
def _load(X, DT, Z, B, C, BIAS, MODALITY, POSITION, r, t, d, n, D, sx, sdt, sz, sb, sc, M: tl.constexpr,
          OUTPUT: tl.constexpr):  # fmt: skip
    """The operands of one step in the dtype that they have in memory. A conversion here would wait for the load."""
    x, dt, B_n = tl.load(X + r * sx + d), tl.load(DT + r * sdt + d), tl.load(B + r * sb + n)
    bias, position = _bias(BIAS, MODALITY, t, d, D, M), tl.load(POSITION + t)
    if OUTPUT:
        return x, dt, bias, position, B_n, tl.load(C + r * sc + n), tl.load(Z + r * sz + d)
    return x, dt, bias, position, B_n, B_n, x


@triton.jit(do_not_specialize=LENGTHS)
def _forward(
    X, DT, Z, B, C, A, SKIP, BIAS, START, ORDER, MODALITY, POSITION, Y, END, DECAY, STATES,
    L, D, SPAN, CHUNKS, sx, sdt, sz, sb, sc, sy,
    N: tl.constexpr, BD: tl.constexpr, CH: tl.constexpr, S: tl.constexpr, M: tl.constexpr, WIDE: tl.constexpr,
    EVEN: tl.constexpr, HAS_START: tl.constexpr, OUTPUT: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Processes the steps [span*SPAN, (span+1)*SPAN) of row b. A, START, END, DECAY and STATES are (..., N, D).

    With OUTPUT it writes Y, END and, with KEEP, the kept STATES. Without OUTPUT it writes END, the end state of the
    span if it starts from zero, and DECAY, the factor by which its start state enters its end state.
    """
    span, b = tl.program_id(1), tl.program_id(2)
    d, n = tl.program_id(0) * BD + tl.arange(0, BD), tl.arange(0, N)
    tile = n[:, None] * D + d[None, :]
    a2 = tl.load(A + tile) * _LOG2E
    here = (b * tl.num_programs(1) + span).to(tl.int64) * N * D
    first, last = span * SPAN, tl.minimum((span + 1) * SPAN, L)
    h = tl.load(START + here + tile) if HAS_START else tl.full([N, BD], 0.0, tl.float32)
    skip = tl.load(SKIP + d)
    total, any_reset = tl.full([BD], 0.0, tl.float32), 0.0

    # Operands are loaded one block of S steps ahead and rows two, so that no load waits for the stores of this block.
    now, rows, rows_next = (), (), ()
    for s in tl.static_range(S):
        rows = rows + (_row(ORDER, b * L + tl.minimum(first + s, L - 1), WIDE),)
        rows_next = rows_next + (_row(ORDER, b * L + tl.minimum(first + S + s, L - 1), WIDE),)
    for s in tl.static_range(S):
        now = now + (_load(X, DT, Z, B, C, BIAS, MODALITY, POSITION, rows[s], b * L + tl.minimum(first + s, L - 1),
                           d, n, D, sx, sdt, sz, sb, sc, M, OUTPUT),)  # fmt: skip
    for t0 in range(first, last, S):
        following, rows_after = (), ()
        for s in tl.static_range(S):
            t = b * L + tl.minimum(t0 + S + s, L - 1)
            following = following + (_load(X, DT, Z, B, C, BIAS, MODALITY, POSITION, rows_next[s], t, d, n, D,
                                           sx, sdt, sz, sb, sc, M, OUTPUT),)  # fmt: skip
        for s in tl.static_range(S):
            rows_after = rows_after + (_row(ORDER, b * L + tl.minimum(t0 + 2 * S + s, L - 1), WIDE),)
        if KEEP:  # noqa: SIM102
            if t0 % CH == 0:
                tl.store(STATES + (b * CHUNKS + t0 // CH).to(tl.int64) * N * D + tile, h)
        for s in tl.static_range(S):
            x, dt, bias, position, B_n, C_n, z = now[s]
            alive, reset = _alive(t0 + s, d, L, EVEN), _reset(position, t0 + s, L, EVEN)
            x = x.to(tl.float32)
            delta, _ = _delta(dt, bias, alive)
            h = tl.exp2(delta[None, :] * a2 + reset) * h + (delta * x)[None, :] * B_n.to(tl.float32)[:, None]
            if OUTPUT:
                z = z.to(tl.float32)
                y = _sum(h * C_n.to(tl.float32)[:, None], 0) + skip * x
                tl.store(Y + rows[s] * sy + d, (y * z * _sigmoid(z)).to(Y.dtype.element_ty), mask=alive)
            else:
                total += delta
                any_reset += reset
        now, rows, rows_next = following, rows_next, rows_after
    tl.store(END + here + tile, h)
    if not OUTPUT:
        tl.store(DECAY + here + tile, tl.exp2(total[None, :] * a2 + any_reset))


@triton.jit(do_not_specialize=LENGTHS)
def _carry(
    DT, Z, C, A, BIAS, ORDER, MODALITY, POSITION, GY, CARRY, DECAY, L, D, SPAN, sdt, sz, sc, sgy,
    N: tl.constexpr, BD: tl.constexpr, S: tl.constexpr, M: tl.constexpr, WIDE: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Computes the gradient of the state before a span, if no gradient enters at its end, and the decay of the span."""
    span, b = tl.program_id(1), tl.program_id(2)
    d, n = tl.program_id(0) * BD + tl.arange(0, BD), tl.arange(0, N)
    tile = n[:, None] * D + d[None, :]
    a2 = tl.load(A + tile) * _LOG2E
    G = tl.full([N, BD], 0.0, tl.float32)
    total, any_reset = tl.full([BD], 0.0, tl.float32), 0.0
    first, last = span * SPAN, tl.minimum((span + 1) * SPAN, L)
    blocks = (last - first + S - 1) // S
    for i in range(blocks):
        t0 = first + (blocks - 1 - i) * S
        now = ()
        for s in tl.static_range(S):
            t = b * L + tl.minimum(t0 + S - 1 - s, L - 1)
            r = _row(ORDER, t, WIDE)
            bias, position = _bias(BIAS, MODALITY, t, d, D, M), tl.load(POSITION + t)
            now = now + ((tl.load(DT + r * sdt + d), tl.load(Z + r * sz + d), tl.load(GY + r * sgy + d),
                          tl.load(C + r * sc + n), bias, position),)  # fmt: skip
        for s in tl.static_range(S):
            dt, z, gy, C_n, bias, position = now[s]
            alive = _alive(t0 + S - 1 - s, d, L, EVEN)
            reset = _reset(position, t0 + S - 1 - s, L, EVEN)
            z = z.to(tl.float32)
            delta, _ = _delta(dt, bias, alive)
            g = tl.where(alive, gy.to(tl.float32) * z * _sigmoid(z), 0.0)
            G = tl.exp2(delta[None, :] * a2 + reset) * (G + g[None, :] * C_n.to(tl.float32)[:, None])
            total += delta
            any_reset += reset
    here = (b * tl.num_programs(1) + span).to(tl.int64) * N * D
    tl.store(CARRY + here + tile, G)
    tl.store(DECAY + here + tile, tl.exp2(total[None, :] * a2 + any_reset))


@triton.jit(do_not_specialize=LENGTHS)
def _backward(
    X, DT, Z, B, C, A, SKIP, BIAS, STATES, ORDER, MODALITY, POSITION, GY, CARRY, SCRATCH,
    GX, GDT, GZ, GA, GB, GC, GSKIP, GBIAS, GSTART,
    T, L, D, SPAN, CHUNKS, sx, sdt, sz, sb, sc, sgy,
    N: tl.constexpr, BD: tl.constexpr, CH: tl.constexpr, S: tl.constexpr, KEPT: tl.constexpr, M: tl.constexpr,
    WIDE: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """For each chunk, from the last to the first: recomputes its states, with y and what depends on it, and then takes
    the gradient G of the state back through it.

    The SCRATCH of a program has every KEPT-th state of the chunk and then, for each step, Delta, the gradient behind
    the gate and the derivative of softplus. GB and GC (blocks, T, N) are sums over the channels of this block; GA,
    GSKIP and GBIAS are sums over the steps of this row and span. GX, GDT and GZ are contiguous rows.
    """
    q, span, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    w, n, m = tl.arange(0, BD), tl.arange(0, N), tl.arange(0, M)
    d = q * BD + w
    tile = n[:, None] * D + d[None, :]
    a2 = tl.load(A + tile) * _LOG2E
    skip = tl.load(SKIP + d)
    flat = (b * tl.num_programs(1) + span).to(tl.int64)
    G = tl.load(CARRY + flat * N * D + tile)
    ga, gskip = tl.full([N, BD], 0.0, tl.float32), tl.full([BD], 0.0, tl.float32)
    gbias = tl.full([M, BD], 0.0, tl.float32)
    kept = SCRATCH + (flat * tl.num_programs(0) + q) * (CH // KEPT * N * BD + CH * 3 * BD)
    per_step = kept + CH // KEPT * N * BD + w
    kept += n[:, None] * BD + w[None, :]
    GB += q.to(tl.int64) * T * N + n
    GC += q.to(tl.int64) * T * N + n
    first, last = span * SPAN, tl.minimum((span + 1) * SPAN, L)
    chunks = (last - first + CH - 1) // CH
    for i in range(chunks):
        begin = first + (chunks - 1 - i) * CH
        h = tl.load(STATES + (b * CHUNKS + begin // CH).to(tl.int64) * N * D + tile)
        for k in range(0, CH, S):
            rows, now = (), ()
            for s in tl.static_range(S):
                rows = rows + (_row(ORDER, b * L + tl.minimum(begin + k + s, L - 1), WIDE),)
            for s in tl.static_range(S):
                t = b * L + tl.minimum(begin + k + s, L - 1)
                now = now + ((_load(X, DT, Z, B, C, BIAS, MODALITY, POSITION, rows[s], t, d, n, D,
                                    sx, sdt, sz, sb, sc, M, True), tl.load(GY + rows[s] * sgy + d)),)  # fmt: skip
            for s in tl.static_range(S):
                if s % KEPT == 0:
                    tl.store(kept + (k + s) // KEPT * (N * BD), h)
                x, dt, bias, position, B_n, C_n, z = now[s][0]
                alive, reset = _alive(begin + k + s, d, L, EVEN), _reset(position, begin + k + s, L, EVEN)
                x, z = x.to(tl.float32), z.to(tl.float32)
                delta, slope = _delta(dt, bias, alive)
                h = tl.exp2(delta[None, :] * a2 + reset) * h + (delta * x)[None, :] * B_n.to(tl.float32)[:, None]
                y = _sum(h * C_n.to(tl.float32)[:, None], 0) + skip * x
                sigmoid = _sigmoid(z)
                silu = z * sigmoid
                g = tl.where(alive, now[s][1].to(tl.float32), 0.0)
                gz = g * y * (sigmoid + silu * (1.0 - sigmoid))
                tl.store(GZ + rows[s] * D + d, gz.to(GZ.dtype.element_ty), mask=alive)
                g *= silu
                gskip += g * x
                tl.store(GC + rows[s] * N, _sum(h * g[None, :], 1), mask=_alive(begin + k + s, n, L, EVEN))
                tl.store(per_step + (k + s) * 3 * BD, delta)
                tl.store(per_step + (k + s) * 3 * BD + BD, g)
                tl.store(per_step + (k + s) * 3 * BD + 2 * BD, tl.where(alive, slope, 0.0))
        tl.debug_barrier()  # the thread that wrote a scratch value may not be the one that reads it
        for k in range(CH - KEPT, -1, -KEPT):
            h = tl.load(kept + k // KEPT * (N * BD))
            rows, now, before, decays = (), (), (), ()
            for s in tl.static_range(KEPT):
                rows = rows + (_row(ORDER, b * L + tl.minimum(begin + k + s, L - 1), WIDE),)
            for s in tl.static_range(KEPT):
                t = b * L + tl.minimum(begin + k + s, L - 1)
                now = now + ((tl.load(X + rows[s] * sx + d), tl.load(per_step + (k + s) * 3 * BD),
                              tl.load(per_step + (k + s) * 3 * BD + BD), tl.load(per_step + (k + s) * 3 * BD + 2 * BD),
                              tl.load(B + rows[s] * sb + n), tl.load(C + rows[s] * sc + n),
                              tl.load(POSITION + t)),)  # fmt: skip
            for s in tl.static_range(KEPT):
                x, delta, g, slope, B_n, C_n, position = now[s]
                decay = tl.exp2(delta[None, :] * a2 + _reset(position, begin + k + s, L, EVEN))
                before, decays = before + (h,), decays + (decay,)
                if s < KEPT - 1:
                    h = decay * h + (delta * x.to(tl.float32))[None, :] * B_n.to(tl.float32)[:, None]
            for j in tl.static_range(KEPT):
                x, delta, g, slope, B_n, C_n, position = now[KEPT - 1 - j]
                t = begin + k + (KEPT - 1 - j)
                row = rows[KEPT - 1 - j]
                x = x.to(tl.float32)
                G += g[None, :] * C_n.to(tl.float32)[:, None]
                tl.store(GB + row * N, _sum(G * (delta * x)[None, :], 1), mask=_alive(t, n, L, EVEN))
                gdu = _sum(G * B_n.to(tl.float32)[:, None], 0)
                G *= decays[KEPT - 1 - j]
                gexponent = G * before[KEPT - 1 - j]  # the gradient of Delta * A
                ga += gexponent * delta[None, :]
                graw = (_sum(gexponent * a2, 0) * _LN2 + x * gdu) * slope
                if M == 1:
                    gbias += graw[None, :]
                else:
                    modality = tl.load(MODALITY + b * L + tl.minimum(t, L - 1)).to(tl.int32)
                    gbias += tl.where(m[:, None] == modality, graw[None, :], 0.0)
                tl.store(GX + row * D + d, (delta * gdu + g * skip).to(GX.dtype.element_ty), mask=_alive(t, d, L, EVEN))
                tl.store(GDT + row * D + d, graw.to(GDT.dtype.element_ty), mask=_alive(t, d, L, EVEN))
        tl.debug_barrier()
    tl.store(GA + flat * N * D + tile, ga)
    tl.store(GSKIP + flat * D + d, gskip)
    tl.store(GBIAS + flat * M * D + m[:, None] * D + d[None, :], gbias)
    if span == 0:
        tl.store(GSTART + b.to(tl.int64) * N * D + tile, G)


def _on(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _rows(*tensors: Tensor) -> list[Tensor]:
    return [t if t.stride(1) == 1 else t.contiguous() for t in tensors]


def _is_wide(*tensors: Tensor) -> bool:
    return any(t.shape[0] * t.stride(0) >= 2**31 for t in tensors)


def _combine(first: Tensor, decay: Tensor, local: Tensor, reverse: bool = False) -> Tensor:
    """The state (or gradient) that enters each span (B, spans, N, D).

    `first` enters the first span (the last one with `reverse`); `local` is what each span yields if zero enters it.
    """
    entering = torch.empty_like(local)
    order = range(local.shape[1])[:: -1 if reverse else 1]
    entering[:, order[0]] = first
    for here, after in itertools.pairwise(order):
        torch.addcmul(local[:, here], decay[:, here], entering[:, here], out=entering[:, after])
    return entering


def forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor,
    h0: Tensor | None, order: Tensor, rows: Tensor, modality: Tensor, position: Tensor, batch: int, keep: bool,
    spans: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See `selective_scan`. `spans` is for tests; otherwise `span_count` chooses it."""
    (T, Dn), N = x.shape, A.shape[1]
    L, BD = T // batch, channel_block(N)
    x, dt, z, B, C = _rows(x, dt, z, B, C)
    y, states = x.new_empty(T, Dn), new_states(x, A, batch, keep)
    span, spans = _spans(spans, batch, L, Dn // BD, x.device)
    A_ND, M2 = A.t().contiguous(), triton.next_power_of_2(dt_bias.shape[0])
    wide = _is_wide(x, dt, z, B, C, y)
    fixed = dict(N=N, BD=BD, CH=CHUNK, S=_STEPS, M=M2, WIDE=wide, EVEN=L % CHUNK == 0, **OPTIONS)

    def run(start: Tensor | None, output: bool) -> tuple[Tensor, Tensor]:
        end = A.new_empty(batch, spans, N, Dn)
        decay = end if output else torch.empty_like(end)
        _forward[Dn // BD, spans, batch](
            x, dt, z, B, C, A_ND, D.contiguous(), dt_bias.contiguous(), A_ND if start is None else start, order,
            modality, position, y, end, decay, states, L, Dn, span, -(-L // CHUNK), x.stride(0), dt.stride(0),
            z.stride(0), B.stride(0), C.stride(0), y.stride(0), HAS_START=start is not None, OUTPUT=output,
            KEEP=keep and output, **fixed,
        )  # fmt: skip
        return end, decay

    with _on(x):
        start = None if h0 is None else h0.transpose(1, 2).contiguous()
        if spans > 1:
            local, decay = run(None, False)
            start = _combine(A.new_zeros(batch, N, Dn) if start is None else start, decay, local)
        end, _ = run(start, True)
    return y, end[:, -1].transpose(1, 2).contiguous(), states


def backward(
    grad_y: Tensor, grad_hT: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor,
    dt_bias: Tensor, states: Tensor, order: Tensor, rows: Tensor, modality: Tensor, position: Tensor, batch: int,
    spans: int | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    (T, Dn), N = x.shape, A.shape[1]
    L, BD, M = T // batch, channel_block(N), dt_bias.shape[0]
    blocks = Dn // BD
    x, dt, z, B, C, gy = _rows(x, dt, z, B, C, grad_y)
    span, spans = _spans(spans, batch, L, blocks, x.device)
    A_ND, D, dt_bias = A.t().contiguous(), D.contiguous(), dt_bias.contiguous()
    gx, gdt, gz = (x.new_empty(T, Dn) for _ in range(3))
    gB, gC = A.new_empty(blocks, T, N), A.new_empty(blocks, T, N)
    M2 = triton.next_power_of_2(M)
    gA, gskip = A.new_empty(batch * spans, N, Dn), A.new_empty(batch * spans, Dn)
    gbias, gstart = A.new_empty(batch * spans, M2, Dn), A.new_empty(batch, N, Dn)
    scratch = A.new_empty(batch * spans * blocks * (CHUNK // _KEPT * N * BD + CHUNK * 3 * BD))
    wide = _is_wide(x, dt, z, B, C, gy, gx)
    fixed = dict(N=N, BD=BD, S=_STEPS, M=M2, WIDE=wide, EVEN=L % CHUNK == 0, **OPTIONS)
    with _on(x):
        carry = grad_hT.transpose(1, 2).contiguous()
        grid = (blocks, spans, batch)
        if spans > 1:
            local = A.new_empty(batch, spans, N, Dn)
            decay = torch.empty_like(local)
            _carry[grid](
                dt, z, C, A_ND, dt_bias, order, modality, position, gy, local, decay, L, Dn, span, dt.stride(0),
                z.stride(0), C.stride(0), gy.stride(0), **fixed,
            )  # fmt: skip
            carry = _combine(carry, decay, local, reverse=True)
        _backward[grid](
            x, dt, z, B, C, A_ND, D, dt_bias, states, order, modality, position, gy, carry, scratch, gx, gdt, gz, gA,
            gB, gC, gskip, gbias, gstart, T, L, Dn, span, -(-L // CHUNK), x.stride(0), dt.stride(0), z.stride(0),
            B.stride(0), C.stride(0), gy.stride(0), CH=CHUNK, KEPT=_KEPT, **fixed,
        )  # fmt: skip
    return (gx, gdt, gA.sum(0).t().contiguous(), gB.sum(0), gC.sum(0), gskip.sum(0), gz, gbias.sum(0)[:M].contiguous(),
            gstart.transpose(1, 2).contiguous())  # fmt: skip


def _spans(spans: int | None, batch: int, length: int, blocks: int, device: torch.device) -> tuple[int, int]:
    """Returns the number of steps per span, a multiple of CHUNK, and the number of spans."""
    chunks = -(-length // CHUNK)
    span = -(-chunks // (spans or span_count(batch, length, blocks, device))) * CHUNK
    return span, -(-length // span)
