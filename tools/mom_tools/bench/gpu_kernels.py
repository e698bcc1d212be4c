"""Parts of `mom gpu-check` about single operators: limits of the machine, what is right, and how fast it is."""

from __future__ import annotations

import mom_tokenizers  # noqa: F401  # isort: skip  # before torch: how its threads wait

import platform
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mom_data.batches.batch import IGNORE
from mom_tools.bench import gpu_products
from mom_tools.bench import kernels as bench_kernels
from mom_tools.bench.findings import Findings
from mom_tools.bench.gpu_products import checked, routing_error, worst
from mom_tools.bench.suites import SUITES, Sizes
from mom_train.model.cross_entropy import linear_cross_entropy
from mom_train.ops import backends
from mom_train.ops.layout import RowLayout
from mom_train.ops.norm.add_norm import add_norm
from mom_train.ops.scan import naive as naive_scan
from mom_train.ops.scan.selective_scan import selective_scan

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Errors = dict[str, float]


def sizes_of(findings: Findings, **given: Any) -> Sizes:
    """Sizes for the suites of `mom bench`, on the device of the part."""
    usual = {"batch": 2, "length": 128, "dim": 32, "state": 16, "modalities": 3, "dtype": torch.float32}
    return Sizes(**{**usual, "published": None, "device": findings.device, **given})


# ---- the machine -------------------------------------------------------------------------------------------


def machine(findings: Findings) -> None:
    """Names device and software, and measures copying and matrix products, which nothing here can be faster than."""
    cuda = torch.cuda.is_available()
    findings.device = "cuda" if cuda else "cpu"
    about: dict[str, str] = {}
    if cuda:
        seen = torch.cuda.get_device_properties(0)
        about["card"] = f"{seen.name}, {seen.total_memory / 2**30:.0f} GiB, sm_{seen.major}{seen.minor}"
    else:
        about["card"] = "none: everything ran on the CPU"
    about["machine"] = f"{platform.machine()}, {torch.get_num_threads()} threads of PyTorch, {platform.system()}"
    about["torch"] = f"{torch.__version__} (CUDA {torch.version.cuda})"
    about["triton"] = _version("triton")
    about["python"] = platform.python_version()
    about["mamba_ssm, causal_conv1d"] = f"{_version('mamba_ssm')}, {_version('causal_conv1d')}"
    findings.figure("about", about)
    findings.figure("device", findings.device)
    if not cuda:
        torch.set_num_threads(1)
    for name, dtype in DTYPES.items():
        if not cuda and name == "bf16":  # it takes a CPU without AMX half a minute
            continue
        limit = bench_kernels.limits(sizes_of(findings, dtype=dtype))
        findings.figure(f"limits_{name}", limit)
        cells = {"TFLOP/s of a large product": f"{limit['gemm_flops_per_s'] / 1e12:.3g}"}
        cells["TB/s copied (read and written)"] = f"{limit['copy_bytes_per_s'] / 1e12:.3g}"
        findings.row("Limits, measured", **{"precision": name, **cells})


def _version(package: str) -> str:
    import importlib.metadata

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


# ---- whether they are right --------------------------------------------------------------------------------


def kernels(findings: Findings) -> None:
    """Compares every backend that can run here with the definition of its operator in float64."""
    if findings.device == "cpu":
        torch.set_num_threads(1)
    for name, dtype in DTYPES.items():
        for operator, suite_of in SUITES.items():
            _suite(findings, operator, name, dtype, suite_of)
    for name, dtype in DTYPES.items():
        one = torch.empty(1, 64, device=findings.device, dtype=dtype)
        for backend in backends.BACKENDS:
            if backends.why_not(backend, "scan", one, 16) is None:
                what = f"ours, {backend}, {name}, a state that enters and one that leaves, an empty modality"
                compare = lambda b=backend, d=dtype: carried_scan_error(findings, b, d)  # noqa: E731
                checked(findings, "scan", what, 1e-5 if name == "fp32" else 3e-2, compare)
        tolerance = 1e-5 if name == "fp32" else 2e-2
        for modalities in (1, 2, 8):
            what = f"ours, {name}, " + (f"{modalities} modalities, one empty" if modalities > 1 else "one modality")
            compare = lambda m=modalities, d=dtype: routing_error(findings, m, d)  # noqa: E731
            checked(findings, "routing", what, tolerance, compare)
        loose = 1e-5 if name == "fp32" else 3e-2
        checked(findings, "cross-entropy", f"ours, {name}", loose, partial(cross_entropy_error, findings, dtype))
        checked(
            findings, "RMSNorm", f"ours, {name}, of a sum, by modality", loose, partial(norm_error, findings, dtype)
        )
    gpu_products.check_backends(findings)
    gpu_products.check_fp8(findings)


