"""The losses that validation computes, and the checkpoint that a run keeps because of them."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mom_data.shards.dataset import TokenDataset
from tests.helpers.checkpoint_ranks import bests
from tests.helpers.corpus import VOCAB
from tests.helpers.ranks import mom_train, run_ranks
from tests.helpers.run_config import tiny_config, write_config
from tests.helpers.tokenized import tokenized_config


def figures_and_oracle(folder):
    """(what two ranks validate; the same by hand on whole logits, rank 0)."""
    from mom_data.batches.batch import first_sequences
    from mom_data.batches.loader import Share, batches
    from mom_tokenizers.bundle import Tokenizers
    from mom_train.distributed.ranks import process_group
    from mom_train.distributed.status import Stop
    from mom_train.model.objective import noised_patches, row_layout
    from mom_train.trainer import Trainer

    config = tokenized_config(folder)
    with process_group() as ranks:
        trainer = Trainer(config, ranks)
        with torch.no_grad():
            # so that predictions are not all zero, and losses differ by quarter
            trainer.model.patch_head.patch_out.weight.to_local().normal_(0, 0.1)
        values = trainer.validate(Stop())
        text = Tokenizers.load(config.tokenizers).tokenizer("text")
        nats, size, squares = 0.0, 0, {}
        [plan] = trainer.validation_plans.values()
        modality_of_id = torch.from_numpy(config.layout.modality_of_id)
        specials = torch.tensor(list(config.layout.specials.values()))
        stream = batches(plan, config.layout, Share(0, 1, 5, 5))
        batch = first_sequences(next(stream), 5)
        patches = noised_patches(batch, -1, trainer.config.objective.diffusion)
        layout = row_layout(batch, trainer.config.objective.diffusion)
        with torch.no_grad():
            logits, predicted = trainer.model(batch.tokens.reshape(-1)[batch.rows], layout, None, patches)
        losses = F.cross_entropy(logits, batch.labels.reshape(-1)[batch.rows], reduction="none", ignore_index=-100)
        time_losses = torch.empty_like(losses)
        time_losses[batch.rows] = losses
        for row_labels, row_losses in zip(batch.labels, time_losses.view(batch.labels.shape), strict=True):
            kept = (row_labels >= 0) & ~torch.isin(row_labels, specials)
            kept &= modality_of_id[row_labels.clamp_min(0)] == 0
            nats += row_losses[kept].double().sum().item()
            size += text_bytes(text, row_labels, kept)
        for p in range(len(predicted)):
            t = int(patches.timestep[patches.picture[p]])
            error = (predicted[p] - patches.target[p]).square().mean().item()
            squares.setdefault(t // 250, []).append(error)
    oracle = {"bits": nats / math.log(2) / size, **{f"t{q}": float(np.mean(e)) for q, e in squares.items()}}
    return values, oracle


def text_bytes(tokenizer, labels, kept):
    """UTF-8 bytes of the targets, by decoding each run of text whole: a token may end inside a character."""
    total, run = 0, []
    for label, is_text in [*zip(labels.tolist(), kept.tolist(), strict=True), (0, False)]:
        if is_text:
            run.append(label)
        elif run:
            total += len(tokenizer._tokenizer.decode(run).replace("\ufffd", "?").encode())
            run = []
    return total


def test_bits_per_byte_and_errors_by_timestep_are_what_whole_logits_give(tmp_path):
    tokenized_config(tmp_path)
    (values, oracle), (other, _) = run_ranks(2, figures_and_oracle, tmp_path)
    assert values == other
    assert values["val/held/bits_per_byte/text"] == pytest.approx(oracle["bits"], rel=1e-5)
    quarters = {name.removeprefix("val/held/mse/"): v for name, v in values.items() if "/mse/" in name}
    assert quarters == pytest.approx({q: v for q, v in oracle.items() if q != "bits"}, rel=1e-4)
    assert len(quarters) == 4


def whole_set(folder, window):
    """(rows, pieces of documents, targets by modality, sums) of one pass over the validation set."""
    from mom_data.order.plan import Lane
    from mom_train.distributed.ranks import process_group
    from mom_train.trainer import Trainer
    from mom_train.validation.losses import score

    config = tiny_config(folder, validation={"sequences": None}, data__pack_window=window)
    with process_group() as ranks:
        trainer = Trainer(config, ranks)
        [plan] = trainer.validation_plans.values()
        scores = score(trainer.passes, plan, None, None)
    pieces = sum(len(row) for row in Lane(plan, 0))
    return scores.rows, pieces, scores.counts.targets_M.tolist(), scores.sums.tolist()


def test_a_validation_set_is_scored_once_and_whole_whatever_the_training_order_and_the_ranks(tmp_path):
    tiny_config(tmp_path)
    [(rows, pieces, targets, sums)] = run_ranks(1, whole_set, tmp_path, 64)
    (again, _) = run_ranks(2, whole_set, tmp_path, 500)
    assert rows % 2, "with two ranks one of them gets a row of padding"
    assert again[:3] == (rows, pieces, targets)
    assert again[3] == pytest.approx(sums, rel=1e-5)
    dataset = TokenDataset(tmp_path / "val")
    positions = documents = 0
    for k, shard in enumerate(dataset.shards):
        for d in range(shard["documents"]):
            lengths, modalities, _ = dataset.index(k).segments(d)
            positions += 2 + sum(n + 2 * (m > 0) for n, m in zip(lengths, modalities, strict=True))
            documents += 1
    assert documents == 30
    assert sum(targets) == positions - pieces, "each token is a target once, but for the first of a piece"


def train_until_interrupted(folder, where):
    """Train a run in which a signal meets the last rank during the validation after step `where`. With 0 there is no
    signal."""
    from mom_train.distributed.ranks import process_group
    from mom_train.distributed.status import Stop
    from mom_train.trainer import Trainer

    class InValidation(Stop):
        trainer = None

        @property
        def code(self):
            met = self.trainer.state.step == where and not self.trainer.model.training
            return 15 if where and met and self.trainer.ranks.rank == 1 else super().code

    checkpoint = {"keep": 9, "best": "val/held/loss/total"}
    config = tiny_config(folder, checkpoint=checkpoint, validation={"every": 4, "sequences": 5})
    with process_group() as ranks:
        stop = InValidation()
        stop.trainer = Trainer(config, ranks)
        return stop.trainer.run(stop)[0]


def logged(folder):
    lines = (folder / "run/metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(("perf/", "checkpoint/"))} for line in lines]


def test_a_validation_that_a_signal_cuts_short_is_made_up_for(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    tiny_config(whole), tiny_config(cut)
    assert run_ranks(2, train_until_interrupted, whole, 0) == ["finished"] * 2
    assert run_ranks(2, train_until_interrupted, cut, 4) == ["preempted"] * 2
    assert not any(name.startswith("val/") for name in logged(cut)[-1])
    assert run_ranks(2, train_until_interrupted, cut, 0) == ["finished"] * 2
    assert logged(cut) == logged(whole)
    totals = {line["step"]: line["val/held/loss/total"] for line in logged(cut) if "val/held/loss/total" in line}
    assert list(totals) == [0, 4, 8]
    best = min((4, 8), key=totals.get)
    assert (cut / "run/BEST").read_text() == (whole / "run/BEST").read_text() == f"step-{best}\n"


def test_the_best_checkpoint_outlives_newer_ones_until_a_better_one_is_committed(tmp_path):
    # losses by step; a save that fails; what is on the disk after each
    story = [(1, 5.0), (2, 3.0), (3, 4.0), (4, 6.0), (5, math.nan), (6, 2.0, "fails"), (7, 2.5), (8, 9.0)]
    told = run_ranks(2, bests, tmp_path, story)
    assert told[0] == told[1]
    assert [(best, steps) for best, steps in told[0]] == [
        ("step-1", [1]),
        ("step-2", [2]),
        ("step-2", [2, 3]),
        ("step-2", [2, 4]),
        ("step-2", [2, 5]),
        ("step-2", [2, 5]),  # step 6 was better and could not be written
        ("step-7", [7]),
        ("step-7", [7, 8]),
    ]


def test_the_figure_that_decides_must_exist(tmp_path):
    for figure in ("val/other/loss/total", "val/held/loss/video"):
        with pytest.raises(ValueError, match=f"checkpoint.best={figure} is not a figure.*val/held/loss/"):
            tiny_config(tmp_path, checkpoint={"best": figure})
    # a modality that the vocabulary has, and no document of the set
    changes = {"vocabulary": {**dict(VOCAB.sizes), "music": 8}, "checkpoint": {"best": "val/held/loss/music"}}
    code, said = mom_train(write_config(tmp_path, **changes, training__steps=3))
    assert code == 2
    assert "checkpoint.best=val/held/loss/music: validation has no such figure, only val/held/" in said
    assert "Traceback" not in said
