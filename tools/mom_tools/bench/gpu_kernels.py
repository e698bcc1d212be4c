"""Parts of `mom gpu-check` about single operators: limits of the machine, what is right, and how fast it is."""

from __future__ import annotations

import mom_tokenizers  # noqa: F401  # isort: skip  # before torch: how its threads wait

import platform
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mom_data.batches.batch import IGNORE
from mom_tools.bench import kernels as bench_kernels
from mom_tools.bench.findings import Findings
from mom_tools.bench.suites import SUITES, Sizes
from mom_train.model.cross_entropy import linear_cross_entropy
from mom_train.model.routed import Norm
from mom_train.ops import backends
from mom_train.ops.layout import RowLayout
from mom_train.ops.routing.modality_linear import modality_linear
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


def checked(findings: Findings, operator: str, what: str, tolerance: float, compare: Callable[[], float]) -> None:
    """A row about one comparison. An error beyond the tolerance, or an exception, is wrong and ends nothing else."""
    try:
        error = compare()
        verdict = "right" if error <= tolerance else "**WRONG**"
        shown = f"{error:.1e}"
    except Exception as raised:
        traceback.print_exc()
        verdict, shown, error = "**FAILED**", f"{type(raised).__name__}: {str(raised)[:120]}", float("inf")
    cells = {"operator": operator, "what": what, "greatest error": shown, "allowed": f"{tolerance:.0e}"}
    findings.row("Error of outputs and gradients over their greatest magnitude", **cells, verdict=verdict)
    if verdict != "right":
        findings.wrong(f"{operator}, {what}: {shown}")


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
    checked(findings, "cross-entropy", "ours, fp32", 1e-5, lambda: cross_entropy_error(findings))
    checked(findings, "RMSNorm", "ours, fp32, by modality", 1e-5, lambda: norm_error(findings))


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


def worst(ours: list[Tensor], wanted: list[Tensor]) -> float:
    """The greatest error of any tensor over the greatest magnitude of what it should be; infinite for NaN."""
    errors = []
    for a, b in zip(ours, wanted, strict=True):
        error = float((a.detach().double() - b.detach()).abs().max() / b.detach().abs().max().clamp_min(1e-30))
        errors.append(error if error == error else float("inf"))
    return max(errors)


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


def routing_error(findings: Findings, modalities: int, dtype: torch.dtype) -> float:
    """Error of `modality_linear` with segments of uneven lengths, of which the last is empty where there are more than
    one, against a product of each row with its own matrix in float64."""
    inputs, outputs = (24, 40) if findings.tiny else (344, 200)
    lengths = [(13 * m * m + 5) % 97 + 1 for m in range(modalities)]
    if modalities > 1:
        lengths[-1] = 0
    g = torch.Generator().manual_seed(modalities)
    T = sum(lengths)
    drawn = [torch.randn(*s, generator=g) for s in ((T, inputs), (modalities * outputs, inputs), (T, outputs))]
    x, weight, gradient = (t.to(findings.device, dtype) for t in drawn)
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(findings.device, torch.int32)
    leaves = [t.clone().requires_grad_() for t in (x, weight)]
    y = modality_linear(leaves[0], leaves[1], offsets)
    found = torch.autograd.grad(y, leaves, gradient)
    wide = [t.double().requires_grad_() for t in (x, weight)]
    number_T = torch.repeat_interleave(torch.arange(modalities), torch.tensor(lengths)).to(findings.device)
    chosen = wide[1].view(modalities, outputs, inputs)[number_T]
    y_true = (chosen @ wide[0][:, :, None]).squeeze(2)
    return worst([y, *found], [y_true, *torch.autograd.grad(y_true, wide, gradient.double())])


def cross_entropy_error(findings: Findings) -> float:
    """Error of the loss of the head, with rows that have no label, against PyTorch's in float64."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(37, 16, generator=g).to(findings.device).requires_grad_()
    weight = torch.randn(50, 16, generator=g).to(findings.device).requires_grad_()
    labels = torch.randint(0, 50, (37,), generator=g).to(findings.device)
    labels[::5] = IGNORE
    loss, each = linear_cross_entropy(x, weight, labels)
    found = torch.autograd.grad(loss, [x, weight])
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    each_true = F.cross_entropy(wide[0] @ wide[1].t(), labels, ignore_index=IGNORE, reduction="none")
    return worst([each, *found], [each_true, *torch.autograd.grad(each_true.sum(), wide)])


def norm_error(findings: Findings) -> float:
    """Error of RMSNorm with weights of its own for each modality, against its formula in float64."""
    g = torch.Generator().manual_seed(0)
    modality = torch.tensor([[0, 1, 1, 2, 0, 2, 1]])
    layout = RowLayout.sort(modality.to(torch.uint8), torch.zeros(1, 7, dtype=torch.int32), 3)
    moved = {k: v.to(findings.device) for k, v in vars(layout).items() if isinstance(v, Tensor)}
    on_device = RowLayout(**{**vars(layout), **moved})
    norm = Norm(48, 3, 1e-5).to(findings.device)
    weight = next(iter(norm.parameters()))
    with torch.no_grad():
        weight.copy_(torch.randn(weight.shape, generator=g))
    x = torch.randn(7, 48, generator=g).to(findings.device).requires_grad_()
    gradient = torch.randn(7, 48, generator=g).to(findings.device)
    y = norm(x, on_device)
    found = torch.autograd.grad(y, [x, weight], gradient)
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    scale = wide[0] / (wide[0].square().mean(1, keepdim=True) + 1e-5).sqrt()
    y_true = scale * wide[1].view(3, 48)[modality.view(-1)[layout.rows].to(findings.device)]
    return worst([y, *found], [y_true, *torch.autograd.grad(y_true, wide, gradient.double())])


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