def _suite(findings: Findings, operator: str, name: str, dtype: torch.dtype, suite_of: Callable[..., Any]) -> None:
    """Every candidate of a suite of `mom bench`, each by itself, so that one that fails ends no other."""
    try:
        suite = suite_of(sizes_of(findings, dtype=dtype).small())
    except Exception as raised:
        traceback.print_exc()
        findings.wrong(f"{operator}, {name}: {type(raised).__name__}: {str(raised)[:200]}")
        return
    for candidate in suite.candidates:
        prefix = f"{candidate.name.split(',')[0]}/" if operator == "routing" else ""

        def compare(candidate: Any = candidate, prefix: str = prefix) -> float:
            candidate.prepare()
            return bench_kernels.greatest_error(candidate, suite.truth, prefix)

        tolerance = bench_kernels.TOLERANCE[operator][dtype == torch.bfloat16]
        checked(findings, operator, f"{candidate.name}, {name}", tolerance, compare)
    if name == "fp32":
        for absent, why in suite.absent.items():
            findings.left_out(f"{operator}, {absent}", why)


def carried_scan_error(findings: Findings, backend: str, dtype: torch.dtype) -> float:
    """Error of a scan whose state comes from before and goes on after, against the recurrence in float64. On a GPU the
    rows are long enough to be cut into spans."""
    M, D, N = 3, 64, 16
    B, L = (2, 40) if findings.tiny else (2, 600)
    T, device = B * L, findings.device
    g = torch.Generator().manual_seed(3)
    drawn = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    modality = torch.randint(0, M - 1, (B, L), generator=g)  # so that the last one is empty
    document = (torch.rand(B, L, generator=g) < 3 / L).cumsum(1)
    rounded = [t.to(dtype).double() for t in (drawn(B, L, D), drawn(B, L, D) - 3, drawn(B, L, N), drawn(B, L, N))]
    x, dt, Bm, Cm = rounded
    z, gy = drawn(B, L, D).to(dtype).double(), drawn(B, L, D).to(dtype).double()
    A, skip, bias = -drawn(D, N).exp().double(), drawn(D).double(), drawn(M, D).double()
    h0, ghT = drawn(B, D, N).double(), drawn(B, D, N).double()
    leaves = [t.clone().requires_grad_() for t in (x, dt, A, Bm, Cm, skip, z, bias, h0)]
    x, dt, A, Bm, Cm, skip, z, bias, h0 = leaves
    y_true, hT_true = naive_scan.selective_scan(x, dt, A, Bm, Cm, skip, z, bias, modality, document.int(), h0)
    true = torch.autograd.grad([y_true, hT_true], leaves, [gy, ghT])

    past_B = torch.full((B,), 255, dtype=torch.int64)
    layout = RowLayout.sort(modality.to(torch.uint8), document.int(), M, past_B=past_B)
    moved = {k: v.to(device) for k, v in vars(layout).items() if isinstance(v, Tensor)}
    on_device = RowLayout(**{**vars(layout), **moved})
    of_rows = (0, 1, 3, 4, 6)
    into_rows = lambda t: t.reshape(T, -1)[layout.rows]  # noqa: E731
    ours = [
        (into_rows(t.detach()).to(device, dtype) if i in of_rows else t.detach().float().to(device)).requires_grad_()
        for i, t in enumerate(leaves)
    ]
    rows_x, rows_dt, own_A, rows_B, rows_C, own_D, rows_z, own_bias, own_h0 = ours
    y, hT = selective_scan(
        rows_x, rows_dt, own_A, rows_B, rows_C, own_D, rows_z, own_bias, on_device, own_h0, backend=backend
    )  # fmt: skip
    found = torch.autograd.grad([y, hT], ours, [into_rows(gy).to(device, dtype), ghT.float().to(device)])
    wanted = [into_rows(t) if i in of_rows else t for i, t in enumerate(true)]
    return worst([t.cpu() for t in (y, hT, *found)], [into_rows(y_true), hT_true, *wanted])


