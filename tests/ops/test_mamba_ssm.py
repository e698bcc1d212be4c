"""The adapter to the stock CUDA kernels, against the float64 definitions.

The extension needs a GPU to exist at all, so that its contract is written out here in PyTorch: what
`selective_scan_fn` and `causal_conv1d_fn` take, refuse and return, one step at a time.
"""

import pytest
import torch
import torch.nn.functional as F

from mom_train.ops import backends, mamba_ssm
from mom_train.ops.conv import naive as naive_conv
from mom_train.ops.conv.causal_conv import causal_conv
from mom_train.ops.layout import RowLayout
from mom_train.ops.scan import naive as naive_scan
from mom_train.ops.scan.selective_scan import selective_scan


def stock_scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False):
    """The contract of `selective_scan_fn`: u, delta (B, D, L), B and C (B, N, L), all of one dtype and contiguous in
    time; A (D, N) fp32. It has neither resets nor an initial state, and the last state carries no gradient."""
    assert u.dtype == delta.dtype == B.dtype == C.dtype
    assert A.dtype == torch.float32
    assert all(t.stride(-1) == 1 for t in (u, delta, B, C))
    assert D is None and z is None and delta_bias is None and not delta_softplus  # noqa: PT018
    h, outputs = torch.zeros(u.shape[0], *A.shape), []
    for t in range(u.shape[2]):
        d = delta[:, :, t, None].float()
        h = torch.exp(d * A) * h + d * B[:, None, :, t].float() * u[:, :, t, None].float()
        outputs.append((h * C[:, None, :, t].float()).sum(2))
    y = torch.stack(outputs, 2).to(u.dtype)
    return (y, h.detach()) if return_last_state else y


def stock_conv(x, weight, bias=None, seq_idx=None, initial_states=None, activation=None):
    """The contract of `causal_conv1d_fn`: x (B, D, L), whose channels are innermost in memory where seq_idx (B, L)
    int32 is given. A tap counts where it lies in the row and in the same sequence."""
    assert seq_idx is not None
    assert seq_idx.dtype == torch.int32
    assert seq_idx.shape == (x.shape[0], x.shape[2])
    assert x.stride(1) == 1 and x.shape[1] % 8 == 0  # noqa: PT018
    assert initial_states is None
    assert activation in ("silu", "swish")
    K, L = weight.shape[1], x.shape[2]
    pre = bias[None, :, None].float().expand(x.shape)
    for k in range(K):
        shifted = F.pad(x.float(), (k, 0))[:, :, :L]
        same = F.pad(seq_idx, (k, 0), value=-7)[:, :L] == seq_idx
        pre = pre + weight[:, K - 1 - k, None].float() * shifted * same[:, None]
    return F.silu(pre).to(x.dtype)


@pytest.fixture
def stock(monkeypatch):
    monkeypatch.setattr(mamba_ssm, "stock", lambda: (stock_scan, stock_conv))


def close(ours, theirs, tolerance, what):
    error = float((ours.double() - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30))
    assert error < tolerance, f"{what}: {error:.1e}"


