"""A dataset whose manifest was changed after it was written is refused, wherever the dataset is opened."""

import json
import shutil
from pathlib import Path

import fsspec
import pytest

from mom_data.shards.dataset import TokenDataset
from mom_data.shards.verify import read_manifest
from mom_tokenizers.errors import UserError
from tests.helpers.corpus import TOKENIZERS, rewrite_manifest, write_dataset


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("manifest") / "whole"
    write_dataset(folder, documents=30, shards=3)
    return folder


@pytest.fixture
def copy(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def without_a_shard(manifest):
    gone = manifest["shards"].pop(1)
    manifest["documents"] -= gone["documents"]
    for modality, n in gone["tokens"].items():
        manifest["tokens"][modality] -= n


def with_a_shard_twice(manifest):
    again = manifest["shards"][1]
    manifest["shards"].append(again)
    manifest["documents"] += again["documents"]
    for modality, n in again["tokens"].items():
        manifest["tokens"][modality] += n


def with_two_modalities_swapped(manifest):
    manifest["modalities"] = ["text", "speech", "image"]
    manifest["tokenizers"] = {m: manifest["tokenizers"][m] for m in manifest["modalities"]}


def with_fewer_documents(manifest):
    manifest["shards"][0]["documents"] -= 1
    manifest["documents"] -= 1


def with_tokens_of_another_modality(manifest):
    for counts in (manifest["shards"][0]["tokens"], manifest["tokens"]):
        counts["image"] -= 1
        counts["speech"] += 1


CHANGES = [
    without_a_shard,
    with_a_shard_twice,
    with_two_modalities_swapped,
    with_fewer_documents,
    with_tokens_of_another_modality,
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_manifest_that_was_changed_is_refused_in_a_folder_and_elsewhere(copy, change):
    manifest = json.loads((copy / "manifest.json").read_text())
    change(manifest)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"manifest.json: it was changed or damaged.*What to do: copy both again"):
        TokenDataset(copy)
    pytest.importorskip("tenacity", reason="pip install 'mixture-of-mamba[remote]': remote manifests are NOT tested")
    remote = fsspec.filesystem("memory")
    remote.put(f"{copy}/", f"/{change.__name__}/", recursive=True)
    try:
        with pytest.raises(UserError, match=rf"memory://{change.__name__}/manifest.json: it was changed or damaged"):
            TokenDataset(f"memory://{change.__name__}", cache=copy / "cache")
    finally:
        remote.rm(f"/{change.__name__}", recursive=True)


def test_a_dataset_whose_manifests_checksum_is_lost_says_how_it_is_made_again(copy):
    (copy / "manifest.sha256").unlink()
    with pytest.raises(UserError, match=r"manifest.sha256: it is missing.*verify_shards.*sha256sum manifest.json >"):
        TokenDataset(copy)
    assert [p.file for p in read_manifest(copy)[1]] == ["manifest.sha256"]
    rewrite_manifest(copy, json.loads((copy / "manifest.json").read_text()))
    assert TokenDataset(copy).read(0, 0) is not None


@pytest.mark.parametrize("change", [with_two_modalities_swapped, with_fewer_documents, with_tokens_of_another_modality])
def test_a_manifest_that_agrees_with_itself_alone_is_held_against_the_indices(copy, change):
    manifest = json.loads((copy / "manifest.json").read_text())
    change(manifest)
    rewrite_manifest(copy, manifest)
    dataset = TokenDataset(copy)
    with pytest.raises(UserError, match=r"part-00000.idx contradicts manifest.json: .* found, the manifest says"):
        dataset.index(0)


def changed(*path_and_value):
    *path, last, value = path_and_value

    def change(manifest):
        for key in path:
            manifest = manifest[key]
        manifest[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m["shards"].pop(1), "documents: 30, but its own entries give 20"),
        (with_a_shard_twice, "named more than once: part-00001.tar"),
        (changed("modalities", ["text", "speech", "image"]), "modalities: .*, but its own entries give"),
        (changed("modalities", ["image", "text", "speech"]), "first modality must be 'text'"),
        (changed("tokens", {"text": 1}), "tokens: "),
        (changed("shards", 0, "tokens", {"text": 1}), r"part-00000.tar counts tokens of \['text'\]"),
        (changed("shards", 0, "documents", -10), "documents: Input should be greater"),
        (changed("shards", 0, "documents", "10"), "documents: Input should be a valid integer"),
        (changed("shards", 0, "sha256", "0" * 63), "part-00000.tar has no proper sha256"),
        (changed("tokenizers", "text", "size", 1 << 17), "2 bytes a token cannot hold the 131072 ids"),
        (changed("token_bytes", 1), "1 bytes a token"),
        (changed("latent_width", 4), "latent_width: 4, but its own entries give 0"),
        (changed("schema", "mom-tokens-0"), "schema 'mom-tokens-0'; this version reads"),
        (lambda m: m.pop("tokenizers"), "tokenizers: Field required"),
    ],
)
def test_opening_and_verifying_refuse_the_same_manifests_in_the_same_words(copy, change, said):
    manifest = json.loads((copy / "manifest.json").read_text())
    change(manifest)
    rewrite_manifest(copy, manifest)
    with pytest.raises(UserError, match=said) as refused:
        TokenDataset(copy)
    assert str(refused.value) == f"{copy}/" + " ".join(map(str, read_manifest(copy)[1]))


@pytest.mark.parametrize("content", [b"", b"[" * 100_000, b"[]", b"null", b'{"a": \xff}', b"{"])
def test_what_is_no_manifest_at_all_is_one_message(copy, content):
    (copy / "manifest.json").write_bytes(content)
    with pytest.raises(UserError, match=r"copy/manifest.json: it was changed or damaged"):
        TokenDataset(copy)
    assert read_manifest(copy)[0] is None


def test_further_keys_of_a_manifest_are_kept_and_do_not_matter(copy):
    tokenizers = {**TOKENIZERS, "image": {**TOKENIZERS["image"], "latent_scale": 0.5}}
    manifest = json.loads((copy / "manifest.json").read_text()) | {"tokenizers": tokenizers, "account": {"members": 3}}
    rewrite_manifest(copy, manifest)
    assert TokenDataset(copy).tokenizers["image"]["latent_scale"] == 0.5
