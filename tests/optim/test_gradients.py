"""The norms of a step's gradient and its clipping, as on a CPU and in one pass."""

import math

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from mom_train.config.model import ModelConfig
from mom_train.config.optimizer import OptimizerConfig
from mom_train.model.init import initialize
from mom_train.model.language_model import LanguageModel
from mom_train.model.sharding import shard
from mom_train.optim.gradients import Clipping, gradient_squares
from mom_train.optim.optimizer import build_optimizer
from tests.helpers.ranks import run_ranks

MODALITIES = ("text", "image")


def test_gradient_norms_by_part_and_modality_are_those_of_the_gradients():
    config = ModelConfig(dim=32, layers=1, decoupled=("in_proj", "out_proj"))
    model = LanguageModel(config, 64, 2)
    initialize(model, 0)
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    squares = gradient_squares(model, ("text", "image"))
    grads = {n: p.grad.double().numpy() for n, p in model.named_parameters()}

    def norm(chosen):
        return math.sqrt(sum(float((g**2).sum()) for g in chosen))

    for part in ("in_proj", "x_proj", "dt_proj", "out_proj"):
        own = [g for n, g in grads.items() if n.endswith(f"{part}.weight")]
        assert len(own) == 2
        assert math.sqrt(squares[part]) == pytest.approx(norm(own))
    for m, modality in enumerate(("text", "image")):
        own = [np.split(g, 2)[m] for n, g in grads.items() if n.endswith(("in_proj.weight", "out_proj.weight"))]
        assert math.sqrt(squares[modality]) == pytest.approx(norm(own))
    assert math.sqrt(squares["head"]) == pytest.approx(norm([grads["head.weight"]]))
    assert set(squares) == {"embedding", "head", "in_proj", "x_proj", "dt_proj", "out_proj", "text", "image"}


def clipped_steps(cases):
    """For each case (kind, one_pass, clip, odd): loss sums of all ranks, norms, and weights and moments of this rank
    after three steps on made-up gradients. `odd` replaces a value of the second gradient, whose step is then bad."""
    from mom_train.distributed.ranks import process_group

    results = []
    with process_group() as ranks:
        for kind, one_pass, clip, odd in cases:
            model = LanguageModel(ModelConfig(dim=32, layers=1, decoupled=("in_proj", "out_proj")), 64, 2)
            model = shard(model, ranks.mesh)
            initialize(model, 0)
            optimizer = build_optimizer(model, OptimizerConfig(kind=kind, learning_rate=0.01))
            clipping = Clipping(model, MODALITIES, clip, 1, one_pass)
            g = torch.Generator().manual_seed(0)
            seen = []
            for step in range(3):
                for name, p in model.named_parameters():
                    whole = torch.randn(p.shape, generator=g)
                    if step == 1 and odd is not None and name == "head.weight":
                        whole[3, 4] = odd
                    p.grad = distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None)
                sums = torch.tensor([1.0, 2.0], dtype=torch.float64) * (1 + ranks.rank)
                all_sums, norms = clipping(sums, optimizer, detailed=True)
                seen.append((all_sums.tolist(), {name: float(norm) for name, norm in norms.items()}))
                optimizer.found_inf = (~norms["total"].isfinite()).float()
                optimizer.step()
                optimizer.zero_grad()
            tensors = [p.detach() for p in model.parameters()]
            tensors += [v for state in optimizer.state.values() for v in state.values()]
            local = [(t.to_local() if isinstance(t, DTensor) else t).clone().numpy() for t in tensors]
            results.append((seen, local))
    return results


CASES = [("adamw", 1.0, None), ("adamw", 1e9, None), ("muon", 1.0, None), ("adamw", 1.0, math.inf)]


def test_clipping_in_one_pass_gives_the_norms_and_the_update_of_clip_grad_norm():
    """On two ranks, so that the rows of a modality lie on one of them or on both. Limits: fp32 sums in another
    order."""
    cases = [(kind, one_pass, clip, odd) for kind, clip, odd in CASES for one_pass in (False, True)]
    of_ranks = run_ranks(2, clipped_steps, cases)
    for of_rank in of_ranks:
        for (usual, usual_tensors), (one, one_tensors) in zip(of_rank[::2], of_rank[1::2], strict=True):
            for (sums, norms), (other_sums, other_norms) in zip(usual, one, strict=True):
                assert sums == other_sums == [3.0, 6.0]
                assert norms.keys() == other_norms.keys()
                assert norms == pytest.approx(other_norms, rel=2e-6)
            for a, b in zip(usual_tensors, one_tensors, strict=True):
                np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)
    bad = of_ranks[0][-1][0][1][1]
    assert bad["head"] == bad["total"] == math.inf
    assert math.isfinite(bad["in_proj"]), "an infinite gradient of the head is not one of in_proj"
