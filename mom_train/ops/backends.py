"""Chooses the backend that runs an operator, and says why in one log line.

A backend is a module mom_train/ops/{scan,conv}/NAME.py with the functions `forward` and `backward`, in a scan also
`new_states`, and `why_not(x, size)`, which returns the reason why it cannot run rows like x, or None if it can.
`forward` and `backward` take the arguments of the custom operators in scan/selective_scan.py and conv/causal_conv.py
except `backend`, and return the same. To add a backend, add such a module and put its name into BACKENDS.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from mom_tokenizers.errors import UserError
from mom_train.ops import mamba_ssm

BACKENDS = ("torch", "c", "cuda", "triton", "mamba_ssm")
_FASTEST = {
    ("scan", "cuda"): ("cuda", "triton"),
    ("conv", "cuda"): ("triton",),
    ("scan", "cpu"): ("c",),
    ("conv", "cpu"): ("c",),
}
"""What an operator tries on a type of device before PyTorch, in this order."""
forced: str | None = os.environ.get("MOM_KERNELS") or None
"""The backend that MOM_KERNELS names for every operator. It is an error if that one cannot run."""
_chosen: dict[tuple[str, torch.device, torch.dtype, int, int], str] = {}
log = logging.getLogger(__name__)


def module(kernel: str, backend: str, x: Tensor, size: int) -> ModuleType:
    """The module that runs an operator.

    `kernel` is "scan" or "conv", `backend` is one of BACKENDS or "auto", `x` are the rows (T, D), and `size` is the
    size of the SSM state or the number of taps.
    """
    if backend == "auto":
        backend = choose(kernel, x, size)
    assert backend in BACKENDS, backend
    return _imported(kernel, "torch" if backend == "mamba_ssm" else backend)


def choose(kernel: str, x: Tensor, size: int) -> str:
    """The name of the backend: MOM_KERNELS, or else the first that can run of cuda (only the scan has it) and Triton on
    an NVIDIA GPU, and of C on a CPU, or PyTorch.

    MOM_KERNELS=cuda leaves the convolution to Triton, or to PyTorch if Triton cannot run it. Raises UserError if
    MOM_KERNELS names a backend that cannot run this operator.
    """
    key = (kernel, x.device, x.dtype, x.shape[1], size)
    if key not in _chosen:
        elsewhere = forced == "cuda" and kernel == "conv"
        wanted = (forced,) if forced and not elsewhere else _FASTEST.get((kernel, x.device.type), ())
        reasons = ["MOM_KERNELS=cuda, but only the scan has cuda kernels"] if elsewhere else []
        for name in (*wanted, "torch"):
            obstacle = why_not(name, kernel, x, size)
            if obstacle is None:
                break
            if forced and not elsewhere:
                raise UserError(f"MOM_KERNELS={forced} cannot run the {kernel} kernel here: {obstacle}; unset it")
            reasons.append(f"{name} not used: {obstacle}")
        _chosen[key] = name
        why = "; ".join(reasons) or ("MOM_KERNELS" if forced else "the fastest here")
        log.info("%s on %s, %s: %s kernels (%s)", kernel, x.device, str(x.dtype)[6:], name, why)
    return _chosen[key]


def triton_or_torch(kernel: str, x: Tensor) -> str:
    """The backend of an operator that has only these two: Triton on an NVIDIA GPU if it can run, or else PyTorch.

    `kernel` is "cross_entropy" or "norm". MOM_KERNELS counts here only if it names one of the two.
    Raises UserError if it names Triton and that cannot run this operator.
    """
    key = (kernel, x.device, x.dtype, x.shape[1], 0)
    if key not in _chosen:
        wanted = forced if forced in ("torch", "triton") else "triton" if x.device.type == "cuda" else "torch"
        obstacle = why_not("triton", kernel, x, x.shape[1]) if wanted == "triton" else None
        if obstacle and forced == "triton":
            raise UserError(f"MOM_KERNELS=triton cannot run the {kernel} kernel here: {obstacle}; unset it")
        _chosen[key] = "torch" if obstacle else wanted
        if obstacle:
            log.info("%s on %s, %s: torch (triton not used: %s)", kernel, x.device, str(x.dtype)[6:], obstacle)
    return _chosen[key]


def why_not(backend: str, kernel: str, x: Tensor, size: int) -> str | None:
    """The reason why a backend cannot run an operator, or None if it can."""
    if backend not in BACKENDS:
        raise UserError(f"there are no kernels named {backend!r}, only {', '.join(BACKENDS)}")
    if backend == "mamba_ssm":
        return mamba_ssm.why_not(kernel, x, size)
    if backend == "cuda" and kernel != "scan":
        return "only the scan has cuda kernels"
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    obstacle: str | None = _imported(kernel, backend).why_not(x, size)
    return obstacle


def _imported(kernel: str, backend: str) -> ModuleType:
    # Imported late because triton may be absent, and because the modules of the operators import this one.
    return import_module(f"mom_train.ops.{kernel}.{backend}")
