"""Linear maps in FP8: the output and the gradient of the input are products of e4m3 numbers with a scale for each row.

The rows of both operands are scaled by powers of two, so that the largest number of a row is at most 448, the largest
that e4m3 holds. The gradient of the weight is a product in bf16. This is the recipe that torchao calls
ROWWISE_WITH_GW_HP, its most accurate one: e4m3 also for gradients, because a scale for each row makes up for the range
that e5m2 would add, and the gradient of the weight in higher precision, because there the sum is over tokens of very
different sizes (https://docs.pytorch.org/ao/main/api_reference/generated/torchao.float8.Float8LinearRecipeName.html).
It also keeps the segments of modalities, over which that sum runs, free of the multiples of 16 that FP8 products need.

On a GPU the products are torch.nn.functional.scaled_mm and scaled_grouped_mm. `emulated` computes the same anywhere:
the same rounded numbers, multiplied and added in fp32.
"""

from __future__ import annotations

import importlib.util
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

Fp8 = Literal["device", "emulated"]
"""Whether FP8 products run on the device, or are emulated in fp32."""
ALIGNMENT = 16
"""Inputs and outputs of an FP8 product must be multiples of this, so that each row begins at a multiple of 16 bytes."""
_E4M3 = torch.float8_e4m3fn
_LARGEST = 448.0
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def why_not(device: torch.device, grouped: bool) -> str | None:
    """The reason why a device cannot run FP8 products, or None if it can. `grouped`: also those in which rows have
    matrices by modality."""
    if device.type != "cuda" or torch.version.hip:
        return f"{device.type} has no FP8 products here, only NVIDIA GPUs do"
    capability = torch.cuda.get_device_capability(device)
    name = f"{torch.cuda.get_device_name(device)} (compute capability {capability[0]}.{capability[1]})"
    if capability < (8, 9):
        return f"{name} has no FP8, which begins with 8.9"
    if grouped and capability[0] != 9:
        return f"torch has no grouped FP8 product with scales by row for {name}, only for 9.0 (H100, H200)"
    return None


def quantized(x_RC: Tensor) -> tuple[Tensor, Tensor]:
    """(q (R, C) e4m3, scale (R,) fp32) with x = q * scale, rounded to nearest, ties to even.

    The scale is the smallest power of two that is above the largest |x| of the row divided by 448. NaN and infinity
    become NaN, of which e4m3 has one and no infinity.
    """
    if x_RC.device.type == "cuda" and _HAS_TRITON and x_RC.shape[1] <= 16384:
        from mom_train.ops.routing import fp8_triton

        return fp8_triton.quantized(x_RC)
    largest_R = x_RC.abs().amax(1).float()
    exponent_R = torch.frexp(largest_R / _LARGEST).exponent.clamp(-100, 120)
    scale_R = ((exponent_R + 127) << 23).view(torch.float32)  # 2^exponent, exactly
    scaled_RC = x_RC.float() / scale_R.unsqueeze(1)
    return torch.where(scaled_RC.abs() <= _LARGEST, scaled_RC, torch.nan).to(_E4M3), scale_R


def product(a_RC: Tensor, b_GNC: Tensor, offsets: Tensor | None, mode: Fp8) -> Tensor:
    """y (R, N) bf16 with y[r] = b[g] @ a[r], for rows a in segments offsets[g]:offsets[g+1] (None: one segment)."""
    return multiplied(quantized(a_RC), quantized(b_GNC.reshape(-1, b_GNC.shape[2])), offsets, mode)


