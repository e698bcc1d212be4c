"""Loads the model of a checkpoint: finds the checkpoint, reads the config of its run, and fills a model with its
weights.

Everything that reads a finished or running run uses this module: samples, evaluation, scores, exports.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from mom_tokenizers.errors import UserError
from mom_train.checkpoint.store import Checkpoint, Checkpoints
from mom_train.config.run import RunConfig
from mom_train.model.language_model import LanguageModel, build_model

Weights = Literal["model", "ema"]
"""Which weights of a checkpoint: the weights themselves, or their exponential moving average."""


def find_checkpoint(where: str | Path, step: int | Literal["best"] | None = None) -> Checkpoint:
    """The checkpoint that `where` names.

    `where` is the folder or URL of a run (`step` then chooses the newest with None, the best, or that of one step) or
    the folder or URL of one checkpoint. Raises UserError if there is no such checkpoint.
    """
    root, _, name = str(where).rstrip("/").rpartition("/checkpoints/")
    if root and name.startswith("step-"):
        if step is not None:
            raise UserError(f"--step: {where} is already the checkpoint of one step")
        return Checkpoints(root).find(int(name.removeprefix("step-")))
    return Checkpoints.of(where).find(step)


def check_weights(checkpoint: Checkpoint, weights: Weights) -> None:
    """Raises UserError if `weights` asks for the average of the weights and the run kept none."""
    if weights == "ema" and not any(name.startswith("ema.") for name in checkpoint.metadata().state_dict_metadata):
        raise UserError(f"{checkpoint} holds no average of the weights: the run had no training.ema_decay")


def load_weights(model: LanguageModel, checkpoint: Checkpoint, weights: Weights, *, alone: bool) -> None:
    """Fills `model`, which may be sharded. Collective, unless the process is `alone`. Raises as `check_weights`
    does."""
    check_weights(checkpoint, weights)
    values = model.state_dict()
    checkpoint.load({weights: values}, no_dist=alone)
    model.load_state_dict(values)


def load_run(
    run: Path | str, step: int | Literal["best"] | None = None, device: str = "cpu", weights: Weights = "model"
) -> tuple[LanguageModel, RunConfig]:
    """Returns the model of a checkpoint, whole in this process and in evaluation mode, and the config of its run.

    Arguments are as in `find_checkpoint`. Raises UserError if there is no such checkpoint, or if it is damaged.
    """
    checkpoint = find_checkpoint(run, step)
    checkpoint.check()
    config = checkpoint.config()
    model = build_model(config)
    model.to_empty(device=device)
    load_weights(model, checkpoint, weights, alone=True)
    return model.eval(), config
