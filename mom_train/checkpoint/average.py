"""The weighted mean of the weights of several checkpoints of one run.

A mean of checkpoints from the stable part of a run comes near to what a decay of the learning rate would have reached
(arXiv 2306.03241, 2507.17634). With coefficients c_1..c_K for the checkpoints in the order of their steps, the
changes of weights between checkpoints i-1 and i count with w_i = c_i + ... + c_K. A uniform mean therefore emulates a
linear decay, w_i = 1 - (i - 1) / K, and c_j = sqrt(j / K) - sqrt((j - 1) / K) emulates one of 1 - sqrt.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mom_tokenizers.errors import UserError, user_path
from mom_train.checkpoint.saver import read_train_state
from mom_train.checkpoint.store import Checkpoint, Checkpoints
from mom_train.config.files import differences, validated

Shape = Literal["linear", "sqrt"]
_SAME = ("model", "vocabulary", "objective", "seed", "optimizer", "data", "branch")


def coefficients(count: int, shape: Shape) -> list[float]:
    """The weight of each of `count` checkpoints, the oldest first. They are not negative, and their sum is 1."""
    if shape == "linear":
        return [1 / count] * count
    return [math.sqrt(j / count) - math.sqrt((j - 1) / count) for j in range(1, count + 1)]


def average(checkpoints: Sequence[Checkpoint], shape: Shape, out: Path) -> Checkpoint:
    """Writes the mean of the weights of `checkpoints` into the folder `out`, which becomes the folder of a run that can
    be evaluated, exported and started from (init_from), but not continued.

    The sum is taken in float64 in the order of steps, and rounded to fp32 once. Raises UserError if fewer than two
    checkpoints are given, if one is damaged, or if they were trained with different settings.
    """
    ordered = sorted(checkpoints, key=lambda c: c.step)
    if len(ordered) < 2:
        raise UserError("an average needs at least two checkpoints")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: there is something already; name a folder that is empty or not there")
    states = [read_train_state(checkpoint) for checkpoint in ordered]
    configs: list[dict[str, Any]] = [state.config or {} for state in states]
    for checkpoint, given in zip(ordered, configs, strict=True):
        was, now = ({key: c.get(key) for key in _SAME} for c in (configs[-1], given))
        if lines := differences(was, now):
            raise UserError(f"{checkpoint} was trained with other settings than {ordered[-1]}: {'; '.join(lines)}")
        checkpoint.check()
    weights = coefficients(len(ordered), shape)
    total: dict[str, Tensor] = {}
    for checkpoint, weight in zip(ordered, weights, strict=True):
        for name, value in _model(checkpoint).items():
            total.setdefault(name, torch.zeros(value.shape, dtype=torch.float64)).add_(value.double(), alpha=weight)
    mean = {name: value.float() for name, value in total.items()}
    config = validated(configs[-1], ordered[-1])
    own = config.checkpoint.model_copy(update={"path": None})
    config = config.model_copy(update={"run_dir": out, "checkpoint": own, "branch": None})
    state = states[-1]
    state.config, state.best = config.model_dump(mode="json"), {}
    state.averaged = {"steps": [c.step for c in ordered], "weights": weights, "of": ordered[-1].path}
    with user_path(out):
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.yaml").write_text(config.to_yaml())
        config.layout.save(out / "vocab.json")
    made = Checkpoints(out)
    made.write(ordered[-1].step, {"model": mean}, json.dumps(state.state_dict(), indent=1) + "\n", None)
    return made[ordered[-1].step]


def _model(checkpoint: Checkpoint) -> dict[str, Tensor]:
    entries: dict[str, Any] = dict(checkpoint.metadata().state_dict_metadata)
    values = {
        key.removeprefix("model."): torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in entries.items()
        if key.startswith("model.")
    }
    checkpoint.load({"model": values}, no_dist=True)
    return values
