import pytest
import torch

from mom_train.config.model import PROJECTIONS, ModelConfig
from mom_train.cost.flops import active_parameters, parameters
from mom_train.model.init import initialize
from mom_train.model.language_model import LanguageModel
from mom_train.model.routed import RoutedProjection
from mom_train.ops.layout import RowLayout

M, T = 3, 24


def layout(seed=0, missing=None):
    modality = torch.randint(0, M, (2, T // 2), generator=torch.Generator().manual_seed(seed))
    if missing is not None:
        modality[modality == missing] = 0
    return RowLayout.sort(modality.to(torch.uint8), torch.zeros(2, T // 2, dtype=torch.int32), M)


@pytest.mark.parametrize("missing", [None, 1])
@pytest.mark.parametrize(("experts", "among_all"), [(1, True), (2, False), (2, True)])
def test_each_token_gets_its_likeliest_matrix_scaled_by_its_probability(experts, among_all, missing):
    torch.manual_seed(0)
    routed = RoutedProjection(8, 5, M, experts, among_all)
    for p in routed.parameters():
        torch.nn.init.normal_(p)
    rows, x = layout(missing=missing), torch.randn(T, 8, requires_grad=True)
    y = routed(x, rows)
    matrices = routed.weight.view(M * experts, 5, 8)
    expected, chosen, probability = [], [], []
    for t in range(T):
        m = next(m for m in range(M) if rows.offsets[m] <= t < rows.offsets[m + 1])
        allowed = range(M * experts) if among_all else range(m * experts, (m + 1) * experts)
        logits = torch.stack([routed.router[e] @ x[t] for e in allowed])
        p = torch.exp(logits) / torch.exp(logits).sum()
        best = int(p.argmax())
        expected.append(p[best] * (matrices[allowed[best]] @ x[t]))
        chosen.append((m, allowed[best]))
        probability.append({e: p[i] for i, e in enumerate(allowed)})
    expected = torch.stack(expected)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-4)
    gy = torch.randn(T, 5)
    ours = torch.autograd.grad(y, [x, *routed.parameters()], gy, retain_graph=True)
    theirs = torch.autograd.grad(expected, [x, *routed.parameters()], gy, retain_graph=True)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)

    # Switch's loss, n * sum_e f_e P_e, over each group of tokens that share their choices, weighted by its tokens
    balance = 0.0
    groups = [range(T)] if among_all else [[t for t in range(T) if chosen[t][0] == m] for m in range(M)]
    for group in filter(len, groups):
        options = list(probability[group[0]])
        for e in options:
            f = sum(chosen[t][1] == e for t in group) / len(group)
            P = sum(probability[t][e] for t in group) / len(group)
            balance = balance + len(options) * f * P * len(group)
    torch.testing.assert_close(routed.balance, balance, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("changes", [{"router": "learned"}, {"experts": 2}, {"router": "learned", "experts": 2}])
@pytest.mark.parametrize("architecture", ["mamba", "transformer"])
def test_models_with_routers_have_the_counted_parameters_and_gradients_for_all_that_are_used(architecture, changes):
    more = {"heads": 2, "decoupled": ("attention", "feed_forward")} if architecture == "transformer" else {}
    config = ModelConfig(architecture=architecture, dim=32, layers=1, **{"decoupled": PROJECTIONS, **more, **changes})
    model = LanguageModel(config, 96, M)
    initialize(model, 0)
    assert sum(p.numel() for p in model.parameters()) == sum(parameters(config, 96, M).values())
    dense = config.model_copy(update={"decoupled": (), "experts": 1, "router": "rule"})
    assert sum(active_parameters(config, 96).values()) == sum(parameters(dense, 96, M).values())
    rows = layout(missing=2)
    losses = model(torch.arange(T), rows, torch.arange(T))
    (losses.tokens + losses.balance).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert any(p.grad.abs().sum() > 0 for n, p in model.named_parameters() if n.endswith("router"))


def test_the_balance_loss_evens_out_the_experts():
    torch.manual_seed(0)
    routed = RoutedProjection(8, 4, 1, 4, True)
    for p in routed.parameters():
        torch.nn.init.normal_(p)
    x = torch.randn(512, 8) + 1.0
    rows = RowLayout.sort(torch.zeros(1, 512, dtype=torch.uint8), torch.zeros(1, 512, dtype=torch.int32), 1)

    def largest_share():
        return torch.bincount((x @ routed.router.t()).argmax(1), minlength=4).max().item() / 512

    before = largest_share()
    optimizer = torch.optim.Adam([routed.router], lr=0.05)
    for _ in range(100):
        routed(x, rows)
        optimizer.zero_grad()
        (routed.balance / 512).backward()
        optimizer.step()
    assert before > 0.4
    assert largest_share() < 0.35
