"""Ids that were made elsewhere: read from .npy without trust, checked, declared in tokenizers.yaml."""

import io
import pickle
import random

import numpy as np
import pytest

from mom_tokenizers.bundle import Tokenizers
from mom_tokenizers.ready import ReadyIds, as_npy, read_npy
from mom_tokenizers.text import TextTokenizer

YAML = "text: {kind: bpe, path: text}\nmusic: {kind: ids, size: 40, made_by: a test}\n"


def saved(array, **options):
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizers")
    TextTokenizer.train(["some words and some more words"] * 9, 280).save(path / "text")
    return path


def load(folder, text):
    (folder / "tokenizers.yaml").write_text(text)
    return Tokenizers.load(folder / "tokenizers.yaml")


@pytest.mark.parametrize("dtype", ["uint8", "<i2", ">u2", "int32", "int64", ">u8"])
def test_what_numpy_saved_is_read_whatever_its_integers(dtype):
    ids = np.random.default_rng(0).integers(0, 100, 50).astype(dtype)
    found = ReadyIds(100, "numpy").encode(saved(ids))
    assert found.dtype == np.uint32
    assert found.tolist() == ids.tolist()
    assert ReadyIds(100, "numpy").encode(saved(ids[:0])).tolist() == []


def test_a_list_becomes_the_same():
    assert np.load(io.BytesIO(as_npy([7, 0, 4_000_000_000]))).tolist() == [7, 0, 4_000_000_000]
    assert np.load(io.BytesIO(as_npy([]))).shape == (0,)
    for wrong in ([1, -1], [1.0], [True], ["1"], [2**40], [[1]], "12", 5, None, {"1": 2}):
        with pytest.raises(ValueError, match="must be a list of whole numbers"):
            as_npy(wrong)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([0, 40]), r"ids run from 0 to 40, but 0 to 39 is all"),
        (np.array([-1, 3]), r"ids run from -1 to 3"),
        (np.array([2**63], np.uint64), r"ids run from 9223372036854775808"),
        (np.array([0.0, 1.0]), r"expected a row of integers, got float64"),
        (np.array([True]), r"got bool"),
        (np.array([[1, 2]]), r"of shape \(1, 2\)"),
        (np.array(3), r"of shape \(\)"),
        (np.array(["a"]), r"got <U1"),
    ],
)
def test_what_is_no_row_of_ids_below_the_size_is_refused(array, message):
    with pytest.raises(ValueError, match=message):
        ReadyIds(40, "a test").encode(saved(array))


def test_nothing_is_unpickled_or_unzipped_and_headers_are_not_believed(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    zipped = io.BytesIO()
    np.savez(zipped, ids=np.arange(3))
    good = saved(np.arange(30))
    huge = good.replace(b"(30,)", b"(9" + b"0" * 12 + b",)")  # a header that promises terabytes
    negative = good.replace(b"(30,)", b"(-1,)")
    for data in (pickle.dumps(Trap()), saved(np.array([Trap()], object), allow_pickle=True), zipped.getvalue(), b"",
                 b"RIFF", good[:-1], good + b"x", good[:20], huge, negative, b"\x93NUMPY"):  # fmt: skip
        with pytest.raises(ValueError, match=r"npy|integers|promises"):
            read_npy(data)
    assert not (tmp_path / "sprung").exists()


def test_damage_is_an_error_or_another_array_and_nothing_else():
    rng, good = random.Random(0), saved(np.arange(30))
    for _ in range(3000):
        data = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            found = read_npy(bytes(data))
        except ValueError:
            continue
        assert found.ndim == 1
        assert found.dtype.kind in "iu"
        assert found.nbytes <= len(data)


def test_one_entry_declares_a_modality(folder):
    tokenizers = load(folder, YAML)
    assert tokenizers.modalities == ("text", "music")
    described = tokenizers.describe()["music"]
    assert (described["kind"], described["size"], described["made_by"]) == ("ids", 40, "a test")
    assert tokenizers.encode("music", as_npy([3, 39])).tolist() == [3, 39]
    results = tokenizers.encode_many("music", [as_npy([1]), as_npy([40]), b"no ids", as_npy([2, 2])])
    assert [isinstance(r, ValueError) for r in results] == [False, True, True, False]
    assert results[3].tolist() == [2, 2]
    with pytest.raises(ValueError, match="made by a test, which is not here"):
        tokenizers.tokenizer("music").decode([1])


def test_another_maker_or_size_is_another_tokenizer(folder):
    prints = {load(folder, YAML.replace(*change)).describe()["music"]["fingerprint"]
              for change in (("x", "x"), ("a test", "b test"), ("40", "41"))}  # fmt: skip
    assert len(prints) == 3
    assert all(len(p) == 16 for p in prints)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("music: {kind: ids, size: 40}", "exactly the keys kind, size and made_by"),
        ("music: {kind: ids, size: 40, made_by: x, path: y}", "exactly the keys kind, size and made_by"),
        ("music: {kind: ids, size: 0, made_by: x}", "'music': size must be a whole number from 1"),
        ("music: {kind: ids, size: many, made_by: x}", "'music': size must be"),
        ("music: {kind: ids, size: 40, made_by: ''}", "'music': made_by must say"),
        ("music: {kind: id, size: 40, made_by: x}", "exactly the keys kind and path"),
        ("music: {kind: midi, path: text}", "unknown kind 'midi'; known: bpe, .*, units, ids"),
    ],
)
def test_mistakes_in_the_entry_are_explained(folder, entry, message):
    with pytest.raises(ValueError, match=message):
        load(folder, "text: {kind: bpe, path: text}\n" + entry)


def test_text_cannot_bring_ids_and_ids_want_their_kind(folder):
    with pytest.raises(ValueError, match="'text' needs a tokenizer of kind bpe"):
        load(folder, "text: {kind: ids, size: 40, made_by: x}")
    (folder / "image").mkdir(exist_ok=True)
    tokenizers = load(folder, "text: {kind: bpe, path: text}\nimage: {kind: vq, path: image}")
    tokenizers._loaded["image"] = tokenizers.tokenizer("text")  # never asked: the bytes say what they are
    with pytest.raises(ValueError, match="but image has a tokenizer of kind vq: declare it as kind ids"):
        tokenizers.encode("image", as_npy([1]))