@pytest.mark.usefixtures("stock")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("carried", [False, True])
def test_scan_resets_and_carries_as_the_definition_does(carried, dtype, tolerance):
    B, L, D, N, M = 2, 23, 16, 4, 3
    g = torch.Generator().manual_seed(5)
    draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    rounded = lambda t: t.to(dtype).double()  # noqa: E731
    modality = torch.randint(0, M, (B, L), generator=g)
    document = (torch.rand(B, L, generator=g) < 0.2).cumsum(1).int()
    x, dt, z, Bm, Cm, gy = (rounded(draw(B, L, n)) for n in (D, D, D, N, N, D))
    A, skip, bias, ghT = -torch.exp(draw(D, N)).double(), draw(D).double(), draw(M, D).double(), draw(B, D, N).double()
    leaves = [x, dt - 2, A, Bm, Cm, skip, z, bias, *([draw(B, D, N).double()] if carried else [])]
    leaves = [t.requires_grad_() for t in leaves]
    y, hT = naive_scan.selective_scan(*leaves[:8], modality, document, leaves[8] if carried else None)
    expected = torch.autograd.grad([y, hT], leaves, [gy, ghT])

    layout = RowLayout.sort(modality.to(torch.uint8), document, M, past_B=torch.full((B,), 255 * carried))
    by_row = {0, 1, 3, 4, 6}
    rows = lambda t: t.detach().flatten(0, 1)[layout.rows].to(dtype)  # noqa: E731
    ours = [(rows(t) if i in by_row else t.detach().float()).requires_grad_() for i, t in enumerate(leaves)]
    out, last = selective_scan(*ours[:8], layout, ours[8] if carried else None, backend="mamba_ssm")
    in_time = lambda t: t.detach()[layout.order.long()].view(B, L, -1)  # noqa: E731
    close(in_time(out), y.detach(), tolerance, "y")
    close(last.detach(), hT.detach(), tolerance, "hT")
    grads = torch.autograd.grad([out, last], ours, [rows(gy), ghT.float()])
    for i, (mine, theirs) in enumerate(zip(grads, expected, strict=True)):
        close(in_time(mine) if i in by_row else mine, theirs, 2 * tolerance, f"gradient of input {i}")


@pytest.mark.usefixtures("stock")
@pytest.mark.parametrize("past", [None, 1, 2, 255])
def test_convolution_stays_within_documents_and_reaches_what_was_carried_in(past):
    B, L, D, K = 2, 19, 16, 4
    g = torch.Generator().manual_seed(7)
    draw = lambda *shape: torch.randn(*shape, generator=g).double()  # noqa: E731
    document = (torch.rand(B, L, generator=g) < 0.2).cumsum(1).int()
    layout = RowLayout.sort(torch.randint(0, 2, (B, L), generator=g).to(torch.uint8), document, 2,
                            past_B=torch.full((B,), past or 0))  # fmt: skip
    x, w, b, gy = draw(B, L, D), draw(D, K), draw(D), draw(B, L, D)
    initial = None
    if past is not None:
        initial = draw(B, K - 1, D)
        initial[:, : max(0, K - 1 - past)] = 0  # the definition takes 0 for what lies before the document
    leaves = [t.requires_grad_() for t in (x, w, b, *([] if initial is None else [initial]))]
    y = naive_conv.causal_conv(*leaves[:3], document, None if initial is None else leaves[3])
    expected = list(torch.autograd.grad(y, leaves, gy))
    if initial is not None:
        expected[3][:, : max(0, K - 1 - past)] = 0
    rows = lambda t: t.detach().flatten(0, 1)[layout.rows].float()  # noqa: E731
    ours = [t.requires_grad_() for t in (rows(x), *(t.detach().float() for t in leaves[1:]))]
    out, _ = causal_conv(*ours[:3], layout, None if initial is None else ours[3], backend="mamba_ssm")
    in_time = lambda t: t.detach()[layout.order.long()].view(B, L, D)  # noqa: E731
    close(in_time(out), y.detach(), 2e-6, "y")
    grads = list(torch.autograd.grad(out, ours, rows(gy)))
    grads[0] = in_time(grads[0])
    for name, mine, theirs in zip(("x", "weight", "bias", "initial"), grads, expected, strict=False):
        close(mine, theirs, 2e-6, f"gradient of {name}")


def test_without_the_extension_it_says_what_is_missing():
    layout = RowLayout.sort(torch.zeros(1, 4, dtype=torch.uint8), torch.zeros(1, 4, dtype=torch.int32), 1)
    x, weight = torch.zeros(4, 16), torch.zeros(16, 4)
    if torch.cuda.is_available():
        pytest.skip("THERE IS A GPU: here the extension may be installed")
    with pytest.raises(ValueError, match="mamba_ssm backend cannot run the conv kernel here: they need an NVIDIA GPU"):
        causal_conv(x, weight, torch.zeros(16), layout, backend="mamba_ssm")
    assert backends.why_not("mamba_ssm", "scan", x.half(), 16) is not None
    assert "5 taps" in backends.why_not("mamba_ssm", "conv", x, 5)
