import ctypes
import platform
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mom_train.ops import native
from mom_train.ops.conv import naive as naive_conv
from mom_train.ops.conv.causal_conv import _conv, causal_conv
from mom_train.ops.layout import RowLayout
from mom_train.ops.routing.modality_linear import _modality_linear, _modality_linear_backward, modality_linear
from mom_train.ops.scan import naive as naive_scan
from mom_train.ops.scan import torch as scan_torch
from mom_train.ops.scan.selective_scan import selective_scan

BACKENDS = ["torch", "c"]


def require(backend):
    if backend == "c" and native.library(16) is None:
        pytest.skip("NO C COMPILER: the C kernels are not tested on this machine")


def geometry(B, L, modalities, seed, empty=None):
    g = torch.Generator().manual_seed(seed)
    modality = torch.randint(0, modalities, (B, L), generator=g)
    if empty is not None:
        modality[modality == empty] = (empty + 1) % modalities
    document = (torch.rand(B, L, generator=g) < 0.15).cumsum(1)
    return modality.to(torch.uint8), document.to(torch.int32)


def relative_error(a, b):
    a, b = a.detach(), b.detach()
    assert a.shape == b.shape
    if not b.numel():  # what one tap carries on
        return 0.0
    return float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-30))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("B", "L", "D", "M", "carried", "dtype", "tolerance"),
    [
        (2, 37, 32, 3, False, torch.float32, 2e-6),
        (1, 70, 48, 2, True, torch.float32, 2e-6),
        (3, 5, 272, 1, True, torch.float32, 2e-6),
        (2, 33, 32, 3, False, torch.bfloat16, 2e-2),
    ],
)
def test_scan_and_all_its_gradients_equal_the_float64_recurrence(backend, B, L, D, M, carried, dtype, tolerance):
    require(backend)
    g = torch.Generator().manual_seed(L)
    modality, document = geometry(B, L, M, seed=L, empty=1 if M == 3 else None)
    T, N = B * L, 16
    draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    rounded = lambda t: t.to(dtype).double()  # noqa: E731
    x, dt, z = rounded(draw(B, L, D)), rounded(draw(B, L, D) - 3), rounded(draw(B, L, D))
    Bm, Cm = rounded(draw(B, L, N)), rounded(draw(B, L, N))
    A, D_, bias = -torch.exp(draw(D, N)).double(), draw(D).double(), draw(M, D).double()
    h0 = draw(B, D, N).double() if carried else None
    gy, ghT = rounded(draw(B, L, D)), draw(B, D, N).double()

    leaves = [t.clone().requires_grad_() for t in (x, dt, A, Bm, Cm, D_, z, bias)]
    h0_leaf = None if h0 is None else h0.clone().requires_grad_()
    y_ref, hT_ref = naive_scan.selective_scan(*leaves, modality.long(), document, h0_leaf)
    wanted = [*leaves, *([h0_leaf] if carried else [])]
    grads_ref = torch.autograd.grad([y_ref, hT_ref], wanted, [gy, ghT])

    layout = RowLayout.sort(modality, document, M, past_B=torch.full((B,), 255 * carried))
    into_rows = lambda t, to: t.reshape(T, -1)[layout.rows].to(to).requires_grad_()  # noqa: E731
    row_inputs = {i: into_rows(t, dtype) for i, t in zip((0, 1, 3, 4, 6), (x, dt, Bm, Cm, z), strict=True)}
    fp32 = {i: t.float().requires_grad_() for i, t in zip((2, 5, 7), (A, D_, bias), strict=True)}
    inputs = [{**row_inputs, **fp32}[i] for i in range(8)]
    h0_in = None if h0 is None else h0.float().requires_grad_()
    y, hT = selective_scan(*inputs, layout, h0_in, backend=backend)
    into_time = lambda t: t.detach()[layout.order.long()].reshape(B, L, -1)  # noqa: E731
    assert relative_error(into_time(y), y_ref.detach()) < tolerance
    assert relative_error(hT.detach(), hT_ref.detach()) < tolerance

    grads = torch.autograd.grad(
        [y, hT],
        [*inputs, *([h0_in] if carried else [])],
        [gy.reshape(T, -1)[layout.rows].to(dtype), ghT.float()],
    )
    for i, (ours, theirs) in enumerate(zip(grads, grads_ref, strict=True)):
        ours = into_time(ours) if i in row_inputs else ours
        assert relative_error(ours, theirs) < 2 * tolerance, f"gradient of input {i}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_scan_leaves_the_callers_state_and_gradient_as_they_were(backend):
    require(backend)
    B, L, D, N = 2, 9, 32, 16
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    modality, document = geometry(B, L, 2, seed=0)
    layout = RowLayout.sort(modality, document, 2, past_B=torch.full((B,), 255))
    x, dt, Bm, Cm, z = (draw(B * L, C) for C in (D, D, N, N, D))
    h0 = draw(B, N, D).transpose(1, 2).requires_grad_()  # as a backend may want it itself, so that it need not copy
    gradient = draw(B, N, D).transpose(1, 2)
    before = [t.detach().clone() for t in (h0, gradient)]
    A = -torch.exp(draw(D, N))
    _, hT = selective_scan(x, dt, A, Bm, Cm, draw(D), z, draw(2, D), layout, h0, backend=backend)
    torch.autograd.grad(hT, h0, gradient)
    for now, then in zip((h0, gradient), before, strict=True):
        torch.testing.assert_close(now.detach(), then, rtol=0, atol=0)


