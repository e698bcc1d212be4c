"""Muon against independent computations, on one rank and on several."""

import numpy as np
import pytest
import torch

from mom_train.config.model import PROJECTIONS, ModelConfig
from mom_train.config.muon import MuonConfig
from mom_train.config.optimizer import OptimizerConfig
from mom_train.model.init import initialize
from mom_train.model.language_model import LanguageModel
from mom_train.optim.muon import Muon, newton_schulz
from mom_train.optim.optimizer import build_optimizer
from tests.helpers.ranks import run_ranks
from tests.optim.muon_ranks import after_steps

MODEL = ModelConfig(dim=20, layers=1, decoupled=PROJECTIONS, state=5)
TRANSFORMER = ModelConfig(
    architecture="transformer", dim=16, layers=1, heads=2, decoupled=("attention", "feed_forward")
)
MUON = OptimizerConfig(learning_rate=0.01, kind="muon")


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_singular_values(matrix, config=MuonConfig()):  # noqa: B008
    """The iteration in float64 another way: it changes the singular values alone, each by as + bs^3 + cs^5."""
    u, s, v = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    s = s / np.linalg.norm(s)
    a, b, c = config.coefficients
    for _ in range(config.iterations):
        s = a * s + b * s**3 + c * s**5
    return torch.from_numpy(u * s @ v)


@pytest.mark.parametrize("shape", [(32, 32), (12, 40), (40, 12)])
def test_the_iteration_changes_singular_values_by_its_polynomial(shape):
    matrix = random(*shape)
    expected = by_singular_values(matrix)
    got = newton_schulz(matrix, MuonConfig().coefficients, 5).double()
    assert (got - expected).norm() / expected.norm() < 1e-4
    rough = newton_schulz(matrix.bfloat16(), MuonConfig().coefficients, 5).double()
    assert (rough - expected).norm() / expected.norm() < 0.04


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_a_square_matrix_takes_the_steps_of_torchs_muon(adjust, nesterov):
    config = MuonConfig(adjust=adjust, nesterov=nesterov, momentum=0.9)
    ours, theirs, other = (torch.nn.Parameter(random(24, 24)) for _ in range(3))
    adamw = torch.optim.AdamW([other], lr=0.02, fused=True)
    muon = Muon(adamw, [{"params": [ours], "lr": 0.02, "weight_decay": 0.1}], [[24]], config)
    options = {"adjust_lr_fn": adjust, "nesterov": nesterov, "momentum": 0.9}
    reference = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, **options)
    for step in range(4):
        ours.grad, theirs.grad = random(24, 24, seed=step), random(24, 24, seed=step)
        muon.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert (ours - random(24, 24)).abs().max() > 0.005


def stepped(config, model_config=MODEL, change=None):
    """(parameters before, model, optimizer, gradients) after one step with random gradients that `change` may edit."""
    model = LanguageModel(model_config, 24, 3)
    initialize(model, 0)
    optimizer = build_optimizer(model, config)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    gradients = {n: random(*p.shape, seed=i) for i, (n, p) in enumerate(model.named_parameters())}
    if change is not None:
        change(gradients)
    for n, p in model.named_parameters():
        p.grad = gradients[n].clone()
    optimizer.step()
    return before, model, optimizer, gradients


# rows of the matrices of one modality, by hand: x and z; dt, B and C; q, k and v; gate and up
ROWS = {
    "mixer.in_proj": [40, 40],
    "mixer.x_proj": [2, 5, 5],
    "mixer.dt_proj": [40],
    "mixer.out_proj": [20],
    "attention.qkv_proj": [16, 16, 16],
    "attention.out_proj": [16],
    "feed_forward.gate_up_proj": [256, 256],
    "feed_forward.down_proj": [16],
}


@pytest.mark.parametrize("model_config", [MODEL, TRANSFORMER], ids=["mamba", "transformer"])
def test_each_map_of_each_modality_is_orthogonalised_by_itself_and_the_rest_is_adamws(model_config):
    def small_second(gradients):
        for name in gradients:
            if "_proj" in name:
                rows = len(gradients[name]) // 3
                gradients[name][rows : 2 * rows] *= 0.01

    muon = MuonConfig(precision="fp32", nesterov=False)
    config = OptimizerConfig(learning_rate=0.01, kind="muon", muon=muon)
    before, model, _, gradients = stepped(config, model_config, small_second)
    _, adamw, *_ = stepped(OptimizerConfig(learning_rate=0.01), model_config, small_second)
    by_adamw = dict(adamw.named_parameters())
    found = set()
    for name, p in model.named_parameters():
        kind = ".".join(name.split(".")[-3:-1])
        if kind not in ROWS:
            assert torch.equal(p, by_adamw[name]), name
            continue
        found.add(kind)
        first = 0
        for rows in ROWS[kind] * 3:
            here = slice(first, first + rows)
            o = by_singular_values(gradients[name][here])
            factor = 0.2 * max(rows, p.shape[1]) ** 0.5
            expected = before[name][here] * (1 - 0.01 * 0.1) - 0.01 * factor * o
            torch.testing.assert_close(p[here].double(), expected, rtol=0, atol=2e-5)
            first += rows
        assert first == len(p)
    assert found == {k for k in ROWS if k.startswith("mixer") == (model_config is MODEL)}


