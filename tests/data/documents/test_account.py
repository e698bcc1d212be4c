"""Every member of raw input is accounted for, and no document is incomplete."""

import bz2
import gzip
import io
import json
import lzma
import tarfile
from collections import Counter
from pathlib import Path

import pytest
import webdataset.tariterators
from hypothesis import given, settings
from hypothesis import strategies as st

from mom_data.documents import account as raw_account
from mom_data.documents.account import Account
from mom_data.documents.document import BadSample, Document, Reading, expand_inputs, index_parts, read_documents
from mom_data.documents.sample import IMAGE_EXTENSIONS, NOT_READ_EXTENSIONS, SPEECH_EXTENSIONS
from mom_data.documents.tars import _header
from mom_tokenizers.errors import UserError


def write_tar(path, members):
    """Write a tar of `members`: (name, bytes), or (name, (a type of TarInfo, the name that it links to))."""
    with tarfile.open(path, "w:" + {".gz": "gz", ".tgz": "gz", ".bz2": "bz2", ".xz": "xz"}.get(path.suffix, "")) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            if isinstance(data, tuple):
                info.type, info.linkname = data
                tar.addfile(info)
            else:
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def read(path, part=None, reading=None, account=None):
    """The documents and bad samples of a file, each reported to the account as tokenization does it."""
    account = account if account is not None else Account()
    items = list(read_documents(path, part, reading or Reading(), account))
    for item in items:
        account.sample(path.name, item.members, item.reason if isinstance(item, BadSample) else None)
    account.check()
    return items, account


def shape(item):
    return [(s.modality, s.data) for s in item.segments] if isinstance(item, Document) else item.reason


def only(tmp_path, *members, reading=None):
    items, account = read(write_tar(tmp_path / "t.tar", members), reading=reading)
    (item,) = items
    return item, account


LEFT = {"m4a", "mp4", "svg", "heic"}  # media that nothing here reads
PICTURE, SOUND = {"jpg", "PNG", "gif", "tif", "avif", "input.jpg"}, {"wav", "flac", "mp3"}
TEXT = {"txt", "TXT", "caption", "normalized.txt"}
OTHER = {"json", "cls", "npz", "bin", "pkl"}
EXTENSIONS = sorted(LEFT | PICTURE | SOUND | TEXT | OTHER)
JSONS = [b"{}", b'{"text": "said"}', b'{"caption": "shown"}', b"[" * 100_000, b"{", b"", b"7", b'{"text": 7}',
         b'{"segments": [{"type": "text", "text": "a"}, {"type": "image", "part": "jpg"}]}',
         b'{"images": ["jpg", null], "texts": [null, "b"]}']  # fmt: skip


@st.composite
def tars(draw):
    keys = draw(st.lists(st.sampled_from(["a", "b", "./c", "d/e", "x" * 120, "ü", "d.v1/f"]), max_size=6, unique=True))
    members = []
    for key in keys:
        for extension in draw(st.lists(st.sampled_from(EXTENSIONS), min_size=1, max_size=4)):
            data = f"{key} {extension} {len(members)}".encode()
            if extension == "json":
                data = draw(st.sampled_from(JSONS))
            elif draw(st.integers(0, 7)) == 0:
                data = draw(st.sampled_from([b"", b"\xff\xfe"]))
            members.append((f"{key}.{extension}", data))
    names = [name for name, _ in members]
    strays = [
        ("folder", (tarfile.DIRTYPE, "")), ("README", b"r"), ("._a.jpg", b"m"), ("d/.DS_Store", b"s"),
        ("__MACOSX/a.jpg", b"m"), ("pipe.txt", (tarfile.FIFOTYPE, "")), ("up.txt", (tarfile.SYMTYPE, "../../etc")),
    ]  # fmt: skip
    members += draw(st.lists(st.sampled_from(strays), max_size=3, unique_by=lambda m: m[0]))
    for target in draw(st.lists(st.sampled_from(names or ["gone.jpg"]), max_size=2)):
        kind = draw(st.sampled_from([tarfile.LNKTYPE, tarfile.SYMTYPE]))
        extension = draw(st.sampled_from(["jpg", "txt", "wav"]))
        members.append((f"link{len(members)}.{extension}", (kind, target)))
        members.append((f"link{len(members) - 1}.txt" if extension != "txt" else f"link{len(members)}.txt", b"linked"))
    return draw(st.permutations(members))