@pytest.mark.parametrize("tile_steps", [1, 3, 8])
def test_the_torch_scan_is_the_same_recurrence_across_groups_of_rows_chunks_and_tiles(monkeypatch, tile_steps):
    B, L, D, M = 3, 37, 32, 3
    step = 2 * D * 16  # two rows at once, then the third
    monkeypatch.setattr(scan_torch, "_STEP", step)
    monkeypatch.setattr(scan_torch, "_TILE", tile_steps * step)
    monkeypatch.setattr(scan_torch, "_CHUNK", 8 * step)
    x, A = torch.empty(B * L, D), torch.empty(D, 16)
    assert scan_torch._sizes(x, A, B) == (2, 8, tile_steps)
    assert len(scan_torch.new_states(x, A, B, keep=True)) == 5
    test_scan_and_all_its_gradients_equal_the_float64_recurrence("torch", B, L, D, M, True, torch.float32, 2e-6)


@pytest.mark.parametrize(
    ("backend", "B", "L", "D", "K", "carried", "dtype", "tolerance"),
    [
        ("torch", 2, 37, 32, 4, False, torch.float32, 2e-6),
        ("torch", 1, 2, 16, 4, False, torch.float32, 2e-6),
        ("torch", 2, 150, 48, 4, True, torch.float32, 2e-6),
        ("torch", 2, 150, 48, 4, True, torch.bfloat16, 1e-2),
        *(("torch", B, L, 16, K, True, torch.float32, 2e-6) for K in (1, 2, 8) for B, L in ((1, 1), (2, 5))),
        ("torch", 2, 5, 16, 1, False, torch.float32, 2e-6),
        *(("c", B, L, 16, K, True, torch.float32, 2e-6) for K in (1, 2, 8) for B, L in ((1, 1), (2, 5))),
        ("c", 2, 5, 16, 1, False, torch.float32, 2e-6),
        ("c", 2, 5, 16, 1, True, torch.bfloat16, 1e-2),
        ("c", 2, 37, 32, 4, False, torch.float32, 2e-6),
        ("c", 1, 2, 16, 4, False, torch.float32, 2e-6),
        ("c", 2, 150, 48, 4, True, torch.float32, 2e-6),
        ("c", 2, 150, 48, 4, True, torch.bfloat16, 1e-2),
        ("c", 3, 2, 272, 4, True, torch.float32, 2e-6),
    ],
)
def test_convolution_and_its_gradients_equal_the_float64_definition(backend, B, L, D, K, carried, dtype, tolerance):
    require(backend)
    g = torch.Generator().manual_seed(L)
    modality, document = geometry(B, L, 2, seed=L)
    layout = RowLayout.sort(modality, document, 2, past_B=torch.full((B,), 255 * carried))
    x, w, b = (torch.randn(*s, generator=g).to(dtype).double() for s in ((B, L, D), (D, K), (D,)))
    init = torch.randn(B, K - 1, D, generator=g).to(dtype).double() if carried else None
    gy = torch.randn(B, L, D, generator=g).to(dtype).double()
    leaves = [t.clone().requires_grad_() for t in (x, w, b, *([init] if carried else []))]
    y_ref = naive_conv.causal_conv(*leaves[:3], document, leaves[3] if carried else None)
    grads_ref = torch.autograd.grad(y_ref, leaves, gy, materialize_grads=True)  # one tap uses nothing carried

    wide = torch.zeros(B * L, 2 * D, dtype=dtype)
    wide[:, :D] = x.reshape(-1, D)[layout.rows]
    wide.requires_grad_()
    ours = [wide[:, :D], *(t.detach().float().requires_grad_() for t in leaves[1:])]
    y, final = causal_conv(*ours[:3], layout, ours[3] if carried else None, backend=backend)
    order = layout.order.long()
    assert relative_error(y.detach()[order].view(B, L, D), y_ref.detach()) < tolerance
    grads = torch.autograd.grad(y, [wide, *ours[1:]], gy.reshape(-1, D)[layout.rows].to(dtype))
    assert relative_error(grads[0][order][:, :D].reshape(B, L, D), grads_ref[0]) < tolerance
    for a, r in zip(grads[1:], grads_ref[1:], strict=True):
        assert relative_error(a, r) < tolerance
    before = torch.zeros(B, K - 1, D).double() if init is None else init
    assert relative_error(final, torch.cat([before, x], 1)[:, L:]) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sequence_cut_anywhere_carries_on_exactly(backend):
    require(backend)
    g = torch.Generator().manual_seed(3)
    B, L, D, N, M = 2, 41, 32, 16, 2
    modality, document = geometry(B, L, M, seed=5)
    t = {k: torch.randn(B, L, n, generator=g) for k, n in dict(x=D, dt=D, B=N, C=N, z=D).items()}
    A, skip, bias = (
        -torch.rand(D, N, generator=g),
        torch.randn(D, generator=g),
        torch.randn(M, D, generator=g),
    )

    def run(s, e, h):
        layout = RowLayout.sort(
            modality[:, s:e], document[:, s:e], M, past_B=255 * (document[:, s] == document[:, max(s - 1, 0)])
        )
        rows = {k: v[:, s:e].reshape(B * (e - s), -1)[layout.rows] for k, v in t.items()}
        args = (rows["x"], rows["dt"], A, rows["B"], rows["C"], skip, rows["z"], bias)
        y, hT = selective_scan(*args, layout, h, backend=backend)
        return y[layout.order.long()].view(B, e - s, D), hT

    whole, last = run(0, L, torch.zeros(B, D, N))
    for cut in (1, 20, 40):
        first, h = run(0, cut, torch.zeros(B, D, N))
        second, end = run(cut, L, h)
        torch.testing.assert_close(torch.cat([first, second], 1), whole, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(end, last, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_modality_linear_equals_choosing_each_rows_matrix(bias):
    g = torch.Generator().manual_seed(0)
    M, K, O = 3, 8, 5
    offsets = torch.tensor([0, 4, 4, 11])
    x = torch.randn(11, K, generator=g, dtype=torch.float64, requires_grad=True)
    w = torch.randn(M * O, K, generator=g, dtype=torch.float64, requires_grad=True)
    b = torch.randn(M * O, generator=g, dtype=torch.float64, requires_grad=True) if bias else None
    of_row = torch.tensor([0] * 4 + [2] * 7)
    expected = torch.einsum("tok,tk->to", w.view(M, O, K)[of_row], x)
    if b is not None:
        expected = expected + b.view(M, O)[of_row]
    y = modality_linear(x, w, offsets, b)
    torch.testing.assert_close(y, expected)
    leaves = [x, w, *([b] if b is not None else [])]
    gy = torch.randn(11, O, generator=g, dtype=torch.float64)
    for a, r in zip(torch.autograd.grad(y, leaves, gy), torch.autograd.grad(expected, leaves, gy), strict=True):
        torch.testing.assert_close(a, r)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [500, 9000])
def test_modality_linear_in_bf16_is_as_near_to_float64_as_one_product_is(rows, bias):
    g = torch.Generator().manual_seed(0)
    M, K, O = 4, 48, 40
    offsets = torch.tensor([0, 7, 7, rows - 64, rows])
    of_row = torch.repeat_interleave(torch.arange(M), offsets.diff())
    leaves = [torch.randn(*shape, generator=g).bfloat16() for shape in ((rows, K), (M * O, K), (M * O,))]
    leaves = [t.requires_grad_() for t in (leaves if bias else leaves[:2])]
    gy = torch.randn(rows, O, generator=g).bfloat16()
    wide = [t.detach().double().requires_grad_() for t in leaves]
    expected = torch.einsum("tok,tk->to", wide[1].view(M, O, K)[of_row], wide[0])
    expected = expected + wide[2].view(M, O)[of_row] if bias else expected
    found = modality_linear(*leaves[:2], offsets, *leaves[2:])
    grads = torch.autograd.grad(found, leaves, gy), torch.autograd.grad(expected, wide, gy.double())
    for a, r in zip((found, *grads[0]), (expected, *grads[1]), strict=True):
        assert relative_error(a, r) < 2**-7  # two roundings to 8 bits


def test_on_a_cpu_in_bf16_products_soon_have_no_new_shapes():
    """oneDNN compiles a program for each new shape."""
    shapes = set()

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function in (torch.ops.aten.mm.out, torch.ops.aten.mm.default, torch.ops.aten.addmm_.default):
                shapes.add(tuple(tuple(t.shape) for t in args))
            return function(*args, **(kwargs or {}))

    g = torch.Generator().manual_seed(0)
    x, weight, gy = (torch.randn(*shape).bfloat16() for shape in ((4096, 8), (30, 8), (4096, 10)))
    with Recorder():
        for _ in range(300):
            cuts = torch.randint(0, 4097, (2,), generator=g).sort().values
            offsets = torch.tensor([0, *cuts.tolist(), 4096])
            _modality_linear._init_fn(x, weight, None, offsets)
            _modality_linear_backward._init_fn(gy, x, weight, offsets, False)
    assert len(shapes) <= 3 * (4096 // 64 + 1)


def test_operators_keep_torchs_contract():
    """Schema, fake tensors, autograd registration and AOT dispatch, checked by PyTorch itself."""
    modality, document = geometry(2, 9, 3, seed=1)
    layout = RowLayout.sort(modality, document, 3)
    x = torch.randn(18, 16, requires_grad=True)
    torch.library.opcheck(_modality_linear, (x, torch.randn(15, 16, requires_grad=True), None, layout.offsets))
    weight, bias = torch.randn(16, 4, requires_grad=True), torch.randn(16, requires_grad=True)
    for backend in BACKENDS:
        if backend == "c" and native.library(16) is None:
            continue
        torch.library.opcheck(_conv, (x, weight, bias, None, layout.order, layout.rows, layout.position, 2, backend))
        args = (
            torch.randn(18, 16),
            -torch.rand(16, 16),
            torch.randn(18, 16),
            torch.randn(18, 16),
            torch.randn(16),
        )
        args = (x, *(a.requires_grad_() for a in (*args, torch.randn(18, 16), torch.randn(3, 16))))
        torch.library.opcheck(
            torch.ops.mom.selective_scan.default,
            (*args, None, layout.order, layout.rows, layout.modality, layout.position, 2, backend, True),
        )


@pytest.mark.parametrize("architecture", ["x86-64", "x86-64-v3", "x86-64-v4"])
def test_the_c_kernels_agree_with_float64_under_every_instruction_set(architecture, monkeypatch):
    """SSE2, AVX2 and AVX-512 take different vectors, reciprocals and exponentials."""
    require("c")
    needed = {"x86-64-v3": {"avx2", "fma"}, "x86-64-v4": {"avx512f", "avx512dq"}}.get(architecture, set())
    if platform.machine() != "x86_64" or not needed <= set(Path("/proc/cpuinfo").read_text().split()):
        pytest.skip(f"THIS PROCESSOR DOES NOT RUN {architecture}: its C kernels are not tested here")
    built = ctypes.CDLL(str(native.build(native.compiler(), 16, architecture)))
    monkeypatch.setattr(native, "library", lambda state: built)
    scan, conv = (
        test_scan_and_all_its_gradients_equal_the_float64_recurrence,
        test_convolution_and_its_gradients_equal_the_float64_definition,
    )
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 2e-2)):
        scan("c", 2, 37, 48, 2, True, dtype, tolerance)
        conv("c", 2, 37, 48, 4, True, dtype, tolerance)


