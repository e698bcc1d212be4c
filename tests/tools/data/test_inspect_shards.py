"""tools/inspect_shards.py: a page that holds what the dataset holds, whatever its documents say."""

import base64
import io
import json
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest
import soundfile
import webdataset
from PIL import Image

from mom_data.documents.document import read_documents
from mom_data.order.plan import Lane, Plan, Source
from mom_data.shards.dataset import TokenDataset
from mom_data.shards.format import ShardWriter, TokenSegment, write_manifest
from mom_data.shards.tokenize import encode_documents
from mom_tokenizers.bundle import Tokenizers
from mom_tokenizers.errors import UserError
from mom_tokenizers.speech.units import SpeechTokenizer
from mom_tokenizers.text import TextTokenizer
from mom_tools.compare.page import recordings
from mom_tools.data.inspect_shards import page
from tests.helpers import CHECKOUT
from tests.helpers.corpus import MODALITIES, TOKENIZERS, random_document, write_dataset
from tests.helpers.tiny_tokenizers import random_vq

EVIL = '<script>alert("x")</script><img src=http://example.org/x> & "quoted"'
VOID = {"meta", "img"}


class Page(HTMLParser):
    """What a page holds: its tags, its text, and its packed pieces by key and padding. It checks that every tag is
    closed."""

    def __init__(self, html):
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.pieces: Counter[tuple[str, int]] = Counter()
        self.counts: dict[str, int] = {}
        self.attributes, self.text, self.padding = [], [], 0
        self.media: list[tuple[str, str, bytes]] = []  # (tag, name, content) of each picture and recording
        self._open: list[str] = []
        self._counting = None
        self.feed(html)
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags[tag] += 1
        self.attributes += list(values.items())
        if tag not in VOID:
            self._open.append(tag)
        if tag in ("img", "audio"):
            content = base64.b64decode(values["src"].partition("base64,")[2])
            self.media.append((tag, values.get("alt", ""), content))
        if tag == "div" and "data-key" in values:
            self.pieces[values["data-key"], int(values["style"].split(":")[1])] += 1
        if tag == "div" and values.get("class") == "padding":
            self.padding += int(values["style"].split(":")[1])
        self._counting = values.get("data-modality")

    def handle_startendtag(self, tag, attrs):
        self.tags[tag] += 1

    def handle_endtag(self, tag):
        assert self._open.pop() == tag
        self._counting = None

    def handle_data(self, data):
        self.text.append(data)
        if self._counting:
            self.counts[self._counting] = int(data.replace(",", ""))


def plan_of(folder, length=128):
    return Plan((Source(TokenDataset(folder), 1.0),), length, 2, 64, 0)


@pytest.mark.parametrize("latent_width", [0, 8])
def test_every_piece_has_its_bar_and_the_counts_are_the_manifests(tmp_path, latent_width):
    write_dataset(tmp_path / "d", documents=90, latent_width=latent_width)
    plan = plan_of(tmp_path / "d")
    found = Page(page(plan, None, rows=20, documents=9, seed=0))
    lanes = [Lane(plan, 0), Lane(plan, 1)]
    rows = [next(lanes[i % 2]) for i in range(20)]
    wanted = Counter((f"key{p.shard}-{p.document}", p.end - p.start) for row in rows for p in row)
    assert found.pieces == wanted
    assert found.padding == 20 * 128 - sum(size * n for (_, size), n in wanted.items())
    assert found.counts == plan.sources[0].dataset.manifest["tokens"]
    assert found.tags["h3"] == 9
    assert "".join(found.text).count("not decoded: no tokenizer given") > 0


def test_the_page_asks_the_network_for_nothing(tmp_path):
    write_dataset(tmp_path / "d")
    found = Page(page(plan_of(tmp_path / "d"), None, rows=4, documents=6, seed=0))
    assert found.tags["script"] == found.tags["link"] == found.tags["iframe"] == 0
    links = [value for name, value in found.attributes if name in ("src", "href", "srcset", "action")]
    assert all(value.startswith("data:") for value in links)
    assert any(name == "content" and "default-src 'none'" in value for name, value in found.attributes)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    TextTokenizer.train(["some plain words", EVIL] * 20, 300).save(folder / "text")
    random_vq(8).save(folder / "image")
    noise = np.random.default_rng(0).normal(0, 0.1, 16_000).astype(np.float32)
    SpeechTokenizer.train([(noise, 16_000)], 5).save(folder / "speech")
    kinds = {"text": "bpe", "image": "vq", "speech": "units"}
    (folder / "t.yaml").write_text("".join(f"{m}: {{kind: {kind}, path: {m}}}\n" for m, kind in kinds.items()))
    return Tokenizers.load(folder / "t.yaml")