def modality_of(name):
    """What the name of a member says that it is. This is an oracle of its own."""
    last = name.rpartition(".")[2].lower()
    kinds = {"image": {"jpg", "png", "gif", "tif", "avif"}, "speech": SOUND, "text": {"txt", "caption"}}
    return next((m for m, e in (kinds | {"lost": LEFT | {"pkl"}}).items() if last in e), None)


@settings(max_examples=40, deadline=None)
@given(tars(), st.integers(1, 6000))
def test_the_account_adds_up_and_no_document_is_a_half_whatever_the_tar(tmp_path_factory, members, part_bytes):
    path = write_tar(tmp_path_factory.getbasetemp() / "random.tar", members)
    items, account = read(path)
    with tarfile.open(path) as tar:
        assert account.members == len(tar.getmembers())
    # in parts, of any size, it is the same
    summed, in_parts = Account(), []
    for part in index_parts(path, part_bytes):
        found, own = read(path, part)
        assert len(found) == part.documents
        in_parts += found
        summed.add(Account.from_json(own.as_json()))
    assert in_parts == items
    assert (summed.used, summed.left_out, summed.members) == (account.used, account.left_out, account.members)

    given_by_key = {}
    for name, data in members:
        key = webdataset.tariterators.base_plus_ext(name)[0]
        given_by_key.setdefault((key or "").removeprefix("./"), []).append((name, data))
    for item in items:
        if not isinstance(item, Document) or item.page:
            continue
        own = given_by_key[item.key.removeprefix("./")]
        has = {segment.modality for segment in item.segments}
        declared = any(b'"segments"' in d for n, d in own if n.endswith(".json"))
        for name, data in own:
            modality = modality_of(name)
            assert modality != "lost" or (declared and not name.endswith("pkl"))
            if modality == "text" and not declared and data != b"":
                assert "text" in has, own
            if modality in ("image", "speech") and not declared:
                assert modality in has, own
        assert all(segment.data for segment in item.segments)


def test_an_unsorted_tar_pairs_its_members_as_a_sorted_one_does(tmp_path):
    pictures = [(f"p/{i:03d}.jpg", b"J%d" % i) for i in range(20)]
    texts = [(f"p/{i:03d}.txt", b"caption %d" % i) for i in range(20)]
    rows = [member for pair in zip(pictures, texts, strict=True) for member in pair]
    expected, _ = read(write_tar(tmp_path / "sorted.tar", rows))
    unsorted = write_tar(tmp_path / "unsorted.tar", pictures + texts)
    assert read(unsorted)[0] == expected
    assert len(expected) == 20
    assert len(index_parts(unsorted, 1)) == 1  # every sample spans the middle
    # two halves that are each unsorted can be cut between
    halves = write_tar(tmp_path / "halves.tar", pictures[:10] + texts[:10] + pictures[10:] + texts[10:])
    parts = index_parts(halves, 1)
    assert [p.documents for p in parts] == [10, 10]
    assert [item for part in parts for item in read(halves, part)[0]] == expected
    for suffix in ("gz", "bz2", "xz"):
        packed = tmp_path / f"t.tar.{suffix}"
        assert read(write_tar(packed, rows))[0] == expected
        with pytest.raises(UserError, match=r"unpack it to a plain \.tar first"):
            read(write_tar(packed, pictures + texts))


