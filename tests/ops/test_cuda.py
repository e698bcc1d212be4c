"""The scan in CUDA C++ against the float64 definition: its own source, compiled for the host and run by an emulator of
a CTA (emulator/device.h), and on a GPU where there is one."""

import ctypes
import random
import runpy
import shutil
import subprocess
from types import SimpleNamespace

import pytest
import torch

from mom_tokenizers.errors import UserError
from mom_train.ops import backends, nvrtc
from mom_train.ops.layout import RowLayout
from mom_train.ops.scan import cuda as cuda_scan
from mom_train.ops.scan.selective_scan import selective_scan
from tests.helpers import CHECKOUT
from tests.helpers.scan_cases import DEVICE, NAMES, close, defined_scan, random_layout, run_scan, scan_inputs

COMPILER = next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)
emulated = pytest.mark.skipif(COMPILER is None, reason="NO C++ COMPILER: the CUDA kernels are not tested here")
gpu = pytest.mark.skipif(DEVICE == "cpu", reason="NO GPU: the CUDA kernels only ran in the emulator")


class Emulator:
    """Takes the place of nvrtc.Kernels and runs the kernels in the emulator."""

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
# them and without
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


@emulated
def test_a_reset_is_found_wherever_in_a_long_span_it_is(emulator, monkeypatch):
    """A CTA looks for it in 1,024 positions at a time, from the end of a span or from its start."""
    L, D = 2080, 32  # two spans of 1,040 positions
    monkeypatch.setattr(cuda_scan, "span_count", lambda *_: 2)
    document = torch.zeros(1, L, dtype=torch.int32)
    document[:, 10:] += 1  # the last reset of the first span
    document[:, 2070:] += 1  # the first of the second one
    modality = torch.zeros(1, L, dtype=torch.uint8)
    past = torch.full((1,), 255, device=DEVICE)
    layout = RowLayout.sort(modality.to(DEVICE), document.to(DEVICE), 1, past_B=past)
    inputs, h0, gy, ghT = scan_inputs(1, L, D, 16, 1, True, torch.float32, 0)
    # slow decay, so that what a wrong state adds is not forgotten
    inputs = (inputs[0], inputs[1] - 4, inputs[2] / 16, *inputs[3:])
    cut = run_scan(inputs, h0, gy, ghT, layout, torch.float32, "cuda")
    expected = run_scan(inputs, h0, gy, ghT, layout, torch.float64, "torch")
    for name, ours, theirs in zip(NAMES, cut, expected, strict=False):
        close(ours, theirs.double(), 5e-6, name)


@emulated
def test_every_run_gives_the_same_bits_whatever_the_order_of_the_threads(emulator):
    _, _, layout = random_layout(1, 33, 2, 3, True)
    inputs, h0, gy, ghT = scan_inputs(1, 33, 32, 16, 2, True, torch.bfloat16, 3)
    first, again = (run_scan(inputs, h0, gy, ghT, layout, torch.bfloat16, "cuda") for _ in range(2))
    for name, one, other in zip(NAMES, first, again, strict=True):
        assert torch.equal(one, other), name


@emulated
def test_rows_of_any_dtype_alignment_and_stride_are_taken(emulator):
    _, _, layout = random_layout(1, 20, 2, 3, False)
    inputs, h0, gy, ghT = scan_inputs(1, 20, 32, 16, 2, False, torch.float16, 3)
    half = run_scan(inputs, h0, gy, ghT, layout, torch.float16, "cuda")
    whole = run_scan(inputs, h0, gy, ghT, layout, torch.float32, "cuda")
    for name, ours, theirs in zip(NAMES, half, whole, strict=False):
        close(ours, theirs.double(), 2e-3, name)
    _, dt, A, B, C, D, z, bias = (t.flatten(0, 1) if t.dim() == 3 else t for t in inputs)
    odd = torch.randn(20, 37).bfloat16()  # neither its rows nor the first column here are aligned
    rest = (dt.bfloat16(), A.float(), B.bfloat16(), C.bfloat16(), D.float(), z.bfloat16(), bias.float(), layout)
    for view in (odd[:, 3:35], odd[:, 3:35].t().contiguous().t(), odd[:1, :32].expand(20, 32)):
        ours, _ = selective_scan(view, *rest, backend="cuda")
        assert torch.equal(ours, selective_scan(view.clone(), *rest, backend="cuda")[0])


