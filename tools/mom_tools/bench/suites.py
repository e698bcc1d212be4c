"""The candidates of `mom bench` on one problem each: ours by backend, dense PyTorch, and the peers."""

from __future__ import annotations

import mom_tokenizers  # noqa: F401  # isort: skip  # before torch: how its threads wait

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mom_tools.bench import peers
from mom_tools.bench.peers import define_scan
from mom_train.config.model import PROJECTIONS, ModelConfig
from mom_train.model.mamba import MambaMixer
from mom_train.ops import backends
from mom_train.ops.conv import naive as naive_conv
from mom_train.ops.conv.causal_conv import causal_conv
from mom_train.ops.layout import RowLayout
from mom_train.ops.routing.modality_linear import modality_linear
from mom_train.ops.scan.selective_scan import selective_scan


@dataclass
class Candidate:
    """One program on one problem: its output, its inputs that want gradients, and how to read both in time order."""

    name: str
    forward: Callable[[], Tensor | Sequence[Tensor]]
    leaves: dict[str, Tensor]
    gradient: Tensor | Sequence[Tensor]
    in_time: Callable[[Tensor], Tensor] = lambda t: t
    prepare: Callable[[], None] = lambda: None

    def backward(self) -> dict[str, Any]:
        """Run forward and backward. Returns the gradients by name, and the output as "y"."""
        y = self.forward()
        grads = torch.autograd.grad(y, list(self.leaves.values()), self.gradient)
        return {"y": y, **dict(zip(self.leaves, grads, strict=True))}


@dataclass
class Suite:
    """What one subcommand measures: candidates, why others are absent, and at small sizes the right results."""

    candidates: list[Candidate]
    truth: dict[str, Tensor] | None = None
    absent: dict[str, str] = field(default_factory=dict)


class Sizes(argparse.Namespace):
    batch: int
    length: int
    dim: int
    state: int
    modalities: int
    device: str
    dtype: torch.dtype
    published: Path | None

    def small(self) -> Sizes:
        return Sizes(**{**vars(self), "batch": 2, "length": 40, "dim": 32})


def geometry(s: Sizes) -> tuple[Tensor, Tensor, RowLayout]:
    """Modalities in runs of 30 to 300 tokens, documents of 200 on average: (B, L) each, and the layout."""
    g = torch.Generator().manual_seed(0)
    modality, document = torch.zeros(2, s.batch * s.length, dtype=torch.int64)
    at = 0
    while at < len(modality):
        run = int(torch.randint(30, 300, (), generator=g)) if s.length > 100 else 7
        modality[at : at + run] = int(torch.randint(0, s.modalities, (), generator=g))
        at += run
    document = (torch.rand(s.batch, s.length, generator=g) < 1 / min(200, s.length / 3)).cumsum(1).int()
    modality = modality.view(s.batch, s.length)
    layout = RowLayout.sort(modality.to(torch.uint8), document, s.modalities)
    moved = {k: v.to(s.device) for k, v in vars(layout).items() if isinstance(v, Tensor)}
    return modality.to(s.device), document.to(s.device), RowLayout(**{**vars(layout), **moved})


def draw(s: Sizes, *shapes: Sequence[int], dtype: torch.dtype | None = None) -> list[Tensor]:
    g = torch.Generator(s.device).manual_seed(1)
    return [torch.randn(*shape, generator=g, device=s.device).to(dtype or s.dtype) for shape in shapes]


def truth_of(define: Callable[..., Tensor], leaves: dict[str, Tensor], gradient: Tensor) -> dict[str, Tensor]:
    wide = {name: t.detach().double().requires_grad_() for name, t in leaves.items()}
    return Candidate("", lambda: define(**wide), wide, gradient.double()).backward()


def rows_of(leaves: dict[str, Tensor], layout: RowLayout, of_rows: set[str]) -> dict[str, Tensor]:
    """The problem's inputs in row order, as leaves that gradients are computed for."""
    flat = lambda t: t.detach().reshape(layout.tokens, -1)[layout.rows]  # noqa: E731
    return {n: (flat(t) if n in of_rows else t.detach().clone()).requires_grad_() for n, t in leaves.items()}


def to_time(layout: RowLayout) -> Callable[[Tensor], Tensor]:
    order, T = layout.order.long(), layout.tokens
    return lambda t: t[order].view(layout.batch, layout.length, -1) if t.dim() == 2 and t.shape[0] == T else t


