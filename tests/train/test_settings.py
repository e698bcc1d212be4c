"""Every setting with every architecture trains on real tokens over two ranks, and its losses fall."""

import numpy as np
import pytest

from mom_train.config.run import RunConfig
from tests.helpers.ranks import run_ranks
from tests.helpers.settings import ARCHITECTURES, ROUTERS, SETTINGS, write_digits


def train_few_steps(configs, steps):
    """Train a few steps. Returns {architecture: [losses of each step]}."""
    from itertools import islice

    from mom_data.batches.loader import Share, batches
    from mom_train.distributed.ranks import process_group
    from mom_train.distributed.status import Stop
    from mom_train.trainer import Trainer

    curves, stop = {}, Stop()
    with process_group() as ranks:
        for name, config in configs.items():
            trainer = Trainer(config, ranks)
            share = Share(ranks.rank, ranks.world_size, config.training.batch, config.training.micro_batch)
            curves[name] = []
            for batch in islice(batches(trainer.plan, trainer.vocab, share), steps):
                agreement = trainer.agree([batch], stop)
                sums = trainer.passes.forward_backward([batch], agreement.counts)
                all_sums, _ = trainer.step(sums, agreement.counts, [batch])
                trainer.advance([batch], agreement)
                curves[name].append(trainer.passes.means("", all_sums, agreement.counts))
    return curves


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_architecture_trains_in_the_setting(setting, tmp_path):
    values = SETTINGS[setting]
    write_digits(tmp_path / "digits", values["vocabulary"], setting == "transfusion")
    common = {
        **values,
        "run_dir": str(tmp_path / "run"),
        "data": {"train": [{"path": str(tmp_path / "digits")}], "sequence_length": 256, "lanes": 2},
        "optimizer": {"learning_rate": 2e-2, "warmup": 3},
        "training": {"steps": 12, "batch": 4, "micro_batch": 2},
    }
    models = ARCHITECTURES | (ROUTERS if setting == "chameleon_speech" else {})
    if setting == "four_modalities":  # one more entry of the vocabulary, and nothing else
        models = {"mom": ARCHITECTURES["mom"], "mot": ARCHITECTURES["mot"]}
    configs = {name: RunConfig.model_validate({**common, "model": model}) for name, model in models.items()}
    curves, others = run_ranks(2, train_few_steps, configs, 12)
    assert curves == others
    for name, curve in curves.items():
        assert curve[0].keys() == {"loss/total", *(f"loss/{m}" for m in values["vocabulary"])}
        for loss in curve[0]:
            start = curve[0][loss]
            end = np.mean([step[loss] for step in curve[-5:]])
            assert end < 0.85 * start, f"{setting}, {name}: {loss} went from {start:.3f} to {end:.3f}"