@pytest.mark.parametrize("N", [4, 6, 16, 32])
def test_the_c_scan_handles_other_state_sizes_and_extreme_time_steps(N):
    """exp(Delta A) underflows to 0 or stays within rounding of 1; neither may spoil a sum."""
    if native.library(N) is None:
        pytest.skip("NO C COMPILER: the C kernels are not tested on this machine")
    g = torch.Generator().manual_seed(N)
    modality, document = geometry(1, 50, 2, seed=N)
    layout = RowLayout.sort(modality, document, 2)
    dt = torch.randn(50, 32, generator=g) * 15  # Delta from 1e-20 to 40
    rows = [torch.randn(50, n, generator=g) for n in (32, N, N, 32)]
    A, skip, bias = -torch.exp(torch.randn(32, N, generator=g) * 2), torch.randn(32, generator=g), torch.zeros(2, 32)
    inputs = [rows[0], dt, A, rows[1], rows[2], skip, rows[3], bias]
    results = []
    for dtype, backend in ((torch.float32, "c"), (torch.float64, "torch")):
        leaves = [t.to(dtype).requires_grad_() for t in inputs]
        y, hT = selective_scan(*leaves, layout, backend=backend)
        results.append([y.detach(), hT.detach(), *torch.autograd.grad([y.sum() + hT.sum()], leaves)])
    for i, (ours, wanted) in enumerate(zip(*results, strict=True)):
        assert bool(ours.isfinite().all())
        assert relative_error(ours, wanted) < 5e-6, f"output or gradient {i}"


