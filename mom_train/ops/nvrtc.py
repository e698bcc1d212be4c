"""Compiles CUDA C++ when it is first needed, keeps the machine code on disk, and starts its kernels.

NVIDIA's own bindings do it (PyPI: cuda-bindings, for NVRTC and the driver). PyTorch's CUDA builds bring them and the
NVRTC library along; no compiler and no CUDA toolkit has to be installed. Nothing of CUDA is imported before a kernel is
asked for.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import logging
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from mom_tokenizers.files import write_whole
from mom_train.ops.native import cache_folder

_DIGEST = 32  # bytes of the SHA-256 that a file of the cache begins with
log = logging.getLogger(__name__)


class Unavailable(RuntimeError):
    """CUDA kernels cannot be compiled or loaded here. The message says why."""


def missing() -> str | None:
    """The reason why nothing can be compiled in this Python, or None. It says which package to install."""
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None:
        return "cuda-bindings is not installed (pip install cuda-bindings nvidia-cuda-nvrtc)"
    try:
        compiler_version()
    except Unavailable as error:
        return str(error)
    return None


@functools.cache
def compiler_version() -> tuple[int, int]:
    """Of NVRTC, such as (13, 0). Raises Unavailable if its library is not there."""
    try:
        from cuda.bindings import nvrtc

        major, minor = _checked(nvrtc, nvrtc.nvrtcVersion())
    except Unavailable:
        raise
    except Exception as error:  # the bindings raise RuntimeError or errors of cuda-pathfinder, by version
        raise Unavailable(f"the NVRTC library cannot be loaded (pip install nvidia-cuda-nvrtc): {error}") from error
    return int(major), int(minor)


def machine_code(folder: Path, name: str, arch: int, flags: tuple[str, ...]) -> bytes:
    """The cubin of folder/name for compute capability arch/10. It is compiled if the cache does not hold it.

    The file may include the other *.cuh of its folder. The entry of the cache is named by the content of all these
    files, the architecture, the flags and the version of the compiler; any number of processes may ask at once.
    Raises Unavailable with what the compiler said if it cannot be compiled.
    """
    files = {path.name: path.read_bytes() for path in sorted([*folder.glob("*.cuh"), folder / name])}
    parts = [repr((arch, flags, compiler_version())).encode(), *(part for file in files.items() for part in
             (file[0].encode(), str(len(file[1])).encode(), file[1]))]  # fmt: skip
    key = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    try:
        cache = cache_folder()
        entry = cache / f"{Path(name).stem}-sm_{arch}-{key}.cubin"
        if (code := _whole(entry)) is not None:
            return code
        with FileLock(f"{entry}.lock"):
            if (code := _whole(entry)) is None:
                code = compile_source(files, name, arch, flags)
                write_whole(entry, hashlib.sha256(code).digest() + code)
            return code
    except OSError as error:
        log.warning("CUDA kernels are compiled again in every process: the cache cannot be used: %s", error)
        return compile_source(files, name, arch, flags)


def _whole(entry: Path) -> bytes | None:
    """The machine code in an entry of the cache, or None if there is none or it is damaged."""
    try:
        content = entry.read_bytes()
    except FileNotFoundError:
        return None
    code = content[_DIGEST:]
    if code and content[:_DIGEST] == hashlib.sha256(code).digest():
        return code
    log.warning("%s is damaged; compiling it again", entry)
    return None


def compile_source(files: dict[str, bytes], name: str, arch: int, flags: tuple[str, ...]) -> bytes:
    """The cubin of files[name], which may include the other files. Raises Unavailable."""
    from cuda.bindings import nvrtc

    headers = {other: text for other, text in files.items() if other != name}
    names = [other.encode() for other in headers]
    program = _checked(
        nvrtc, nvrtc.nvrtcCreateProgram(files[name], name.encode(), len(headers), list(headers.values()), names)
    )
    try:
        options = [f"--gpu-architecture=sm_{arch}".encode(), *(flag.encode() for flag in flags)]
        (code,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if code != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            said = b" " * _checked(nvrtc, nvrtc.nvrtcGetProgramLogSize(program))
            _checked(nvrtc, nvrtc.nvrtcGetProgramLog(program, said))
            text = said.decode(errors="replace").strip("\0 \n")
            raise Unavailable(f"NVRTC cannot compile {name} for sm_{arch}: {code.name}: {text[:2000]}")
        cubin = b" " * _checked(nvrtc, nvrtc.nvrtcGetCUBINSize(program))
        _checked(nvrtc, nvrtc.nvrtcGetCUBIN(program, cubin))
        return cubin
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _checked(api: Any, answer: tuple[Any, ...]) -> Any:
    """What a function of the bindings returned behind its error code. Raises Unavailable if that is not success."""
    code, *values = answer
    if code.value:
        raise Unavailable(f"{type(code).__name__} {code.name}")
    return values[0] if len(values) == 1 else tuple(values)


class Kernels:
    """The kernels of one cubin, loaded on one device.

    All kernels may use as much shared memory as the device allows.
    """

    def __init__(self, code: bytes, names: tuple[str, ...], device: torch.device) -> None:
        from cuda.bindings import driver

        self._driver = driver
        self.device = device
        self._resident: dict[tuple[str, int, int], int] = {}
        properties = torch.cuda.get_device_properties(device)
        self.processors = int(properties.multi_processor_count)
        attribute = driver.CUfunction_attribute
        limits = driver.CUdevice_attribute
        here = _checked(driver, driver.cuDeviceGet(device.index))
        self._context = _checked(driver, driver.cuDevicePrimaryCtxRetain(here))  # the one that PyTorch works in
        with torch.cuda.device(device):
            _checked(driver, driver.cuCtxSetCurrent(self._context))
            most = limits.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
            self.shared_limit = int(_checked(driver, driver.cuDeviceGetAttribute(most, here)))
            self._module = _checked(driver, driver.cuModuleLoadData(code))
            self._functions = {}
            for name in names:
                function = _checked(driver, driver.cuModuleGetFunction(self._module, name.encode()))
                dynamic = attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                static = attribute.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES
                own = int(_checked(driver, driver.cuFuncGetAttribute(static, function)))
                _checked(driver, driver.cuFuncSetAttribute(function, dynamic, self.shared_limit - own))
                carveout = attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
                _checked(driver, driver.cuFuncSetAttribute(function, carveout, 100))
                self._functions[name] = function

    def resident(self, name: str, threads: int, shared: int) -> int:
        """How many CTAs of that many threads and bytes of shared memory an SM holds at a time."""
        key = (name, threads, shared)
        if key not in self._resident:
            with torch.cuda.device(self.device):
                _checked(self._driver, self._driver.cuCtxSetCurrent(self._context))
                count = self._driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(self._functions[name], threads, shared)
                self._resident[key] = int(_checked(self._driver, count))
        return self._resident[key]

    def launch(
        self, name: str, grid: tuple[int, int, int], threads: int, shared: int, argument: ctypes.Structure
    ) -> None:
        """Starts a kernel with one argument, a structure by value, on the current stream of the device."""
        driver = self._driver
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(argument))
        stream = torch.cuda.current_stream(self.device).cuda_stream
        with torch.cuda.device(self.device):
            # a thread of autograd may have no context yet
            _checked(driver, driver.cuCtxSetCurrent(self._context))
            function, arguments = self._functions[name], ctypes.addressof(pointers)
            _checked(driver, driver.cuLaunchKernel(function, *grid, threads, 1, 1, shared, stream, arguments, 0))
