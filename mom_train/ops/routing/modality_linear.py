"""Linear maps whose weights are chosen by the modality of each row."""

from __future__ import annotations

import importlib.util
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mom_train.ops import backends
from mom_train.ops.routing import grouped_mm


def modality_linear(x_TK: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None = None) -> Tensor:
    """y[t] = W_m x[t] + b_m, where m is the modality of row t (Algorithm 1 of the paper).

    x_TK is (T, K) with rows sorted by modality; weight (M*O, K); bias (M*O,) or None; offsets (M+1,) int32 or int64 on
    the device of x, the bounds of the modalities' segments: offsets[0] is 0 and offsets[M] is T. Returns (T, O). Under
    autocast, x and the weights are cast first, as for F.linear.

    On a GPU this is one grouped product, and its shapes and launches depend on no data (`backend` says which kernel
    computes it). On a CPU there is one product per modality on a contiguous segment, and two in bf16. Nothing is
    gathered or masked. An empty modality gets a zero gradient, so that every rank does the same collective operations
    whatever its data.
    """
    device = x_TK.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x_TK, weight = x_TK.to(dtype), weight.to(dtype)
        bias = bias if bias is None else bias.to(dtype)
    return _modality_linear(x_TK, weight, bias, offsets)


def backend(
    dtype: torch.dtype, inputs: int, outputs: int, has_bias: bool, capability: tuple[int, int] | None, triton: bool
) -> str:
    """The name of the module here that computes the map: "grouped_mm" or "triton" on a GPU, "torch" elsewhere.

    It depends on nothing that differs from batch to batch. `capability` is the compute capability of the NVIDIA GPU
    that the rows are on, or None where they are on another device; `triton` says whether Triton is installed.
    MOM_KERNELS=torch and MOM_KERNELS=triton (`mom_train.ops.backends`) are followed on a GPU.
    """
    if capability is None or capability < (8, 0) or dtype == torch.float64 or backends.forced == "torch":
        return "torch"
    if backends.forced != "triton" and grouped_mm.why_not(dtype, inputs, outputs, has_bias, capability) is None:
        return "grouped_mm"
    return "triton" if triton else "torch"


_HAS_TRITON = importlib.util.find_spec("triton") is not None


def _module(x_TK: Tensor, weight: Tensor, offsets: Tensor, has_bias: bool) -> ModuleType:
    nvidia = x_TK.device.type == "cuda" and not torch.version.hip
    capability = torch.cuda.get_device_capability(x_TK.device) if nvidia else None
    outputs = weight.shape[0] // (len(offsets) - 1)
    name = backend(x_TK.dtype, x_TK.shape[1], outputs, has_bias, capability, _HAS_TRITON)
    return import_module(f"mom_train.ops.routing.{name}")  # imported late because triton may be absent


@torch.library.custom_op("mom::modality_linear", mutates_args=())
def _modality_linear(x_TK: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
    y_TO: Tensor = _module(x_TK, weight, offsets, bias is not None).forward(x_TK, weight, bias, offsets)
    return y_TO


@_modality_linear.register_fake
def _(x_TK: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
    return x_TK.new_empty(x_TK.shape[0], weight.shape[0] // (offsets.shape[0] - 1))


@torch.library.custom_op("mom::modality_linear_backward", mutates_args=())
def _modality_linear_backward(
    grad_TO: Tensor, x_TK: Tensor, weight: Tensor, offsets: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grads: tuple[Tensor, Tensor, Tensor]
    grads = _module(x_TK, weight, offsets, has_bias).backward(grad_TO, x_TK, weight, offsets, has_bias)
    return grads


@_modality_linear_backward.register_fake
def _(grad_TO: Tensor, x_TK: Tensor, weight: Tensor, offsets: Tensor, has_bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x_TK.new_empty(x_TK.shape),
        weight.new_empty(weight.shape),
        weight.new_empty(weight.shape[0] if has_bias else 0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_TK, weight, bias, offsets = inputs
    ctx.save_for_backward(x_TK, weight, offsets)
    ctx.has_bias = bias is not None


def _backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor | None, ...]:
    x_TK, weight, offsets = ctx.saved_tensors
    grad_x, grad_weight, grad_bias = _modality_linear_backward(grad_TO, x_TK, weight, offsets, ctx.has_bias)
    return grad_x, grad_weight, (grad_bias if ctx.has_bias else None), None


_modality_linear.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.mom.modality_linear)
def _flops(x_shape: Any, weight_shape: Any, bias: Any, offsets: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * x_shape[0] * weight_shape[1] * (weight_shape[0] // (offsets[0] - 1))


@register_flop_formula(torch.ops.mom.modality_linear_backward)
def _backward_flops(grad_shape: Any, x_shape: Any, *args: Any, **kwargs: Any) -> int:
    return 4 * grad_shape[0] * grad_shape[1] * x_shape[1]
