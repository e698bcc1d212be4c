"""A fourth modality whose ids were made elsewhere, from raw documents to the losses and samples of a run."""

import io
import json

import numpy as np
import pytest
import soundfile
import webdataset
import yaml
from PIL import Image

from mom_data.shards.dataset import TokenDataset
from mom_tokenizers.speech.units import SpeechTokenizer
from mom_tokenizers.text import TextTokenizer
from mom_train.config.files import load_config
from mom_train.data import build_plans
from tests.helpers.ranks import mom_train, program
from tests.helpers.tiny_tokenizers import random_vq

MELODIES = 48
ENTRY = "music: {kind: ids, size: 90, made_by: a melody of the test}\n"
WAVE = np.random.default_rng(0).normal(0, 0.1, 8_000).astype(np.float32)


def melody(i):
    return (40 + 12 * np.sin(np.arange(30 + i) * (1 + i % 5) / 7)).astype(np.int64)


def encoded(save, *values, **options):
    file = io.BytesIO()
    save(file, *values, **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Tokenizers of three modalities with the fourth's entry, and documents of all four: melodies as lists in every
    other document, as .npy in the rest. Three documents cannot be read."""
    folder = tmp_path_factory.mktemp("four")
    TextTokenizer.train(["a melody of some notes"] * 9, 280).save(folder / "text")
    random_vq(4).save(folder / "image")
    SpeechTokenizer.train([(WAVE, 16_000)], 5).save(folder / "speech")
    entries = "text: {kind: bpe, path: text}\nimage: {kind: vq, path: image}\nspeech: {kind: units, path: speech}\n"
    (folder / "tokenizers.yaml").write_text(entries + ENTRY)
    (folder / "raw").mkdir()
    flac = encoded(soundfile.write, WAVE, 16_000, format="FLAC")
    with webdataset.TarWriter(str(folder / "raw/songs.tar"), mtime=0) as tar:
        for i in range(MELODIES):
            pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            parts = {"0.png": encoded(Image.fromarray(pixels).save, format="PNG"), "1.flac": flac}
            music = {"ids": melody(i).tolist()} if i % 2 else {"part": "2.npy"}
            if "part" in music:
                parts["2.npy"] = encoded(np.save, melody(i).astype(np.uint8))
            segments = [{"type": "text", "text": f"melody {i}"}, {"type": "image", "part": "0.png"},
                        {"type": "speech", "part": "1.flac"}, {"type": "music", **music}]  # fmt: skip
            tar.write({"__key__": f"d{i:03d}", "json": json.dumps({"segments": segments}).encode(), **parts})
        for key, segment in {
            "e-large": {"type": "music", "ids": [3, 90]},
            "e-negative": {"type": "music", "ids": [-1]},
            "e-speech": {"type": "speech", "ids": [1, 2]},
        }.items():
            tar.write({"__key__": key, "json": json.dumps({"segments": [segment]}).encode()})
    tool = ["tools/tokenize_shards.py", "--config", folder / "tokenizers.yaml", "--workers", 1]
    done = program(*tool, "--input", folder / "raw", "--output", folder / "tokens", "--max-bad-fraction", 0.1)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_the_shards_hold_the_ids_as_they_were_brought(made):
    dataset = TokenDataset(made / "tokens")
    assert list(dataset.modalities) == ["text", "image", "speech", "music"]
    for i in range(MELODIES):
        segments = dataset.read(0, i)
        assert [s.modality for s in segments] == [0, 1, 2, 3]
        assert segments[3].values.tolist() == melody(i).tolist()
    described = dataset.tokenizers["music"]
    assert (described["kind"], described["size"], described["made_by"]) == ("ids", 90, "a melody of the test")
    skipped = [json.loads(line) for line in (made / "tokens/skipped.jsonl").read_text().splitlines()]
    reasons = {s["key"]: s["reason"] for s in skipped}
    assert set(reasons) == {"e-large", "e-negative", "e-speech"}
    assert "segment 0 (music): ids run from 3 to 90, but 0 to 89" in reasons["e-large"]
    assert "must be a list of whole numbers from 0 on" in reasons["e-negative"]
    assert "speech has a tokenizer of kind units: declare it as kind ids" in reasons["e-speech"]


def config(made, **changes):
    values = {
        "run_dir": str(made / "run"),
        "vocabulary": {"text": 280, "image": 16, "speech": 5, "music": 90},
        "tokenizers": str(made / "tokenizers.yaml"),
        "model": {"dim": 16, "layers": 1, "decoupled": ["in_proj", "x_proj", "dt_proj", "out_proj"]},
        "data": {"train": [{"path": str(made / "tokens")}], "validation": {"held": [{"path": str(made / "tokens")}]},
                 "sequence_length": 256, "lanes": 2, "workers": 0},
        "optimizer": {"learning_rate": 0.01},
        "training": {"steps": 3, "batch": 2, "micro_batch": 2},
        "validation": {"sequences": 2},
        "sampling": {"every": 3, "prompts": [{"text": "melody", "start": "music"}], "max_tokens": 24},
    }  # fmt: skip
    path = made / "run.yaml"
    path.write_text(yaml.safe_dump({**values, **changes}, sort_keys=False))
    return path


def test_a_run_trains_on_it_and_says_its_loss(made):
    code, said = mom_train(config(made))
    assert code == 0, said[-3000:]
    lines = [json.loads(line) for line in (made / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines][-1] == 3
    for modality in ("text", "image", "speech", "music"):
        for name in (f"loss/{modality}", f"val/held/loss/{modality}"):
            assert 0 < lines[-1][name] < 2 * np.log(448), name
        assert lines[-1][f"tokens/{modality}"] > 0
    assert lines[-1]["val/held/loss/music"] < lines[0]["val/held/loss/music"]  # of the weights at the start
    written = list((made / "run/samples").glob("step-*/**/*.json"))
    spans = [json.loads(file.read_text()) for file in written]
    music = [s["ids"] for s in spans if s.get("modality") == "music"]
    assert music
    assert all(0 <= i < 90 for ids in music for i in ids)


def test_ids_of_another_maker_are_not_trained_on(made):
    other = made / "other.yaml"
    other.write_text((made / "tokenizers.yaml").read_text().replace("a melody of the test", "somebody else"))
    with pytest.raises(ValueError, match="music tokenizers differ"):
        build_plans(load_config(config(made, tokenizers=str(other))))
