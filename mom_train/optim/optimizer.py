"""AdamW and its learning rate."""

from __future__ import annotations

import math

import torch
from torch import nn

from mom_train.config.run import OptimizerConfig

_NO_DECAY = ("A_log", ".D", "bias", "norm.weight")  # patch and time biases among them


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Fused AdamW; weight decay on matrices only, as Mamba trains.

    A modality that no rank saw in a step has zero gradients, like any unused weight: AdamW still decays it and lets
    its momentum run out. Nothing is skipped, because skipping would have to be decided by all ranks.
    """
    decay: list[nn.Parameter] = []
    keep: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (keep if name.endswith(_NO_DECAY) else decay).append(parameter)
    groups = [{"params": decay, "weight_decay": config.weight_decay}, {"params": keep, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True)


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """Rate of optimiser step `step` of 0 to steps - 1: linear warm-up to the peak, then half a cosine, whose first step
    has the peak and whose last, steps - 1, has exactly `final_fraction` of it."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.learning_rate
    last, floor = steps - 1, config.final_fraction
    progress = 1.0 if step >= last else (step - config.warmup) / (last - config.warmup)
    return config.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
