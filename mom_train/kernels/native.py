"""The C kernels: compiled once per machine into a cache, called through ctypes."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sysconfig
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor

LANES = 16
_SOURCE = Path(__file__).with_name("scan.c")
_FLAGS = ["-O3", "-march=native", "-fno-math-errno", "-ffp-contract=fast", "-shared", "-fPIC"]
log = logging.getLogger(__name__)


@functools.cache
def library(state: int) -> ctypes.CDLL | None:
    """The compiled kernels for an SSM state of `state`, or None (one log line says why) without a compiler.

    MOM_KERNELS=torch turns them off.
    """
    if os.environ.get("MOM_KERNELS") == "torch":
        return None
    if state % 2:
        log.info("C kernels off: the SSM state (%d) is odd; using PyTorch", state)
        return None
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        log.info("C kernels off: no C compiler (cc, gcc, clang) on the PATH; using PyTorch")
        return None
    try:
        return ctypes.CDLL(str(_build(compiler, state)))
    except (OSError, subprocess.CalledProcessError) as error:
        detail = error.stderr.decode(errors="replace") if isinstance(error, subprocess.CalledProcessError) else error
        log.warning("C kernels off: building them with %s failed; using PyTorch: %s", compiler, detail)
        return None


@torch.compiler.assume_constant_result
def available(state: int) -> bool:
    """Whether `library` has kernels for this state size; torch.compile asks once and does not look inside."""
    return library(state) is not None


def _build(compiler: str, state: int) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mom_train"
    cache.mkdir(parents=True, exist_ok=True)
    source = _SOURCE.read_bytes()
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    identity = b"\0".join([source, str(state).encode(), version, " ".join(_FLAGS).encode(), _cpu().encode()])
    target = cache / f"scan-{hashlib.sha256(identity).hexdigest()[:16]}.so"
    with FileLock(f"{target}.lock"):
        if not target.exists():
            partial = target.with_suffix(".tmp")
            command = [compiler, *_FLAGS, f"-DSTATE={state}", str(_SOURCE), "-o", str(partial)]
            try:
                subprocess.run([*command, "-fopenmp"], check=True, capture_output=True)
            except subprocess.CalledProcessError:  # a clang without libomp: one thread is still far ahead
                subprocess.run(command, check=True, capture_output=True)
            partial.rename(target)
    return target


def _cpu() -> str:
    """What -march=native depends on: a cache on a shared home must not serve another node's instructions."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return line
    except OSError:
        pass
    return f"{platform.machine()} {platform.processor()} {sysconfig.get_platform()}"


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(0 if tensor is None else tensor.data_ptr())


def integer(value: int) -> ctypes.c_int64:
    return ctypes.c_int64(value)


def threads() -> ctypes.c_int:
    return ctypes.c_int(torch.get_num_threads())


def rows(tensor: Tensor) -> Tensor:
    """fp32 with unit stride along channels; a view with a longer row stride is taken as it is."""
    tensor = tensor.float()
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
