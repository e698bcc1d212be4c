"""What a run that carries on has to share with its checkpoint, and what it may change."""

from __future__ import annotations

import logging
from typing import Any

from mom_tokenizers.errors import UserError
from mom_tokenizers.vocab import VocabLayout
from mom_train.checkpoint.saver import TrainState
from mom_train.checkpoint.store import Checkpoint
from mom_train.config.files import differences, with_defaults
from mom_train.config.model import ModelConfig, ObjectiveConfig
from mom_train.config.optimizer import OptimizerConfig
from mom_train.config.run import RunConfig

log = logging.getLogger(__name__)


def compare_with_checkpoint(config: RunConfig, saved: TrainState, checkpoint: Checkpoint) -> None:
    """Raises UserError as `check_same_model`, and logs the other settings that differ."""
    check_same_model(config, saved, checkpoint)
    log_other_settings(config, saved)


def check_same_model(config: RunConfig, saved: TrainState, checkpoint: Checkpoint) -> None:
    """Raises UserError where the checkpoint's model, vocabulary, objective or optimiser differs from the config's."""
    if saved.config is None:
        return
    now, was = config.model_dump(mode="json"), dict(saved.config)
    for section, form in (("model", ModelConfig), ("objective", ObjectiveConfig)):
        # a key that was added since the checkpoint was saved takes its default
        was[section] = form.model_validate(was.get(section, {})).model_dump(mode="json")
    was.setdefault("picture_shapes", None)
    fixed = ("model", "vocabulary", "picture_shapes", "objective")
    if lines := [line for section in fixed for line in differences(was[section], now[section], section)]:
        raise UserError(
            f"the config differs from what {checkpoint} was trained with (was -> is):\n  "
            + "\n  ".join(lines)
            + "\nRestore these keys, or use another run_dir for another model."
        )
    check_same_optimizer(config.optimizer, saved.config.get("optimizer", {}), checkpoint)
    layout = config.run_dir / "vocab.json"
    if layout.is_file() and VocabLayout.load(layout) != config.layout:
        raise UserError(
            f"{config.vocabulary} is another layout than the one that {checkpoint} was trained with, {layout}: "
            "restore it, or use another run_dir."
        )


def check_same_optimizer(config: OptimizerConfig, saved: dict[str, Any], checkpoint: Checkpoint) -> None:
    """Raises UserError where the state of the checkpoint's optimiser does not fit the one that the config names."""

    def states(kind: str, muon: Any) -> str:
        by_adamw = sorted((muon or {}).get("exclude", ()))
        return kind + (f" without {', '.join(by_adamw)}" if by_adamw else "")

    was = states(saved.get("kind", "adamw"), saved.get("muon"))
    now = states(config.kind, config.muon and config.muon.model_dump())
    if was != now:
        raise UserError(
            f"optimizer.kind: {checkpoint} was trained with {was}, whose state does not fit {now}. Restore "
            "optimizer.kind and optimizer.muon.exclude, or begin another run_dir from its weights (init_from)."
        )


def log_other_settings(config: RunConfig, saved: TrainState) -> None:
    """Log the settings that differ from those that the checkpoint was made with."""
    lines = differences(with_defaults(saved.config or {}), config.model_dump(mode="json"))
    if lines and saved.config:
        log.info("other settings than the checkpoint's (was -> is): %s", "; ".join(lines))