@pytest.mark.parametrize("packed", [bytes, gzip.compress, bz2.compress, lzma.compress])
def test_a_file_is_read_as_it_is_packed_whatever_it_is_called(tmp_path, packed):
    plain = write_tar(tmp_path / "plain", [("BZh1.jpg", b"J"), ("BZh1.txt", b"words"), ("b.txt", b"x" * 3000)])
    for name in ("t.tar", "t.tar.gz", "t.tgz", "t.tar.bz2", "t.tar.xz"):
        (tmp_path / name).write_bytes(packed(plain.read_bytes()))
        assert read(tmp_path / name)[0] == read(plain)[0]
        assert len(index_parts(tmp_path / name, 1)) == (2 if packed is bytes else 1)
    for name in ("t.jsonl", "t.jsonl.gz"):
        (tmp_path / name).write_bytes(packed(b'{"text": "one"}\n{"text": "two"}\n'))
        assert [shape(item) for item in read(tmp_path / name)[0]] == [[("text", "one")], [("text", "two")]]


def test_tars_that_were_joined_keep_samples_that_share_a_key(tmp_path):
    rows = [("a.jpg", b"1"), ("a.txt", b"one"), ("b.txt", b"x"), ("a.jpg", b"2"), ("a.txt", b"two")]
    items, _ = read(write_tar(tmp_path / "t.tar", rows))
    assert [dict(shape(i)) for i in items] == [
        {"image": b"1", "text": "one"},
        {"text": "x"},
        {"image": b"2", "text": "two"},
    ]


SOUND_PAIR = {"speech": b"W", "text": "words"}
PAIR = {"image": b"J", "text": "words"}


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ([("s.jpg", b"J"), ("s.caption", b"words")], PAIR),
        ([("s.jpg", b"J"), ("s.json", b'{"caption": "words", "url": "u"}')], PAIR),
        ([("s.jpg", b"J"), ("s.txt", b"words"), ("s.json", b'{"caption": "other"}')], PAIR),
        ([("s.jpg", b"J"), ("s.txt", b"words"), ("s.json", b'{"text": [3, 4]}')], PAIR),
        ([("s.jpg", b"J"), ("s.txt", b""), ("s.json", b'{"caption": "words"}')], PAIR),
        ([("s.JPG", b"J"), ("./s.txt", b"words")], PAIR),
        ([("s.0.JPG", b"J"), ("s.json", b'{"segments": [{"type": "image", "part": "0.JPG"}]}')], {"image": b"J"}),
        ([("s.input.jpg", b"J"), ("s.outputs.txt", b"words")], PAIR),
        ([("s.v1.jpg", b"J"), ("s.v1.txt", b"words"), ("s.v1.json", b'{"url": "u"}')], PAIR),
        ([("s.jpg", b"J"), ("s.txt", b"\xef\xbb\xbfwords")], PAIR),
        ([("s.flac", b"W"), ("s.json", b'{"text": "words"}')], SOUND_PAIR),
        ([("s.wav", b"W"), ("s.json", b'{"text": "words", "segments": [{"start": 0, "text": "words"}]}')], SOUND_PAIR),
        ([("s.wav", b"W"), ("s.normalized.txt", b"words"), ("s.original.txt", b"Words!")], SOUND_PAIR),
        ([("s.jpg", b"J"), ("s.txt", b"")], {"image": b"J"}),
        *[([(f"s.{e}", b"J"), ("s.txt", b"words")], PAIR) for e in ("gif", "tif", "bmp", "avif", "jfif")],
    ],
)  # fmt: skip
def test_pairs_keep_both_sides_however_they_are_spelled(tmp_path, members, expected):
    item, account = only(tmp_path, *members)
    assert isinstance(item, Document), item
    assert dict(shape(item)) == expected
    assert account.bad_members[0] == 0


