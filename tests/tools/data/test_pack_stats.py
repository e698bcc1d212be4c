"""tools/pack_stats.py predicts from indices alone what the loader's batches then are."""

import json
import re
import subprocess
import sys
from itertools import islice

import numpy as np
import pytest

from mom_data.batches.loader import Share, batches
from mom_data.order.forecast import first_rows, measure, predict, remarks
from mom_data.order.plan import Plan, Source
from mom_data.shards.dataset import TokenDataset
from mom_data.shards.format import TokenSegment
from mom_tools.data.pack_stats import configured
from tests.helpers import CHECKOUT
from tests.helpers.corpus import TOKENIZERS, VOCAB, random_document, write_dataset
from tests.helpers.run_config import tiny_config


def tool(*arguments):
    command = [sys.executable, str(CHECKOUT / "tools/pack_stats.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def plan_of(*folders, weights=(1.0,), length=96, lanes=2, window=32, **kwargs):
    sources = tuple(Source(TokenDataset(f), w) for f, w in zip(folders, weights, strict=True))
    return Plan(sources, length, lanes, window, 0, **kwargs)


def counted(plan, sequences):
    """The same figures counted from batches: padding, cut documents, tokens by modality, documents."""
    tokens, pieces, begun, split = np.zeros(3, int), 0, 0, 0
    for batch in islice(batches(plan, VOCAB, Share(0, 1, 1, 1)), sequences):
        tokens += batch.real_tokens.numpy()
        ids, document = batch.tokens[0], batch.document[0]
        for number in document.unique():
            of_piece = ids[document == number]
            pieces += not bool((of_piece == VOCAB.specials["pad"]).all())
            if of_piece[0] == VOCAB.specials["bos"]:
                begun += 1
                split += int(of_piece[-1] != VOCAB.specials["eos"])
    return tokens.tolist(), pieces, begun, split


@pytest.mark.parametrize("latent_width", [0, 8])
@pytest.mark.parametrize("how", [{}, {"packing": "concatenate"}, {"cut_spans": True}])
def test_the_figures_are_those_of_the_batches(tmp_path, latent_width, how):
    write_dataset(tmp_path / "a", documents=240, latent_width=latent_width)
    write_dataset(tmp_path / "b", documents=240, seed=1, latent_width=latent_width)
    plan = plan_of(tmp_path / "a", tmp_path / "b", weights=(3.0, 1.0), **how)
    predicted = measure(plan, 60)
    tokens, pieces, begun, split = counted(plan, 60)
    assert list(predicted["tokens"].values()) == tokens
    assert predicted["padding_percent"] == pytest.approx(100 * (1 - sum(tokens) / (60 * 96)), abs=1e-9)
    assert predicted["documents_per_row"] * 60 == pytest.approx(pieces)
    assert predicted["documents_split_percent"] == pytest.approx(100 * split / begun)
    assert split > 0
    assert sum(predicted["source_tokens"]) == sum(tokens)


def caption(rng, _):
    """A caption and a picture of 1,024 codes. Three of them fit into a row of 4,096, whatever the algorithm."""
    words, codes = rng.integers(20, 40), rng.integers(0, 32, 1024)
    return [TokenSegment(0, rng.integers(0, 100, words).astype(np.uint16)), TokenSegment(1, codes.astype(np.uint16))]


def test_captions_with_large_pictures_are_warned_of_with_a_remedy_that_works(tmp_path):
    write_dataset(tmp_path / "d", documents=300, make=caption)
    predicted = predict(plan_of(tmp_path / "d", length=4096, window=120), 64)
    assert 20 < predicted["padding_percent"] < 25
    (warning,) = predicted["warnings"]
    assert "must stay whole" in warning
    assert "data.cut_spans=true" in warning
    length = int(warning.split("data.sequence_length=")[1].split(";")[0].rstrip("."))
    assert measure(plan_of(tmp_path / "d", length=length, window=120), 64)["padding_percent"] < 3
    cut = measure(plan_of(tmp_path / "d", length=4096, window=120, cut_spans=True), 64)
    assert cut["padding_percent"] < 3.5  # a window of 120 makes chunks of 30 rows, and one of them is never full


def test_a_config_gives_epochs_and_warns_of_repeated_sources(tmp_path):
    write_dataset(tmp_path / "large", documents=600)
    write_dataset(tmp_path / "small", documents=60, seed=1)
    sources = [{"path": str(tmp_path / name), "weight": w} for name, w in (("large", 1.0), ("small", 3.0))]
    config = tiny_config(tmp_path, data__train=sources, data__pack_window=1024)
    path = tmp_path / "run.yaml"
    path.write_text(config.to_yaml())
    plan, sequences = configured(path, ["training.steps=400"])
    assert sequences == 400 * config.training.batch
    found = predict(plan, 64, sequences)
    large, small = found["sources"]
    assert found["length"] == config.data.sequence_length
    assert small["wanted_percent"] == 75
    assert small["share_percent"] == pytest.approx(75, abs=3)
    for source, name in ((large, "large"), (small, "small")):
        shards = TokenDataset(tmp_path / name)
        total = 0
        for k in range(len(shards.shards)):
            for d in range(shards.shards[k]["documents"]):
                lengths, modalities, _ = shards.index(k).segments(d)
                total += 2 + sum(lengths) + 2 * sum(m > 0 for m in modalities)
        assert source["tokens_per_epoch"] == total
    positions = 400 * config.training.batch * config.data.sequence_length
    assert found["run_tokens"] == pytest.approx(positions * (1 - found["padding_percent"] / 100), rel=1e-6)
    epochs = found["run_tokens"] * small["share_percent"] / 100 / small["tokens_per_epoch"]
    assert small["epochs"] == pytest.approx(epochs, rel=1e-6)
    assert epochs > 4
    assert any("small is seen" in w for w in found["warnings"])


def test_pictures_of_latents_that_never_fit_are_an_error_that_says_how_many(tmp_path):
    truth = write_dataset(tmp_path / "d", latent_width=8)
    pictures = sum(s.latent for segments in truth.values() for s in segments)
    done = tool("--data", tmp_path / "d", "--length", 17, "--lanes", 2)
    assert done.returncode == 2
    assert f"{pictures} pictures of latents never fit a row of 17 positions" in done.stderr
    assert "the largest takes 18" in done.stderr


def test_neither_config_nor_data_is_an_error():
    done = tool("--length", 64)
    assert (done.returncode, "either a CONFIG" in done.stderr) == (2, True)


def test_the_table_for_a_person_names_every_way_and_source(tmp_path):
    write_dataset(tmp_path / "d", documents=90, make=lambda rng, _: random_document(rng), tokenizers=TOKENIZERS)
    done = tool("--data", tmp_path / "d", "--length", 96, "--lanes", 2, "--sequences", 32, "--json", tmp_path / "o")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "o").read_text())
    assert f"{found['sources'][0]['tokens_per_epoch']:,}" in done.stdout
    assert "<- configured" in done.stdout
    assert done.stdout.count("concatenate") == 2
    assert str(tmp_path / "d") in done.stdout


