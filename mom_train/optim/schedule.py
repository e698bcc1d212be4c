"""The learning rate of each step, as a pure function of the step: nothing about it is kept in a checkpoint."""

from __future__ import annotations

import math

from mom_train.config.optimizer import OptimizerConfig
from mom_train.config.run import TrainingConfig


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """The learning rate of optimiser step `step`, counted from 0 to steps - 1.

    It rises linearly to its peak during the warm-up: (step + 1) / warmup of the peak. Afterwards

    - `cosine` falls along half a cosine. The first step after the warm-up has the peak;
    - `constant` stays at the peak;
    - `wsd` stays at the peak and falls in the last `decay` steps. With p = 1 / decay in the first of them and p = 1 in
      the last, the rate is peak * (m + (1 - m) f(p)), where m is `final_fraction` and f is 1 - p (linear),
      1 - sqrt(p) (sqrt; Hägele et al., arXiv 2405.18392) or (1 + cos(pi p)) / 2 (cosine).

    The last step of `cosine` and `wsd` has exactly `final_fraction` of the peak.
    """
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.learning_rate
    last, floor = steps - 1, config.final_fraction
    if config.schedule == "wsd":
        assert config.decay is not None
        first = steps - config.decay
        if step < first:
            return config.learning_rate
        progress = 1.0 if step >= last else (step - first + 1) / config.decay
        return config.learning_rate * (floor + (1 - floor) * _left(progress, config.decay_shape))
    progress = 1.0 if step >= last else (step - config.warmup) / (last - config.warmup)
    return config.learning_rate * (floor + (1 - floor) * _left(progress, "cosine"))


def _left(progress: float, shape: str) -> float:
    """The part of the fall that is left at `progress` from 0 to 1. It is exactly 0 at 1."""
    if shape == "linear":
        return 1 - progress
    if shape == "sqrt":
        return 1 - math.sqrt(progress)
    return 0.5 * (1 + math.cos(math.pi * progress))


def rate_of_step(step: int, training: TrainingConfig, config: OptimizerConfig) -> float:
    """The learning rate of a step of this run, before the factors of parameter groups.

    It is `learning_rate`, times sqrt(batch of the step / training.batch) where `optimizer.scale_with_batch` is set.
    """
    rate = learning_rate(step, training.steps, config)
    if config.scale_with_batch:
        rate *= math.sqrt(training.batch_at(step) / training.batch)
    return rate
