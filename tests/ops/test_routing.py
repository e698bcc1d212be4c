"""The linear map by modality on GPUs: its kernels against the float64 definition (in Triton's interpreter where there
is no GPU), which of them runs, and that neither shapes nor the compiled graph depend on the data."""

import pytest
import torch

from mom_train.config.model import PROJECTIONS, ModelConfig
from mom_train.model.init import initialize
from mom_train.model.language_model import LanguageModel
from mom_train.model.routed import Norm
from mom_train.ops import backends
from mom_train.ops.layout import RowLayout
from mom_train.ops.routing import grouped_mm, modality_linear, naive
from tests.helpers.models import M, V, batch, run

pytest.importorskip("triton", reason="NO TRITON: its kernels are not tested on this machine")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
with pytest.MonkeyPatch.context() as patch:  # read when a kernel is defined, not when it runs
    if DEVICE == "cpu":
        patch.setenv("TRITON_INTERPRET", "1")
    from mom_train.ops.routing import triton as triton_routing

needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="NO GPU: the grouped products only ran in the interpreter")


def errors(module, offsets, K, O, dtype, bias=False, device="cpu"):
    """The largest errors of y, grad x, grad W and grad b, relative to the largest values in float64."""
    g = torch.Generator().manual_seed(K)
    T, groups = offsets[-1], len(offsets) - 1
    wide = torch.randn(T, K + 3, generator=g).to(dtype)
    x, gy = wide[:, :K], torch.randn(T, O, generator=g).to(dtype)  # rows with gaps between them
    weight, b = torch.randn(groups * O, K, generator=g).to(dtype), torch.randn(groups * O, generator=g).to(dtype)
    bounds = torch.tensor(offsets, dtype=torch.int32)
    modality = torch.repeat_interleave(torch.arange(groups), bounds.diff())
    leaves = [t.double().requires_grad_() for t in (x, weight, b)]
    expected = naive.modality_linear(leaves[0], leaves[1].view(groups, O, K), modality)
    expected = expected + leaves[2].view(groups, O)[modality] if bias else expected
    truth = [expected.detach(), *torch.autograd.grad(expected, leaves[: 2 + bias], gy.double())]
    x, weight, b, gy, bounds = (t.to(device) for t in (wide, weight, b, gy, bounds))
    x = x[:, :K]
    found = [module.forward(x, weight, b if bias else None, bounds)]
    found += [t.cpu() for t in module.backward(gy, x, weight, bounds, bias)][: 2 + bias]
    for m in range(groups):
        if offsets[m] == offsets[m + 1]:
            assert not found[2].view(groups, -1)[m].any(), "a gradient without rows"
            assert not bias or not found[3].view(groups, -1)[m].any()
    return [
        float((a.detach().cpu().double() - e).abs().max() / e.abs().max()) for a, e in zip(found, truth, strict=True)
    ]


SEGMENTS = {
    1: [0, 70],
    2: [0, 130, 131],
    3: [0, 5, 5, 150],
    5: [0, 0, 1, 64, 64, 64],
    8: [0, 9, 9, 20, 40, 41, 66, 90, 99],
}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-7)])
@pytest.mark.parametrize(
    ("groups", "K", "O", "bias"),
    [(1, 64, 64, False), (2, 37, 130, True), (3, 70, 19, True), (5, 33, 9, False), (8, 8, 8, True)],
)
def test_the_triton_kernels_equal_the_float64_definition(groups, K, O, bias, dtype, tolerance):
    assert max(errors(triton_routing, SEGMENTS[groups], K, O, dtype, bias, DEVICE)) < tolerance


def test_the_least_grid_covers_every_segment(monkeypatch):
    """T rows in M segments never need more row tiles than are launched. One row here and there is the worst case."""
    small = {"ROWS": 16, "COLUMNS": 16, "REDUCED": 16, "num_warps": 1, "num_stages": 1}
    monkeypatch.setattr(triton_routing, "blocks", lambda *_: dict(small))
    for offsets in ([0, 16, 32], [0, 17, 34, 51], [0, 1, 2, 3], [0, 1, 1, 18]):
        assert max(errors(triton_routing, offsets, 9, 5, torch.float32, False, DEVICE)) < 1e-6, offsets


