"""The optimiser of a run, AdamW or Muon beside AdamW, and which parameters it treats alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import nn

from mom_train.config.model import ModelConfig
from mom_train.config.muon import MuonConfig
from mom_train.config.optimizer import OptimizerConfig
from mom_train.config.width import growth
from mom_train.optim.matrices import matrix_rows
from mom_train.optim.muon import Muon, adjusted

_NO_DECAY = ("A_log", ".D", "bias", "norm.weight")  # these include the biases of patches and timesteps


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Makes a fused AdamW with weight decay on matrices only, as in the training of Mamba, or Muon beside it.

    The weights of a modality that no rank had in a step get zero gradients, like any unused weight. AdamW still decays
    them and lets their momentum fade. Muon leaves its matrices as they are in such a step. With `model.base_dim`,
    rates, weight decay and epsilon are scaled as `mom_train.config.width` says.
    """
    muon = config.as_muon
    rows = {} if muon is None else matrix_rows(model, muon)
    kept = _NO_DECAY if config.decay_convolution else (*_NO_DECAY, "conv_weight")
    matrices: list[nn.Parameter] = []
    described = cast(ModelConfig, model.config)
    alike: dict[tuple[float, float, float], list[nn.Parameter]] = {}  # (factor on the rate, weight decay, eps)
    for name, parameter in model.named_parameters():
        if name in rows:
            matrices.append(parameter)
            continue
        decay = 0.0 if name.endswith(kept) else config.weight_decay
        grown = growth(name, described)
        factor = getattr(config.groups, part_of(name)) * grown.rate
        alike.setdefault((factor, decay / grown.rate, config.eps * grown.eps), []).append(parameter)
    groups = [
        {"params": p, "factor": factor, "weight_decay": decay, "eps": eps} for (factor, decay, eps), p in alike.items()
    ]
    adamw = torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True)
    if muon is None:
        return adamw
    group = {
        "params": matrices,
        "lr": config.learning_rate,
        "factor": config.groups.projection,
        "weight_decay": config.weight_decay,
    }
    return Muon(adamw, [group], [*rows.values()], muon, _adjustments(rows, described, muon))


def _adjustments(rows: Mapping[str, Sequence[int]], model: ModelConfig, config: MuonConfig) -> list[float]:
    """The factor on Muon's rate for each matrix: as `optimizer.muon.adjust` says for its shape at `model.base_dim`, and
    from there as `mom_train.config.width` says."""
    found: list[float] = []
    for name, of_parameter in rows.items():
        columns, stacked = model.base.matrices[name.split(".")[-2]]
        grown = zip(stacked, growth(name, model).muon, strict=True)
        factors = [adjusted(config, n, columns) * factor for n, factor in grown]
        found += factors * (len(of_parameter) // len(factors))
    return found


def part_of(name: str) -> str:
    """The kind of the parameter of this name: a key of `optimizer.groups`."""
    *path, leaf = name.split(".")
    if leaf in ("A_log", "D", "dt_bias"):
        return "ssm"
    if leaf in ("conv_weight", "conv_bias"):
        return "conv"
    if path[-1].endswith("norm"):
        return "norm"
    if path[0] == "blocks":
        return "projection"
    return "head" if path[0] in ("head", "patch_head") else "embedding"


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the learning rate of the next step: `rate`, times the factor of each group (`optimizer.groups`)."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]
