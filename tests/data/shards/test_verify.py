"""mom_data.shards.verify and tools/verify_shards.py: whatever happens to a dataset's files is found and named."""

import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from mom_data.shards import format as shards
from mom_data.shards.dataset import TokenDataset
from mom_data.shards.manifest import Manifest
from mom_data.shards.verify import document_keys, read_manifest, rebuild_index, verify_shard
from tests.helpers import CHECKOUT
from tests.helpers.corpus import TOKENIZERS, write_dataset


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A dataset of two shards with several blocks each, and with latents."""
    folder = tmp_path_factory.mktemp("verify") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "BLOCK_BYTES", 3000)
        write_dataset(folder, documents=60, shards=2, latent_width=8)
    return folder


@pytest.fixture
def copy(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def problems_of(folder):
    manifest, problems = read_manifest(folder)
    if manifest is not None:
        for record in manifest.shards:
            problems += verify_shard(folder, record, manifest).problems
    return problems


def tool(*arguments):
    command = [sys.executable, str(CHECKOUT / "tools/verify_shards.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def members(path):
    """(header, content, end of content) of each member, by the standard library."""
    with tarfile.open(path) as tar:
        return [(m.offset, m.offset_data, m.offset_data + m.size) for m in tar]


def keys_by_webdataset(path):
    """The keys of the documents that webdataset, a stock reader, delivers."""
    keys = []
    for sample in webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False):
        length = int.from_bytes(sample["safetensors"][:8], "little")
        metadata = json.loads(sample["safetensors"][8 : 8 + length])["__metadata__"]
        keys += json.loads(metadata[shards.SCHEMA])["keys"]
    return keys


def edit(path, change):
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(content)


def test_a_whole_dataset_has_no_problem_and_its_counts(whole):
    assert problems_of(whole) == []
    done = tool(whole, "--json", "--workers", 2)
    assert done.returncode == 0, done.stderr
    found, manifest = json.loads(done.stdout), json.loads((whole / "manifest.json").read_text())
    assert found["whole"]
    assert found["tokens"] == manifest["tokens"]
    assert found["documents"] == manifest["documents"] == 60
    on_disk = sum(f.stat().st_size for f in whole.glob("*.idx"))
    assert found["index_bytes_per_document"] == round(on_disk / 60, 2)
    assert document_keys(whole / "part-00001.tar") == [f"key1-{d}" for d in range(30)]


@given(st.data())
@settings(max_examples=120, deadline=None)
def test_one_changed_byte_anywhere_is_found_and_its_file_named(whole, data):
    files = sorted(f.name for f in whole.iterdir())
    path = whole / data.draw(st.sampled_from(files), label="file")
    good = path.read_bytes()
    at = data.draw(st.integers(0, len(good) - 1), label="byte")
    flip = data.draw(st.integers(1, 255), label="bits")
    try:
        edit(path, lambda content: content.__setitem__(at, content[at] ^ flip))
        named = {p.file for p in problems_of(whole)}
        assert named & ({"manifest.json"} if path.name.startswith("manifest") else {path.name})
    finally:
        path.write_bytes(good)


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_a_cut_anywhere_is_found(whole, data):
    path = whole / data.draw(st.sampled_from(["part-00000.tar", "part-00001.idx", "manifest.json"]))
    good = path.read_bytes()
    keep = data.draw(st.integers(0, len(good) - 1))
    try:
        path.write_bytes(good[:keep])
        assert path.name in {p.file for p in problems_of(whole)}
    finally:
        path.write_bytes(good)


@pytest.mark.parametrize("damage", ["flipped", "zeroed"])
def test_a_damaged_header_drops_data_silently_from_stock_readers_and_is_named_here(copy, damage):
    """The reason for index and manifest: webdataset, which raises by default, loses half a shard and says nothing."""
    path = copy / "part-00000.tar"
    headers = [header for header, _, _ in members(path)]
    all_keys = keys_by_webdataset(path)
    victim = len(headers) // 2
    kept = sum(len(json.loads(_metadata(path, m))["keys"]) for m in members(path)[:victim])
    at = headers[victim]
    flipped = {"flipped": lambda c: c.__setitem__(at + 3, c[at + 3] ^ 4), "zeroed": lambda c: c.__setitem__(
        slice(at, at + 512), bytes(512))}  # fmt: skip
    edit(path, flipped[damage])
    assert keys_by_webdataset(path) == all_keys[:kept]
    assert 0 < kept < len(all_keys)
    positions = [p.position for p in problems_of(copy) if p.file == path.name and p.position is not None]
    assert positions == [at]  # that header, and no document: the trainer reads all of them by the index
    assert any(f"lose {len(all_keys) - kept} documents" in p.what for p in problems_of(copy))
    dataset = TokenDataset(copy)
    assert all(dataset.read(0, d) is not None for d in range(30))


def _metadata(path, member):
    content = path.read_bytes()[member[1] : member[2]]
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"][shards.SCHEMA]


def test_several_damages_are_all_listed_with_their_positions_and_keys(copy):
    path = copy / "part-00000.tar"
    table, index = members(path), safetensors.numpy.load_file(copy / "part-00000.idx")
    spans = [index["segment_modality"][slice(*index["segment_start"][d : d + 2])] for d in range(30)]
    with_tokens = [d for d, modalities in enumerate(spans) if (modalities < 128).any()]
    first, last = with_tokens[0], with_tokens[-1]
    tokens = [int(index["token_offset"][d]) for d in (first, last)]
    padding = next(end for _, _, end in table if end % 512)

    def change(content):
        content[table[1][0]] ^= 1
        content[table[3][0] + 100] ^= 1
        content[padding] = 7
        for at in tokens:
            content[at] ^= 1

    edit(path, change)
    (copy / "part-00001.tar").unlink()
    found = problems_of(copy)
    located = {(p.position, p.document, p.key) for p in found if p.position is not None}
    wanted: set[tuple[int, int | None, str | None]] = {
        (table[1][0], None, None),
        (table[3][0], None, None),
        (padding, None, None),
    }
    wanted |= {(tokens[0], first, f"key0-{first}"), (tokens[1], last, f"key0-{last}")}
    assert wanted <= located
    assert "part-00001.tar" in {p.file for p in found}
    assert all(p.what and p.remedy for p in found)
    done = tool(copy)
    assert done.returncode == 2
    assert all(str(p) in done.stdout for p in found)


def test_a_cut_on_a_member_boundary_and_off_it(copy):
    path = copy / "part-00000.tar"
    table = members(path)
    good = path.read_bytes()
    for keep, words in ((table[3][0], "end mark"), (table[3][1] + 100, "before the end of member")):
        path.write_bytes(good[:keep])
        found = problems_of(copy)
        assert any(p.position == keep and words in p.what for p in found)
        beyond = [p for p in found if "beyond the end" in p.what or "crc32" in p.what]
        assert {p.document for p in beyond} >= set(range(30 - 5, 30))


def test_ids_and_counts_that_are_wrong_in_themselves_are_found(tmp_path):
    """Sound checksums over wrong values: what a faulty writer would leave."""
    small = {**TOKENIZERS, "text": {**TOKENIZERS["text"], "size": 50}}
    write_dataset(tmp_path / "ids", tokenizers=small)
    assert any("text id 99, but its tokenizer has 50 ids" in p.what for p in problems_of(tmp_path / "ids"))
    write_dataset(tmp_path / "counts")
    manifest = json.loads((tmp_path / "counts/manifest.json").read_text())
    manifest["shards"][1]["tokens"]["image"] += 16
    manifest["tokens"]["image"] += 16
    (tmp_path / "counts/manifest.json").write_text(json.dumps(manifest))
    assert any(p.file == "part-00001.tar" and "image tokens found" in p.what for p in problems_of(tmp_path / "counts"))


def test_a_lost_or_damaged_index_is_made_again_byte_for_byte(copy, whole):
    (copy / "part-00000.idx").unlink()
    edit(copy / "part-00001.idx", lambda content: content.__setitem__(200, content[200] ^ 1))
    assert {p.file for p in problems_of(copy)} == {"part-00000.idx", "part-00001.idx"}
    done = tool(copy, "--rebuild-index", "--json", copy / "found.json")
    assert done.returncode == 0, done.stdout
    assert json.loads((copy / "found.json").read_text())["rebuilt"] == ["part-00000.idx", "part-00001.idx"]
    for name in ("part-00000.idx", "part-00001.idx"):
        assert (copy / name).read_bytes() == (whole / name).read_bytes()


def test_no_index_is_made_from_a_damaged_tar(copy):
    (copy / "part-00000.idx").unlink()
    edit(copy / "part-00000.tar", lambda content: content.__setitem__(700, content[700] ^ 1))
    manifest, _ = read_manifest(copy)
    assert isinstance(manifest, Manifest)
    with pytest.raises(ValueError, match=r"part-00000.tar is damaged itself"):
        rebuild_index(copy, manifest.shards[0])
    done = tool(copy, "--rebuild-index", "--workers", 1)
    assert done.returncode == 2
    assert "not made again" in done.stdout
    assert not (copy / "part-00000.idx").exists()


def test_the_manifests_checksum_is_the_one_of_sha256sum(whole):
    digest = hashlib.sha256((whole / "manifest.json").read_bytes()).hexdigest()
    assert (whole / "manifest.sha256").read_text() == f"{digest}  manifest.json\n"


def test_no_folder_and_no_manifest_are_clear_errors(tmp_path):
    done = tool(tmp_path / "nowhere")
    assert (done.returncode, "no such folder" in done.stderr) == (2, True)
    done = tool(tmp_path)
    assert done.returncode == 2
    assert "manifest.json: it is missing" in done.stdout


def test_counting_of_documents_is_not_that_of_the_writer(whole):
    """The report's figures against the tar read by webdataset and safetensors alone."""
    manifest, _ = read_manifest(whole)
    assert manifest is not None
    counts, documents = np.zeros(3, int), 0
    for sample in webdataset.WebDataset([str(f) for f in sorted(whole.glob("*.tar"))], shardshuffle=False):
        block = safetensors.numpy.load(sample["safetensors"])
        documents += len(block["docs"]) - 1
        np.add.at(counts, block["segments"][:, 0], block["segments"][:, 1])
    reports = [verify_shard(whole, record, manifest) for record in manifest.shards]
    assert sum(r.documents for r in reports) == documents
    assert [sum(r.tokens[m] for r in reports) for m in manifest.modalities] == counts.tolist()