def runnable(kernel: str, x: Tensor, size: int, absent: dict[str, str]) -> list[str]:
    for name in backends.BACKENDS:
        obstacle = backends.why_not(name, kernel, x, size)
        if obstacle:
            absent[f"ours, {name}"] = obstacle
    return [name for name in ("c", "cuda", "triton", "mamba_ssm", "torch") if f"ours, {name}" not in absent]


def scan(s: Sizes) -> Suite:
    D, N, M = 2 * s.dim, s.state, s.modalities
    modality, document, layout = geometry(s)
    x, dt, B, C, z, gradient = draw(s, *[(s.batch, s.length, n) for n in (D, D, N, N, D, D)])
    dt = dt / 2 - 4
    A = -torch.arange(1, N + 1.0, device=s.device).repeat(D, 1)
    skip, bias = draw(s, (D,), (M, D), dtype=torch.float32)
    leaves = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": skip, "z": z, "bias": bias / 4}
    leaves = {name: t.requires_grad_() for name, t in leaves.items()}
    rows, time_gradient = {"x", "dt", "B", "C", "z"}, gradient.view(layout.tokens, D)[layout.rows]
    suite = Suite([])
    for backend in runnable("scan", x.view(-1, D), N, suite.absent):
        own = rows_of(leaves, layout, rows)

        def ours(own: dict[str, Tensor] = own, backend: str = backend) -> Tensor:
            x, dt, A, B, C, D, z, bias = own.values()
            return selective_scan(x, dt, A, B, C, D, z, bias, layout, backend=backend)[0]

        suite.candidates.append(Candidate(f"ours, {backend}", ours, own, time_gradient, to_time(layout)))
    try:
        peers.load_pscan()
        copies = {name: t.detach().clone().requires_grad_() for name, t in leaves.items()}
        run = lambda: peers.pscan_scan(**copies, modality=modality, document=document).to(s.dtype)  # noqa: E731
        suite.candidates.append(Candidate("mambapy pscan", run, copies, gradient))
    except ImportError as error:
        suite.absent["mambapy pscan"] = str(error)
    if s.length > 40 and (stock := peers.stock_scan(absent=suite.absent)):  # it knows no documents and no modality
        u, delta, B_BNL, C_BNL, gate = (
            leaves[n].detach().transpose(1, 2).contiguous() for n in ("x", "dt", "B", "C", "z")
        )
        theirs = {"u": u, "delta": delta, "A": A.detach(), "B": B_BNL, "C": C_BNL, "D": leaves["D"].detach(), "z": gate}
        theirs = {name: t.clone().requires_grad_() for name, t in theirs.items()}
        first_bias = leaves["bias"].detach()[0].contiguous()
        run = lambda: stock(**theirs, delta_bias=first_bias, delta_softplus=True)  # noqa: E731
        suite.candidates.append(
            Candidate(f"stock {peers.STOCK[0]}", run, theirs, gradient.transpose(1, 2).contiguous())
        )
    if s.length <= 40:
        define = lambda **w: define_scan(**w, modality=modality, document=document)  # noqa: E731
        suite.truth = truth_of(define, leaves, gradient)
    return suite


def conv(s: Sizes) -> Suite:
    D = 2 * s.dim
    _, document, layout = geometry(s)
    x, gradient = draw(s, *[(s.batch, s.length, D)] * 2)
    weight, bias = draw(s, (D, 4), (D,), dtype=torch.float32)
    leaves = {"x": x.requires_grad_(), "weight": weight.requires_grad_(), "bias": bias.requires_grad_()}
    suite = Suite([])
    for backend in runnable("conv", x.view(-1, D), 4, suite.absent):
        own = rows_of(leaves, layout, {"x"})

        def ours(own: dict[str, Tensor] = own, backend: str = backend) -> Tensor:
            return causal_conv(own["x"], own["weight"], own["bias"], layout, backend=backend)[0]

        in_rows = gradient.view(layout.tokens, D)[layout.rows]
        suite.candidates.append(Candidate(f"ours, {backend}", ours, own, in_rows, to_time(layout)))
    if s.length <= 40:
        suite.truth = truth_of(
            lambda **w: naive_conv.causal_conv(w["x"], w["weight"], w["bias"], document), leaves, gradient
        )
    else:  # it crosses documents, so that there is nothing to hold it against
        own = {name: t.detach().clone().requires_grad_() for name, t in leaves.items()}

        def conv1d() -> Tensor:
            pre = F.conv1d(
                own["x"].transpose(1, 2),
                own["weight"][:, None].to(s.dtype),
                own["bias"].to(s.dtype),
                padding=3,
                groups=D,
            )
            return F.silu(pre[..., : s.length]).transpose(1, 2)

        suite.candidates.append(Candidate("F.conv1d (crosses documents)", conv1d, own, gradient))
        if stock := peers.stock_conv(absent=suite.absent):  # channels first in shape, and innermost in memory
            theirs = {"x": x.detach().transpose(1, 2), "weight": weight.detach(), "bias": bias.detach()}
            theirs = {name: t.clone().requires_grad_() for name, t in theirs.items()}
            run = lambda: stock(*theirs.values(), activation="silu")  # noqa: E731
            suite.candidates.append(Candidate(f"stock {peers.STOCK[1]}", run, theirs, gradient.transpose(1, 2)))
    return suite


