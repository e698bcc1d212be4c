"""Inputs of the selective scan, with outputs and gradients from a backend and from the float64 definition."""

import torch

from mom_train.ops.layout import RowLayout
from mom_train.ops.scan import naive
from mom_train.ops.scan.selective_scan import selective_scan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("y", "hT", *(f"gradient of {name}" for name in ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "h0")))


def random_layout(B, L, M, seed, carried, empty=None, chance=0.2):
    g = torch.Generator().manual_seed(seed)
    modality = torch.randint(0, M, (B, L), generator=g)
    if empty is not None:
        modality[modality == empty] = (empty + 1) % M
    document = (torch.rand(B, L, generator=g) < chance).cumsum(1).to(torch.int32)
    layout = RowLayout.sort(modality.to(torch.uint8).to(DEVICE), document.to(DEVICE), M,
                            past_B=torch.full((B,), 255 * carried, device=DEVICE))  # fmt: skip
    return modality, document, layout


def close(ours, theirs, tolerance, what):
    assert ours.shape == theirs.shape, what
    if not theirs.numel():
        return
    error = float((ours.cpu().double() - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30))
    assert error < tolerance, f"{what}: {error:.1e}"


def scan_inputs(B, L, D, N, M, carried, dtype, seed):
    """Returns (x, dt, A, B, C, D, z, dt_bias), h0, and the gradients of the outputs. All are float64, and those by row
    are rounded to `dtype`."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    rounded = lambda t: t.to(dtype).double()  # noqa: E731
    x, dt, z, gy = rounded(draw(B, L, D)), rounded(draw(B, L, D) - 3), rounded(draw(B, L, D)), rounded(draw(B, L, D))
    Bm, Cm = rounded(draw(B, L, N)), rounded(draw(B, L, N))
    A, skip, bias = -torch.exp(draw(D, N)).double(), draw(D).double(), draw(M, D).double()
    h0 = draw(B, D, N).double() if carried else None
    return (x, dt, A, Bm, Cm, skip, z, bias), h0, gy, draw(B, D, N).double()


def run_scan(inputs, h0, gy, ghT, layout, dtype, backend):
    """y, hT and all gradients by a backend, in time order. x and z are halves of one tensor, and B and C slices of
    another."""
    x, dt, A, Bm, Cm, skip, z, bias = (t.to(DEVICE) for t in inputs)
    D, N, order = x.shape[2], A.shape[1], layout.order.long()
    rows = lambda t: t.flatten(0, 1)[layout.rows]  # noqa: E731
    leaves = [torch.cat([rows(x), rows(z)], 1).to(dtype), rows(dt).to(dtype), A.float()]
    leaves += [torch.cat([rows(Bm), rows(Cm)], 1).to(dtype), skip.float(), bias.float()]
    leaves += [] if h0 is None else [h0.float().to(DEVICE)]
    wide, dt, A, BC, skip, bias, *start = (t.requires_grad_() for t in leaves)
    y, hT = selective_scan(wide[:, :D], dt, A, BC[:, :N], BC[:, N:], skip, wide[:, D:], bias, layout,
                           start[0] if start else None, backend=backend)  # fmt: skip
    incoming = [rows(gy.to(DEVICE)).to(dtype), ghT.float().to(DEVICE)]
    gwide, gdt, gA, gBC, gskip, gbias, *gstart = torch.autograd.grad([y, hT], leaves, incoming)
    in_time = lambda t: t.detach()[order].unflatten(0, (layout.batch, layout.length))  # noqa: E731
    gBC = in_time(gBC)
    return [in_time(y), hT.detach(), in_time(gwide)[..., :D], in_time(gdt), gA, gBC[..., :N], gBC[..., N:], gskip,
            in_time(gwide)[..., D:], gbias, *gstart]  # fmt: skip


def defined_scan(inputs, h0, gy, ghT, modality, document):
    """y, hT and all gradients by the definition in float64."""
    leaves = [t.clone().requires_grad_() for t in (*inputs, *([] if h0 is None else [h0]))]
    y, hT = naive.selective_scan(*leaves[:8], modality, document, None if h0 is None else leaves[8])
    return [y.detach(), hT.detach(), *torch.autograd.grad([y, hT], leaves, [gy, ghT])]
