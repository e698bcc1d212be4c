"""What happens to one part of a raw file that is tokenized in this process by tokenizers that fail."""

import json
from dataclasses import dataclass, field

import numpy as np
import pytest

from mom_data.documents.account import is_damage
from mom_data.shards.dataset import TokenDataset
from mom_data.shards.format import write_manifest
from mom_data.shards.tokenize import Settings, index, jobs_of, tokenize_part
from mom_tokenizers.bundle import Tokenizers


@dataclass
class Letters:
    """A tokenizer of letters that fails on some texts."""

    kind: str = "bpe"
    size: int = 256
    failures: dict[str, Exception] = field(default_factory=dict)

    def encode(self, value):
        if value in self.failures:
            raise self.failures[value]
        return np.array([ord(c) for c in value], np.uint32)


def part_of(tmp_path, texts, failures, **more):
    raw = tmp_path / "t.jsonl"
    raw.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    declared = {"kind": "bpe", "fingerprint": "0" * 16, "size": 256}
    settings = Settings(tmp_path / "tokenizers.yaml", {"text": declared}, **more)
    [job] = jobs_of([raw], ["t"], [index(raw, "t", settings, tmp_path).parts], settings, tmp_path)
    tokenizers = Tokenizers((("text", "bpe", tmp_path),), _loaded={"text": Letters(failures=failures)})
    return job, lambda: tokenizers


def test_one_document_that_fails_in_whatever_way_never_ends_the_pass_and_is_named(tmp_path):
    failures = {
        "assertion": AssertionError("not this"),
        "memory": MemoryError(),
        "recursion": RecursionError("too deep"),
        "value": ValueError("not that"),
    }
    texts = ["one", *failures, "", "euro \u20ac", "two"]
    job, load = part_of(tmp_path, texts, failures)
    record = tokenize_part(job, load)
    reasons = {entry["key"]: entry["reason"] for entry in record["skipped"]}
    assert reasons == {
        "t.jsonl:2": "cannot be read: segment 0 (text): unforeseen AssertionError: not this",
        "t.jsonl:3": "cannot be read: segment 0 (text): unforeseen MemoryError: ",
        "t.jsonl:4": "cannot be read: segment 0 (text): unforeseen RecursionError: too deep",
        "t.jsonl:5": "cannot be read: segment 0 (text): not that",
        "t.jsonl:6": "empty",
        "t.jsonl:7": "cannot be read: text ids run from 32 to 8364, but its tokenizer has 256",
    }
    assert [is_damage(reason) for reason in reasons.values()] == [True] * 4 + [False, True]
    write_manifest(tmp_path, record["shards"], job.settings.described, np.uint16, {})
    dataset = TokenDataset(tmp_path)
    read = ["".join(map(chr, dataset.read(0, d)[0].values)) for d in range(dataset.manifest["documents"])]
    assert read == ["one", "two"]


def test_where_every_document_fails_the_pass_ends_and_names_the_first(tmp_path):
    texts = [f"text {i}" for i in range(70)]
    job, load = part_of(tmp_path, texts, dict.fromkeys(texts, RuntimeError("device lost")))
    with pytest.raises(RuntimeError, match=r"not the matter. The first is t.jsonl:1: .*RuntimeError: device lost"):
        tokenize_part(job, load)
    assert not list(tmp_path.glob("*.tar"))


def test_long_texts_are_not_held_in_memory_many_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr("mom_data.shards.tokenize._GROUP_BYTES", 1000)
    texts = ["x" * 600] * 5 + ["y"] * 200
    sizes = []
    job, load = part_of(tmp_path, texts, {})
    original = Tokenizers.encode_many

    def counted(self, modality, data):
        sizes.append(sum(map(len, data)))
        return original(self, modality, data)

    monkeypatch.setattr(Tokenizers, "encode_many", counted)
    assert tokenize_part(job, load)["shards"][0]["documents"] == 205
    assert max(sizes) <= 1600
    assert len(sizes) == 6