def routing(s: Sizes) -> Suite:
    d, D, N, M = s.dim, 2 * s.dim, s.state, s.modalities
    R, T = math.ceil(s.dim / 16), s.batch * s.length
    modality, _, layout = geometry(s)
    shapes = {"in_proj": (d, 2 * D), "x_proj": (D, R + 2 * N), "dt_proj": (R, D), "out_proj": (D, d)}
    masks = torch.stack([modality.view(-1) == m for m in range(M)])
    suite = Suite([])
    truth: dict[str, Tensor] = {}
    for part, (inputs, outputs) in shapes.items():
        x, weight, gradient = draw(s, (T, inputs), (M, outputs, inputs), (T, outputs))
        weight = weight / inputs**0.5
        own = {"x": x[layout.rows].requires_grad_(), "weight": weight.view(-1, inputs).clone().requires_grad_()}
        dense = {"x": x.clone().requires_grad_(), "weight": weight[0].clone().requires_grad_()}
        masked = {"x": x.clone().requires_grad_(), "weight": weight.clone().requires_grad_()}
        ours = lambda own=own: modality_linear(own["x"], own["weight"], layout.offsets)  # noqa: E731
        linear = lambda own=dense: F.linear(own["x"], own["weight"])  # noqa: E731
        by_mask = lambda own=masked: peers.masked_linear(own["x"], own["weight"], masks)  # noqa: E731
        back = lambda t: t[layout.order.long()] if t.shape[0] == T else t.view(M, -1, t.shape[1])  # noqa: E731
        suite.candidates += [
            Candidate(f"{part}, ours", ours, own, gradient[layout.rows], back),
            Candidate(f"{part}, boolean masks", by_mask, masked, gradient),
        ]
        if s.length > 40:
            suite.candidates.append(Candidate(f"{part}, one dense matrix", linear, dense, gradient))
            continue
        define = lambda x, weight: torch.einsum("toi,ti->to", weight[modality.view(-1)], x)  # noqa: E731
        truth |= {f"{part}/{k}": v for k, v in truth_of(define, {"x": x, "weight": weight}, gradient).items()}
    suite.truth = truth or None
    return suite


