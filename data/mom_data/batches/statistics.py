"""The unigram baseline, whose loss a model must beat."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from mom_data.batches.batch import PackedBatch
from mom_tokenizers.vocab import VocabLayout


def unigram_losses(
    train: Iterable[PackedBatch], held_out: Iterable[PackedBatch], vocab: VocabLayout
) -> dict[str, float]:
    """Mean loss of the unigram model in nats on the held-out targets, by modality and as "total".

    The unigram model knows only which modality comes next, and how often each id of that modality is a target in
    training, with add-one smoothing.
    """
    counts = np.ones(vocab.used)
    for batch in train:
        labels = batch.labels.numpy()
        counts += np.bincount(labels[labels >= 0], minlength=vocab.used)
    modality = vocab.modality_of_id[: vocab.used]
    nats = -np.log(counts / np.bincount(modality, counts)[modality])
    targets = np.concatenate([(labels := batch.labels.numpy())[labels >= 0] for batch in held_out])
    of_target = vocab.modality_of_id[targets]
    losses = {"total": float(nats[targets].mean())}
    for number, name in enumerate(vocab.modalities):
        if (of_target == number).any():
            losses[name] = float(nats[targets[of_target == number]].mean())
    return losses
