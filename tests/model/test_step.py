"""A training step: what is kept for the backward pass, what is computed again, and when the host must wait."""

from contextlib import nullcontext

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from mom_train.config.model import PROJECTIONS, ModelConfig
from mom_train.cost.memory import block_activation_bytes, selective_activation_bytes
from mom_train.model import routed
from mom_train.model.attention import attention_mask
from mom_train.model.init import initialize
from mom_train.model.language_model import LanguageModel
from mom_train.ops import chunks, native
from mom_train.ops.layout import RowLayout
from tests.helpers.models import M, V, batch, run

CONFIGS = {
    "mixture": ModelConfig(dim=128, layers=1, decoupled=PROJECTIONS),
    "dense": ModelConfig(dim=128, layers=1, decoupled=()),
    "norms": ModelConfig(dim=128, layers=1, decoupled=(*PROJECTIONS, "norm")),
    "learned": ModelConfig(dim=128, layers=1, decoupled=PROJECTIONS, router="learned"),
    "transformer": ModelConfig(
        architecture="transformer", heads=4, dim=128, layers=1, decoupled=("attention", "feed_forward")
    ),
    "normalised": ModelConfig(dim=128, layers=1, decoupled=PROJECTIONS, normalise=True),
    "qk_norm": ModelConfig(
        architecture="transformer", heads=4, dim=128, layers=1, decoupled=("attention", "feed_forward"), qk_norm=True
    ),
}


def build(name, recompute=False):
    model = LanguageModel(CONFIGS[name], V, M, recompute=recompute)
    initialize(model, 0)
    return model


def autocast(precision):
    return torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext()


