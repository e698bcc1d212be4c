"""Calls the CUDA kernels of the package mamba_ssm (`selective_scan_fn`, `causal_conv1d_fn`) through our interfaces.

They are optional: to compare speeds with, and to use if Triton fails. They support neither document boundaries nor a
state that is carried in, so both are expressed through the inputs:

- At the first token of a document, the time step is Delta' = Delta + 1e6, so that exp(Delta' A) = 0 clears the state,
  and the input is u' = u Delta / Delta', so that the token enters the state as before. The D term needs u itself, so it
  and the gate are computed outside the kernel.
- A carried state h0 enters through N tokens before the row: token n has B = e_n, Delta = 2^-60 and u = 2^60 h0[:, n].
- The last state is read, with its gradient, through N tokens after the row: token n has C = e_n and u = 0.

These kernels sum gradients of B, C, A and D with atomic additions, so results differ between runs. They do not work
with torch.compile.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mom_tokenizers.errors import UserError
from mom_train.ops.layout import RowLayout

_FORGET = 1e6  # above float16's range; 1e3 leaks where |A| is small
_EPSILON = 2.0**-60  # a power of two: scaling by it is exact, and exp(2^-60 A) is 1


@functools.cache
def stock() -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Returns (selective_scan_fn, causal_conv1d_fn). Raises UserError if they cannot run here."""
    if not torch.cuda.is_available():
        raise UserError("they need an NVIDIA GPU")
    for extension in ("selective_scan_cuda", "causal_conv1d_cuda"):
        if importlib.util.find_spec(extension) is None:
            raise UserError(f"the extension {extension} is not built here; it comes with the extra `cuda`")
    try:
        from causal_conv1d import causal_conv1d_fn
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except (ImportError, OSError) as error:
        raise UserError(f"importing mamba_ssm failed: {error}") from error
    return selective_scan_fn, causal_conv1d_fn


def why_not(kernel: str, x: Tensor, size: int) -> str | None:
    """The reason why these kernels cannot run on rows like x (T, D) with `size` states or taps, or None if they can."""
    if x.dtype not in (torch.float32, torch.bfloat16):
        return f"rows of {str(x.dtype)[6:]}: a document's reset needs the range of float32 or bfloat16"
    if kernel == "conv" and not 2 <= size <= 4:
        return f"{size} taps are not 2 to 4"
    if kernel == "conv" and x.shape[1] % 8:
        return f"{x.shape[1]} channels are not a multiple of 8"
    if kernel == "scan" and size > 256:
        return f"an SSM state of {size} is above 256"
    try:
        stock()
    except ValueError as error:
        return str(error)
    return None


def _require(kernel: str, x: Tensor, size: int) -> None:
    if obstacle := why_not(kernel, x, size):
        raise UserError(f"the mamba_ssm backend cannot run the {kernel} kernel here: {obstacle}")


def selective_scan(
    x_TD: Tensor, dt_TD: Tensor, A_DN: Tensor, B_TN: Tensor, C_TN: Tensor, D_D: Tensor, z_TD: Tensor,
    dt_bias_MD: Tensor, layout: RowLayout, h0_BDN: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same as `scan.selective_scan.selective_scan`, but Delta is rounded to the dtype of the rows for the
    kernel."""
    D, N = A_DN.shape
    _require("scan", x_TD, N)
    batch, length, dtype = layout.batch, layout.length, x_TD.dtype
    x_BLD, dt_BLD, B_BLN, C_BLN, z_BLD = (
        t.index_select(0, layout.order).view(batch, length, -1) for t in (x_TD, dt_TD, B_TN, C_TN, z_TD)
    )
    x_BLD, z_BLD = x_BLD.float(), z_BLD.float()
    bias_BLD = dt_bias_MD[layout.modality.long()].view(batch, length, D)
    delta_BLD = F.softplus(dt_BLD.float() + bias_BLD)
    first_BL1 = (layout.position == 0).view(batch, length, 1)
    taken_BLD = torch.where(first_BL1, delta_BLD + _FORGET, delta_BLD).to(dtype)
    u_BLD = torch.where(first_BL1, x_BLD * delta_BLD / taken_BLD.float(), x_BLD).to(dtype)

    # Tokens before the row bring h0 in, as a sum of values that the dtype of the rows can hold; tokens after it read
    # the state.
    pieces: list[Tensor] = []
    if h0_BDN is not None:
        rest = h0_BDN
        for _ in range(1 if dtype == torch.float32 else 3):
            pieces.append(rest.to(dtype))
            rest = rest - pieces[-1].float()
    brought = len(pieces) * N
    one_BNN = torch.eye(N, device=x_TD.device, dtype=dtype).expand(batch, N, N)
    still_BND = x_TD.new_full((batch, N, D), _EPSILON)
    nothing_BND, nothing_BNN = torch.zeros_like(still_BND), torch.zeros_like(one_BNN)
    enter_BND = [piece.transpose(1, 2) / _EPSILON for piece in pieces]
    repeat = len(pieces)
    u, delta, B, C = (
        torch.cat([*front, middle, behind], 1).transpose(1, 2).contiguous()
        for front, middle, behind in (
            (enter_BND, u_BLD, nothing_BND),
            ([still_BND] * repeat, taken_BLD, still_BND),
            ([one_BNN] * repeat, B_BLN.to(dtype), nothing_BNN),
            ([nothing_BNN] * repeat, C_BLN.to(dtype), one_BNN),
        )
    )
    scan, _ = stock()
    y_BDS, last_BDN = scan(u, delta, A_DN.contiguous(), B, C, return_last_state=True)
    y_BLD = y_BDS[:, :, brought : brought + length].transpose(1, 2).float()
    y_BLD = (y_BLD + D_D * x_BLD) * F.silu(z_BLD)
    read_BDN = y_BDS[:, :, brought + length :].float()
    hT_BDN = last_BDN.detach() + (read_BDN - read_BDN.detach())  # fp32 value of the one, gradient of the other
    return y_BLD.reshape(-1, D).index_select(0, layout.rows).to(dtype), hT_BDN


def causal_conv(
    x_TD: Tensor, weight_DK: Tensor, bias_D: Tensor, layout: RowLayout, initial_BKD: Tensor | None = None
) -> Tensor:
    """The output y (T, D) of `conv.causal_conv.causal_conv`.

    The kernel gets document boundaries as `seq_idx`. Inputs that are carried in become K-1 tokens before the row,
    because the kernel ignores `initial_states` if there is a `seq_idx`.
    """
    D, K = weight_DK.shape
    _require("conv", x_TD, K)
    x_BLD = x_TD.index_select(0, layout.order).view(layout.batch, layout.length, D)
    position_BL = layout.position.view(layout.batch, layout.length)
    document_BL = (position_BL == 0).cumsum(1, dtype=torch.int32)  # 0 is a document that continues from the row before
    brought = 0
    if initial_BKD is not None:
        brought = K - 1
        x_BLD = torch.cat([initial_BKD.to(x_BLD.dtype), x_BLD], 1)
        back = torch.arange(K - 1, 0, -1, device=x_TD.device)
        before_BK = torch.where(position_BL[:, :1] >= back, 0, -1).to(torch.int32)
        document_BL = torch.cat([before_BK, document_BL], 1)
    _, conv = stock()
    # with `seq_idx`, the kernel needs channels innermost in memory
    y_BDL = conv(x_BLD.contiguous().transpose(1, 2), weight_DK, bias_D, seq_idx=document_BL, activation="silu")
    return y_BDL[:, :, brought:].transpose(1, 2).reshape(-1, D).index_select(0, layout.rows)
