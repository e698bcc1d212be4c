"""The selective scan in the C kernels of scan.c."""

from __future__ import annotations

from torch import Tensor

from mom_train.ops import native
from mom_train.ops.chunks import SCAN_CHANNELS, SCAN_STEPS
from mom_train.ops.native import integer, pointer, threads


def why_not(x: Tensor, state: int) -> str | None:
    """The reason why these kernels cannot run on rows like x (T, D), or None if they can."""
    return native.why_not(x, state)


def chunk_length(batch: int, length: int, channels: int, state: int) -> int:
    """Number of steps between kept states."""
    return min(length, SCAN_STEPS)


def new_states(x: Tensor, A: Tensor, batch: int, keep: bool) -> Tensor:
    """An empty tensor for the states before each chunk. The kernels use its memory as [batch][chunks][D * N]."""
    if not keep:
        return A.new_empty(0)
    length = x.shape[0] // batch
    return A.new_empty(-(-length // chunk_length(batch, length, *A.shape)), batch, A.shape[1], A.shape[0])


def forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor,
    h0: Tensor | None, order: Tensor, rows: Tensor, modality: Tensor, position: Tensor, batch: int, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    Dn, N = A.shape
    T = x.shape[0]
    L = T // batch
    library = native.library(N)
    assert library is not None
    (xc, dtc, Bc, Cc, zc), half = native.row_tensors(x, dt, B, C, z)
    if Bc.stride(0) != Cc.stride(0):
        Bc, Cc = Bc.contiguous(), Cc.contiguous()
    A, D, dt_bias = A.contiguous(), D.contiguous(), dt_bias.contiguous()
    h0 = h0 if h0 is None else h0.contiguous()
    y, hT, states = xc.new_empty(T, Dn), A.new_empty(batch, Dn, N), new_states(x, A, batch, keep)
    library.mom_scan_forward(
        integer(batch), integer(L), integer(Dn), integer(chunk_length(batch, L, Dn, N)),
        integer(-(-Dn // SCAN_CHANNELS)), int(half), pointer(xc), integer(xc.stride(0)), pointer(dtc),
        integer(dtc.stride(0)), pointer(A), pointer(Bc), pointer(Cc), integer(Bc.stride(0)), pointer(D), pointer(zc),
        integer(zc.stride(0)), pointer(dt_bias), pointer(order), pointer(modality), pointer(position), pointer(h0),
        pointer(y), pointer(hT), pointer(states if keep else None), threads(),
    )  # fmt: skip
    return y.to(x.dtype), hT, states


def backward(
    grad_y: Tensor, grad_hT: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor,
    dt_bias: Tensor, states: Tensor, order: Tensor, rows: Tensor, modality: Tensor, position: Tensor, batch: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    Dn, N = A.shape
    T, M = x.shape[0], dt_bias.shape[0]
    L, ranges = T // batch, -(-Dn // SCAN_CHANNELS)
    library = native.library(N)
    assert library is not None
    (xc, dtc, Bc, Cc, zc, gy), half = native.row_tensors(x, dt, B, C, z, grad_y)
    if Bc.stride(0) != Cc.stride(0):
        Bc, Cc = Bc.contiguous(), Cc.contiguous()
    A, D, dt_bias, ghT = A.contiguous(), D.contiguous(), dt_bias.contiguous(), grad_hT.float().contiguous()
    gx, gdt, gz = (xc.new_empty(T, Dn) for _ in range(3))
    gA, gh0 = A.new_empty(batch, Dn, N), A.new_empty(batch, Dn, N)
    gB, gC = A.new_empty(ranges, T, N), A.new_empty(ranges, T, N)
    gD, gbias = A.new_empty(batch, Dn), A.new_empty(batch, M, Dn)
    library.mom_scan_backward(
        integer(batch), integer(L), integer(Dn), integer(chunk_length(batch, L, Dn, N)), integer(ranges), integer(M),
        int(half), pointer(xc), integer(xc.stride(0)), pointer(dtc), integer(dtc.stride(0)), pointer(A), pointer(Bc),
        pointer(Cc), integer(Bc.stride(0)), pointer(D), pointer(zc), integer(zc.stride(0)), pointer(dt_bias),
        pointer(order), pointer(modality), pointer(position), pointer(states), pointer(gy), integer(gy.stride(0)),
        pointer(ghT), pointer(gx), pointer(gdt), pointer(gz), pointer(gA), pointer(gB), pointer(gC), pointer(gD),
        pointer(gbias), pointer(gh0), threads(),
    )  # fmt: skip
    return gx, gdt, gA.sum(0), gB.sum(0), gC.sum(0), gD.sum(0), gz, gbias.sum(0), gh0