def write_decodable(folder, tokenizers, documents=16):
    """Write documents of a hostile text, with a key that is HTML, a picture, and a recording."""
    folder.mkdir()
    image = tokenizers.tokenizer("image")
    with ShardWriter(folder / "x-00000.tar", tokenizers.modalities) as writer:
        for d in range(documents):
            codes = np.random.default_rng(d).integers(0, image.size, image.codes_per_image).astype(np.uint16)
            text = tokenizers.encode("text", f"{EVIL} {d}").astype(np.uint16)
            units = np.array([d % 5, 1, 2], np.uint16)
            writer.add(f"<b>{d}", [TokenSegment(0, text), TokenSegment(1, codes), TokenSegment(2, units)])
    write_manifest(folder, [writer.record()], tokenizers.describe(), np.uint16, {})


def test_documents_are_decoded_and_their_text_cannot_become_markup(tmp_path, tokenizers):
    write_decodable(tmp_path / "d", tokenizers)
    html = page(plan_of(tmp_path / "d", 512), tokenizers, rows=2, documents=5, seed=0)
    found = Page(html)
    assert found.tags["script"] == 0
    assert found.tags["b"] == 4  # the page's own: the padding and three histograms' names, none of a key
    assert found.tags["audio"] == 5
    assert found.tags["img"] == 5 + 5  # pictures and spectrograms
    assert found.tags["rect"] == 5 * 3  # units
    assert "".join(found.text).count(EVIL) == 5
    assert EVIL not in html
    assert sum(value.startswith("data:image/png") for name, value in found.attributes if name == "src") == 10
    assert [alt for name, alt in found.attributes if name == "alt"].count("from its tokens") == 5


def test_other_tokenizers_than_the_shards_are_refused(tmp_path, tokenizers):
    write_dataset(tmp_path / "d")
    with pytest.raises(ValueError, match=r"text was made with tokenizer text-1, the one given is"):
        page(plan_of(tmp_path / "d"), tokenizers, rows=2, documents=2, seed=0)


def test_a_damaged_document_is_named_not_fatal(tmp_path):
    write_dataset(tmp_path / "d", documents=6, shards=1, make=lambda rng, _: random_document(rng))
    path = tmp_path / "d/part-00000.tar"
    content = bytearray(path.read_bytes())
    content[int(TokenDataset(tmp_path / "d").index(0).token_offset[3])] ^= 1
    path.write_bytes(content)
    text = "".join(Page(page(plan_of(tmp_path / "d"), None, rows=2, documents=6, seed=0)).text)
    assert text.count("Damaged: its bytes do not match") == 1


SECONDS = 0.4


def write_raw(file, documents=4, words="some plain words"):
    """Raw documents of a text, a picture of 12 x 8 pixels, and a recording of 0.4 s in 16 kHz."""
    rng = np.random.default_rng(1)
    file.parent.mkdir(exist_ok=True)
    with webdataset.TarWriter(str(file), mtime=0) as tar:
        for d in range(documents):
            picture, recording = io.BytesIO(), io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (8, 12, 3), np.uint8)).save(picture, "PNG")
            soundfile.write(recording, rng.normal(0, 0.1, round(SECONDS * 16_000)), 16_000, "PCM_16", format="WAV")
            said = [{"type": "text", "text": f"{words} {d}"}, {"type": "image", "part": "png"},
                    {"type": "speech", "part": "wav"}]  # fmt: skip
            tar.write({"__key__": f"key{d}", "json": json.dumps({"segments": said}).encode(),
                       "png": picture.getvalue(), "wav": recording.getvalue()})  # fmt: skip
    return file


@pytest.fixture(scope="module")
def tokenized(tmp_path_factory, tokenizers):
    """A raw file, and a dataset made from it."""
    folder = tmp_path_factory.mktemp("tokenized")
    documents = list(read_documents(write_raw(folder / "raw/a.tar")))
    (folder / "d").mkdir()
    with ShardWriter(folder / "d/a-00000.tar", tokenizers.modalities) as writer:
        for document, encoded in zip(documents, encode_documents(documents, tokenizers), strict=True):
            writer.add(document.key, encoded.segments)
    write_manifest(folder / "d", [writer.record()], tokenizers.describe(), np.uint16, {})
    return folder


def inspected(folder, tokenizers, *raw):
    return Page(page(plan_of(folder / "d", 512), tokenizers, rows=1, documents=4, seed=0, raw=[str(r) for r in raw]))