def test_the_start_of_a_run_says_how_often_each_modality_is_seen(tmp_path):
    write_dataset(tmp_path / "train", documents=240)
    write_dataset(tmp_path / "val", documents=8, seed=1)
    plan, held_out = plan_of(tmp_path / "train"), plan_of(tmp_path / "val", lanes=1)
    _, once = plan_epoch(plan)
    line, said = remarks(plan, 6 * once, {"held": held_out}, 10_000)
    for modality in VOCAB.modalities:
        seen = float(re.search(rf"its {modality} ([\d.]+) times", line)[1])
        assert seen == pytest.approx(6, rel=0.15)  # from a sample of the rows
        assert any(f"{modality} is seen {seen:.1f} times" in warning for warning in said)
    [few] = [warning for warning in said if "validation set 'held'" in warning]
    for modality, n in held_out.sources[0].dataset.manifest["tokens"].items():
        assert f"{n:,} tokens of {modality}" in few
    assert "raise validation.sequences" not in few, "all of it is counted already"
    assert not [w for w in remarks(plan, once, {}, 1)[1] if "times" in w]


def plan_epoch(plan):
    """(documents, rows) of one pass over a plan of one source."""
    documents = sum(s["documents"] for s in plan.sources[0].dataset.shards)
    begun = 0
    for rows, row in enumerate(first_rows(plan, 10_000)):
        if begun >= documents:
            return documents, rows
        begun += sum(piece.start == 0 for piece in row)
    raise AssertionError("no epoch within 10,000 rows")
