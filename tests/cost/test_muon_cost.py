"""The cost of Muon, from a config, against what PyTorch counts and what its optimiser holds."""

from collections import Counter

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mom_train.config.model import PROJECTIONS, ModelConfig
from mom_train.cost.flops import muon_matrices, muon_parameters, newton_schulz_flops, optimizer_flops
from mom_train.cost.memory import memory
from mom_train.cost.step_time import muon_seconds
from mom_train.model.language_model import LanguageModel
from mom_train.optim.muon import newton_schulz
from mom_train.optim.optimizer import build_optimizer
from tests.helpers.run_config import tiny_config

MUON = {"learning_rate": 0.01, "kind": "muon"}
MODELS = {
    "mixture": ModelConfig(dim=32, layers=1, decoupled=PROJECTIONS),
    "half-and-experts": ModelConfig(dim=32, layers=2, decoupled=("in_proj", "out_proj"), experts=2),
    "transformer": ModelConfig(
        architecture="transformer", dim=32, layers=1, heads=2, decoupled=("feed_forward", "norm")
    ),
    "attention": ModelConfig(architecture="transformer", dim=32, layers=1, heads=2, decoupled=("attention",)),
}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_the_accounts_have_the_matrices_that_the_optimizer_has(tmp_path, model):
    config = tiny_config(tmp_path, model=model.model_dump(), optimizer=MUON)
    optimizer = build_optimizer(LanguageModel(model, config.layout.size, 3), config.optimizer)
    held = Counter((m.rows, m.columns) for m in optimizer._owners.matrices)
    counted = Counter()
    for rows, columns, count in muon_matrices(config):
        counted[rows, columns] += count
    assert held == counted
    trained = sum(p.numel() for p in optimizer.param_groups[-1]["params"])
    assert muon_parameters(config) == trained
    with FlopCounterMode(display=False) as counter:
        for rows, columns in held:
            newton_schulz(torch.ones(rows, columns), (1.0, 1.0, 1.0), 5)
    assert counter.get_total_flops() == sum(newton_schulz_flops(*shape, 5) for shape in held)
    assert optimizer_flops(config) == sum(n * newton_schulz_flops(*shape, 5) for shape, n in held.items())


def test_muon_holds_one_buffer_less_and_adds_to_the_computing_of_the_step(tmp_path):
    adamw, muon = tiny_config(tmp_path), tiny_config(tmp_path, optimizer=MUON)
    assert muon_parameters(adamw) == optimizer_flops(adamw) == muon_seconds(adamw, 2, 1.0) == 0
    for ranks in (1, 2):
        states = [memory(c, ranks)["without_checkpointing"]["by_use"]["optimizer"] for c in (adamw, muon)]
        assert states[0] - states[1] == pytest.approx(4 * muon_parameters(muon) / ranks, abs=4)
    assert muon_seconds(muon, 2, 1e9) == optimizer_flops(muon) / 2e9
    largest = newton_schulz_flops(64, 32, 5)
    assert muon_seconds(muon, 10**6, 1.0) == largest  # more ranks than matrices: one has the largest
