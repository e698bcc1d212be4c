"""Checkpoints as models: which one a place names, what its run's config is, and its weights in a model.

Whoever reads a finished or running run goes through here: samples, evaluation, scores, exports.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from mom_tokenizers.errors import UserError
from mom_train.checkpoint.store import Checkpoint, Checkpoints
from mom_train.config.run import RunConfig
from mom_train.model.language_model import LanguageModel, build_model

Weights = Literal["model", "ema"]
"""The weights themselves, or the exponential moving average of them."""


def find_checkpoint(where: str | Path, step: int | Literal["best"] | None = None) -> Checkpoint:
    """The checkpoint that `where` names: a run's folder or URL (its newest, its best, or that of one step), or one
    checkpoint's own folder or URL. Raises UserError where there is none."""
    root, _, name = str(where).rstrip("/").rpartition("/checkpoints/")
    if root and name.startswith("step-"):
        if step is not None:
            raise UserError(f"--step: {where} is one step's checkpoint already")
        return Checkpoints(root).find(int(name.removeprefix("step-")))
    return Checkpoints.of(where).find(step)


def check_weights(checkpoint: Checkpoint, weights: Weights) -> None:
    """Raises UserError where the average of the weights is asked for and the run kept none."""
    if weights == "ema" and not any(name.startswith("ema.") for name in checkpoint.metadata().state_dict_metadata):
        raise UserError(f"{checkpoint} holds no average of the weights: the run had no training.ema_decay")


def load_weights(model: LanguageModel, checkpoint: Checkpoint, weights: Weights, *, alone: bool) -> None:
    """Fill `model`, sharded or not. Collective, unless one process is `alone`. Raises UserError as `check_weights`."""
    check_weights(checkpoint, weights)
    values = model.state_dict()
    checkpoint.load({weights: values}, no_dist=alone)
    model.load_state_dict(values)


def load_run(
    run: Path | str, step: int | Literal["best"] | None = None, device: str = "cpu", weights: Weights = "model"
) -> tuple[LanguageModel, RunConfig]:
    """The model of a run's checkpoint, whole in this process and ready to be evaluated, and the run's config.

    Raises UserError where there is no such checkpoint, or it does not verify.
    """
    checkpoint = find_checkpoint(run, step)
    checkpoint.check()
    config = checkpoint.config()
    model = build_model(config)
    model.to_empty(device=device)
    load_weights(model, checkpoint, weights, alone=True)
    return model.eval(), config
