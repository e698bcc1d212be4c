"""The passes between the products (cross-entropy, norms) against their float64 definitions, in PyTorch and in Triton.

Triton's kernels run on the GPU where there is one, else in its interpreter.
"""

import pytest
import torch

from mom_train.ops import backends
from mom_train.ops.cross_entropy import naive as naive_cross_entropy
from mom_train.ops.cross_entropy.softmax_cross_entropy import softmax_cross_entropy_

pytest.importorskip("triton", reason="NO TRITON: its kernels are not tested on this machine")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
with pytest.MonkeyPatch.context() as patch:  # read when a kernel is defined, not when it runs
    if DEVICE == "cpu":
        patch.setenv("TRITON_INTERPRET", "1")
    from mom_train.ops.cross_entropy import triton as triton_cross_entropy
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
