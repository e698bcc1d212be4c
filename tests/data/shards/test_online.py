"""Raw documents read as a token dataset, against the shards that tools/tokenize_shards.py writes of them."""

import io
import json
import pickle
import random
import subprocess
import sys
import threading
from dataclasses import fields
from itertools import islice

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from mom_data.batches.loader import Share, batches
from mom_data.documents.document import Document, Limits, read_documents
from mom_data.order.plan import Plan, Source
from mom_data.shards.dataset import TokenDataset, check_agreement
from mom_data.shards.online import OnlineDataset
from mom_tokenizers.bundle import Tokenizers
from mom_tokenizers.text import TextTokenizer
from mom_tokenizers.vocab import VocabLayout
from tests.helpers import CHECKOUT
from tests.helpers.ranks import program
from tests.helpers.tiny_tokenizers import random_patches

TOOL = CHECKOUT / "tools/tokenize_shards.py"
PART = 100_000


def png(rng):
    file = io.BytesIO()
    pixels = np.frombuffer(rng.randbytes(20 * 20 * 3), np.uint8).reshape(20, 20, 3)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def sentence(rng):
    return " ".join(rng.choice(("one", "two", "three", "four")) for _ in range(rng.randrange(1, 60)))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Raw shards of text and pictures, and two sets of tokenizers: for both, and for text alone."""

    folder, rng = tmp_path_factory.mktemp("made"), random.Random(0)
    TextTokenizer.train((sentence(rng) for _ in range(50)), 300).save(folder / "text")
    random_patches(8).save(folder / "image")
    (folder / "both.yaml").write_text("text: {kind: bpe, path: text}\nimage: {kind: patches, path: image}\n")
    (folder / "words.yaml").write_text("text: {kind: bpe, path: text}\n")
    (folder / "raw").mkdir()
    with webdataset.TarWriter(str(folder / "raw/pictures.tar"), mtime=0) as tar:
        for i in range(80):
            tar.write({"__key__": f"{i:03d}", "png": png(rng), "txt": sentence(rng)})
    lines = [json.dumps({"text": sentence(rng)}) for _ in range(200)]
    (folder / "raw/words.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def offline(made):
    tool = [TOOL, "--config", made / "both.yaml", "--input", made / "raw", "--output", made / "tokens"]
    program(*tool, "--workers", 1, "--part-mib", PART / 2**20).check_returncode()
    return TokenDataset(made / "tokens")


@pytest.fixture(scope="module")
def online(made):
    return OnlineDataset([str(made / "raw")], made / "both.yaml", made / "cache", part_bytes=PART)


def test_batches_are_those_of_shards_made_beforehand_bit_for_bit(offline, online):
    assert [(s["name"], s["documents"]) for s in online.shards] == [(s["name"], s["documents"]) for s in offline.shards]
    assert len(online.shards) > 2
    vocab = VocabLayout({"text": 300, "image": 16})

    def made_of(dataset, workers):
        plan = Plan((Source(dataset, 1.0),), length=128, lanes=4, window=64, seed=5)
        return list(islice(batches(plan, vocab, Share(0, 1, 8, 4), workers=workers), 20))

    # the order is drawn from the fingerprint, and theirs differ: one knows the raw files, one the shards
    again = pickle.loads(pickle.dumps(online))
    again.fingerprint = offline.fingerprint
    expected = made_of(offline, 0)
    for workers in (0, 2):
        for a, b in zip(expected, made_of(again, workers), strict=True):
            for field in fields(a):
                x, y = getattr(a, field.name), getattr(b, field.name)
                assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
    assert sum(int(b.real_tokens[1]) for b in expected) > 0


def test_the_files_are_byte_for_byte_those_of_the_tool(made, offline, online):
    for k, shard in enumerate(online.shards):
        online.index(k)
        for name in (shard["name"], shard["name"].replace(".tar", ".idx")):
            (made_online,) = (made / "cache").glob(f"tokens-*/{name}")
            assert made_online.read_bytes() == (made / "tokens" / name).read_bytes()


def test_nothing_is_made_until_it_is_asked_for_and_prefetch_does_not_wait(made, tmp_path):
    dataset = OnlineDataset([str(made / "raw/words.jsonl")], made / "words.yaml", tmp_path, part_bytes=10_000)
    assert len(dataset.shards) > 2
    assert not list(tmp_path.rglob("*.tar"))
    dataset.prefetch(1)
    assert not list(tmp_path.rglob("*.tar"))  # a process needs longer to start
    assert dataset.read(1, 0) is not None
    dataset.index(1)
    assert [p.name for p in tmp_path.rglob("*.tar")] == ["words-p00001-00000.tar"]


def test_processes_of_a_node_make_a_shard_once(made, tmp_path):
    (tmp_path / "count.py").write_text(
        "import sys; from pathlib import Path; from mom_data.shards.online import OnlineDataset\n"
        "d = OnlineDataset([sys.argv[1]], Path(sys.argv[2]), Path(sys.argv[3]))\n"
        "print(d.read(0, 3)[0].values.tolist())\n"
    )
    arguments = [str(made / "raw/words.jsonl"), str(made / "words.yaml"), str(tmp_path / "cache")]
    command = [sys.executable, str(tmp_path / "count.py"), *arguments]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    written = set()
    done = threading.Event()

    def watch():
        while not done.wait(0.002):
            for path in tmp_path.glob("cache/tokens-*/*.tar"):
                written.add((path.stat().st_ino, path.stat().st_mtime_ns))

    watcher = threading.Thread(target=watch)
    watcher.start()
    said = {p.communicate()[0] for p in processes}
    done.set()
    watcher.join()
    text = list(read_documents(made / "raw/words.jsonl"))[3].segments[0].data
    expected = Tokenizers.load(made / "words.yaml").encode("text", text).tolist()
    assert said == {f"{expected}\n"}
    assert len(written) == 1


def test_documents_that_are_left_out_keep_their_place_are_masked_and_counted_by_reason(made, tmp_path):
    good = list(islice(read_documents(made / "raw/words.jsonl"), 40))
    lines = [json.dumps({"text": d.segments[0].data}) for d in good if isinstance(d, Document)]
    lines[7], lines[8], lines[30] = "no json", json.dumps({"text": ""}), json.dumps({"text": "x" * 5000})
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    limits = Limits(characters=4999)
    dataset = OnlineDataset([str(tmp_path / "t.jsonl")], made / "words.yaml", tmp_path / "cache", limits=limits)
    assert [(s["key"], s["reason"].split(":")[0]) for s in dataset.skipped(0)] == [
        ("t.jsonl:8", "cannot be read"), ("t.jsonl:9", "empty"), ("t.jsonl:31", "above the limits"),
    ]  # fmt: skip
    text = Tokenizers.load(made / "words.yaml").tokenizer("text")
    for number, document in enumerate(good):
        segments = dataset.read(0, number)
        assert (segments is None) == (number in (7, 8, 30))
        if segments is not None:
            assert text.decode(segments[0].values) == document.segments[0].data
    plan = Plan((Source(dataset, 1.0),), length=64, lanes=1, window=500, seed=5)
    unreadable, left_out = set(), set()
    for batch in islice(batches(plan, VocabLayout({"text": 300}), Share(0, 1, 4, 4)), 30):
        assert not batch.damaged
        unreadable |= {name.rpartition("#")[2].partition(":")[0] for name in batch.unreadable}
        left_out |= {name.rpartition("#")[2] for name in batch.left_out}
    assert unreadable == {"7"}
    assert left_out == {"8: empty", "30: above the limits: 5000 characters"}


def test_a_split_counts_its_own_documents(made, tmp_path):
    both = [
        OnlineDataset([str(made / "raw/words.jsonl")], made / "words.yaml", tmp_path, split=side, holdout=0.3)
        for side in ("train", "val")
    ]
    assert sum(d.manifest["documents"] for d in both) == 200
    assert both[0].fingerprint != both[1].fingerprint
    for dataset in both:
        assert len(dataset.index(0).crc32) == dataset.manifest["documents"]


def test_a_file_that_changes_or_is_damaged_is_one_clear_message(made, tmp_path):
    raw = tmp_path / "t.tar"
    content = (made / "raw/pictures.tar").read_bytes()
    raw.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"t\.tar: (truncated|not a readable tar|damaged)"):
        OnlineDataset([str(raw)], made / "both.yaml", tmp_path / "cache")
    raw.write_bytes(content)
    dataset = OnlineDataset([str(raw)], made / "both.yaml", tmp_path / "cache")
    raw.write_bytes(content[: len(content) // 2])
    with pytest.raises(
        ValueError, match=r"t\.tar could not be tokenized: .*t\.tar: (truncated|not a readable|damaged)"
    ):
        dataset.index(0)


def test_a_bug_in_the_process_that_tokenizes_keeps_its_traceback_and_is_no_users_mistake(made, tmp_path, monkeypatch):
    dataset = OnlineDataset([str(made / "raw/words.jsonl")], made / "words.yaml", tmp_path / "cache")
    (tmp_path / "sitecustomize.py").write_text(
        "import json, sys\nif '-m' in sys.orig_argv:\n    import pickle\n    pickle.loads = lambda _: 1 / 0\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"(?s)words.jsonl could not be tokenized:.*Traceback.*ZeroDivisionError"):
        dataset.index(0)


def test_a_modality_without_a_tokenizer_is_refused_before_anything_is_tokenized(made, tmp_path):
    with pytest.raises(ValueError, match=r"hold image .*--drop-modalities image.*'image' to the recipe"):
        OnlineDataset([str(made / "raw")], made / "words.yaml", tmp_path)
    dropped = OnlineDataset([str(made / "raw")], made / "words.yaml", tmp_path, drop=("image",))
    assert not list(tmp_path.rglob("*.tar"))
    assert dropped.manifest["documents"] == 280


def test_the_vocabulary_is_checked_though_the_counts_are_unknown(online):
    check_agreement([online], {"text": 300, "image": 16})
    with pytest.raises(ValueError, match="image"):
        check_agreement([online], {"text": 300})
