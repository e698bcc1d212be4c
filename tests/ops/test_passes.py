"""The passes between the products (cross-entropy, norms) against their float64 definitions, in PyTorch and in Triton.

Triton's kernels run on the GPU where there is one, else in its interpreter.
"""

import pytest
import torch

from mom_train.ops import backends
from mom_train.ops.cross_entropy import naive as naive_cross_entropy
from mom_train.ops.cross_entropy.softmax_cross_entropy import softmax_cross_entropy_
from mom_train.ops.layout import RowLayout
from mom_train.ops.norm import naive as naive_norm
from mom_train.ops.norm.add_norm import add_norm

pytest.importorskip("triton", reason="NO TRITON: its kernels are not tested on this machine")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
with pytest.MonkeyPatch.context() as patch:  # read when a kernel is defined, not when it runs
    if DEVICE == "cpu":
        patch.setenv("TRITON_INTERPRET", "1")
    from mom_train.ops.cross_entropy import triton as triton_cross_entropy
    from mom_train.ops.norm import triton as triton_norm
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}


def close(ours, theirs, tolerance, what):
    assert ours.shape == theirs.shape, what
    error = float((ours.cpu().double() - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30))
    assert error < tolerance, f"{what}: {error:.1e}"


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "vocabulary"), [(7, 100), (3, 64), (2, 5)])
def test_cross_entropy_and_its_gradient_equal_the_float64_definition(rows, vocabulary, dtype, backend, monkeypatch):
    monkeypatch.setattr(triton_cross_entropy, "_BLOCK", 32)  # several blocks, the last one ragged
    g = torch.Generator().manual_seed(rows)
    logits = (20 * torch.randn(rows, vocabulary, generator=g)).to(dtype)
    logits[0, 1:] = -torch.inf  # ids that cannot follow; the first one is certain
    target = torch.randint(0, vocabulary, (rows,), generator=g)
    target[0], target[1] = 0, -100
    expected = naive_cross_entropy.softmax_cross_entropy(logits.double(), target, 0.01)
    ours = softmax_cross_entropy_(logits.to(DEVICE), target.to(DEVICE), 0.01, backend=backend)
    assert ours[2].dtype == dtype
    for name, mine, theirs in zip(("loss", "logsum", "gradient"), ours, expected, strict=True):
        close(mine, theirs, TOLERANCE[dtype] if name == "gradient" else 2e-6, name)


def test_triton_writes_the_gradient_over_the_logits_and_only_where_one_is_wanted():
    logits = torch.randn(3, 40, device=DEVICE)
    target, before = torch.tensor([1, 2, 3], device=DEVICE), logits.clone()
    softmax_cross_entropy_(logits, target, gradient=False, backend="triton")
    assert torch.equal(logits, before)
    gradient = softmax_cross_entropy_(logits, target, backend="triton")[2]
    assert gradient.data_ptr() == logits.data_ptr()
    assert float(gradient.sum(1).abs().max()) < 1e-6, "softmax less one-hot"


def test_a_target_or_a_logit_that_is_no_number_makes_the_loss_of_its_row_nan_and_no_other():
    logits = torch.randn(3, 40, device=DEVICE)
    logits[1, 7] = torch.nan
    losses = softmax_cross_entropy_(logits, torch.tensor([1, 2, 40], device=DEVICE), backend="triton")[0]
    assert losses.isnan().tolist() == [False, True, True]


def test_the_passes_run_in_pytorch_on_a_cpu_and_where_triton_cannot(monkeypatch):
    monkeypatch.setattr(backends, "_chosen", {})
    assert backends.triton_or_torch("cross_entropy", torch.zeros(2, 8)) == "torch"
    wide = torch.zeros(2, 8, dtype=torch.float64, device=DEVICE)
    monkeypatch.setattr(backends, "forced", "triton")
    monkeypatch.setattr(backends, "_chosen", {})
    with pytest.raises(ValueError, match="MOM_KERNELS=triton cannot run the cross_entropy kernel here"):
        backends.triton_or_torch("cross_entropy", wide)


def row_layout(T, M, empty):
    modality = torch.randint(0, M, (1, T), generator=torch.Generator().manual_seed(T))
    modality[modality == empty] = (empty + 1) % M
    return RowLayout.sort(modality.to(torch.uint8).to(DEVICE), torch.zeros(1, T, dtype=torch.int32, device=DEVICE), M)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    ("T", "d", "M", "branch_dtype", "tolerance"),
    [  # a ragged span and width, an empty modality, a shared scale, no addition, one row
        (11, 40, 3, torch.float32, 3e-6),
        (9, 32, 2, torch.bfloat16, 1e-2),
        (6, 33, 1, torch.float32, 3e-6),
        (8, 16, 3, None, 3e-6),
        (1, 8, 2, torch.float32, 3e-6),
    ],
)
def test_norm_of_a_sum_and_all_its_gradients_equal_the_float64_definition(
    T, d, M, branch_dtype, tolerance, backend, monkeypatch
):
    monkeypatch.setattr(triton_norm, "SPAN", 4)
    layout = row_layout(T, M, empty=0 if M == 3 else -1)
    g = torch.Generator().manual_seed(T)
    draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    leaves = [draw(T, d), draw(M, d)] + ([] if branch_dtype is None else [draw(T, d).to(branch_dtype)])
    incoming = [draw(T, d), draw(T, d)]
    exact = [t.double().requires_grad_() for t in leaves]
    modality = layout.modality[layout.rows].cpu()
    y = naive_norm.add_norm(exact[0], exact[2] if exact[2:] else None, exact[1], modality, 1e-5)
    r = exact[0] + exact[2] if exact[2:] else exact[0] * 1
    expected = [r, y, *torch.autograd.grad([r, y], exact, [t.double() for t in incoming])]

    mine = [t.to(DEVICE).requires_grad_() for t in leaves]
    r, y = add_norm(mine[0], mine[2] if mine[2:] else None, mine[1], layout, 1e-5, backend=backend)
    assert r.dtype == y.dtype == torch.float32
    ours = [r, y, *torch.autograd.grad([r, y], mine, [t.to(DEVICE) for t in incoming])]
    names = ("residual", "norm", "gradient of x", "gradient of the scale", "gradient of the branch")
    for name, a, b in zip(names, ours, expected, strict=False):
        close(a.detach(), b.detach(), tolerance if "branch" in name else 3e-6, name)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_norm_is_returned_in_the_precision_of_the_next_product_and_computed_in_fp32(backend):
    layout, x, branch = row_layout(5, 2, -1), torch.randn(5, 64), torch.randn(5, 64).bfloat16()
    x, branch, scale = x.to(DEVICE), branch.to(DEVICE), torch.ones(2, 64, device=DEVICE)
    wide = add_norm(x, branch, scale, layout, 1e-5, backend=backend)
    narrow = add_norm(x, branch, scale, layout, 1e-5, torch.bfloat16, backend=backend)
    assert torch.equal(wide[0], narrow[0])
    assert narrow[1].dtype == torch.bfloat16
    close(narrow[1], wide[1].double().cpu(), 1e-2, "rounded once")


def test_the_norms_operators_keep_torchs_contract():
    layout, leaf = row_layout(5, 2, -1), lambda *shape: torch.randn(*shape, device=DEVICE).requires_grad_()
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    for branch in (None, leaf(5, 8)):
        args = (leaf(5, 8), branch, leaf(2, 8), layout.modality, layout.rows, 1e-5, torch.float32, "triton")
        torch.library.opcheck(torch.ops.mom.add_norm.default, args, test_utils=tests)
