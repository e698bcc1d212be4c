"""A result that was made from a file is reused by the content of the file alone, whatever its name, size and times."""

import json
import os
import random

import pytest

from mom_data.shards import content
from mom_data.shards.content import content_of, keep_inputs
from mom_data.shards.online import OnlineDataset, OnlineFolder
from mom_data.shards.tokenize import Settings, index, jobs_of, tokenize_part, tokenizing
from mom_tokenizers.bundle import Tokenizers
from mom_tokenizers.errors import UserError
from mom_tokenizers.text import TextTokenizer


def lines(seed):
    """JSON lines with a text that depends on the seed. They have the same size for every seed."""
    rng = random.Random(seed)
    return "\n".join(json.dumps({"text": " ".join(rng.choices(("one", "two", "six", "ten"), k=9))}) for _ in range(20))


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("content")
    TextTokenizer.train([lines(0)], 260).save(folder / "text")
    (folder / "tokenizers.yaml").write_text("text: {kind: bpe, path: text}\n")
    return folder / "tokenizers.yaml"


def replace(file, text, at):
    """Replace a file by another one of the same name, size and time of change, as `cp -p` and rsync do."""
    other = file.with_name("other")
    other.write_text(text)
    os.utime(other, ns=at)
    other.replace(file)


def first_text(dataset, tokenizers):
    return Tokenizers.load(tokenizers).tokenizer("text").decode(dataset.read(0, 0)[0].values)


@pytest.mark.parametrize("how", ["another file in its place", "written to"])
def test_online_tokens_are_never_those_of_another_file_of_the_same_name_and_size(
    tokenizers, tmp_path, monkeypatch, how
):
    # in this process: a process of its own, as it does by default, takes seconds to start
    monkeypatch.setattr(OnlineFolder, "_make", lambda self, job: tokenize_part(job, lambda: tokenizing(tokenizers)))
    raw = tmp_path / "t.jsonl"
    raw.write_text(lines(1))
    times = raw.stat().st_atime_ns, raw.stat().st_mtime_ns
    first = OnlineDataset([str(raw)], tokenizers, tmp_path / "cache")
    assert first_text(first, tokenizers) == json.loads(lines(1).split("\n")[0])["text"]
    if how == "written to":
        raw.write_text(lines(2))
        os.utime(raw, ns=times)
    else:
        replace(raw, lines(2), times)
    assert (raw.stat().st_size, raw.stat().st_mtime_ns) == (len(lines(1)), times[1])
    second = OnlineDataset([str(raw)], tokenizers, tmp_path / "cache")
    assert second.fingerprint != first.fingerprint
    assert first_text(second, tokenizers) == json.loads(lines(2).split("\n")[0])["text"]
    # and the same content somewhere else is the same dataset
    raw.unlink()
    (tmp_path / "moved").mkdir()
    (tmp_path / "moved/t.jsonl").write_text(lines(1))
    assert OnlineDataset([str(tmp_path / "moved/t.jsonl")], tokenizers, tmp_path / "b").fingerprint == first.fingerprint


def test_a_finished_part_is_never_that_of_another_file_of_the_same_name_and_size(tokenizers, tmp_path):
    settings = Settings(tokenizers, Tokenizers.load(tokenizers).describe())
    loaded = []

    def made(file):
        def load():
            loaded.append(file)
            return tokenizing(tokenizers)

        parts = [index(file, "t", settings, tmp_path / "out").parts]
        (job,) = jobs_of([file], ["t"], parts, settings, tmp_path / "out")
        return tokenize_part(job, load)["shards"][0]["sha256"]

    files = [tmp_path / name / "t.jsonl" for name in "abc"]
    for file, seed in zip(files, (1, 2, 2), strict=True):
        file.parent.mkdir()
        file.write_text(lines(seed))
    first, second = made(files[0]), made(files[1])
    assert first != second
    assert made(files[2]) == second
    assert loaded == files[:2], "a copy elsewhere is not tokenized again"


def test_a_source_that_changes_after_the_jobs_were_planned_is_an_error_not_a_mixture(tokenizers, tmp_path):
    settings = Settings(tokenizers, Tokenizers.load(tokenizers).describe())
    raw = tmp_path / "t.jsonl"
    raw.write_text(lines(1))
    (job,) = jobs_of([raw], ["t"], [index(raw, "t", settings, tmp_path).parts], settings, tmp_path)
    raw.write_text(lines(2))
    with pytest.raises(UserError, match=r"t\.jsonl: damaged or changed since its headers were read"):
        tokenize_part(job, lambda: tokenizing(tokenizers))
    os.utime(raw, ns=(1, 1))
    raw.write_text(lines(1))
    assert tokenize_part(job, lambda: tokenizing(tokenizers))["shards"], "the same content again is fine"


def test_a_file_is_read_once_while_it_stays_as_it_is(tmp_path, monkeypatch):
    file, reads = tmp_path / "x", []
    file.write_bytes(b"abc")
    read = content.sha256_of
    monkeypatch.setattr(content, "sha256_of", lambda path: reads.append(path) or read(path))
    wanted = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # the standard's example
    for _ in range(2):
        monkeypatch.setattr(content, "_known", {})  # as in another process
        assert content_of(file, tmp_path / "memory") == wanted
    assert content_of(file, tmp_path / "another memory") == wanted
    assert len(reads) == 1
    for damaged in (tmp_path / "memory").glob("*.sha256"):
        damaged.write_text("{")
    monkeypatch.setattr(content, "_known", {})
    assert content_of(file, tmp_path / "memory") == wanted
    with pytest.raises(UserError, match=r"nowhere cannot be read: .*No such file"):
        content_of(tmp_path / "nowhere", tmp_path / "memory")


def test_a_folder_of_results_is_never_continued_with_other_inputs(tmp_path):
    made, a, b = tmp_path / "made", tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    made.mkdir()
    a.write_text('{"text": "one"}')
    b.write_text('{"text": "two"}')
    keep_inputs(made, [a, b])
    keep_inputs(made, [a, b])
    with pytest.raises(UserError, match=r"made was made from other inputs: .*b\.jsonl is gone"):
        keep_inputs(made, [a])
    a.write_text('{"text": "six"}')  # of the same size
    with pytest.raises(UserError, match=r"a\.jsonl has other contents"):
        keep_inputs(made, [a, b])