@pytest.mark.parametrize(
    ("members", "reason", "extension"),
    [
        ([("s.m4a", b"?"), ("s.txt", b"t")], raw_account.NOT_READ, ".m4a"),
        ([("s.mp4", b"?"), ("s.jpg", b"J"), ("s.txt", b"t")], raw_account.NOT_READ, ".mp4"),
        ([("s.svg", b"?"), ("s.txt", b"t")], raw_account.NOT_READ, ".svg"),
        ([("s.xyz", b"?"), ("s.txt", b"t")], raw_account.UNKNOWN, ".xyz"),
        ([("s.jpg", b""), ("s.txt", b"t")], raw_account.EMPTY_MEMBER, ".jpg"),
        ([("s.caption", b"t")], raw_account.ALONE, ".caption"),
        ([("s.json", b'{"caption": "t", "url": "u"}')], raw_account.ALONE, ".json"),
        ([("84-121.trans.txt", b"84-121-0000 WORDS")], raw_account.ALONE, ".txt"),
        ([("s.normalized.txt", b"words"), ("s.original.txt", b"Words!")], raw_account.ALONE, ".txt"),
        ([("s.a.jpg", b"J"), ("s.b.jpg", b"K"), ("s.txt", b"t")], raw_account.SEVERAL, ".jpg"),
        ([("s.v1.txt", b"t"), ("s.v2.txt", b"u")], raw_account.SEVERAL, ".txt"),
        ([("s.jpg", b"J"), ("s.txt", b"t"), ("s.TXT", b"t")], raw_account.SEVERAL, ".txt"),
        ([("s.jpg", (tarfile.SYMTYPE, "/etc/passwd")), ("s.txt", b"t")], raw_account.LINK, ".jpg"),
        ([("s.jpg", (tarfile.LNKTYPE, "s.jpg")), ("s.txt", b"t")], raw_account.LINK, ".jpg"),
        ([("s.jpg", (tarfile.FIFOTYPE, "")), ("s.txt", b"t")], raw_account.SPECIAL, ".jpg"),
        ([("s.jpg", b"J"), ("s.txt", "t".encode("utf-16"))], raw_account.UNREADABLE, ".txt"),
        ([("s.json", b"[" * 100_000), ("s.txt", b"t")], raw_account.UNREADABLE, ".json"),
        ([("s.json", b"1" * 5000), ("s.txt", b"t")], raw_account.UNREADABLE, ".json"),
        ([("s.jpg", b"J"), ("s.json", b'{"text": "lone \\ud83d"}')], raw_account.UNREADABLE, ".json"),
        ([("s.json", b'{"segments": [{"type": ["image"], "part": "0.jpg"}]}'), ("s.0.jpg", b"J")],
         raw_account.UNREADABLE, ".json"),
    ],
)  # fmt: skip
def test_a_sample_that_loses_a_part_is_left_out_whole_and_counted_by_extension(tmp_path, members, reason, extension):
    item, account = only(tmp_path, *members)
    assert isinstance(item, BadSample)
    assert account.left_out[reason, extension] >= 1, account.text()
    assert account.bad_members == (len(members), len(members))
    assert not account.used


def test_links_lead_to_their_members_across_parts_and_nowhere_else(tmp_path):
    members = [("d/a.jpg", b"J"), ("d/a.txt", b"one"), ("d/b.jpg", (tarfile.LNKTYPE, "d/a.jpg")), ("d/b.txt", b"two"),
               ("d/c.jpg", (tarfile.SYMTYPE, "../d/b.jpg")), ("d/c.txt", b"three")]  # fmt: skip
    path = write_tar(tmp_path / "t.tar", members)
    items = [item for part in index_parts(path, 1) for item in read(path, part)[0]]
    assert [dict(shape(i))["image"] for i in items] == [b"J"] * 3
    packed, account = read(write_tar(tmp_path / "t.tgz", members))
    assert [type(i) for i in packed] == [Document, BadSample, BadSample]
    assert account.left_out[raw_account.PACKED_LINK, ".jpg"] == 2


def test_a_page_keeps_its_text_where_a_picture_is_missing_and_counts_it(tmp_path):
    page = {"images": ["a.jpg", "", "b.jpg", None], "texts": ["", "one", None, "two"]}
    item, _ = only(tmp_path, ("s.json", json.dumps(page).encode()), ("s.b.jpg", b"J"))
    assert shape(item) == [("text", "one"), ("image", b"J"), ("text", "two")]
    assert item.missing == ("a.jpg",)
    page = {"images": ["http://x/1", "http://x/2", None], "texts": [None, None, "words"]}
    item, _ = only(tmp_path, ("s.json", json.dumps(page).encode()), ("s.1.png", b"P"))
    assert (shape(item), item.missing) == ([("image", b"P"), ("text", "words")], ("http://x/1",))
    both = {"images": ["a.jpg"], "texts": ["words"]}
    item, _ = only(tmp_path, ("s.json", json.dumps(both).encode()), ("s.a.jpg", b"J"))
    assert isinstance(item, BadSample)