def block(s: Sizes) -> Suite:
    d, D, N, M = s.dim, 2 * s.dim, s.state, s.modalities
    R = math.ceil(s.dim / 16)
    modality, document, layout = geometry(s)
    if s.length <= 40 or s.published:  # the published block and Transformers' know no documents
        document = torch.zeros_like(document)
        layout = RowLayout.sort(modality.cpu().to(torch.uint8), document.cpu(), M)
        moved = {k: v.to(s.device) for k, v in vars(layout).items() if isinstance(v, Tensor)}
        layout = RowLayout(**{**vars(layout), **moved})
    shapes = [(M, 2 * D, d), (M, R + 2 * N, D), (M, D, R), (M, d, D), (D, 4), (D,), (M, D)]
    weights = [t / t.shape[-1] ** 0.5 for t in draw(s, *shapes, dtype=torch.float32)]
    names = ("in_proj", "x_proj", "dt_proj", "out_proj", "conv_weight", "conv_bias", "dt_bias")
    p = dict(zip(names, weights, strict=True))
    p["dt_bias"] = p["dt_bias"] - 4
    p["A_log"] = torch.arange(1, N + 1.0, device=s.device).log().repeat(D, 1)
    p["D"] = torch.ones(D, device=s.device)
    x, gradient = draw(s, *[(s.batch, s.length, d)] * 2)
    autocast = lambda: torch.autocast(s.device, torch.bfloat16, enabled=s.dtype == torch.bfloat16)  # noqa: E731
    suite, in_rows = Suite([]), gradient.view(layout.tokens, d)[layout.rows]
    config = ModelConfig(dim=d, layers=1, state=N, decoupled=PROJECTIONS)
    dense_layout = RowLayout.sort(torch.zeros_like(modality.cpu()).to(torch.uint8), document.cpu(), 1)

    def ours(backend: str | None, dense: bool) -> Candidate:
        mixer = MambaMixer(config.model_copy(update={"decoupled": ()}) if dense else config, 1 if dense else M)
        own = {name: t[0] if dense and name in (*PROJECTIONS, "dt_bias") else t for name, t in p.items()}
        state = {
            f"{name}.weight" if name in PROJECTIONS else name: (
                t.reshape(-1, t.shape[-1]) if t.dim() == 3 else t[None] if dense and name == "dt_bias" else t
            )
            for name, t in own.items()
        }
        mixer.load_state_dict(state)
        mixer.to(s.device)
        at = dense_layout if dense else layout
        rows = x.reshape(-1, d)[at.rows.to(s.device)].requires_grad_()

        def run() -> Tensor:
            with autocast():
                return mixer(rows, at).to(s.dtype)

        def pick() -> None:
            backends.forced = backend
            backends._chosen.clear()

        named = {name.removesuffix(".weight"): t for name, t in mixer.named_parameters()}
        back = to_time(at)
        view = lambda t: back(t) if t.shape[0] == layout.tokens else t  # noqa: E731
        label = "ours, dense" if dense else f"ours, {backend}"
        return Candidate(label, run, {"x": rows, **named}, in_rows if not dense else gradient.view(-1, d), view, pick)

    one = x.new_empty(1, D)
    convolves = lambda b: b == "cuda" or backends.why_not(b, "conv", one, 4) is None  # noqa: E731  (by Triton)
    usable = [b for b in runnable("scan", one, N, suite.absent) if convolves(b)]
    suite.candidates += [ours(b, False) for b in usable]
    if s.length <= 40:
        define = lambda x, **w: peers.define_block(x, w, modality, document)  # noqa: E731
        suite.truth = truth_of(define, {"x": x, **p}, gradient)
    else:
        suite.candidates += [ours(None, True), _gemms(s, p, autocast)]

    def other(name: str, module: torch.nn.Module, *extra: Any) -> Candidate:
        module.to(s.device)
        own = x.detach().clone().requires_grad_()

        def run() -> Tensor:
            with autocast():
                return module(own, *extra).to(s.dtype)

        return Candidate(name, run, {"x": own, **dict(module.named_parameters())}, gradient)

    if s.published is None:
        suite.absent["published + pscan"] = "NOT READ: --published CLONE names no clone of its repository"
    else:
        kind = peers.load_published(s.published, s.device == "cuda")
        masks = [(modality.view(-1) == m) for m in range(M)]
        suite.candidates.append(other("published + pscan", peers.build_published(kind, p), masks))
    if s.length > 40:
        try:
            suite.candidates.append(other("Transformers, dense", peers.build_transformers(p)))
        except ImportError as error:
            suite.absent["Transformers, dense"] = f"NOT INSTALLED: {error}"
    return suite


def _gemms(s: Sizes, p: dict[str, Tensor], autocast: Callable[[], Any]) -> Candidate:
    """Only the four matrix products of the block, for one modality."""
    weights: dict[str, Tensor] = {name: p[name][0].detach().clone().requires_grad_() for name in PROJECTIONS}
    T = s.batch * s.length
    inputs = [t.requires_grad_() for t in draw(s, *[(T, weights[name].shape[1]) for name in PROJECTIONS])]

    def run() -> Sequence[Tensor]:
        with autocast():
            return [F.linear(x, weights[name]) for x, name in zip(inputs, PROJECTIONS, strict=True)]

    leaves = weights | {f"{name} input": x for name, x in zip(PROJECTIONS, inputs, strict=True)}
    return Candidate("its four GEMMs alone", run, leaves, draw(s, *[(T, weights[n].shape[0]) for n in PROJECTIONS]))


SUITES = {"scan": scan, "conv": conv, "routing": routing, "block": block}
