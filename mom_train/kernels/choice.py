"""Which backend runs a kernel where, and one log line that says why."""

from __future__ import annotations

import importlib.util
import logging
import os
from types import ModuleType

import torch
from torch import Tensor

from mom_tokenizers.errors import UserError

BACKENDS = ("torch", "c", "triton", "mamba_ssm")
forced: str | None = os.environ.get("MOM_KERNELS") or None
"""MOM_KERNELS: one backend for every kernel, and an error where it cannot run."""
_chosen: dict[tuple[str, torch.device, torch.dtype, int, int], str] = {}
log = logging.getLogger(__name__)


def module(kernel: str, backend: str, x: Tensor, size: int) -> ModuleType:
    """The module with `forward` and `backward` (a scan's also `new_states`) that runs this kernel.

    kernel "scan" or "conv"; backend one of BACKENDS or "auto"; x the rows (T, D); size the SSM state or the taps.
    """
    if backend == "auto":
        backend = choose(kernel, x, size)
    assert backend in BACKENDS, backend
    if backend == "triton":
        from mom_train.kernels import triton_conv, triton_scan

        return triton_scan if kernel == "scan" else triton_conv
    if backend == "c":
        from mom_train.kernels import conv_c, scan_c

        return scan_c if kernel == "scan" else conv_c
    from mom_train.kernels import conv_torch, scan_torch

    return scan_torch if kernel == "scan" else conv_torch


def choose(kernel: str, x: Tensor, size: int) -> str:
    """MOM_KERNELS, else Triton on an NVIDIA GPU and C on a CPU where they apply, else PyTorch.

    Raises ValueError where MOM_KERNELS names a backend that cannot run this.
    """
    key = (kernel, x.device, x.dtype, x.shape[1], size)
    if key not in _chosen:
        wanted = forced or {"cuda": "triton", "cpu": "c"}.get(x.device.type, "torch")
        obstacle = why_not(wanted, kernel, x, size)
        if obstacle and forced:
            raise UserError(f"MOM_KERNELS={forced} cannot run the {kernel} kernel here: {obstacle}; unset it")
        _chosen[key] = "torch" if obstacle else wanted
        why = "MOM_KERNELS" if forced else f"{wanted} not used: {obstacle}" if obstacle else "the fastest here"
        log.info("%s on %s, %s: %s kernels (%s)", kernel, x.device, str(x.dtype)[6:], _chosen[key], why)
    return _chosen[key]


def why_not(backend: str, kernel: str, x: Tensor, size: int) -> str | None:
    """What keeps a backend from running this kernel, or None."""
    if backend == "torch":
        return None
    if backend == "c":
        return _why_not_c(kernel, x, size)
    if backend == "triton":
        return _why_not_triton(kernel, x, size)
    if backend == "mamba_ssm":
        from mom_train.kernels import mamba_ssm_adapter

        return mamba_ssm_adapter.why_not(kernel, x, size)
    raise UserError(f"no kernels named {backend!r}; there are {', '.join(BACKENDS)}")


def _why_not_c(kernel: str, x: Tensor, size: int) -> str | None:
    from mom_train.kernels import conv_c, native

    if x.device.type != "cpu":
        return "they run on the CPU"
    if x.dtype == torch.float64:
        return "they compute in fp32, not float64"
    if x.shape[1] % native.LANES:
        return f"{x.shape[1]} channels are not a multiple of {native.LANES}"
    if kernel == "conv" and size > conv_c.LONGEST:
        return f"{size} taps are more than {conv_c.LONGEST}"
    # the library is built per state size; the convolution is the same in all of them
    return None if native.available(size if kernel == "scan" else 16) else "they could not be built (see above)"


def _why_not_triton(kernel: str, x: Tensor, size: int) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not (x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        if x.device.type != "cuda" or torch.version.hip:
            return "they need an NVIDIA GPU"
        capability = torch.cuda.get_device_capability(x.device)
        if capability < (8, 0):
            return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
    from mom_train.kernels import triton_conv, triton_scan

    return (triton_scan if kernel == "scan" else triton_conv).why_not(x, size)