def test_bf16_rows_are_rounded_to_nearest_and_keep_nan():
    require("c")
    layout = RowLayout.sort(torch.zeros(1, 64, dtype=torch.uint8), torch.arange(64).view(1, 64).int(), 1)
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    x[3, 5], x[4, 6] = float("nan"), float("inf")
    weight, bias = torch.full((16, 4), 0.37), torch.full((16,), 3e-3)
    y, _ = causal_conv(x, weight, bias, layout, backend="c")
    pre = 0.37 * x.double() + 3e-3  # every token its own document: one tap each
    expected = (pre * torch.sigmoid(pre)).to(torch.bfloat16)
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_number_of_threads_does_not_change_a_bit_of_the_c_kernels(dtype):
    require("c")
    modality, document = geometry(2, 64, 2, seed=7)
    layout = RowLayout.sort(modality, document, 2)
    g = torch.Generator().manual_seed(0)
    inputs = [torch.randn(*s, generator=g) for s in ((128, 512),) * 2]
    inputs += [-torch.rand(512, 16, generator=g), *(torch.randn(128, 16, generator=g) for _ in range(2))]
    inputs += [
        torch.randn(512, generator=g),
        torch.randn(128, 512, generator=g),
        torch.randn(2, 512, generator=g),
    ]
    results = []
    for n in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(n)
        try:
            leaves = [(t.to(dtype) if t.shape[0] == 128 else t.clone()).requires_grad_() for t in inputs]
            y, _ = selective_scan(*leaves, layout, backend="c")
            weights = [t.t().float().contiguous().requires_grad_() for t in (leaves[6][:4], leaves[6][:1])]
            c, _ = causal_conv(leaves[0], weights[0], weights[1].flatten(), layout, backend="c")
            total = y.float().square().sum() + c.float().square().sum()
            results.append([y.detach(), c.detach(), *torch.autograd.grad(total, [*leaves, *weights])])
        finally:
            torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