def test_what_the_tokens_bring_back_stands_beside_what_they_were_made_from(tokenized, tokenizers, capsys):
    found = inspected(tokenized, tokenizers, tokenized / "raw")
    assert "4 beside their original" in capsys.readouterr().out
    assert "".join(found.text).count("the same as the original") == 4
    raw = {d.key: [s.data for s in d.segments] for d in read_documents(tokenized / "raw/a.tar")}
    pictures = [(name, np.asarray(Image.open(io.BytesIO(c)), np.float64)) for tag, name, c in found.media
                if tag == "img" and "spectrogram" not in name]  # fmt: skip
    assert [name for name, _ in pictures] == ["original", "from its tokens"] * 4
    scores = [float(x) for x in re.findall(r"PSNR ([\d.]+) dB", "".join(found.text))]
    for i, score in enumerate(scores):
        before, after = pictures[2 * i][1], pictures[2 * i + 1][1]
        assert score == pytest.approx(10 * np.log10(255**2 / np.mean((before - after) ** 2)), abs=0.06)
        # the middle square of the picture of 12 x 8, which the tokenizer reads
        photo = np.asarray(Image.open(io.BytesIO(raw[f"key{i}"][1])))
        assert np.abs(before - photo[:, 2:10]).max() <= 1
    assert len(scores) == 4
    sounds = [soundfile.read(io.BytesIO(c)) for tag, _, c in found.media if tag == "audio"]
    assert len(sounds) == 8
    for i in range(4):
        (before, rate), (after, _) = sounds[2 * i : 2 * i + 2]
        spoken, _ = soundfile.read(io.BytesIO(raw[f"key{i}"][2]))
        assert rate == 16_000
        np.testing.assert_allclose(before, spoken, atol=2**-14)
        units = TokenDataset(tokenized / "d").read(0, i)[2].values
        assert len(after) == len(tokenizers.tokenizer("speech").decode(units)[0])
        assert not np.allclose(after[: len(before)], before[: len(after)], atol=0.01)


def test_a_spectrogram_shows_a_tone_at_its_frequency_and_in_its_time():
    rate, seconds, hz = 16_000, 2.0, 3000
    times = np.arange(round(seconds * rate)) / rate
    tone = 0.5 * np.sin(2 * np.pi * hz * times) * (times > seconds / 2)
    [clip, short] = recordings([(tone, rate), (tone[rate:], rate)])
    image = Image.open(io.BytesIO(base64.b64decode(clip["spectrogram"].partition(",")[2])))
    seen = np.asarray(image.convert("L"), np.float64)
    brightest = np.unravel_index(seen.argmax(), seen.shape)
    assert (seen.shape[0] - 1 - brightest[0]) / (seen.shape[0] - 1) * 8000 == pytest.approx(hz, abs=100)
    half = seen.shape[1] // 2
    assert seen[:, : half - 20].max() < 20 < 150 < seen[:, half + 20 :].max()
    assert (clip["share"], short["share"]) == (100, 50)


def test_originals_that_are_not_there_are_counted_and_named(tokenized, tokenizers, tmp_path, capsys):
    inspected(tokenized, tokenizers, write_raw(tmp_path / "some/a.tar", 3))
    assert "3 beside their original, 1 not in the raw files (key3)" in capsys.readouterr().out
    # another document of one key: its words are others
    found = inspected(tokenized, tokenizers, tmp_path / "some/a.tar", write_raw(tmp_path / "b.tar", 4, "other words"))
    said = capsys.readouterr().out
    assert "1 otherwise in the raw files (key3: its text has other ids)" in said
    assert "3 beside their original" in said
    assert "Its original is not in the raw files." in "".join(found.text)
    with pytest.raises(UserError, match=r"none of the 4 documents chosen has its original there"):
        inspected(tokenized, tokenizers, tmp_path / "b.tar")
    with pytest.raises(UserError, match="no input matches"):
        inspected(tokenized, tokenizers, tmp_path / "none")


def test_what_cannot_be_decoded_is_named_with_the_reason(tokenized):
    found = inspected(tokenized, None, tokenized / "raw")
    for modality in ("text", "image", "speech"):
        assert f"{modality}: 4 of 4 segments here are not decoded: no tokenizer given." in "".join(found.text)
    assert [tag for tag, *_ in found.media].count("audio") == 4  # the originals


def test_the_command_writes_the_page_and_says_what_is_wrong(tmp_path):
    write_dataset(tmp_path / "d")
    tool = [sys.executable, str(CHECKOUT / "tools/inspect_shards.py")]
    done = subprocess.run([*tool, tmp_path / "d", "--output", tmp_path / "p.html", "--length", "96", "--lanes", "2"],
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert Page((tmp_path / "p.html").read_text()).counts.keys() == set(MODALITIES) == TOKENIZERS.keys()
    done = subprocess.run([*tool, "--output", tmp_path / "q.html"], capture_output=True, text=True)
    assert (done.returncode, "give a DATASET folder" in done.stderr) == (2, True)