@emulated
def test_the_operator_keeps_torchs_contract(emulator):
    _, _, layout = random_layout(1, 4, 2, 1, False)
    leaf = lambda *shape: torch.randn(*shape, device=DEVICE).requires_grad_()  # noqa: E731
    rows = (leaf(4, 32), leaf(4, 32), leaf(32, 16), leaf(4, 16), leaf(4, 16), leaf(32), leaf(4, 32), leaf(2, 32))
    args = (*rows, None, layout.order, layout.rows, layout.modality, layout.position, 1, "cuda", True)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.mom.selective_scan.default, args, test_utils=tests)


@emulated
def test_python_and_the_kernels_agree_on_the_arguments_and_on_shared_memory(emulator, monkeypatch):
    library = emulator[True].library
    assert library.arguments_bytes() == ctypes.sizeof(cuda_scan.Arguments)
    assert library.sums_bytes() == ctypes.sizeof(cuda_scan.Sums)
    exact = cuda_scan.shared_bytes  # one modality less, and the kernels write behind what they have
    monkeypatch.setattr(cuda_scan, "shared_bytes", lambda name, bf16, modalities: exact(name, bf16, modalities - 1))
    _, _, layout = random_layout(1, 16, 2, 1, False)
    inputs, h0, gy, ghT = scan_inputs(1, 16, 32, 16, 2, False, torch.bfloat16, 3)
    with pytest.raises(AssertionError, match="scan_forward: a write behind the shared memory"):
        run_scan(inputs, h0, gy, ghT, layout, torch.bfloat16, "cuda")


@pytest.mark.parametrize(
    ("batch", "channels", "length", "spans"),
    [(8, 4096, 4096, 1), (2, 4096, 4096, 4), (1, 4096, 32768, 8), (4, 2048, 4096, 4), (1, 512, 256, 2)],
)
def test_spans_fill_an_h100_and_leave_no_cta_over_for_a_second_wave(batch, channels, length, spans):
    ctas = batch * channels // 128
    for before in (0.3, 0.7):
        assert cuda_scan.span_count(ctas, length // 16, 132, 2, before) == spans
    assert spans == 1 or ctas * spans <= 2 * 132


def test_backends_on_a_gpu_are_tried_in_order_and_the_log_says_why(monkeypatch, caplog):
    x = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16, shape=(4, 64))
    obstacles = {}
    monkeypatch.setattr(backends, "why_not", lambda name, kernel, x, size: obstacles.get((name, kernel)))
    caplog.set_level("INFO", logger=backends.__name__)

    def choose(kernel):
        caplog.clear()
        monkeypatch.setattr(backends, "_chosen", {})
        return backends.choose(kernel, x, 16)

    assert choose("scan") == "cuda"
    assert choose("conv") == "triton"
    assert "cuda kernels" not in caplog.text
    obstacles["cuda", "scan"] = "no NVRTC"
    assert choose("scan") == "triton"
    assert "cuda not used: no NVRTC" in caplog.text
    obstacles["triton", "scan"] = "no triton"
    assert choose("scan") == "torch"
    assert "cuda not used: no NVRTC; triton not used: no triton" in caplog.text
    monkeypatch.setattr(backends, "forced", "cuda")
    assert choose("conv") == "triton"
    assert "only the scan has cuda kernels" in caplog.text
    with pytest.raises(UserError, match="MOM_KERNELS=cuda cannot run the scan kernel here: no NVRTC"):
        choose("scan")


