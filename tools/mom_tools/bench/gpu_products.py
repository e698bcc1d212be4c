"""What `mom gpu-check` compares with float64 about products: every backend of routing, and FP8."""

from __future__ import annotations

import mom_tokenizers  # noqa: F401  # isort: skip  # before torch: how its threads wait

import traceback
from collections.abc import Callable, Sequence
from importlib import import_module

import torch
from torch import Tensor

from mom_tools.bench.findings import Findings
from mom_train.config.model import PROJECTIONS, ModelConfig
from mom_train.model.init import initialize
from mom_train.model.language_model import LanguageModel
from mom_train.ops.layout import RowLayout
from mom_train.ops.routing import fp8, grouped_mm
from mom_train.ops.routing.fp8 import Fp8, fp8_linear
from mom_train.ops.routing.modality_linear import modality_linear


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


def worst(ours: list[Tensor], wanted: list[Tensor]) -> float:
    """The greatest error of any tensor over the greatest magnitude of what it should be; infinite for NaN."""
    errors = []
    for a, b in zip(ours, wanted, strict=True):
        error = float((a.detach().double() - b.detach()).abs().max() / b.detach().abs().max().clamp_min(1e-30))
        errors.append(error if error == error else float("inf"))
    return max(errors)


def routing_error(findings: Findings, modalities: int, dtype: torch.dtype, backend: str | None = None) -> float:
    """Error of `modality_linear`, or of one of its backends, against a product of each row with its own matrix in
    float64. Segments have uneven lengths, and the last is empty where there are several."""
    inputs, outputs = (24, 48) if findings.tiny else (344, 200)
    lengths = [(13 * m * m + 5) % 97 + 1 for m in range(modalities)]
    if modalities > 1:
        lengths[-1] = 0
    g = torch.Generator().manual_seed(modalities)
    T = sum(lengths)
    drawn = [torch.randn(*s, generator=g) for s in ((T, inputs), (modalities * outputs, inputs), (T, outputs))]
    x, weight, gradient = (t.to(findings.device, dtype) for t in drawn)
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(findings.device, torch.int32)
    found: Sequence[Tensor]
    if backend is None:
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        y = modality_linear(leaves[0], leaves[1], offsets)
        found = torch.autograd.grad(y, leaves, gradient)
    else:
        module = import_module(f"mom_train.ops.routing.{backend}")
        y = module.forward(x, weight, None, offsets)
        found = module.backward(gradient, x, weight, offsets, False)[:2]
    wide = [t.double().requires_grad_() for t in (x, weight)]
    number_T = torch.repeat_interleave(torch.arange(modalities), torch.tensor(lengths)).to(findings.device)
    chosen = wide[1].view(modalities, outputs, inputs)[number_T]
    y_true = (chosen @ wide[0][:, :, None]).squeeze(2)
    return worst([y, *found], [y_true, *torch.autograd.grad(y_true, wide, gradient.double())])


def check_backends(findings: Findings) -> None:
    """Each backend of routing by itself, in fp32 and bf16. Those that cannot run here are listed with the reason."""
    cuda = findings.device == "cuda"
    capability = torch.cuda.get_device_capability() if cuda else None
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        for backend in ("torch", "grouped_mm", "triton"):
            obstacle = None
            if backend != "torch" and capability is None:
                obstacle = "there is no GPU"
            elif backend == "grouped_mm" and capability is not None:
                obstacle = grouped_mm.why_not(dtype, 344, 200, False, capability)
            if obstacle is not None:
                findings.left_out(f"routing by {backend}, {name}", obstacle)
                continue
            compare = lambda b=backend, d=dtype: routing_error(findings, 3, d, b)  # noqa: E731
            checked(findings, "routing", f"ours, {backend}, {name}", 1e-5 if name == "fp32" else 2e-2, compare)


