import hashlib
import json

import numpy as np
import pytest
import safetensors.numpy
import webdataset

from mom_data.batches.batch import IGNORE, build_batch
from mom_data.order.plan import Piece, Source
from mom_data.shards import format as shards
from mom_data.shards.dataset import TokenDataset, check_agreement
from mom_data.shards.format import ShardWriter, TokenSegment
from mom_tokenizers.errors import UserError
from tests.helpers.corpus import MODALITIES, TOKENIZERS, VOCAB, random_document, write_dataset


def same(a, b):
    return len(a) == len(b) and all(
        x.modality == y.modality and x.latent == y.latent and np.array_equal(x.values, y.values)
        for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("latent_width", [0, 8])
@pytest.mark.parametrize("block_bytes", [200, 1 << 20])
def test_documents_read_by_offset_are_those_written(tmp_path, monkeypatch, latent_width, block_bytes):
    monkeypatch.setattr(shards, "BLOCK_BYTES", block_bytes)
    truth = write_dataset(tmp_path / "d", latent_width=latent_width)
    dataset = TokenDataset(tmp_path / "d")
    assert all(same(dataset.read(k, d), truth[k, d]) for k, d in truth)
    index_bytes = sum(f.stat().st_size for f in (tmp_path / "d").glob("*.idx"))
    assert index_bytes / len(truth) < 40 + 500 * 3 / len(truth)  # the header is paid once per shard
    lengths = dataset.manifest["tokens"]
    assert lengths["speech"] == sum(len(s.values) for doc in truth.values() for s in doc if s.modality == 2)


def test_stock_webdataset_and_safetensors_read_the_shards(tmp_path):
    truth = write_dataset(tmp_path / "d")
    seen = 0
    for k in range(3):
        for sample in webdataset.WebDataset(str(tmp_path / f"d/part-{k:05d}.tar"), shardshuffle=False):
            block = safetensors.numpy.load(sample["safetensors"])
            for d in range(len(block["docs"]) - 1):
                table = block["segments"][block["docs"][d] : block["docs"][d + 1]]
                for (modality, count, offset, _), segment in zip(table, truth[k, d], strict=True):
                    assert modality == segment.modality
                    assert np.array_equal(block["tokens"][offset : offset + count], segment.values)
                seen += 1
    assert seen == len(truth)


def test_the_same_documents_give_the_same_bytes(tmp_path):
    for name in "ab":
        write_dataset(tmp_path / name)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_values_of_latents_that_were_clipped_are_counted_in_the_manifest(tmp_path):
    pictures = iter([np.array([[65504, -65504, 65472, 0]]), np.array([[1, 65504, -65472, 0]])])

    def make(rng, latent_width):
        return [TokenSegment(1, next(pictures).astype(np.float16))]

    write_dataset(tmp_path / "clipped", documents=2, shards=1, latent_width=4, make=make)
    [record] = json.loads((tmp_path / "clipped/manifest.json").read_text())["shards"]
    assert record["latents_at_limit"] == 3
    assert TokenDataset(tmp_path / "clipped").manifest["latent_width"] == 4
    write_dataset(tmp_path / "plain", latent_width=4)
    assert "latents_at_limit" not in (tmp_path / "plain/manifest.json").read_text()


def test_a_writer_that_fails_leaves_no_shard(tmp_path):
    def fail():
        with ShardWriter(tmp_path / "x.tar", MODALITIES) as writer:
            writer.add("k", random_document(np.random.default_rng(0)))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert not list(tmp_path.iterdir())


def test_one_flipped_byte_damages_one_document(tmp_path):
    truth = write_dataset(tmp_path / "d")
    path = tmp_path / "d/part-00001.tar"
    at = int(TokenDataset(tmp_path / "d").index(1).token_offset[5]) + 1
    content = bytearray(path.read_bytes())
    content[at] ^= 0x10
    path.write_bytes(content)
    dataset = TokenDataset(tmp_path / "d")
    assert [key for key in truth if dataset.read(*key) is None] == [(1, 5)]


def test_a_document_with_an_id_that_its_tokenizer_has_not_is_masked_and_named(tmp_path, caplog):
    """Never another modality's id: text id 100 of 100 would be a special token, image id 32 of 32 a speech unit."""
    at = {(0, 3): (0, 100), (1, 0): (1, 32), (1, 7): (2, 65535), (2, 19): (0, 99)}  # the last one is right
    made = iter((k, d) for k in range(3) for d in range(20))

    def make(rng, latent_width):
        segments = random_document(rng, latent_width)
        modality, largest = at.get(next(made), (0, 0))
        return [*segments, TokenSegment(modality, np.array([0, largest, 1], np.uint16)), *segments]

    truth = write_dataset(tmp_path / "d", make=make, latent_width=8)
    dataset = TokenDataset(tmp_path / "d")
    assert [key for key in truth if dataset.values(*key, _stored(truth[key]), (0, 1), (0, 0)) is None] == list(at)[:3]
    assert [key for key in truth if dataset.read(*key) is None] == list(at)[:3]
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2, "one line a shard"
    assert "part-00000.tar, document 3 has text id 100, but its tokenizer has 100 ids" in said[0]
    assert "part-00001.tar, document 0 has image id 32, but its tokenizer has 32 ids" in said[1]

    source = Source(dataset, 1.0)
    whole = {key: sum(len(s.values) + 2 * (s.modality > 0) for s in segments) + 2 for key, segments in truth.items()}
    rows = [[Piece(0, *key, 0, whole[key]), Piece(0, 2, 1, 0, whole[2, 1])] for key in at]
    batch = build_batch(rows, [source], VOCAB, max(whole.values()) * 2, range(4))
    assert [name.rpartition("/")[2] for name in batch.damaged] == [f"part-{k:05d}.tar#{d}" for k, d in list(at)[:3]]
    for row, key in enumerate(list(at)[:3]):
        assert (batch.labels[row, : whole[key]] == IGNORE).all()
        assert (batch.tokens[row, : whole[key]] == VOCAB.specials["pad"]).all()
    assert (batch.labels[3, : whole[2, 19]] != IGNORE).any()


def _stored(segments):
    latents = sum(len(s.values) for s in segments if s.latent)
    return sum(len(s.values) for s in segments) - latents, latents


def test_everything_missing_or_short_is_listed_at_once(tmp_path):
    write_dataset(tmp_path / "d")
    (tmp_path / "d/part-00000.idx").unlink()
    (tmp_path / "d/part-00001.tar").unlink()
    with open(tmp_path / "d/part-00002.tar", "r+b") as file:
        file.truncate(1000)
    with pytest.raises(ValueError, match=r"00000.idx is missing.*00001.tar is missing.*00002.tar has 1000 bytes"):
        TokenDataset(tmp_path / "d")
    with pytest.raises(ValueError, match=r"no manifest.json"):
        TokenDataset(tmp_path)


def test_files_that_vanish_or_may_not_be_read_are_named_with_what_to_do(tmp_path, monkeypatch, caplog):
    write_dataset(tmp_path / "d")
    dataset = TokenDataset(tmp_path / "d")
    (tmp_path / "d/part-00000.idx").unlink()
    with pytest.raises(UserError, match=r"part-00000.idx: it was there .*now cannot be read: .*--rebuild-index"):
        dataset.index(0)
    (tmp_path / "d/part-00001.tar").unlink()
    assert dataset.read(1, 0) is None
    assert "part-00001.tar cannot be had" in caplog.text
    assert "Bring it back: past data.max_bad_fraction" in caplog.text
    # root may read everything, so permissions themselves show nothing here
    write_dataset(tmp_path / "e")
    monkeypatch.setattr("os.access", lambda path, mode: not str(path).endswith("00002.tar"))
    with pytest.raises(UserError, match=r"no permission to read it: '.*part-00002.tar'"):
        TokenDataset(tmp_path / "e")


def test_a_damaged_index_is_an_error_not_wrong_data(tmp_path):
    write_dataset(tmp_path / "d")
    index = tmp_path / "d/part-00000.idx"
    index.write_bytes(index.read_bytes()[:-1] + b"\x05")
    with pytest.raises(ValueError, match=r"00000.idx.*checksum"):
        TokenDataset(tmp_path / "d").index(0)


def test_tokenizers_that_differ_are_named_on_both_sides(tmp_path):
    write_dataset(tmp_path / "a")
    other = {**TOKENIZERS, "image": {**TOKENIZERS["image"], "fingerprint": "image-2"}}
    write_dataset(tmp_path / "b", tokenizers=other)
    a, b = TokenDataset(tmp_path / "a"), TokenDataset(tmp_path / "b")
    vocabulary = dict(VOCAB.sizes)
    check_agreement([a], vocabulary, TOKENIZERS)
    with pytest.raises(ValueError, match=r"image tokenizers differ: .*b was made with image-2, .*a has image-1"):
        check_agreement([a, b], vocabulary)
    with pytest.raises(ValueError, match=r"image-1, the run's tokenizers has image-2"):
        check_agreement([a], vocabulary, other)
    wide = {**other, "image": {**other["image"], "patch_width": 64}}
    with pytest.raises(ValueError, match=r"image-1, the run's tokenizers has image-2 \(patches of 64 values\)"):
        check_agreement([a], vocabulary, wide)
    with pytest.raises(ValueError, match=r"20 ids, but the config has vocabulary.speech=19"):
        check_agreement([a], {**vocabulary, "speech": 19})
    with pytest.raises(ValueError, match="'speech', which the config's vocabulary"):
        check_agreement([a], {"text": 100, "image": 32})


def test_the_manifest_holds_checksums_of_the_files(tmp_path):
    write_dataset(tmp_path / "d")
    for shard in json.loads((tmp_path / "d/manifest.json").read_text())["shards"]:
        assert hashlib.sha256((tmp_path / "d" / shard["name"]).read_bytes()).hexdigest() == shard["sha256"]


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
@pytest.mark.parametrize("ids", [[0, 300], [-1, 5], [1 << 16, 2], [(1 << 32) - 1]])
def test_an_id_that_its_tokenizer_cannot_have_never_enters_a_shard(tmp_path, dtype, ids):
    sizes = {"text": 300, "image": 16}
    with ShardWriter(tmp_path / "x.tar", list(sizes), dtype, sizes) as writer:
        writer.add("good", [TokenSegment(0, np.array([299], np.uint32)), TokenSegment(1, np.array([15], np.uint16))])
        for modality, values in ((0, ids), (1, [16])):
            with pytest.raises(ValueError, match=r"but its tokenizer has (300|16)"):
                writer.add("bad", [TokenSegment(0, np.array([1])), TokenSegment(modality, np.array(values))])
        writer.add("good too", [TokenSegment(0, np.array([7], np.uint32))])
    assert writer.record()["documents"] == 2
    assert writer.record()["tokens"] == {"text": 2, "image": 1}
    if dtype is np.uint16:  # and without sizes no id becomes another one for want of bits
        with ShardWriter(tmp_path / "y.tar", ["text"], dtype) as writer, pytest.raises(ValueError, match="65536"):
            writer.add("wraps", [TokenSegment(0, np.array([1 << 16]))])
