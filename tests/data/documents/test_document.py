import gzip
import io
import json
import pickle
import random
import tarfile
import tracemalloc
import zlib

import numpy as np
import pytest
import soundfile
from PIL import Image

from mom_data.documents import json_lines
from mom_data.documents.document import BadSample, Document, Limits, Segment, expand_inputs, index_parts, read_documents


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


def test_ready_made_ids_are_a_list_or_a_part(tmp_path):
    file = io.BytesIO()
    np.save(file, np.array([4, 1], np.uint16))

    def declared(*segments):
        return encode({"segments": [{"type": "music", **s} for s in segments]})

    members = {
        "a.json": declared({"ids": [5, 3]}, {"part": "0.npy"}),
        "a.0.npy": file.getvalue(),
        "b.json": declared({"ids": [5, 3], "part": "0.npy"}),
        "c.json": declared({"ids": [-1]}),
        "d.json": declared({"ids": [2**40]}),
        "e.json": declared({"part": "0.npy"}),
    }
    a, *others = read_documents(write_tar(tmp_path / "t.tar", members))
    assert [s.modality for s in a.segments] == ["music", "music"]
    assert [np.load(io.BytesIO(s.data)).tolist() for s in a.segments] == [[5, 3], [4, 1]]
    reasons = ["either 'ids' or a 'part'", "whole numbers", "whole numbers", "'0.npy' is not in the tar"]
    assert [type(o) for o in others] == [BadSample] * 4
    assert all(why in o.reason for why, o in zip(reasons, others, strict=True))


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


@pytest.mark.parametrize("damage", ["header", "truncated", "cut", "zeroed"])
def test_a_damaged_tar_is_an_error_never_a_short_corpus(tmp_path, damage):
    """tarfile and webdataset take a damaged header for the end of the archive, without a word."""
    path = write_tar(tmp_path / "t.tar", {f"{i}.txt": b"x" * 700 for i in range(20)})
    content = bytearray(path.read_bytes())
    at = 10 * (512 + 1024)
    if damage == "header":
        content[at + 3] ^= 0xFF
    elif damage == "zeroed":
        content[at : at + 512] = bytes(512)
    elif damage == "cut":
        del content[at:]  # exactly between two members: to tarfile, a whole archive
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


def test_parts_hold_every_sample_once_whatever_their_size(tmp_path):
    """Against one reading of the whole file; members with long names have headers in front of their own."""
    rng = random.Random(0)
    members = {}
    for i in range(60):
        name = f"{i:03d}" + "x" * rng.choice([0, 0, 150])
        members |= {
            f"{name}.jpg": rng.randbytes(rng.randrange(3000)),
            f"{name}.txt": b"t",
            f"note-{i}": b"no extension",
        }
    write_tar(tmp_path / "t.tar", members)
    write_tar(tmp_path / "t.tar.gz", members)
    lines = [b'{"text": "one\u2028 line"}\n', b"broken\r\n", b'{"text": "\xc3\xbc"}\n', b'{"text": "\xff"}\n'] * 200
    (tmp_path / "t.jsonl").write_bytes(b"".join(lines) + b'{"text": "without an end"}')
    for name, number in (("t.tar", 60), ("t.tar.gz", 60), ("t.jsonl", 801)):
        path = tmp_path / name
        whole = list(read_documents(path))
        assert len(whole) == number
        for size in (1, 5_000, 1 << 30):
            parts = index_parts(path, size, lambda key: key.endswith("3"))
            assert [item for part in parts for item in read_documents(path, part)] == whole
            assert sum(part.wanted for part in parts) == sum(item.key.endswith("3") for item in whole)
            assert len(parts) == 1 if size > 1 << 20 or name == "t.tar.gz" else len(parts) > 1
            assert all(part.end is None or part.end - part.start >= size for part in parts)


def test_a_part_of_a_file_that_has_changed_is_an_error(tmp_path):
    path = write_tar(tmp_path / "t.tar", {f"{i}.txt": b"x" * 700 for i in range(20)})
    last = index_parts(path, 5_000)[-1]
    write_tar(path, {f"{i}.txt": b"x" * 700 for i in range(19)})
    with pytest.raises(ValueError, match=r"t\.tar: \d samples .* it has changed"):
        list(read_documents(path, last))


