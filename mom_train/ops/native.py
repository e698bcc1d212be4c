"""Compiles the C kernels once per machine into a cache, and calls them through ctypes."""

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
"""The number of channels must be a multiple of this: the number of floats in an AVX-512 vector."""
SOURCE = Path(__file__).with_name("scan.c")
FLAGS = ["-O3", "-fno-math-errno", "-ffp-contract=fast", "-Wno-psabi", "-shared", "-fPIC"]
log = logging.getLogger(__name__)


def compiler() -> str | None:
    """Path of a C compiler, or None."""
    return next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)


@functools.cache
def library(state: int) -> ctypes.CDLL | None:
    """The compiled kernels for an SSM state of size `state`. If they cannot be had, logs why and returns None.

    MOM_KERNELS=torch turns them off.
    """
    if os.environ.get("MOM_KERNELS") == "torch":
        return None
    if state % 2:
        log.info("C kernels off: the SSM state (%d) is odd; using PyTorch", state)
        return None
    found = compiler()
    if found is None:
        log.info("C kernels off: no C compiler (cc, gcc, clang) on the PATH; using PyTorch")
        return None
    try:
        path = build(found, state)
        log.info("C kernels on: %s, built by %s for this processor (-march=native)", path, found)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.CalledProcessError) as error:
        detail = error.stderr.decode(errors="replace") if isinstance(error, subprocess.CalledProcessError) else error
        log.warning("C kernels off: building them with %s failed; using PyTorch: %s", found, detail)
        return None


def available(state: int) -> bool:
    """Whether `library` has kernels for this state size."""
    return library(state) is not None


def why_not(x: Tensor, state: int) -> str | None:
    """The reason why the C kernels cannot run on rows like x (T, D), or None if they can."""
    if x.device.type != "cpu":
        return "they run on the CPU"
    if x.dtype == torch.float64:
        return "they compute in fp32, not float64"
    if x.shape[1] % LANES:
        return f"{x.shape[1]} channels are not a multiple of {LANES}"
    return None if available(state) else "they could not be built (see above)"


def cache_folder() -> Path:
    """Where compiled kernels are kept: mom_train in XDG_CACHE_HOME, or else in ~/.cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mom_train"
    cache.mkdir(parents=True, exist_ok=True)
    return cache


def build(compiler: str, state: int, architecture: str = "native") -> Path:
    """Path of the shared library for one state size and -march. It is compiled if the cache does not hold it."""
    flags = [*FLAGS, f"-march={architecture}", f"-DSTATE={state}"]
    source = SOURCE.read_bytes()
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    identity = b"\0".join([source, version, " ".join(flags).encode(), _cpu().encode()])
    target = cache_folder() / f"scan-{hashlib.sha256(identity).hexdigest()[:16]}.so"
    with FileLock(f"{target}.lock"):
        if not target.exists():
            partial = target.with_suffix(".tmp")
            command = [compiler, *flags, str(SOURCE), "-o", str(partial)]
            try:
                subprocess.run([*command, "-fopenmp"], check=True, capture_output=True)
            except subprocess.CalledProcessError:  # clang without libomp; one thread is still much faster than PyTorch
                subprocess.run(command, check=True, capture_output=True)
            partial.rename(target)
    return target


def _cpu() -> str:
    """What -march=native depends on. It names the library, because nodes with other processors may share the cache."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return line
    except OSError:
        pass
    return f"{platform.machine()} {platform.processor()} {sysconfig.get_platform()}"


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    """The address of the data of `tensor`, or a null pointer."""
    return ctypes.c_void_p(0 if tensor is None else tensor.data_ptr())


def integer(value: int) -> ctypes.c_int64:
    return ctypes.c_int64(value)


def threads() -> ctypes.c_int:
    """The number of threads that PyTorch uses."""
    return ctypes.c_int(torch.get_num_threads())


def row_tensors(*tensors: Tensor) -> tuple[list[Tensor], bool]:
    """The tensors as the kernels take them, and whether they are bf16.

    They stay bf16 if all of them are, and otherwise become fp32. Channels get unit stride; a view with a longer row
    stride is not copied.
    """
    half = all(t.dtype == torch.bfloat16 for t in tensors)
    cast = [t if half else t.float() for t in tensors]
    return [t if t.stride(-1) == 1 else t.contiguous() for t in cast], half