@pytest.mark.parametrize("name", ["mixture", "dense", "learned", "transformer", "normalised", "qk_norm"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recomputing_changes_no_bit_of_loss_or_gradients(name, precision):
    results = []
    for recompute in (False, True, "selective"):
        model = build(name, recompute)
        with autocast(precision):
            loss, _ = run(model, *batch(missing=1))
        loss.backward()
        results.append((loss.detach(), {n: p.grad for n, p in model.named_parameters()}))
    (loss, gradients), *others = results
    for other_loss, other_gradients in others:
        assert torch.equal(loss, other_loss)
        for parameter, gradient in gradients.items():
            assert torch.equal(gradient, other_gradients[parameter]), parameter


def operators_of_backward(recompute):
    """How often PyTorch's operators run in the backward pass of a block of the mixture. It is in float64, so that the
    scan and the convolution consist of such operators."""
    model = build("mixture", recompute).double()
    modality, document, *_ = batch()
    layout = RowLayout.sort(modality, document, M)
    y_Td = model.blocks[0](torch.randn(layout.tokens, 128, dtype=torch.float64, requires_grad=True), layout, None)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        y_Td.sum().backward()
    counts = {event.key: event.count for event in seen.key_averages()}
    return [counts.get(f"aten::{name}", 0) for name in ("mm", "softplus", "silu")]


def test_selective_recomputation_repeats_neither_the_scan_nor_the_large_products():
    """A product per modality and projection; a softplus in the scan; a SiLU in the convolution, and one in the scan."""
    (mm, softplus, silu), every, selective = map(operators_of_backward, (False, True, "selective"))
    assert every == [mm + 4 * M, softplus + 1, silu + 2]
    assert selective == [mm + M, softplus, silu + 1]  # dt_proj and the convolution


def kept_bytes(name, recompute, precision, B=2, L=480):
    """Bytes per token that one block's forward pass leaves allocated, by PyTorch's allocator, and its input; without
    its output and bf16 copies of weights."""
    model = build(name, recompute)
    modality = torch.randint(0, M, (B, L), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    layout = RowLayout.sort(modality, torch.zeros(B, L, dtype=torch.int32), M)
    x_Td = torch.randn(B * L, model.config.dim, requires_grad=True)
    more = ()
    if model.config.architecture == "transformer":
        more = (attention_mask(layout, 0, torch.bfloat16 if precision == "bf16" else torch.float32),)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen, autocast(precision):
        y_Td = model.blocks[0](x_Td, layout, None, *more)
    kept = sum(e.nbytes() for e in seen.profiler.kineto_results.events() if e.name() == "[memory]")
    copied = {False: "_proj", "selective": "out_proj" if not more else "none", True: "none"}[recompute]
    weights = sum(p.numel() for n, p in model.blocks[0].named_parameters() if copied in n and p.dim() == 2)
    copies = 2 * weights if precision == "bf16" else 0
    return (kept - y_Td.nbytes - copies + x_Td.nbytes) / (B * L)


@pytest.mark.parametrize("name", ["mixture", "dense", "transformer", "normalised", "qk_norm"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("norms_of", ["cpu", "cuda"])
def test_a_block_keeps_as_much_as_predicted_in_each_way_to_recompute(name, precision, norms_of, monkeypatch):
    """On a CPU; the joint norms of CUDA run there too, in PyTorch's operations."""
    if native.library(16) is None:
        pytest.skip("NO C COMPILER: the prediction is for the C scan's chunks")
    monkeypatch.setattr(routed, "on_cuda", lambda _: norms_of == "cuda")
    monkeypatch.setattr(chunks, "CUDA_SCAN_STEPS", chunks.SCAN_STEPS)  # the scan here is the one in C
    element, config = (2 if precision == "bf16" else 4), CONFIGS[name]
    predicted = {
        False: block_activation_bytes(config, element, norms_of),
        "selective": selective_activation_bytes(config, element),
        True: 4 * config.dim,
    }
    measured = {recompute: kept_bytes(name, recompute, precision) for recompute in predicted}
    print(f"{name} {precision}: bytes per block and token {measured}")
    for recompute, expected in predicted.items():
        assert measured[recompute] == pytest.approx(expected, rel=0.03), recompute


def step_without_data(name, precision, device, objective=None):
    """The forward and backward pass, the clipping and the judgement of one step, with the trainer's own parts."""
    from mom_data.batches.batch import PackedBatch
    from mom_train.anomaly import Judge
    from mom_train.config.run import AnomalyConfig, RunConfig
    from mom_train.distributed.ranks import Ranks
    from mom_train.model.objective import Counts
    from mom_train.passes import Passes

    vocabulary = {"text": 40, "image": 20, "speech": 20}
    config = RunConfig.model_validate(
        {
            "run_dir": "unused",
            "vocabulary": vocabulary if objective is None else {"text": 40, "image": 1, "speech": 20},
            "model": CONFIGS[name].model_dump(),
            "data": {"train": [{"path": "unused"}], "sequence_length": 24},
            "optimizer": {"learning_rate": 1e-3},
            "training": {"steps": 1, "batch": 2, "micro_batch": 2, "precision": precision},
            "objective": objective or {},
        }
    )
    ranks = Ranks(0, 1, torch.device(device), None)
    model = LanguageModel(config.model, config.layout.size, M, diffusion=config.objective.diffusion).to(device)
    passes = Passes(config, config.layout, ranks, model)
    full: PackedBatch = passes._full_batch()
    counts = Counts(passes.targets(full), len(full.latent_position), full.tokens.numel())
    judge = Judge(AnomalyConfig(loss_spike=2.0), ranks.device)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True, capturable=device == "cuda")

    def step():
        scored = passes.score(full, 0)
        counts.objective(scored.losses, config.objective).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        bad = judge.bad(passes.total(scored.sums, counts), norm)
        if device != "meta":
            optimizer.step()
        optimizer.zero_grad()
        return bad

    return step


OBJECTIVES = [None, {"diffusion": {"patch_width": 4}, "z_loss": 1e-4}]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=["chameleon", "transfusion"])
@pytest.mark.parametrize("name", ["mixture", "dense", "norms", "learned", "normalised"])
def test_nothing_in_a_step_reads_a_value_from_the_device(name, objective, monkeypatch):
    """A tensor on the meta device has no values: whatever would make the host wait for a GPU (item, tolist, nonzero,
    a mask as an index, a condition on a tensor) is an error there. In fp32, as meta knows no autocast."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # asked about meta, it raises
    bad = step_without_data(name, "fp32", "meta", objective)()
    assert bad.device.type == "meta"
    with pytest.raises(RuntimeError):  # so that the test above can fail
        bool(bad)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["mixture", "dense", "norms", "learned"])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=["chameleon", "transfusion"])
def test_no_step_after_the_first_makes_the_host_wait_for_the_gpu(name, objective):
    if not torch.cuda.is_available():
        pytest.skip("NO CUDA DEVICE: host syncs of a real step are not tested on this machine")
    step = step_without_data(name, "bf16", "cuda", objective)
    for _ in range(2):
        step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["normalised", "qk_norm"])
def test_selective_recomputation_goes_through_the_compiler_whole(name):
    import torch._dynamo

    torch._dynamo.reset()
    results = []
    for compiled in (False, True):
        model = build(name, "selective")
        for block in model.blocks if compiled else ():
            block.compile(backend="aot_eager", fullgraph=True)
        loss, _ = run(model, *batch())
        loss.backward()
        results.append((loss.detach(), [p.grad for p in model.parameters()]))
    (loss, gradients), (other_loss, other_gradients) = results
    torch.testing.assert_close(loss, other_loss)
    for gradient, other in zip(gradients, other_gradients, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-5)