def test_members_with_python_objects_are_refused_and_never_loaded(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    trap = pickle.dumps(Trap())
    members = {f"{e}.{e}": trap for e in ("pkl", "pickle", "pyd", "pth", "pt")}
    members |= {"beside.txt": b"text", "beside.x.pkl": trap, "fine.txt": b"text"}
    items = list(read_documents(write_tar(tmp_path / "t.tar", members)))
    assert [d.key for d in items if isinstance(d, Document)] == ["fine"]
    assert all("could run code" in b.reason for b in items if isinstance(b, BadSample))
    assert not (tmp_path / "sprung").exists()


def test_members_that_point_outside_touch_nothing_there(tmp_path):
    inside = tmp_path / "a/b"
    inside.mkdir(parents=True)
    (tmp_path / "secret.txt").write_text("secret")
    with tarfile.open(inside / "t.tar", "w") as tar:
        for name in ("../../escaped.txt", str(tmp_path / "absolute.txt"), "in.txt"):
            info = tarfile.TarInfo(name)
            info.size = 4
            tar.addfile(info, io.BytesIO(b"text"))
        for name, kind in (
            ("link.txt", tarfile.SYMTYPE),
            ("hard.txt", tarfile.LNKTYPE),
            ("fifo.txt", tarfile.FIFOTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, str(tmp_path / "secret.txt")
            tar.addfile(info)
    before = sorted(tmp_path.rglob("*"))
    documents = list(read_documents(inside / "t.tar"))
    assert [d.segments[0].data for d in documents if isinstance(d, Document)] == ["text"] * 3
    assert [d.key for d in documents if isinstance(d, BadSample)] == ["link", "hard", "fifo"]
    assert sorted(tmp_path.rglob("*")) == before


def test_limits_go_by_what_headers_say(tmp_path):
    def picture(width, height):
        file = io.BytesIO()
        Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(file, "PNG")
        return file.getvalue()

    sound = io.BytesIO()
    soundfile.write(sound, np.zeros(16_000, np.float32), 8_000, format="FLAC")
    bomb = bytearray(picture(1, 1))
    bomb[16:24] = (1 << 20).to_bytes(4, "big") * 2  # the header's width and height: a terapixel
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    limits = Limits(pixels=100, seconds=1.5, characters=5)
    assert limits.exceeded(Segment("text", "12345")) is None
    assert limits.exceeded(Segment("text", "123456")) == "6 characters"
    assert limits.exceeded(Segment("image", picture(10, 10))) is None
    assert limits.exceeded(Segment("image", picture(10, 11))) == "picture of 10 x 11"
    assert limits.exceeded(Segment("speech", sound.getvalue())) == "recording of 2.0 s"
    assert Limits(seconds=2).exceeded(Segment("speech", sound.getvalue())) is None
    assert Limits().exceeded(Segment("speech", sound.getvalue())) is None
    assert limits.exceeded(Segment("image", b"not a picture")) is None  # for its tokenizer to say
    assert limits.exceeded(Segment("image", bytes(bomb)))


def test_two_members_of_one_kind_make_a_bad_sample_and_the_rest_is_read(tmp_path):
    path = write_tar(tmp_path / "t.tar", {"a.txt": b"one", "a.TXT": b"two", "b.txt": b"three"})
    bad, good = read_documents(path)
    assert isinstance(bad, BadSample)
    assert isinstance(good, Document)
    assert "two members 'txt'" in bad.reason


def test_a_truncated_gzip_of_lines_is_one_clear_message(tmp_path):
    path = tmp_path / "t.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "some words"}\n' * 5000)[:-40])
    with pytest.raises(ValueError, match=r"t\.jsonl\.gz: not a readable file of lines"):
        list(read_documents(path))


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz", "t.tar", "t.tar.gz"])
def test_a_text_too_large_to_be_one_is_left_out_by_its_size_and_never_held_in_memory(tmp_path, monkeypatch, name):
    monkeypatch.setattr(json_lines, "MAX_LINE_BYTES", 1 << 20)
    path, large, rest = tmp_path / name, "many words " * 3_000_000, {"a": "one", "b": "large", "c": "two"}
    if ".tar" in name:
        write_tar(path, {f"{k}.txt": (large if v == "large" else v).encode() for k, v in rest.items()})
    else:
        lines = "".join(json.dumps({"text": large if v == "large" else v}) + "\n" for v in rest.values()).encode()
        path.write_bytes(gzip.compress(lines, 1) if name.endswith(".gz") else lines)
        del lines
    del large
    tracemalloc.start()
    parts = index_parts(path, 1 << 20)
    items = [item for part in parts for item in read_documents(path, part)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [d.segments[0].data for d in (items[0], items[2])] == ["one", "two"]
    assert isinstance(items[1], BadSample)
    assert items[1].reason.startswith("above the limits: ")
    assert "33000000" in items[1].reason or "33000013" in items[1].reason
    assert peak < 8 << 20


def test_a_line_of_the_largest_size_is_still_read(tmp_path, monkeypatch):
    monkeypatch.setattr(json_lines, "MAX_LINE_BYTES", 32)
    fits = json.dumps({"text": "x" * 20}).encode()  # 32 bytes
    assert len(fits) == 32
    for end in (b"", b"\n", b"\n" + fits + b" "):
        (tmp_path / "t.jsonl").write_bytes(fits[:-1].replace(b": ", b":") + b"}" + end)
        assert isinstance(next(iter(read_documents(tmp_path / "t.jsonl"))), Document)
    (tmp_path / "t.jsonl").write_bytes(fits)
    assert isinstance(next(iter(read_documents(tmp_path / "t.jsonl"))), Document)
