"""The optimiser of a run, AdamW or Muon beside AdamW, and its learning rate."""

from __future__ import annotations

import math

import torch
from torch import nn

from mom_train.config.run import OptimizerConfig
from mom_train.optim.matrices import matrix_rows
from mom_train.optim.muon import Muon

_NO_DECAY = ("A_log", ".D", "bias", "norm.weight")  # these include the biases of patches and timesteps


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Makes a fused AdamW with weight decay on matrices only, as in the training of Mamba, or Muon beside it.

    The weights of a modality that no rank had in a step get zero gradients, like any unused weight. AdamW still decays
    them and lets their momentum fade. Muon leaves its matrices as they are in such a step.
    """
    muon = config.as_muon
    rows = {} if muon is None else matrix_rows(model, muon)
    kept = _NO_DECAY if config.decay_convolution else (*_NO_DECAY, "conv_weight")
    decay: list[nn.Parameter] = []
    keep: list[nn.Parameter] = []
    matrices: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (matrices if name in rows else keep if name.endswith(kept) else decay).append(parameter)
    groups = [{"params": decay, "weight_decay": config.weight_decay}, {"params": keep, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True)
    if muon is None:
        return adamw
    group = {"params": matrices, "lr": config.learning_rate, "weight_decay": config.weight_decay}
    return Muon(adamw, [group], [*rows.values()], muon)


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """The learning rate of optimiser step `step`, counted from 0 to steps - 1.

    It rises linearly to its peak during the warm-up and then falls along half a cosine. The first step after the
    warm-up has the peak, and the last step has exactly `final_fraction` of it.
    """
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.learning_rate
    last, floor = steps - 1, config.final_fraction
    progress = 1.0 if step >= last else (step - config.warmup) / (last - config.warmup)
    return config.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