def multiplied(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], offsets: Tensor | None, mode: Fp8) -> Tensor:
    """`product` of rows (R, C) and rows (G*N, C) that are `quantized` already."""
    (a_RC, scale_R), (b_GN_C, scale_GN) = a, b
    groups = 1 if offsets is None else len(offsets) - 1
    if mode == "emulated":
        wide_RC = a_RC.float() * scale_R.unsqueeze(1)
        wide_GNC = (b_GN_C.float() * scale_GN.unsqueeze(1)).view(groups, -1, b_GN_C.shape[1])
        bounds = [0, len(a_RC)] if offsets is None else offsets.tolist()
        parts = [wide_RC[s:e] @ wide_GNC[g].t() for g, (s, e) in enumerate(pairwise(bounds))]
        return torch.cat(parts).to(torch.bfloat16)
    recipe = F.ScalingType.RowWise
    if offsets is None or groups == 1:
        scales = scale_R.unsqueeze(1), recipe, scale_GN.unsqueeze(0), recipe
        return F.scaled_mm(a_RC, b_GN_C.t(), *scales, output_dtype=torch.bfloat16)
    by_group = b_GN_C.view(groups, -1, b_GN_C.shape[1]).transpose(1, 2)
    scales = scale_R, recipe, scale_GN.view(groups, -1), recipe
    ends = offsets[1:].to(torch.int32)
    grouped = F.scaled_grouped_mm  # type: ignore[attr-defined]  # public, and missing in torch's stubs
    y_RN: Tensor = grouped(a_RC, by_group, *scales, offs=ends, output_dtype=torch.bfloat16)
    return y_RN


def fp8_linear(x_TK: Tensor, weight: Tensor, offsets: Tensor | None, mode: Fp8) -> Tensor:
    """y[t] = W_m x[t] in bf16, where m is the modality of row t, or one W for all rows if `offsets` is None.

    x_TK is (T, K) with rows sorted by modality; weight (M*O, K); offsets (M+1,) as for `modality_linear`. K and O are
    multiples of 16. x and weight are cast to bf16 first, as under autocast. A modality without rows gets a gradient of
    0.
    """
    return _fp8_linear(x_TK.to(torch.bfloat16), weight.to(torch.bfloat16), offsets, mode)


def _by_modality(weight: Tensor, offsets: Tensor | None) -> Tensor:
    return weight.view(1 if offsets is None else len(offsets) - 1, -1, weight.shape[1])


@torch.library.custom_op("mom::fp8_linear", mutates_args=())
def _fp8_linear(x_TK: Tensor, weight: Tensor, offsets: Tensor | None, mode: str) -> Tensor:
    return product(x_TK, _by_modality(weight, offsets), offsets, mode)  # type: ignore[arg-type]


@_fp8_linear.register_fake
def _(x_TK: Tensor, weight: Tensor, offsets: Tensor | None, mode: str) -> Tensor:
    return x_TK.new_empty(x_TK.shape[0], weight.shape[0] // (1 if offsets is None else offsets.shape[0] - 1))


@torch.library.custom_op("mom::fp8_linear_backward", mutates_args=())
def _fp8_linear_backward(
    grad_TO: Tensor, x_TK: Tensor, weight: Tensor, offsets: Tensor | None, mode: str
) -> tuple[Tensor, Tensor]:
    weight_MKO = _by_modality(weight, offsets).transpose(1, 2)
    grad_x = product(grad_TO, weight_MKO, offsets, mode)  # type: ignore[arg-type]
    if offsets is None:
        grad_weight = grad_TO.t() @ x_TK
    elif mode == "device":
        ends = offsets[1:].to(torch.int32)
        grad_weight = F.grouped_mm(grad_TO.contiguous().t(), x_TK.contiguous(), offs=ends).view(weight.shape)
    else:
        bounds = pairwise(offsets.tolist())
        grad_weight = torch.cat([grad_TO[s:e].t() @ x_TK[s:e] for s, e in bounds])
    return grad_x, grad_weight


@_fp8_linear_backward.register_fake
def _(grad_TO: Tensor, x_TK: Tensor, weight: Tensor, offsets: Tensor | None, mode: str) -> tuple[Tensor, Tensor]:
    return x_TK.new_empty(x_TK.shape), weight.new_empty(weight.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_TK, weight, offsets, mode = inputs
    ctx.save_for_backward(x_TK, weight, offsets)
    ctx.mode = mode


def _backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # read only once: a second time is an error under activation checkpointing
    return *_fp8_linear_backward(grad_TO, *saved, ctx.mode), None, None


_fp8_linear.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.mom.fp8_linear)
def _flops(x_shape: Any, weight_shape: Any, offsets: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * x_shape[0] * weight_shape[1] * (weight_shape[0] // (1 if offsets is None else offsets[0] - 1))


@register_flop_formula(torch.ops.mom.fp8_linear_backward)
def _backward_flops(grad_shape: Any, x_shape: Any, *args: Any, **kwargs: Any) -> int:
    return 4 * grad_shape[0] * grad_shape[1] * x_shape[1]
