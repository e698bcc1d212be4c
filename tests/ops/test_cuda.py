"""The scan in CUDA C++ against the float64 definition: its own source, compiled for the host and run by an emulator of
a CTA (emulator/device.h), and on a GPU where there is one."""

import ctypes
import random
import shutil
import subprocess

import pytest
import torch

from mom_train.ops.scan import cuda as cuda_scan
from tests.helpers import CHECKOUT
from tests.helpers.scan_cases import DEVICE, NAMES, close, defined_scan, random_layout, run_scan, scan_inputs

COMPILER = next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)
emulated = pytest.mark.skipif(COMPILER is None, reason="NO C++ COMPILER: the CUDA kernels are not tested here")
gpu = pytest.mark.skipif(DEVICE == "cpu", reason="NO GPU: the CUDA kernels only ran in the emulator")


class Emulator:
    """Stands in for nvrtc.Kernels."""

    processors, shared_limit, device = 132, 227 * 1024, torch.device("cpu")

    def __init__(self, folder, bf16):
        library = folder / f"scan-{bf16}.so"
        here = CHECKOUT / "tests/ops/emulator"
        command = [COMPILER, "-std=c++17", "-O1", "-w", "-shared", "-fPIC", f"-I{here}", f"-I{cuda_scan.SOURCES}"]
        command += [f"-DROWS_BF16={int(bf16)}", str(here / "emulator.cpp"), "-o", str(library)]
        subprocess.run(command, check=True)
        self.library = ctypes.CDLL(str(library))
        self.library.launch.restype = ctypes.c_char_p
        self.random = random.Random(0)
        self.launched = []

    def resident(self, name, threads, shared):
        return 2

    def launch(self, name, grid, threads, shared, argument):
        self.launched.append((name, grid))
        seed = self.random.randrange(2**31)
        failure = self.library.launch(name.encode(), *grid, threads, shared, ctypes.byref(argument), seed)
        assert failure is None, f"{name}: {failure.decode()}"


@pytest.fixture(scope="module")
def emulators(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emulator")
    return {bf16: Emulator(folder, bf16) for bf16 in (True, False)}


@pytest.fixture
def emulator(emulators, monkeypatch):
    monkeypatch.setattr(cuda_scan, "kernels", lambda device, bf16: emulators[bf16])
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)  # what no kernel writes is NaN
    yield emulators
    torch.use_deterministic_algorithms(False)


# ragged and whole chunks, an empty modality, one modality, warps without channels, rows cut into spans with resets in
# them and without, spans longer than what a CTA looks through for a reset at a time
CASES = [
    # B, L, D, M, carried, spans, chance of a new document
    (1, 16, 32, 1, False, 1, 0.2),
    (2, 37, 32, 3, True, 1, 0.2),
    (1, 21, 160, 2, True, 1, 0.2),
    (2, 57, 64, 3, True, 3, 0.0),
    (1, 100, 32, 8, False, 4, 0.03),
]


@emulated
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("B", "L", "D", "M", "carried", "spans", "chance"), CASES)
def test_emulated_scan_and_all_its_gradients_equal_the_float64_recurrence(
    B, L, D, M, carried, spans, chance, dtype, emulator, monkeypatch
):
    monkeypatch.setattr(cuda_scan, "span_count", lambda *_: spans)
    modality, document, layout = random_layout(B, L, M, L, carried, empty=1 if M == 3 else None, chance=chance)
    inputs, h0, gy, ghT = scan_inputs(B, L, D, 16, M, carried, dtype, L)
    expected = defined_scan(inputs, h0, gy, ghT, modality, document)
    tolerances = {torch.float32: (2e-6, 2e-6), torch.bfloat16: (1e-2, 1e-5)}[dtype]
    for name, ours, theirs in zip(NAMES, run_scan(inputs, h0, gy, ghT, layout, dtype, "cuda"), expected, strict=False):
        close(ours, theirs, tolerances[ours.dtype == torch.float32], name)
