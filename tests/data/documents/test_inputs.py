"""Which files a command reads, and which documents are held out of them."""

import json
from pathlib import Path

import pytest

from mom_data.documents.inputs import Holdout, files_of_side, least_held_out
from mom_data.shards.tokenize import Settings, index, jobs_of, with_a_document_held_out


def lines(path, *texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.mark.parametrize("layout", ["{0}/{0}-00000.jsonl", "{}/a.jsonl", "{}/deep/a.jsonl", "{}.jsonl", "{}-000.jsonl"])
@pytest.mark.parametrize("val", ["val", "validation"])
def test_documents_that_folders_or_names_hold_out_never_reach_the_other_side(tmp_path, layout, val):
    train, held_out = (lines(tmp_path / "raw files" / layout.format(side), side) for side in ("train", val))
    for pattern in (tmp_path / "raw files", tmp_path / "raw files/**/*.jsonl"):
        assert files_of_side([str(pattern)], "train") == ([train], None)
        assert files_of_side([str(pattern)], "val") == ([held_out], None)
        with pytest.raises(ValueError, match="Say --split train or --split val"):
            files_of_side([str(pattern)], None)
    assert files_of_side([str(train)], None) == ([train], None)
    assert files_of_side([str(train)], "val") == ([train], "val")


@pytest.mark.parametrize("other", ["more.jsonl", "test/a.jsonl", "test-1.jsonl"])
def test_a_file_of_neither_side_is_refused_and_not_left_out_in_silence(tmp_path, other):
    for side in ("train", "val"):
        lines(tmp_path / side / "a.jsonl", side)
    lines(tmp_path / other, "whose?")
    with pytest.raises(ValueError, match=f"{other} belongs to neither side"):
        files_of_side([str(tmp_path)], "train")


@pytest.mark.parametrize("documents", [2, 3, 10, 60])
@pytest.mark.parametrize("files", [1, 2])
def test_a_hold_out_takes_at_least_one_document_and_both_sides_agree_which(tmp_path, documents, files):
    sources = [lines(tmp_path / f"f{k}.jsonl", *map(str, range(documents))) for k in range(files)]
    names = [source.stem for source in sources]
    keys = [f"{source.name}:{i + 1}" for source in sources for i in range(documents)]
    for share in (1e-9, 0.03, 0.5):
        taken = {}
        for side in ("train", "val"):
            settings = Settings(Path("t"), {"text": {"size": 300}}, split=side, holdout=share)

            def indices(settings, folder=tmp_path / f"{side}{share}"):
                return [index(*pair, settings, folder) for pair in zip(sources, names, strict=True)]

            settings = with_a_document_held_out(settings, indices(settings))
            jobs = jobs_of(sources, names, [one.parts for one in indices(settings)], settings, tmp_path)
            taken[side] = {key for key in keys if settings.wanted(key)}
            assert sum(job.part.wanted for job in jobs) == len(taken[side])
        assert taken["train"] | taken["val"] == set(keys)
        assert not taken["train"] & taken["val"]
        by_share = {key for key in keys if Holdout(share).held_out(key)}
        assert taken["val"] == by_share if by_share else len(taken["val"]) == 1


def test_a_side_without_a_document_is_an_error_that_says_so(tmp_path):
    source = lines(tmp_path / "f.jsonl", "the only one")
    for side, share in (("train", 0.03), ("val", 0.0), ("train", 1.0)):
        settings = Settings(Path("t"), {"text": {"size": 300}}, split=side, holdout=share)
        settings = with_a_document_held_out(settings, [index(source, "f", settings, tmp_path)])
        found = index(source, "f", settings, tmp_path)
        with pytest.raises(ValueError, match=f"none of the 1 documents is {side}"):
            jobs_of([source], ["f"], [found.parts], settings, tmp_path)
    assert least_held_out(0.0, [5]) is None
