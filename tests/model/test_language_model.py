import math
import subprocess
import sys

import pytest
import torch

from mom_train.config.model import PROJECTIONS, ModelConfig
from mom_train.cost.flops import forward_flops_per_token
from mom_train.model.cross_entropy import linear_cross_entropy
from mom_train.model.language_model import LanguageModel
from mom_train.model.mamba import MambaMixer
from mom_train.ops.layout import RowLayout
from tests.helpers import CHECKOUT
from tests.helpers.models import SMALL, M, V, batch, build, run


def algorithm_2(mixer: MambaMixer, x, modality, document):
    """The paper's Algorithm 2, one token at a time in float64, with the weights looked up for each token. Where the
    paper prints Delta A and u, it takes exp(Delta A) and D u as the published code does."""
    w = {n: p.detach().double().requires_grad_() for n, p in mixer.named_parameters()}

    def choose(name, m, rows):
        weight = w[f"{name}.weight"]
        count = weight.shape[0] // rows
        return weight.view(count, rows, -1)[m if count > 1 else 0]

    D, N, R, K = mixer.inner, mixer.state, mixer.rank, mixer.conv_weight.shape[1]
    outputs = []
    for b in range(x.shape[0]):
        h, window = torch.zeros(D, N, dtype=torch.float64), []
        for t in range(x.shape[1]):
            m = int(modality[b, t])
            if t and document[b, t] != document[b, t - 1]:
                h, window = torch.zeros(D, N, dtype=torch.float64), []
            xz = choose("in_proj", m, 2 * D) @ x[b, t]
            u, z = xz[:D], xz[D:]
            window = [*window[-(K - 1) :], u]
            pre = w["conv_bias"] + sum(w["conv_weight"][:, K - 1 - k] * v for k, v in enumerate(reversed(window)))
            u = pre * torch.sigmoid(pre)
            dbc = choose("x_proj", m, R + 2 * N) @ u
            bias = w["dt_bias"][m if w["dt_bias"].shape[0] > 1 else 0]
            delta = torch.log1p(torch.exp(choose("dt_proj", m, D) @ dbc[:R] + bias))
            A = -torch.exp(w["A_log"])
            h = torch.exp(delta[:, None] * A) * h + delta[:, None] * dbc[R : R + N] * u[:, None]
            y = h @ dbc[R + N :] + w["D"] * u
            outputs.append(choose("out_proj", m, x.shape[2]) @ (y * z * torch.sigmoid(z)))
    return torch.stack(outputs).view_as(x), w


@pytest.mark.parametrize("decoupled", [PROJECTIONS, (), ("in_proj",), ("x_proj", "dt_proj")])
@pytest.mark.parametrize("kernels", ["torch", "c"])
def test_the_block_equals_algorithm_2_in_float64_outputs_and_gradients(decoupled, kernels, monkeypatch):
    from mom_train.ops import backends, native

    monkeypatch.setattr(backends, "forced", kernels)
    monkeypatch.setattr(backends, "_chosen", {})
    if kernels == "c" and native.library(16) is None:
        pytest.skip("NO C COMPILER: the C kernels are not tested on this machine")
    config = ModelConfig(dim=32, layers=1, decoupled=decoupled)
    mixer = build(config).blocks[0].block.mixer
    modality, document, *_ = batch(missing=1)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, 24, 32, generator=g, dtype=torch.float64, requires_grad=True)
    gy = torch.randn(2, 24, 32, generator=g, dtype=torch.float64)
    expected, weights = algorithm_2(mixer, x, modality, document)
    names = list(weights)
    expected_grads = torch.autograd.grad(expected, [x, *weights.values()], gy)

    layout = RowLayout.sort(modality, document, M)
    rows = x.detach().float().reshape(48, 32)[layout.rows].requires_grad_()
    y = mixer(rows, layout)
    order = layout.order.long()
    assert (y.detach()[order].view(2, 24, 32) - expected).abs().max() < 1e-5
    parameters = dict(mixer.named_parameters())
    grads = torch.autograd.grad(y, [rows, *(parameters[n] for n in names)], gy.reshape(48, 32)[layout.rows].float())
    assert (grads[0][order].view(2, 24, 32) - expected_grads[0]).abs().max() < 1e-5
    for name, ours, theirs in zip(names, grads[1:], expected_grads[1:], strict=True):
        assert (ours - theirs).abs().max() / theirs.abs().max().clamp_min(1) < 1e-5, name


