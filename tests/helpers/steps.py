"""Trains a few steps on any number of ranks, and compares the results."""

from itertools import islice

import numpy as np
import pytest

from tests.helpers.run_config import tiny_config


def whole(tensors):
    return {n: (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone().numpy() for n, t in tensors}


def train_steps(config, steps):
    """Train a few steps. Returns the losses, all gradient norms, the gradient of each step, and the weights after the
    last step."""
    from mom_train.distributed.ranks import process_group
    from mom_train.distributed.status import Stop
    from mom_train.trainer import Trainer

    with process_group() as ranks:
        trainer, history = Trainer(config, ranks), []
        stream = trainer.stream()
        before = whole(trainer.model.named_parameters())
        for _ in range(steps):
            batches = list(islice(stream, trainer.accumulation))
            agreement = trainer.agree(batches, Stop())
            sums = trainer.passes.forward_backward(batches, agreement.counts)
            gradients = whole((n, p.grad) for n, p in trainer.model.named_parameters())
            all_sums, norms = trainer.step(sums, agreement.counts, batches, detailed=True)
            trainer.advance(batches, agreement)
            means = trainer.passes.means("", all_sums, agreement.counts)
            history.append((means, {part: float(norm) for part, norm in norms.items()}, gradients))
        return {"before": before, "history": history, "after": whole(trainer.model.named_parameters())}


def assert_same(a, b):
    for (losses, norms, gradients), (b_losses, b_norms, b_gradients) in zip(a["history"], b["history"], strict=True):
        assert losses == pytest.approx(b_losses, rel=1e-5)
        assert norms == pytest.approx(b_norms, rel=2e-5)
        for name, gradient in gradients.items():
            scale = np.abs(b_gradients[name]).max() + 1e-6
            assert np.abs(gradient - b_gradients[name]).max() / scale < 5e-5, f"gradient of {name}"
    for name, weight in a["after"].items():
        change = np.abs(b["after"][name] - b["before"][name]).max()
        assert change > 0, name
        assert np.abs(weight - b["after"][name]).max() < 2e-4 * change, f"{name} after the last step"


def smooth(folder, **changes):
    """A config whose AdamW update is as smooth as its gradients, so that rounding errors stay small. It clips at every
    step, and takes two micro-batches on each of four ranks."""
    optimizer = {"learning_rate": 0.01, "warmup": 0, "eps": 1e-3, "clip": 0.05}
    return tiny_config(folder, **{"training__batch": 8, "optimizer": optimizer} | changes)