def test_what_is_as_meant_is_counted_and_is_no_damage(tmp_path):
    members = [("folder", (tarfile.DIRTYPE, "")), ("._a.jpg", b"m"), ("d/.DS_Store", b"s"), ("__MACOSX/x.jpg", b"m"),
               ("a.txt", b""), ("b.txt", b"words"), ("b.caption", b"words"), ("b.cls", b"3"), ("c.npz", b"z"),
               ("c.jpg", b"J"), ("d.NPZ", b"z")]  # fmt: skip
    items, account = read(write_tar(tmp_path / "t.tar", members), reading=Reading(ignore=frozenset({"npz"})))
    assert [shape(i) for i in items] == ["empty", [("text", "words")], [("image", b"J")], "of an extension to ignore"]
    assert account.bad_members == (0, 4)
    assert account.left_out == Counter({
        ("a folder", ""): 1, ("a hidden or system file", ".jpg"): 2, ("a hidden or system file", ""): 1,
        ("empty", ".txt"): 1, ("another text of a sample whose text was taken", ".caption"): 1,
        ("metadata beside a sample", ".cls"): 1, ("of an extension to ignore", ".npz"): 2,
    })  # fmt: skip


def test_the_text_stands_under_the_key_that_was_named(tmp_path):
    reading = Reading(text_keys=("prompt",))
    members = [("s.jpg", b"J"), ("s.txt", b"file"), ("s.json", b'{"prompt": "words", "caption": "no"}')]
    assert dict(shape(only(tmp_path, *members, reading=reading)[0])) == PAIR
    assert dict(shape(only(tmp_path, *members[:2], reading=reading)[0]))["text"] == "file"
    lines = tmp_path / "t.jsonl"
    lines.write_text('{"prompt": "one", "image": "x"}\n{"text": "two"}\n')
    assert [shape(i) for i in read(lines, reading=reading)[0]] == [
        [("text", "one")], "cannot be read: KeyError: 'prompt'",
    ]  # fmt: skip
    assert [shape(i) for i in read(lines)[0]] == ["cannot be read: KeyError: 'text'", [("text", "two")]]


def test_of_a_list_of_captions_the_user_says_which_one_and_is_told_how(tmp_path):
    members = [("s.wav", b"W"), ("s.json", b'{"text": ["words", "other words"]}')]
    item, _ = only(tmp_path, *members)
    assert isinstance(item, BadSample)
    assert "--text-key text.0" in item.reason
    assert dict(shape(only(tmp_path, *members, reading=Reading(text_keys=("text.0",)))[0])) == SOUND_PAIR
    for key in ("text.2", "text.x", "url.0"):
        assert dict(shape(only(tmp_path, *members, reading=Reading(text_keys=(key,)))[0])) == {"speech": b"W"}


@pytest.mark.parametrize(
    ("described", "lost"),
    [
        ({"description": "a red house"}, True),
        ({"text_list": ["A house.", "It is red."], "image_info": [{"matched_text_index": 0}]}, True),  # as of MMC4
        ({"url": "u", "status": "success", "width": 3, "exif": '{"Image Make": "of a camera"}', "error": None}, False),
        ({"caption": None, "title": "a red house"}, False),
        ({"caption": [], "title": "a red house"}, False),
    ],
)
def test_a_picture_whose_json_has_its_text_under_another_key_is_not_taken_for_one_without_text(
    tmp_path, described, lost
):
    item, account = only(tmp_path, ("s.jpg", b"J"), ("s.json", json.dumps(described).encode()))
    assert dict(shape(item)) == {"image": b"J"}
    assert account.bad_members[0] == account.left_out[raw_account.NO_TEXT, ".json"] == int(lost)


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b'{"caption": "c", "more": ' + b'{"a":' * 100_000, b"{", b"", b"\xff", b"7"]
)
def test_a_json_that_cannot_be_read_costs_its_sample_alone_and_is_counted_as_that(tmp_path, content):
    bad, good = [("s.json", content), ("s.jpg", b"J")], [("t.jpg", b"J"), ("t.txt", b"words")]
    items, account = read(write_tar(tmp_path / "t.tar", [*bad, *good]))
    assert isinstance(items[0], BadSample)
    assert dict(shape(items[1])) == PAIR
    assert account.samples_left_out == {raw_account.UNREADABLE: 1}