def test_a_matrix_without_a_gradient_keeps_weight_and_momentum():
    model = LanguageModel(MODEL, 24, 3)
    initialize(model, 0)
    optimizer = build_optimizer(model, MUON)
    for seed, silent in ((0, None), (1, 1)):
        before = {n: (p.detach().clone(), dict(optimizer.state[p])) for n, p in model.named_parameters()}
        before = {n: (p, {k: v.clone() for k, v in state.items()}) for n, (p, state) in before.items()}
        for i, (n, p) in enumerate(model.named_parameters()):
            p.grad = random(*p.shape, seed=100 * seed + i)
            if silent is not None and "_proj" in n:
                p.grad.view(3, -1)[silent] = 0
        optimizer.step()
    for n, p in model.named_parameters():
        if "_proj" in n:
            weight, momentum = p.view(3, -1), optimizer.state[p]["momentum_buffer"].view(3, -1)
            old_weight, old_momentum = before[n][0].view(3, -1), before[n][1]["momentum_buffer"].view(3, -1)
            for m in range(3):
                assert torch.equal(weight[m], old_weight[m]) == (m == 1), n
                assert torch.equal(momentum[m], old_momentum[m]) == (m == 1), n


def test_an_expert_that_no_token_chose_is_left_alone():
    config = ModelConfig(dim=16, layers=1, decoupled=("out_proj",), experts=2)

    def without_one(gradients):
        for name in gradients:
            if name.endswith("out_proj.weight"):
                gradients[name].view(6, -1)[3] = 0

    before, model, *_ = stepped(MUON, config, without_one)
    for name, p in model.named_parameters():
        if name.endswith("out_proj.weight"):
            still = [torch.equal(a, b) for a, b in zip(p.view(6, -1), before[name].view(6, -1), strict=True)]
            assert still == [i == 3 for i in range(6)]
        assert "router" not in name or not torch.equal(p, before[name])


def test_a_bad_step_changes_nothing():
    before, model, optimizer, _ = stepped(MUON)
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    states = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.full_like(p, torch.nan)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    for n, p in model.named_parameters():
        assert torch.equal(p, weights[n]), n
        assert not torch.equal(p, before[n]), n
    for p, state in zip(model.parameters(), states, strict=True):
        assert all(torch.equal(optimizer.state[p][k], v) for k, v in state.items())


def test_excluded_projections_are_trained_as_by_adamw():
    config = OptimizerConfig(learning_rate=0.01, kind="muon", muon=MuonConfig(exclude=("in_proj",)))
    _, model, optimizer, _ = stepped(config)
    _, adamw, *_ = stepped(OptimizerConfig(learning_rate=0.01))
    for (name, p), (_, q) in zip(model.named_parameters(), adamw.named_parameters(), strict=True):
        under_muon = "_proj" in name and "in_proj" not in name
        assert torch.equal(p, q) != under_muon, name
        assert (list(optimizer.state[p]) == ["momentum_buffer"]) == under_muon


def test_without_decay_the_convolution_is_among_what_does_not_decay():
    model = LanguageModel(MODEL, 24, 3)
    [conv, *_] = [p for n, p in model.named_parameters() if n.endswith("conv_weight")]
    for decays in (True, False):
        decayed, kept = build_optimizer(model, MUON.model_copy(update={"decay_convolution": decays})).param_groups[:2]
        assert any(p is conv for p in decayed["params"]) == decays
        assert any(p is conv for p in kept["params"]) != decays


def assert_same_bits(a, b):
    """The bits of Muon's matrices are the same. Those of fused AdamW on the CPU depend on the sizes of its shards."""
    assert a.keys() == b.keys()
    assert sum(name.endswith("momentum_buffer") for name in a) == 8
    for name in a:
        if "_proj" in name:
            assert np.array_equal(a[name], b[name]), name
        else:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-5, atol=1e-7)


def test_the_same_bits_on_one_two_and_four_ranks_with_replicas_and_from_a_checkpoint_of_other_ranks(tmp_path):
    (tmp_path / "run").mkdir()
    [alone] = run_ranks(1, after_steps, MODEL, MUON)
    two = run_ranks(2, after_steps, MODEL, MUON, None, str(tmp_path / "run"))
    assert_same_bits(alone, two[1])
    four = run_ranks(4, after_steps, MODEL, MUON, None, None, str(tmp_path / "run"))
    assert_same_bits(alone, four[3])
    replicas = run_ranks(4, after_steps, MODEL, MUON, 2)
    for of_rank in replicas:
        assert_same_bits(alone, of_rank)
