"""Every setting with every architecture trains on real tokens over two ranks, and its losses fall."""

import pydoc_data.topics

import numpy as np
import pytest
from ranks import run_ranks
from sklearn.datasets import load_digits

from mom_data.shards import ShardWriter, TokenSegment, write_manifest
from mom_train.config import RunConfig

MAMBA = {"dim": 32, "layers": 1}
TRANSFORMER = {"architecture": "transformer", "dim": 32, "layers": 2, "heads": 2}
ARCHITECTURES = {
    "mom": {**MAMBA, "decoupled": ["in_proj", "x_proj", "dt_proj", "out_proj"]},
    "mamba": {**MAMBA, "decoupled": []},
    "transformer": {**TRANSFORMER, "decoupled": []},
    "mot": {**TRANSFORMER, "decoupled": ["attention", "feed_forward", "norm"]},
}
# beyond the paper, in one setting: a learned choice instead of the rule, and experts inside each modality
ROUTERS = {
    "learned": {**ARCHITECTURES["mom"], "router": "learned"},
    "experts": {**ARCHITECTURES["mom"], "experts": 2, "decoupled": ["in_proj", "out_proj", "norm"]},
}
SETTINGS = {
    "chameleon": {"vocabulary": {"text": 256, "image": 17}},
    "chameleon_speech": {"vocabulary": {"text": 256, "image": 17, "speech": 20}},
    "four_modalities": {"vocabulary": {"text": 256, "image": 17, "speech": 20, "video": 17}},
    "transfusion": {"vocabulary": {"text": 256, "image": 1}, "objective": {"diffusion": {"patch_width": 4}}},
}


def write_digits(folder, vocabulary, continuous):
    """Handwritten digits after bytes of Python's manual: as 64 codes, or as 16 patches of 2 x 2 pixels; their column
    profiles stand in for a third modality."""
    folder.mkdir()
    digits = load_digits()
    manual = "".join(pydoc_data.topics.topics.values()).encode()
    with ShardWriter(folder / "digits.tar", list(vocabulary)) as writer:
        for i, (pixels, digit) in enumerate(zip(digits.images[:300], digits.target, strict=False)):
            text = manual[i * 60 : i * 60 + 60] + b" the digit %d:" % digit
            segments = [TokenSegment(0, np.frombuffer(text, np.uint8).astype(np.uint16))]
            if continuous:
                patches = pixels.reshape(4, 2, 4, 2).transpose(0, 2, 1, 3).reshape(16, 4) / 8 - 1
                segments.append(TokenSegment(1, patches.astype(np.float16)))
            else:
                segments.append(TokenSegment(1, pixels.reshape(-1).astype(np.uint16)))
            if "speech" in vocabulary:
                profile = np.repeat(pixels.sum(0) // 7, 2).clip(max=19)
                segments.append(TokenSegment(2, profile.astype(np.uint16)))
            if "video" in vocabulary:  # three frames of the digit scrolling up
                frames = [np.roll(pixels, -shift, 0)[::2, ::2] for shift in (0, 2, 4)]
                segments.append(TokenSegment(3, np.stack(frames).reshape(-1).astype(np.uint16)))
            writer.add(str(i), segments)
    tokenizers = {m: {"kind": "test", "fingerprint": m, "size": n} for m, n in vocabulary.items()}
    write_manifest(folder, [writer.record()], tokenizers, np.uint16, {})


def train_few_steps(configs, steps):
    """{architecture: [losses of each step]}"""
    from itertools import islice

    from mom_data.loader import Share, batches
    from mom_train.parallel import process_group
    from mom_train.status import Stop
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
        "optimizer": {"learning_rate": 1e-2, "warmup": 3},
        "training": {"steps": 30, "batch": 8, "micro_batch": 4},
    }
    models = ARCHITECTURES | (ROUTERS if setting == "chameleon_speech" else {})
    if setting == "four_modalities":  # one more entry of the vocabulary, and nothing else
        models = {"mom": ARCHITECTURES["mom"], "mot": ARCHITECTURES["mot"]}
    configs = {name: RunConfig.model_validate({**common, "model": model}) for name, model in models.items()}
    curves, others = run_ranks(2, train_few_steps, configs, 30)
    assert curves == others
    for name, curve in curves.items():
        assert curve[0].keys() == {"loss/total", *(f"loss/{m}" for m in values["vocabulary"])}
        for loss in curve[0]:
            start = curve[0][loss]
            end = np.mean([step[loss] for step in curve[-5:]])
            assert end < 0.85 * start, f"{setting}, {name}: {loss} went from {start:.3f} to {end:.3f}"
