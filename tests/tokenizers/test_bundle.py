import io
import shutil
import subprocess
import sys

import numpy as np
import pytest
import soundfile
from PIL import Image

from mom_tokenizers.bundle import Tokenizers
from mom_tokenizers.speech.units import SpeechTokenizer
from mom_tokenizers.text import TextTokenizer
from tests.helpers.tiny_tokenizers import random_vq

YAML = """
speech: {kind: units, path: sounds}
text: {kind: bpe, path: words}
image: {kind: vq, path: pictures}
"""
WAVEFORM = np.random.default_rng(0).normal(0, 0.1, 16_000).astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizers")
    TextTokenizer.train(["some words and some more words"] * 9, 280).save(path / "words")
    random_vq(8).save(path / "pictures")
    SpeechTokenizer.train([(WAVEFORM, 16_000)], 5).save(path / "sounds")
    (path / "tokenizers.yaml").write_text(YAML)
    return path


def png(seed):
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def flac():
    file = io.BytesIO()
    soundfile.write(file, WAVEFORM, 16_000, format="FLAC")
    return file.getvalue()


def test_text_comes_first_and_each_modality_is_described_as_loaded(folder):
    tokenizers = Tokenizers.load(folder / "tokenizers.yaml")
    described = tokenizers.describe()
    assert list(described) == list(tokenizers.by_modality) == ["text", "speech", "image"]
    for modality, tokenizer in tokenizers.by_modality.items():
        assert described[modality] == {
            "kind": tokenizer.kind,
            "fingerprint": tokenizer.fingerprint(),
            "size": tokenizer.size,
            **({"units_per_second": 25} if modality == "speech" else {}),
        }
        assert len(described[modality]["fingerprint"]) == 16


def test_fingerprint_survives_a_move_and_notices_a_changed_weight(folder, tmp_path):
    copy = tmp_path / "elsewhere"
    shutil.copytree(folder, copy)
    before = Tokenizers.load(folder / "tokenizers.yaml").describe()
    assert Tokenizers.load(copy / "tokenizers.yaml").describe() == before
    for changed in [next((copy / "pictures").glob("*.safetensors")), copy / "sounds" / "centroids.safetensors"]:
        content = bytearray(changed.read_bytes())
        content[-1] ^= 1
        changed.write_bytes(content)
    after = Tokenizers.load(copy / "tokenizers.yaml").describe()
    assert after["text"] == before["text"]
    assert all(after[m]["fingerprint"] != before[m]["fingerprint"] for m in ("image", "speech"))


def test_encode_takes_text_and_encoded_bytes(folder):
    tokenizers = Tokenizers.load(folder / "tokenizers.yaml")
    assert tokenizers.tokenizer("text").decode(tokenizers.encode("text", "more words")) == "more words"
    assert tokenizers.encode("image", png(0)).shape == (64,)
    assert tokenizers.encode("speech", flac()).shape == (25,)
    assert tokenizers.encode("speech", flac()).dtype == np.uint32


@pytest.mark.parametrize("modality", ["text", "image", "speech"])
def test_a_bad_item_does_not_spoil_the_others(folder, modality):
    tokenizers = Tokenizers.load(folder / "tokenizers.yaml")
    good = {"text": ["some", "words"], "image": [png(1), png(2)], "speech": [flac(), flac()]}[modality]
    bad = {"text": b"bytes", "image": b"no picture", "speech": flac()[:900]}[modality]
    # more than one batch, the bad ones at its edges
    items = [bad, *good * 20, bad, *good, bad]
    results = tokenizers.encode_many(modality, items)
    assert len(results) == len(items)
    for item, result in zip(items, results, strict=True):
        if item is bad:
            assert isinstance(result, ValueError)
        else:
            np.testing.assert_array_equal(result, tokenizers.encode(modality, item))


def test_text_alone_imports_neither_torch_nor_diffusers(folder):
    code = (
        "import sys; from mom_tokenizers.bundle import Tokenizers; t = Tokenizers.load(sys.argv[1]); t.describe(); "
        "t.encode('text', 'words'); print([m for m in ('torch', 'diffusers', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder / "tokenizers.yaml")], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        (
            "text: {kind: wordpiece, path: words}",
            "unknown kind 'wordpiece'; known: bpe, vq, patches, vidtok, emu3, janus, kl, units",
        ),
        ("text: {kind: bpe, path: words, size: 3}", "exactly the keys kind and path"),
        ("text: {kind: bpe, path: nowhere}", "nowhere, which does not exist"),
        ("image: {kind: vq, path: pictures}", "expected 'text"),
        ("[text", "not YAML"),
        ("text: {kind: [bpe], path: words}", "unknown kind"),
        ("text: {kind: bpe, path: a}\ntext: {kind: bpe, path: b}", "found the key 'text' twice"),
        ("text: words", "exactly the keys"),
    ],
)
def test_mistakes_in_the_file_are_explained(folder, yaml, message):
    file = folder / "wrong.yaml"
    file.write_text(yaml)
    with pytest.raises(ValueError, match=message):
        Tokenizers.load(file)


def test_missing_parts_are_named(folder, tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        Tokenizers.load(tmp_path / "tokenizers.yaml")
    (tmp_path / "image").mkdir()
    shutil.copytree(folder / "words", tmp_path / "text")
    (tmp_path / "tokenizers.yaml").write_text("text: {kind: bpe, path: text}\nimage: {kind: vq, path: image}\n")
    tokenizers = Tokenizers.load(tmp_path / "tokenizers.yaml")
    with pytest.raises(ValueError, match=r"no config\.json there"):
        tokenizers.describe()
    with pytest.raises(ValueError, match=r"'speech'; there is one for text, image"):
        tokenizers.encode("speech", b"")
