"""FP8 products against torch's own scaled product, against definitions in float64, and against products in bf16."""

import math

import pytest
import torch
import torch.nn.functional as F

from mom_train.ops.routing import fp8


def rows(*shape, seed=0):
    """Rows of very different sizes."""
    g = torch.Generator().manual_seed(seed)
    size = torch.exp2(torch.randint(-12, 12, (shape[0], 1), generator=g).float())
    return (torch.randn(*shape, generator=g) * size).bfloat16()


def grid():
    """All finite numbers of e4m3 (Micikevicius and others, arXiv 2209.05433), from their bits."""
    numbers = [(m / 8) * 2.0**-6 for m in range(8)]
    numbers += [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)]
    return torch.tensor(sorted({s * n for n in numbers for s in (1, -1)}), dtype=torch.float64)


def test_rows_are_rounded_to_the_nearest_number_of_e4m3_with_a_power_of_two_for_each_row():
    x = rows(9, 48)
    x[3] = 0
    q, scale = fp8.quantized(x)
    assert torch.equal(torch.log2(scale), torch.log2(scale).round())
    for r in range(9):
        largest = float(x[r].abs().max())
        if largest:
            exponent = math.frexp(largest / 448)[1]
            assert float(scale[r]) == 2.0**exponent
        exact = x[r].double() / float(scale[r])
        distance = (exact[:, None] - grid()).abs()
        assert torch.equal((exact - q[r].double()).abs(), distance.min(1).values)
    assert float(q.float().abs().max()) <= 448


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_stays_so_and_spoils_no_other(bad):
    x = rows(3, 32)
    x[1, 5] = bad
    y = fp8.product(x, rows(16, 32, seed=1)[None], None, "emulated")
    assert not y[1].isfinite().any()
    assert y[[0, 2]].isfinite().all()


@pytest.mark.parametrize("columns", [48, 16])
def test_the_triton_kernel_has_the_same_scales_and_scaled_rows(columns, monkeypatch):
    pytest.importorskip("triton", reason="NO TRITON: its kernels are not tested on this machine")
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")  # read when a kernel is defined, not when it runs
    from mom_train.ops.routing import fp8_triton

    x = rows(9, 2 * columns)[:, :columns]
    x[2], x[4, 3], x[5, 1], x[6] = 0, torch.inf, torch.nan, x[6] * 2.0**-120
    x = x.to("cuda" if torch.cuda.is_available() else "cpu")
    expected, scale = fp8.quantized(x.cpu())
    finite = [r for r in range(9) if r not in (4, 5)]
    scaled, our_scale = (t.cpu() for t in fp8_triton.quantized(x, torch.float32))
    assert torch.equal(our_scale[finite], scale[finite])
    assert torch.equal(scaled[finite], (x.cpu().float() / scale[:, None])[finite])
    assert scaled[[4, 5], [3, 1]].isnan().all()
    if torch.cuda.is_available():  # the interpreter's own conversion to e4m3 makes 64 of 127
        assert torch.equal(fp8_triton.quantized(x)[0].cpu()[finite].float(), expected[finite].float())


def test_emulation_equals_torchs_scaled_product_to_the_last_bit_of_bf16():
    """On the CPU, where torch has that product too; the device's is the same function."""
    x, w = rows(24, 64), rows(32, 64, seed=1)
    theirs = fp8.multiplied(fp8.quantized(x), fp8.quantized(w), None, "device")
    assert torch.equal(fp8.product(x, w[None], None, "emulated"), theirs)


@pytest.mark.parametrize("offsets", [None, [0, 10, 10, 24]])
def test_the_map_and_its_gradients_are_products_of_the_rounded_numbers(offsets):
    M = 1 if offsets is None else len(offsets) - 1
    bounds = torch.tensor(offsets or [0, 24])
    x, w, gy = rows(24, 32), rows(M * 16, 32, seed=1), rows(24, 16, seed=2)
    whole = lambda t: (lambda q, s: q.double() * s.double()[:, None])(*fp8.quantized(t))  # noqa: E731
    modality = torch.bucketize(torch.arange(24), bounds[1:], right=True)
    w_MOK = w.view(M, 16, 32)
    y = torch.einsum("tok,tk->to", whole(w).view(M, 16, 32)[modality], whole(x))
    by_input = whole(w_MOK.transpose(1, 2).reshape(-1, 16)).view(M, 32, 16)  # rounded again, for rows of the inputs
    gx = torch.einsum("tko,to->tk", by_input[modality], whole(gy))
    gw = torch.stack([gy[modality == m].double().t() @ x[modality == m].double() for m in range(M)]).view_as(w)

    leaves = [x.clone().requires_grad_(), w.clone().requires_grad_()]
    ours = fp8.fp8_linear(*leaves, None if offsets is None else bounds, "emulated")
    grads = torch.autograd.grad(ours, leaves, gy)
    for mine, exact in zip([ours.detach(), *grads], [y, gx, gw], strict=True):
        assert mine.dtype == torch.bfloat16
        rounded = exact.abs().amax(1, keepdim=True).clamp_min(1e-30)
        assert float(((mine.double() - exact).abs() / rounded).max()) < 2**-8
    if offsets is not None:
        assert not grads[1].view(M, -1)[1].any(), "the empty modality"
    plain = F.linear(x.float(), w.float().view(M, 16, 32)[0])[: int(bounds[1])]
    error = (ours.detach()[: int(bounds[1])].float() - plain).norm() / plain.norm()
    assert 1e-3 < float(error) < 0.06, "eight-bit numbers differ from their originals, but not by much"


def test_the_operators_keep_torchs_contract():
    x, w = rows(8, 16).requires_grad_(), rows(32, 16, seed=1).requires_grad_()
    for offsets in (None, torch.tensor([0, 3, 8])):
        tests = ("test_schema", "test_faketensor", "test_autograd_registration")
        torch.library.opcheck(torch.ops.mom.fp8_linear.default, (x, w, offsets, "emulated"), test_utils=tests)


def test_devices_without_fp8_are_told_apart(monkeypatch):
    assert "only NVIDIA GPUs" in fp8.why_not(torch.device("cpu"), False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "GPU")
    for capability, grouped, reason in [
        ((8, 0), False, "no FP8"),
        ((8, 9), False, None),
        ((9, 0), True, None),
        ((10, 0), True, "no grouped FP8"),
        ((10, 0), False, None),
    ]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        said = fp8.why_not(torch.device("cuda"), grouped)
        assert said is None if reason is None else reason in said