def test_the_mixture_with_everything_shared_is_dense_mamba_to_the_bit():
    """Dense Mamba sees one modality, whatever the tokens are; row order differs, so compare per token."""
    modality, document, tokens, labels = batch()
    shared = build(ModelConfig(dim=32, layers=1, decoupled=()))
    dense = build(ModelConfig(dim=32, layers=1, decoupled=()), modalities=1)
    _, mixed_rows = run(shared, modality, document, tokens, labels)
    layout = RowLayout.sort(torch.zeros_like(modality), document, 1)
    losses = dense(tokens.reshape(-1), layout, labels.reshape(-1))
    plain, plain_rows = losses.tokens, losses.tokens_T
    torch.testing.assert_close(mixed_rows, plain_rows.view_as(mixed_rows), rtol=0, atol=1e-6)
    assert sum(p.numel() for p in shared.parameters()) == sum(p.numel() for p in dense.parameters())
    # and with the tokens all text, nothing at all may differ
    same, same_rows = run(shared, torch.zeros_like(modality), document, tokens, labels)
    assert torch.equal(same, plain)
    assert torch.equal(same_rows, plain_rows.view_as(same_rows))


def test_equal_weights_for_every_modality_are_dense_mamba():
    args = batch()
    mixture, dense = build(), build(ModelConfig(dim=32, layers=1, decoupled=()))
    with torch.no_grad():
        dense_parameters = dict(dense.named_parameters())
        for name, p in mixture.named_parameters():
            q = dense_parameters[name]
            p.copy_(q.repeat(p.shape[0] // q.shape[0], *[1] * (p.dim() - 1)))
    loss, rows = run(mixture, *args)
    expected, expected_rows = run(dense, *args)
    torch.testing.assert_close(rows, expected_rows, atol=2e-6, rtol=0)
    loss.backward()
    expected.backward()
    for name, p in mixture.named_parameters():
        q = dict(dense.named_parameters())[name]
        total = p.grad.view(-1, *q.shape).sum(0)
        torch.testing.assert_close(total, q.grad, atol=2e-5, rtol=1e-4, msg=name)


def test_nothing_leaks_from_another_document_or_from_the_future():
    modality, document, tokens, labels = batch(B=1, L=40, seed=3)
    model = build()
    _, before = run(model, modality, document, tokens, labels)
    first_length = int((document[0] == 0).sum())
    assert 4 < first_length < 36
    for changed in (slice(0, first_length), slice(first_length, None)):
        other = tokens.clone()
        other[0, changed] = (other[0, changed] + 7) % V
        _, after = run(model, modality, document, other, labels)
        kept = torch.ones(40, dtype=torch.bool)
        kept[changed] = False
        assert torch.equal(after[0, kept], before[0, kept])
        assert not torch.equal(after[0, changed], before[0, changed])
    last = tokens.clone()
    last[0, 30] = (last[0, 30] + 1) % V
    assert torch.equal(run(model, modality, document, last, labels)[1][0, :30], before[0, :30])


def test_the_residual_rescale_reaches_every_modality():
    model = build(ModelConfig(dim=64, layers=8, decoupled=PROJECTIONS))
    for block in model.blocks:
        per_modality = block.block.mixer.out_proj.weight.view(M, 64, 128)
        expected = 128**-0.5 / math.sqrt(3) / math.sqrt(16)  # std of U(+-b) is b / sqrt(3)
        for weight in per_modality:
            assert weight.std().item() == pytest.approx(expected, rel=0.05)
        assert not torch.equal(per_modality[0], per_modality[1])
    same = build(ModelConfig(dim=64, layers=1, decoupled=PROJECTIONS, identical_modalities=True)).blocks[0].block.mixer
    for projection in (same.in_proj, same.x_proj, same.dt_proj, same.out_proj):
        first, *others = projection.weight.view(M, -1, projection.weight.shape[1])
        assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize(
    ("dim", "layers", "vocabulary", "dense", "two", "three"),
    [
        (256, 4, 65536, 37.1, 40.5, 43.9),
        (512, 8, 65536, 94.2, 121.0, 147.7),
        (1024, 24, 65536, 454.2, 772.1, 1089.9),
        (2048, 24, 65536, 1537.6, 2802.4, 4067.2),
    ],
)
def test_parameters_are_those_of_the_papers_sizes(dim, layers, vocabulary, dense, two, three):
    for decoupled, modalities, millions in ((), 2, dense), (PROJECTIONS, 2, two), (PROJECTIONS, 3, three):
        with torch.device("meta"):
            model = LanguageModel(ModelConfig(dim=dim, layers=layers, decoupled=decoupled), vocabulary, modalities)
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.005)


def test_flops_agree_with_pytorchs_counter():
    from torch.utils.flop_counter import FlopCounterMode

    model = build()
    with FlopCounterMode(display=False) as counter:
        run(model, *batch())
    parts = forward_flops_per_token(SMALL, V)
    counted = counter.get_total_flops() / 48
    # the counter sees the loss's own logits matmul and the two gradients made beside it
    assert counted == pytest.approx(sum(parts.values()) + 2 * parts["head"], rel=0.01)


@pytest.mark.parametrize("rows", [8, 13, 1000])  # at least as many as the width
def test_chunked_cross_entropy_equals_torchs(rows, monkeypatch):
    from mom_train.ops import chunks

    monkeypatch.setattr(chunks, "LOGITS", rows * V)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(40, 8, generator=g, requires_grad=True)
    w = torch.randn(V, 8, generator=g, requires_grad=True)
    labels = torch.randint(0, V, (40,), generator=g)
    labels[3] = labels[39] = -100
    loss, each, z = linear_cross_entropy(x, w, labels)
    assert float(z) == 0
    expected = torch.nn.functional.cross_entropy((x @ w.t()).double(), labels, reduction="none")
    torch.testing.assert_close(each, expected.float())
    for a, r in zip(
        torch.autograd.grad(loss / 8, [x, w]), torch.autograd.grad(expected.sum() / 8, [x, w]), strict=True
    ):
        torch.testing.assert_close(a, r)


def test_the_z_loss_adds_the_squared_normaliser_of_rows_with_a_label():
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(*s, generator=g, dtype=torch.float64, requires_grad=True) for s in ((9, 8), (V, 8)))
    labels = torch.randint(0, V, (9,), generator=g)
    labels[4] = -100
    loss, each, z = linear_cross_entropy(x, w, labels, 0.3)
    logits = x @ w.t()
    squares = logits.logsumexp(1)[labels >= 0].square().sum()
    plain = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    torch.testing.assert_close(loss, plain + 0.3 * squares)
    torch.testing.assert_close(each.sum(), plain)
    torch.testing.assert_close(z, 0.3 * squares.detach())
    assert not z.requires_grad
    grads, wanted = (torch.autograd.grad(total, [x, w]) for total in (loss, plain + 0.3 * squares))
    for a, b in zip(grads, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("architecture", ["mamba", "transformer"])
def test_compiled_and_eager_blocks_agree(architecture):
    """The blocks go through dynamo and AOT autograd, over batches whose modalities differ, without being recompiled for
    each."""
    import torch._dynamo.testing

    more = {"heads": 2, "decoupled": ("attention", "feed_forward")} if architecture == "transformer" else {}
    config = ModelConfig(architecture=architecture, dim=32, layers=1, **{"decoupled": PROJECTIONS, **more})
    model = build(config)
    eager = [run(model, *batch(seed=s, missing=m)) for s, m in ((0, None), (1, 1), (2, 2))]
    eager[0][0].backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    for block in model.blocks:
        block.compile(backend=counter, fullgraph=True)
    compiled = [run(model, *batch(seed=s, missing=m)) for s, m in ((0, None), (1, 1), (2, 2))]
    compiled[0][0].backward()
    for (a, _), (b, _) in zip(compiled, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-5)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-5, msg=name)
    assert counter.frame_count <= 2 * len(model.blocks)


