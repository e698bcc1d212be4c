"""The losses that a model must beat: those of counting ids, on the validation sets of a run."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

from mom_train.config.run import RunConfig

NAME = "unigram.json"
_ROWS = 1024  # training rows in which ids are counted
_AT_ONCE = 8

Baseline = dict[str, dict[str, float]]
"""For each validation set, the loss by modality of the target and in "total", in nats per token. For continuous
pictures it is the squared error."""


def unigram(config: RunConfig) -> Baseline:
    """The losses of a model that knows only the modality of the next token and how often each id of it occurs.

    The ids are counted in the first 1,024 training rows of the run. For continuous pictures the model predicts zero:
    its squared error is 1, the variance of the noise, and 2 for the velocity of a flow. Raises UserError if the data
    that the config names cannot be read.
    """
    # Imported here because they import torch, and reading a baseline needs none.
    from mom_data.batches.batch import first_sequences
    from mom_data.batches.loader import Share, batches
    from mom_data.batches.statistics import unigram_losses
    from mom_train.data import build_plans
    from mom_train.validation.losses import rows_of

    train, validation = build_plans(config)
    vocab, diffusion = config.layout, config.objective.diffusion
    share = Share(0, 1, _AT_ONCE, _AT_ONCE)
    found: Baseline = {}
    for name, plan in validation.items():
        rows, _ = rows_of(plan, config.validation.sequences)
        held_out = islice(batches(plan, vocab, share), -(-rows // _AT_ONCE))
        losses = unigram_losses(
            islice(batches(train, vocab, share), _ROWS // _AT_ONCE),
            (first_sequences(batch, rows) for batch in held_out),
            vocab,
        )
        if diffusion is not None and "image" in vocab.modalities:
            losses["image"] = 2.0 if diffusion.prediction == "flow" else 1.0
            losses["total"] += diffusion.weight * losses["image"]
        found[name] = losses
    return found


def write_baseline(run_dir: Path, baseline: Baseline) -> None:
    """Writes the baseline to the folder of the run, where reports and plots look for it."""
    (run_dir / NAME).write_text(json.dumps(baseline, indent=1) + "\n")


def read_baseline(run_dir: Path) -> Baseline:
    """The baseline that `write_baseline` wrote, or {} if there is none."""
    path = run_dir / NAME
    return json.loads(path.read_text()) if path.is_file() else {}