def cross_entropy_error(findings: Findings, dtype: torch.dtype) -> float:
    """Error of the loss of the head, with rows that have no label, against PyTorch's in float64. With bf16, the
    products are in bf16 and so are the logits that the kernel reads."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(37, 16, generator=g).to(findings.device, dtype).requires_grad_()
    weight = torch.randn(50, 16, generator=g).to(findings.device, dtype).requires_grad_()
    labels = torch.randint(0, 50, (37,), generator=g).to(findings.device)
    labels[::5] = IGNORE
    loss, each, _ = linear_cross_entropy(x, weight, labels)
    found = torch.autograd.grad(loss, [x, weight])
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    each_true = F.cross_entropy(wide[0] @ wide[1].t(), labels, ignore_index=IGNORE, reduction="none")
    return worst([each, *found], [each_true, *torch.autograd.grad(each_true.sum(), wide)])


def norm_error(findings: Findings, dtype: torch.dtype) -> float:
    """Error of residual + branch and its RMSNorm, with weights of its own for each modality, against the formula in
    float64. The residual and the weight are fp32; branch, norm and the gradient of the norm are in `dtype`."""
    g = torch.Generator().manual_seed(0)
    modality = torch.tensor([[0, 1, 1, 2, 0, 2, 1]])
    layout = RowLayout.sort(modality.to(torch.uint8), torch.zeros(1, 7, dtype=torch.int32), 3)
    moved = {k: v.to(findings.device) for k, v in vars(layout).items() if isinstance(v, Tensor)}
    on_device = RowLayout(**{**vars(layout), **moved})
    drawn = [torch.randn(*shape, generator=g).to(findings.device) for shape in ((7, 48), (7, 48), (3, 48))]
    x, branch, weight = drawn[0].requires_grad_(), drawn[1].to(dtype).requires_grad_(), drawn[2].requires_grad_()
    of_sum, of_norm = (torch.randn(7, 48, generator=g).to(findings.device) for _ in range(2))
    total, y = add_norm(x, branch, weight, on_device, 1e-5, dtype)
    found = torch.autograd.grad([total, y], [x, branch, weight], [of_sum, of_norm.to(dtype)])
    wide = [t.detach().double().requires_grad_() for t in (x, branch, weight)]
    total_true = wide[0] + wide[1]
    scale = total_true / (total_true.square().mean(1, keepdim=True) + 1e-5).sqrt()
    y_true = scale * wide[2][modality.view(-1)[layout.rows].to(findings.device)]
    gradients = [of_sum.double(), of_norm.to(dtype).double()]
    return worst([total, y, *found], [total_true, y_true, *torch.autograd.grad([total_true, y_true], wide, gradients)])


# ---- how fast they are -------------------------------------------------------------------------------------

SHAPES = {"scan": (8, 4096, 2048), "routing": (4, 4096, 2048), "block": (2, 4096, 2048), "conv": (8, 4096, 2048)}
"""Operator -> (B, L, d) on a GPU; scan and convolution have 2d channels."""
MORE_SCANS = ((2, 4096, 2048), (1, 32768, 2048))
_COLUMNS = {
    "forward_ms": "forward ms",
    "both_ms": "both ms",
    "both_ratio": "both, to the first",
    "forward_of_floor": "forward, share of the floor",
    "both_of_floor": "both, share of the floor",
    "peak_mb": "peak MB",
}


def times(findings: Findings) -> None:
    """Times the operators by `mom bench`, in turns with stock kernels where these are installed."""
    cases: list[tuple[str, tuple[int, int, int]]] = list(SHAPES.items())
    cases += [("scan", shape) for shape in MORE_SCANS]
    if findings.tiny:
        torch.set_num_threads(1)
        cases = [(operator, (1, 101, 32)) for operator in SHAPES]
    named: set[str] = set()
    for operator, (batch, length, dim) in cases:
        what = f"{operator} at B = {batch}, L = {length}, d = {dim}"
        if not findings.time_for(what, 0 if findings.tiny else 8):
            continue
        dtype = torch.float32 if findings.tiny else torch.bfloat16
        sizes = sizes_of(findings, batch=batch, length=length, dim=dim, dtype=dtype)
        without = () if findings.tiny else ("torch", "pscan", "Transformers")  # they would take too long or too much
        try:
            result = bench_kernels.run(operator, sizes, 1 if findings.tiny else 7, without)
        except Exception as raised:
            traceback.print_exc()
            findings.wrong(f"{what}: {type(raised).__name__}: {str(raised)[:200]}")
            continue
        findings.figure(what, result)
        for name, values in result["figures"].items():
            shown = {"candidate": name, **{t: f"{values[c]:.3g}" for c, t in _COLUMNS.items() if c in values}}
            findings.row(f"{what}, {'fp32' if findings.tiny else 'bf16'}", **shown)
        for name, error in result["wrong"].items():
            findings.wrong(f"{what}, {name}: error {error:.1e}, so it was not timed")
        for name, why in result["absent"].items():
            if why != "--without" and not name.startswith("ours") and f"{operator}, {name}" not in named:
                named.add(f"{operator}, {name}")
                findings.left_out(f"{operator}, {name}", why)