def test_transformers_imports_from_the_checkout():
    """A top-level package named `tokenizers` would break it."""
    checkout = CHECKOUT
    code = "import sys; sys.path.insert(0, ''); import transformers.tokenization_utils_fast, mom_tokenizers.vocab"
    subprocess.run([sys.executable, "-c", code], cwd=checkout, check=True)


@pytest.mark.parametrize("recompute", [False, True, "selective"])
@pytest.mark.parametrize("architecture", ["mamba", "transformer"])
@pytest.mark.parametrize("decoupled_norm", [False, True])
def test_norms_joined_with_additions_as_on_cuda_give_the_losses_and_gradients_of_separate_ones(
    architecture, decoupled_norm, recompute, monkeypatch
):
    from mom_train.model import language_model, routed

    parts = (PROJECTIONS if architecture == "mamba" else ("attention", "feed_forward")) + ("norm",) * decoupled_norm
    heads = 2 if architecture == "transformer" else None
    config = ModelConfig(architecture=architecture, dim=32, layers=2, decoupled=parts, heads=heads)
    model = build(config)
    for block in model.blocks:
        block.recompute = recompute
    model.recompute = recompute
    results, joined = [], []
    for _ in range(2):
        loss, each = run(model, *batch(missing=1))[:2]
        loss.backward()
        results.append([each.detach(), *(p.grad for p in model.parameters())])
        model.zero_grad()
        for module in (routed, language_model):
            monkeypatch.setattr(module, "on_cuda", lambda _: True)
        monkeypatch.setattr(routed, "add_norm", lambda *a, f=routed.add_norm: joined.append(a[1]) or f(*a))
    if not recompute:  # every norm but the first begins with the addition before it
        assert [branch is not None for branch in joined] == [False] + [True] * (len(joined) - 1)
        assert len(joined) == 1 + config.blocks * (2 if heads else 1)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
