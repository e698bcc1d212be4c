import math

import pytest
import torch

from mom_train.config.model import PROJECTIONS, ModelConfig
from mom_train.config.run import OptimizerConfig
from mom_train.model.language_model import LanguageModel
from mom_train.optim.optimizer import build_optimizer, learning_rate


def test_the_rate_warms_up_and_follows_half_a_cosine():
    config = OptimizerConfig(learning_rate=2.0, warmup=10, final_fraction=0.1)
    assert [learning_rate(s, 111, config) for s in (0, 4, 9)] == pytest.approx([0.2, 1.0, 2.0])
    assert learning_rate(10, 111, config) == 2.0
    assert learning_rate(60, 111, config) == pytest.approx(1.1)  # half way: the mean of peak and floor
    quarter = 0.2 + 1.8 * (1 + math.sqrt(0.5)) / 2
    assert learning_rate(35, 111, config) == pytest.approx(quarter)
    constant = OptimizerConfig(learning_rate=2.0, warmup=0, schedule="constant")
    assert learning_rate(99, 100, constant) == 2.0


@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.1, 1 / 3, 1.0])
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (2, 1), (3, 0), (7, 6), (360, 30), (250_000, 4000)])
def test_the_last_steps_rate_is_exactly_the_final_fraction_of_the_peak(steps, warmup, fraction):
    config = OptimizerConfig(learning_rate=3e-4, warmup=warmup, final_fraction=fraction)
    assert learning_rate(steps - 1, steps, config) == 3e-4 * fraction
    if steps > warmup + 1:
        assert learning_rate(warmup, steps, config) == 3e-4
        assert learning_rate(steps - 2, steps, config) >= 3e-4 * fraction


def test_only_matrices_decay():
    model = LanguageModel(ModelConfig(dim=32, layers=1, decoupled=PROJECTIONS), 96, 3)
    decayed, kept = (group["params"] for group in build_optimizer(model, OptimizerConfig(learning_rate=1)).param_groups)
    names = {id(p): n for n, p in model.named_parameters()}
    assert len(decayed) + len(kept) == len(names)
    assert {names[id(p)].split(".")[-1] for p in kept} == {"A_log", "D", "dt_bias", "conv_bias", "weight"}
    assert all("norm" in names[id(p)] for p in kept if names[id(p)].endswith("weight"))
    assert all(p.dim() == 2 and isinstance(p, torch.nn.Parameter) for p in decayed)
