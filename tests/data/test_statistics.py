import numpy as np
import pytest
from corpus import VOCAB, write_dataset
from sklearn.metrics import log_loss

from mom_data.loader import PlannedBatches, Share
from mom_data.plan import Plan, Source
from mom_data.shards import TokenDataset
from mom_data.statistics import unigram_losses


def test_the_unigram_baseline_equals_scikit_learns_log_loss(tmp_path):
    write_dataset(tmp_path / "a", seed=1)
    write_dataset(tmp_path / "b", seed=2)
    batches = []
    for name in "ab":
        plan = Plan((Source(TokenDataset(tmp_path / name), 1.0),), 128, 1, 64, 0)
        batches.append(next(iter(PlannedBatches(plan, VOCAB, Share(0, 1, 8, 8)))))
    losses = unigram_losses(batches[:1], batches[1:], VOCAB)
    train, held = (b.labels[b.labels >= 0].numpy() for b in batches)
    p = (np.bincount(train, minlength=VOCAB.used) + 1) / (len(train) + VOCAB.used)
    everything = np.arange(VOCAB.used)
    for name, mask in {
        "total": held >= 0,
        **{m: VOCAB.modality_of_id[held] == i for i, m in enumerate(VOCAB.modalities)},
    }.items():
        expected = log_loss(held[mask], np.tile(p, (mask.sum(), 1)), labels=everything)
        assert losses[name] == pytest.approx(expected, rel=1e-6)
