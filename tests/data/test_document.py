import gzip
import io
import json
import tarfile

import pytest

from mom_data.document import BadSample, Document, Segment, expand_inputs, read_documents


def write_tar(path, members):
    mode = "w:gz" if path.suffix == ".gz" else "w"
    with tarfile.open(path, mode) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def encode(value):
    return json.dumps(value).encode()


def test_every_convention_reads_as_segments(tmp_path):
    members = {
        "a.json": encode(
            {
                "segments": [
                    {"type": "text", "text": "see"},
                    {"type": "image", "part": "0.jpg"},
                    {"type": "speech", "part": "1.flac"},
                ]
            }
        ),
        "a.0.jpg": b"J",
        "a.1.flac": b"F",
        "b.json": encode({"images": [None, "x.png", None], "texts": ["one", None, "two"]}),
        "b.x.png": b"P",
        "c.jpg": b"K",
        "c.txt": b"caption",
        "c.json": encode({"url": "somewhere", "width": 3}),
        "d.wav": b"W",
        "d.txt": b"spoken",
        "e.txt": "Zoë".encode(),
    }
    for name in ("t.tar", "t.tar.gz"):
        documents = {d.key: d for d in read_documents(write_tar(tmp_path / name, members))}
        assert documents["a"].segments == (Segment("text", "see"), Segment("image", b"J"), Segment("speech", b"F"))
        assert documents["b"].segments == (Segment("text", "one"), Segment("image", b"P"), Segment("text", "two"))
        assert set(documents["c"].segments) == {Segment("text", "caption"), Segment("image", b"K")}
        assert set(documents["d"].segments) == {Segment("text", "spoken"), Segment("speech", b"W")}
        assert documents["e"].segments == (Segment("text", "Zoë"),)


def test_pairs_are_read_text_first_four_times_of_five(tmp_path):
    members = {}
    for i in range(1000):
        members |= {f"{i:04d}.jpg": b"J", f"{i:04d}.txt": b"t"}
    documents = list(read_documents(write_tar(tmp_path / "t.tar", members)))
    first = sum(d.segments[0].modality == "text" for d in documents)
    assert 760 < first < 840  # 3 standard deviations of a binomial(1000, 0.8) are 38


def test_json_lines_are_text_documents(tmp_path):
    path = tmp_path / "t.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write('{"text": "one"}\nnot json\n{"text": "two"}\n{"no": 1}\n')
    good, bad = [], []
    for item in read_documents(path):
        (good if isinstance(item, Document) else bad).append(item)
    assert [d.segments[0].data for d in good] == ["one", "two"]
    assert [b.key for b in bad] == ["t.jsonl.gz:2", "t.jsonl.gz:4"]


def test_a_bad_sample_is_reported_and_the_rest_is_read(tmp_path):
    members = {
        "a.json": encode({"segments": [{"type": "image", "part": "0.jpg"}]}),
        "b.json": b"{broken",
        "c.bin": b"?",
        "d.txt": b"\xff\xfe",
        "e.txt": b"fine",
    }
    items = list(read_documents(write_tar(tmp_path / "t.tar", members)))
    bad = {b.key: b.reason for b in items if isinstance(b, BadSample)}
    assert set(bad) == {"a", "b", "c", "d"}
    assert "'0.jpg' is not in the tar" in bad["a"]
    assert [d.key for d in items if isinstance(d, Document)] == ["e"]


@pytest.mark.parametrize("damage", ["header", "truncated", "zeroed"])
def test_a_damaged_tar_is_an_error_never_a_short_corpus(tmp_path, damage):
    """tarfile and webdataset take a damaged header for the end of the archive, without a word."""
    path = write_tar(tmp_path / "t.tar", {f"{i}.txt": b"x" * 700 for i in range(20)})
    content = bytearray(path.read_bytes())
    at = 10 * (512 + 1024)
    if damage == "header":
        content[at + 3] ^= 0xFF
    elif damage == "zeroed":
        content[at : at + 512] = bytes(512)
    else:
        del content[at + 600 :]
    path.write_bytes(content)
    read = []
    with pytest.raises(ValueError, match=r"t\.tar: (damaged|truncated|not a readable tar)"):
        read.extend(read_documents(path))


def test_inputs_that_match_nothing_are_all_named(tmp_path):
    write_tar(tmp_path / "a.tar", {})
    assert expand_inputs([str(tmp_path / "*.tar"), str(tmp_path)]) == [tmp_path / "a.tar"]
    with pytest.raises(ValueError, match=r"nope.*gone"):
        expand_inputs([str(tmp_path / "nope"), str(tmp_path / "a.tar"), "gone*.tar"])
