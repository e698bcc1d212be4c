"""What a model must beat: the losses of counting, on the validation sets of a run."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

from mom_train.config.run import RunConfig

NAME = "unigram.json"
_ROWS = 1024  # of training, that are counted
_AT_ONCE = 8

Baseline = dict[str, dict[str, float]]
"""Validation set -> modality of the target, or "total" -> nats per token (continuous pictures: squared error)."""


def unigram(config: RunConfig) -> Baseline:
    """The losses of a model that knows which modality comes next and how often each of its ids comes, and no more.

    It counts in the run's first 1,024 training rows. Where pictures are latents, their error is that of predicting
    zero for noise of unit variance, and for a flow's velocity of twice that. Raises UserError where the data that the
    config names cannot be had.
    """
    from mom_data.batches.batch import first_sequences  # here: they import torch, and reports of a baseline need none
    from mom_data.batches.loader import Share, batches
    from mom_data.batches.statistics import unigram_losses
    from mom_train.data import build_plans
    from mom_train.validation import rows_of

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
    """Keep it beside the run, where reports and plots look for it."""
    (run_dir / NAME).write_text(json.dumps(baseline, indent=1) + "\n")


def read_baseline(run_dir: Path) -> Baseline:
    """What was kept there; nothing where nothing was."""
    path = run_dir / NAME
    return json.loads(path.read_text()) if path.is_file() else {}