def check_fp8(findings: Findings) -> None:
    """Products in FP8, emulated and on the device, with one matrix and by modality, and a step of a mixture."""
    device = torch.device(findings.device)
    modes: tuple[Fp8, ...] = ("emulated", "device")
    for mode in modes:
        for modalities in (1, 3):
            what = f"fp8, {mode}, " + ("one matrix" if modalities == 1 else "by modality, one empty")
            if mode == "device" and (obstacle := fp8.why_not(device, modalities > 1)) is not None:
                findings.left_out(what, obstacle)
                continue
            compare = lambda m=mode, n=modalities: fp8_error(findings, n, m)  # noqa: E731
            checked(findings, "routing", what, 1e-2, compare)
    what = "a step of a mixture in fp8 on the device, to the emulation"
    if (obstacle := fp8.why_not(device, True)) is not None:
        findings.left_out(what, obstacle)
    else:
        checked(findings, "step", what, 5e-2, lambda: fp8_step_error(findings))


def e4m3(rows: Tensor) -> Tensor:
    """Rows in float64, rounded to e4m3 with a power of two for each row as its scale. E4M3 has 3 bits of fraction and
    normal numbers from 2^-6 to 448."""
    largest = rows.abs().amax(1, keepdim=True)
    scale = torch.where(largest > 0, torch.exp2(torch.floor(torch.log2(largest / 448)) + 1), 1.0)
    scaled = rows / scale
    exponent = torch.floor(torch.log2(scaled.abs().clamp_min(2.0**-6)))
    step = torch.exp2(exponent - 3)
    return torch.round(scaled / step) * step * scale


def fp8_error(findings: Findings, modalities: int, mode: Fp8) -> float:
    """Error of `fp8_linear` and its gradients against products in float64 of the rounded numbers. Segments have uneven
    lengths, and the last is empty where there are several."""
    inputs, outputs = (32, 48) if findings.tiny else (352, 208)
    lengths = [37, 90, 0][:modalities]
    g = torch.Generator().manual_seed(modalities)
    T = sum(lengths)
    drawn = [torch.randn(*s, generator=g) for s in ((T, inputs), (modalities * outputs, inputs), (T, outputs))]
    x, weight, gradient = (t.to(torch.bfloat16) for t in drawn)
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(findings.device, torch.int32)
    leaves = [t.to(findings.device).requires_grad_() for t in (x, weight)]
    y = fp8_linear(leaves[0], leaves[1], offsets if modalities > 1 else None, mode)
    found = torch.autograd.grad(y, leaves, gradient.to(findings.device))
    x, weight, gradient = x.double(), weight.double(), gradient.double()
    outs, grads_x, grads_w = [], [], []
    for rows_x, rows_g, own in zip(x.split(lengths), gradient.split(lengths), weight.chunk(modalities), strict=True):
        outs.append(e4m3(rows_x) @ e4m3(own).t() if len(rows_x) else rows_g)
        grads_x.append(e4m3(rows_g) @ e4m3(own.t().contiguous()).t() if len(rows_x) else rows_x)
        grads_w.append(rows_g.t() @ rows_x)
    wanted = [torch.cat(outs), torch.cat(grads_x), torch.cat(grads_w)]
    return worst([t.cpu() for t in (y, *found)], wanted)


def fp8_step_error(findings: Findings) -> float:
    """Error of losses and gradients of a small mixture whose products are in FP8 on the device, beside the emulation
    in fp32 of the same numbers. Sums in another order move some numbers across a bound between two of e4m3."""
    device, results = torch.device(findings.device), []
    g = torch.Generator().manual_seed(0)
    modality = torch.randint(0, 3, (2, 96), generator=g).to(torch.uint8)
    layout = RowLayout.sort(modality, torch.zeros(2, 96, dtype=torch.int32), 3)
    moved = {k: v.to(device) for k, v in vars(layout).items() if isinstance(v, Tensor)}
    tokens, labels = torch.randint(0, 128, (2, 192), generator=g).to(device)
    modes: tuple[Fp8, ...] = ("device", "emulated")
    for mode in modes:
        model = LanguageModel(ModelConfig(dim=64, layers=1, decoupled=PROJECTIONS), 128, 3)
        initialize(model, 0)
        model.to(device).use_fp8(mode)
        with torch.autocast(device.type, torch.bfloat16):
            losses = model(tokens, RowLayout(**{**vars(layout), **moved}), labels)
        gradients = torch.autograd.grad(losses.tokens, list(model.parameters()))
        results.append([losses.tokens_T, *gradients])
    return worst(results[0], [t.double() for t in results[1]])