def test_the_kernel_follows_from_precision_widths_and_architecture():
    choose = modality_linear.backend
    bf16, hopper = torch.bfloat16, (9, 0)
    assert choose(bf16, 2048, 160, False, hopper, True) == "grouped_mm"
    for capability in ((8, 0), (10, 0), (12, 0)):
        assert choose(bf16, 2048, 160, False, capability, True) == "triton"
    assert choose(bf16, 2048, 157, False, hopper, True) == "triton"
    assert choose(bf16, 36, 160, False, hopper, True) == "triton"
    assert choose(bf16, 2048, 160, True, hopper, True) == "triton"
    assert choose(torch.float32, 2048, 160, False, hopper, True) == "triton"
    assert choose(torch.float64, 2048, 160, False, hopper, True) == "torch"
    assert choose(torch.float32, 2048, 160, False, hopper, False) == "torch"
    assert choose(bf16, 2048, 160, False, (7, 5), True) == "torch"
    assert choose(bf16, 2048, 160, False, None, True) == "torch"


def test_mom_kernels_chooses_the_kernel_on_a_gpu(monkeypatch):
    for forced in ("torch", "triton"):
        monkeypatch.setattr(backends, "forced", forced)
        assert modality_linear.backend(torch.bfloat16, 64, 64, False, (9, 0), True) == forced


def test_grouped_mm_is_called_as_pytorch_defines_it():
    """PyTorch's own version for the CPU checks layouts and takes empty groups, as the one for GPUs does."""
    assert max(errors(grouped_mm, SEGMENTS[3], 72, 24, torch.bfloat16)) < 2**-7
    assert max(errors(grouped_mm, SEGMENTS[8], 8, 16, torch.bfloat16)) < 2**-7


def test_other_shares_of_modalities_compile_nothing_anew():
    torch._dynamo.reset()
    config = ModelConfig(dim=32, layers=1, decoupled=(*PROJECTIONS, "norm"))
    plain, compiled = (LanguageModel(config, V, M) for _ in range(2))
    for model in (plain, compiled):
        initialize(model, 0)
    for block in compiled.blocks:
        block.compile(backend="aot_eager", fullgraph=True, dynamic=False)
    for seed, missing in ((0, None), (1, 1), (2, 0)):
        with torch.compiler.set_stance("default" if seed == 0 else "fail_on_recompile"):
            losses = []
            for model in (plain, compiled):
                loss, _ = run(model, *batch(seed=seed, missing=missing))
                model.zero_grad()
                loss.backward()
                losses.append(loss.detach())
        torch.testing.assert_close(*losses)
        for (parameter, p), q in zip(plain.named_parameters(), compiled.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-5, msg=parameter)


def test_a_norm_scales_each_row_by_its_modality_without_segments(monkeypatch):
    """This is the case on a GPU and in compiled graphs, where no bounds are read."""
    modality, document, *_ = batch(missing=1)
    layout = RowLayout.sort(modality, document, M)
    norm = Norm(32, M, 1e-5)
    torch.nn.init.normal_(norm.weight)
    x_Td = torch.randn(layout.tokens, 32, requires_grad=True)
    gy_Td = torch.randn(layout.tokens, 32)
    results = []
    for compiling in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda value=compiling: value)
        y_Td = norm(x_Td, layout)
        results.append((y_Td, *torch.autograd.grad(y_Td, [x_Td, norm.weight], gy_Td)))
    (y, gx, gw), (other_y, other_gx, other_gw) = results
    assert torch.equal(y, other_y)
    assert torch.equal(gx, other_gx)
    torch.testing.assert_close(gw, other_gw)
    assert not other_gw.view(M, -1)[1].any()


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-7)])
@pytest.mark.parametrize(("K", "O"), [(2048, 8192), (4096, 160), (128, 4096), (4096, 157)])
def test_at_real_sizes_every_grouped_product_is_right_and_repeats_its_bits(K, O, dtype, tolerance):
    offsets = [0, 3000, 3000, 7001, 16384]
    name = modality_linear.backend(dtype, K, O, False, torch.cuda.get_device_capability(), True)
    for module in {triton_routing, {"grouped_mm": grouped_mm}.get(name, triton_routing)}:
        first, again = (errors(module, offsets, K, O, dtype, device="cuda") for _ in range(2))
        assert max(first) < tolerance
        assert first == again