def test_lines_are_members_and_each_has_a_fate(tmp_path):
    content = b"\n".join([
        b'\xef\xbb\xbf{"text": "first"}\r', b"\r", b'{"text": ""}', b'{"caption": "c"}', b'{"text": "lone \\ud83d"}',
        b'{"text": null}', b'{"text": "words", "audio_filepath": "a.wav"}', b"[" * 100_000, b"1" * 5000,
        b'{"text": "\xff"}', b'{"text": "last"}',
    ])  # fmt: skip
    for name, packed in (("a.jsonl", content), ("a.ndjson.gz", gzip.compress(content)),
                         ("a.JSONL.bz2", bz2.compress(content)), ("a.jsonl.xz", lzma.compress(content))):  # fmt: skip
        (tmp_path / name).write_bytes(packed)
        items, account = read(tmp_path / name)
        assert [i.segments[0].data for i in items if isinstance(i, Document)] == ["first", "c", "last"]
        assert (account.members, account.used) == (11, Counter(text=3))
        assert account.left_out[raw_account.ALONE, ".jsonl"] == account.left_out[raw_account.EMPTY, ".jsonl"] == 1
        assert account.bad_members == (6, 9)
    (tmp_path / "u.jsonl").write_bytes('{"text": "x"}\n'.encode("utf-16"))
    with pytest.raises(UserError, match="UTF-16"):
        read(tmp_path / "u.jsonl")


def test_files_of_an_input_folder_that_are_not_read_are_counted(tmp_path):
    write_tar(tmp_path / "00000.tar", [("a.txt", b"t")])
    write_tar(tmp_path / "more.TGZ", [("a.txt", b"t")])
    for name in (
        "00000.parquet",
        "00000_stats.json",
        "README.md",
        "summary.json",
        ".DS_Store",
        "b.tar.zst",
        "c.parquet",
        "loose.jpg",
    ):
        (tmp_path / name).write_bytes(b"x")
    account = Account()
    assert [p.name for p in expand_inputs([str(tmp_path)], account)] == ["00000.tar", "more.TGZ"]
    assert account.bad_files == (3, 5)
    assert account.files_left_out[raw_account.NOT_READ, ".tar.zst"] == 1
    with pytest.raises(UserError, match="zst files are not read"):
        read(tmp_path / "b.tar.zst")


@pytest.mark.parametrize(
    "name", ["a.jpg", "a/b.c.d", "./a.x", "d.v1/a.txt", "d.v1/a", "a", "a.", "x/y.tar.gz", "ü.JPG", "a b.c"]
)
def test_keys_are_those_of_webdataset(name):
    key, extension = webdataset.tariterators.base_plus_ext(name)
    header = _header(tarfile.TarInfo(name))
    assert header.key == key
    assert header.extension == (extension or "").lower()


def test_a_file_that_shrinks_while_it_is_read_is_one_clear_message(tmp_path):
    path = write_tar(tmp_path / "t.tar", [(f"{i}.txt", b"x" * 3000) for i in range(200)])
    items = read_documents(path)
    next(items)
    Path(path).write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(UserError, match=r"t\.tar: not a readable tar: it ends inside member"):
        list(items)


def test_no_extension_is_both_read_and_known_as_not_read():
    assert not NOT_READ_EXTENSIONS & {*IMAGE_EXTENSIONS, *SPEECH_EXTENSIONS}
