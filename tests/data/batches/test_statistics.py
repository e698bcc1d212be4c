import numpy as np
import pytest
from sklearn.metrics import log_loss

from mom_data.batches.loader import PlannedBatches, Share
from mom_data.batches.statistics import unigram_losses
from mom_data.order.plan import Plan, Source
from mom_data.shards.dataset import TokenDataset
from tests.helpers.corpus import VOCAB, write_dataset


def test_the_unigram_baseline_equals_scikit_learns_log_loss(tmp_path):
    write_dataset(tmp_path / "a", seed=1)
    write_dataset(tmp_path / "b", seed=2)
    batches = []
    for name in "ab":
        plan = Plan((Source(TokenDataset(tmp_path / name), 1.0),), 128, 1, 64, 0)
        batches.append(next(iter(PlannedBatches(plan, VOCAB, Share(0, 1, 8, 8)))))
    losses = unigram_losses(batches[:1], batches[1:], VOCAB)
    train, held = (b.labels[b.labels >= 0].numpy() for b in batches)
    total = 0.0
    for number, name in enumerate(VOCAB.modalities):
        ids = np.flatnonzero(VOCAB.modality_of_id[: VOCAB.used] == number)
        p = np.array([(train == i).sum() + 1 for i in ids]) / ((VOCAB.modality_of_id[train] == number).sum() + len(ids))
        targets = held[VOCAB.modality_of_id[held] == number]
        expected = log_loss(targets, np.tile(p, (len(targets), 1)), labels=ids)
        assert losses[name] == pytest.approx(expected, rel=1e-6)
        total += expected * len(targets)
    assert losses["total"] == pytest.approx(total / len(held), rel=1e-6)