def test_reasons_why_the_kernels_cannot_run_are_found_without_a_gpu():
    x = torch.zeros(4, 64)
    assert cuda_scan.why_not(x, 16) == "they need an NVIDIA GPU"
    assert "only the scan" in backends.why_not("cuda", "conv", x, 4)
    on_gpu = lambda width, dtype=torch.bfloat16: SimpleNamespace(  # noqa: E731
        device=torch.device("cuda", 0), dtype=dtype, shape=(4, width))  # fmt: skip
    assert "48" in cuda_scan.why_not(on_gpu(48), 16)
    assert "state of 8" in cuda_scan.why_not(on_gpu(64), 8)
    assert "float64" in cuda_scan.why_not(on_gpu(64, torch.float64), 16)


def test_more_modalities_than_shared_memory_holds_are_refused_with_the_way_out(monkeypatch):
    small = SimpleNamespace(shared_limit=100_000, device="cuda:0")
    a = cuda_scan.Arguments(modalities=40, channels=64, chunks=4)
    with pytest.raises(UserError, match=r"cannot hold 40 modalities.*MOM_KERNELS=triton"):
        cuda_scan._cut_rows("scan_backward", small, True, a, 1, 0.3)


@pytest.mark.skipif(nvrtc.missing() is not None, reason=f"NO NVRTC: {nvrtc.missing()}")
def test_the_kernels_compile_for_every_architecture_and_fit_its_registers_and_shared_memory():
    pytest.importorskip("triton", reason="NO TRITON: its disassemblers are not here")
    tool = runpy.run_path(str(CHECKOUT / "tools/dev/compile_kernels.py"))
    for arch in (80, 90, 100, 120):
        results = tool["compile_cuda"](arch, everything=arch == 90)
        assert {r["kernel"] for r in results} == {f"{n.replace('_', ' ')}, CUDA C++" for n in cuda_scan.NAMES}
        for result in results:
            assert result["spilled_bytes"] <= (8 if arch == 100 else 0), result
            assert result["ctas_per_sm"] >= (2 if arch in (90, 100) else 1), result


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("B", "L", "D", "M", "carried", "spans", "chance"), CASES)
def test_on_a_gpu_the_scan_and_all_its_gradients_equal_the_float64_recurrence(
    B, L, D, M, carried, spans, chance, dtype, monkeypatch
):
    monkeypatch.setattr(cuda_scan, "span_count", lambda *_: spans)
    modality, document, layout = random_layout(B, L, M, L, carried, empty=1 if M == 3 else None, chance=chance)
    inputs, h0, gy, ghT = scan_inputs(B, L, D, 16, M, carried, dtype, L)
    expected = defined_scan(inputs, h0, gy, ghT, modality, document)
    tolerances = {torch.float32: (5e-6, 5e-6), torch.bfloat16: (1e-2, 2e-5)}[dtype]
    for name, ours, theirs in zip(NAMES, run_scan(inputs, h0, gy, ghT, layout, dtype, "cuda"), expected, strict=False):
        close(ours, theirs, tolerances[ours.dtype == torch.float32], name)


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("B", "L", "D"), [(8, 2048, 2048), (1, 16384, 2048), (3, 1000, 1536)])
def test_at_real_sizes_the_gpu_agrees_with_the_torch_backend(B, L, D, dtype):
    _, _, layout = random_layout(B, L, 3, 0, True)
    inputs, h0, gy, ghT = scan_inputs(B, L, D, 16, 3, True, dtype, 0)
    ours, again = (run_scan(inputs, h0, gy, ghT, layout, dtype, "cuda") for _ in range(2))
    theirs = run_scan(inputs, h0, gy, ghT, layout, dtype, "torch")
    for name, mine, same, other in zip(NAMES, ours, again, theirs, strict=True):
        assert torch.equal(mine, same), name
        close(mine, other.cpu().double(), 1e-4 if dtype == torch.float32 else 2e-2, name)
