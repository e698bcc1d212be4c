"""Raw documents: what people have in their WebDataset tars, read into one shape.

Conventions, told apart per sample by its members:

    KEY.json with "segments"               interleaved (ours); parts lie beside it as KEY.0.jpg, KEY.1.flac;
                                           ready-made ids as {"type": "music", "ids": [5, 3]}, or a part KEY.2.npy
    KEY.json with "images" and "texts"     OBELICS: parallel lists, one of the two null at each place;
                                           an image names a part (its number or its file name)
    KEY.jpg|png|webp  + KEY.txt            captioned pictures (img2dataset: CC12M, LAION)
    KEY.wav|flac|...  + KEY.txt            transcribed speech
    KEY.txt                                text
    FILE.jsonl[.gz]                        text, one {"text": ...} a line, no tar
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import operator
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mom_data.json_lines import MAX_LINE_BYTES, text_of
from mom_data.json_lines import lines as json_lines
from mom_tokenizers.errors import UserError
from mom_tokenizers.pictures import IMAGE_EXTENSIONS, TooManyPixels, picture_size
from mom_tokenizers.ready import as_npy
from mom_tokenizers.recordings import SPEECH_EXTENSIONS, recording_seconds

# WebDataset's rule, that of webdataset.tariterators.base_plus_ext, whose package imports torch.
KEY_AND_EXTENSION = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
PICKLES = ("pkl", "pickle", "pyd", "pth", "pt")
# Of captioned pairs, this share has its text first (text -> image); the rest is read image -> text.
TEXT_FIRST_SHARE = 0.8


TOO_LARGE = "above the limits"
"""How the reason begins where a document is left out for its size."""
MAX_MEMBER_BYTES = 4 << 30
"""Of a picture's or a recording's file: two hours of sound in two channels of 24 bits are half of it."""
_TEXTS = ("txt", "json", "npy")  # extensions of members that are bounded as a text is


@dataclass(frozen=True)
class Segment:
    """A run of one modality: `data` is the text, or the encoded bytes of a picture or a recording, or those of a .npy
    of ready-made ids."""

    modality: str
    data: str | bytes


@dataclass(frozen=True)
class Document:
    key: str
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class BadSample:
    """A sample that could not be read: counted and skipped by whoever reads."""

    key: str
    reason: str


@dataclass(frozen=True)
class Part:
    """Consecutive samples of a raw file: `documents` from number `first` on, in its bytes [start, end) as unpacked
    (end None: to its end); `wanted` of them are on the chosen side of a split."""

    start: int
    end: int | None
    first: int
    documents: int
    wanted: int


@dataclass(frozen=True)
class Limits:
    """What a segment may measure; None is no limit. Sizes are read from headers, nothing is decompressed."""

    pixels: int | None = None
    seconds: float | None = None
    characters: int | None = None

    def exceeded(self, segment: Segment) -> str | None:
        """Why the segment is too large, or None; also where the header cannot be read: its tokenizer says why."""
        if isinstance(segment.data, str):
            n = len(segment.data)
            return f"{n} characters" if self.characters is not None and n > self.characters else None
        try:
            if segment.modality == "image" and self.pixels is not None:
                width, height = picture_size(segment.data)
                return f"picture of {width} x {height}" if width * height > self.pixels else None
            if segment.modality == "speech" and self.seconds is not None:
                seconds = recording_seconds(segment.data)
                return f"recording of {seconds:.1f} s" if seconds > self.seconds else None
        except TooManyPixels as error:
            return str(error)
        except ValueError:
            pass
        return None


def expand_inputs(patterns: list[str]) -> list[Path]:
    """Files named by paths, globs or folders (searched for tars and JSON lines), sorted and unique.

    Raises ValueError naming every pattern that matches nothing.
    """
    found: dict[Path, None] = {}
    empty = []
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            files = [f for f in path.rglob("*") if f.name.endswith((".tar", ".tar.gz", ".jsonl", ".jsonl.gz"))]
        elif path.is_file():
            files = [path]
        else:
            anchor = Path(path.anchor) if path.is_absolute() else Path()
            files = [f for f in anchor.glob(str(path.relative_to(anchor))) if f.is_file()]
        if not files:
            empty.append(pattern)
        found.update(dict.fromkeys(sorted(files)))
    if empty:
        raise UserError(
            "no input matches "
            + ", ".join(repr(p) for p in empty)
            + " (a .tar, .tar.gz or .jsonl file, a glob, or a folder)"
        )
    return list(found)


def index_parts(path: Path, part_bytes: int, wanted: Callable[[str], bool] | None = None) -> list[Part]:
    """Cut a raw file into parts of at least `part_bytes`, from its headers alone (of JSON lines: its line ends).

    A function of the file and `part_bytes`. What is gzipped cannot be entered in the middle and is one part. `wanted`
    tells of a key whether the document counts as wanted. Raises ValueError where the file is damaged.
    """
    parts: list[Part] = []
    start = first = documents = chosen = 0
    lines = path.name.endswith((".jsonl", ".jsonl.gz"))
    keys = ((key, at) for key, at, _ in json_lines(path)) if lines else _tar_keys(path)
    for key, at in keys:
        if documents and at - start >= part_bytes and not path.name.endswith(".gz"):
            parts.append(Part(start, at, first, documents, chosen))
            start, first, documents, chosen = at, first + documents, 0, 0
        documents += 1
        chosen += wanted is None or wanted(key)
    return [*parts, Part(start, None, first, documents, chosen)]


def read_documents(path: str | Path, part: Part | None = None) -> Iterator[Document | BadSample]:
    """Documents of one raw file, or of a part of it, in file order. Nothing is unpickled, nothing is unpacked to disk.

    Raises ValueError when the file itself is damaged (truncated, a broken header): what could still be read
    has been yielded by then.
    """
    path = Path(path)
    read = _read_json_lines if path.name.endswith((".jsonl", ".jsonl.gz")) else _read_tar
    number = 0
    for number, document in enumerate(read(path, part), 1):  # noqa: B007  # counted below
        yield document
    if part is not None and number != part.documents:
        raise UserError(
            f"{path}: {number} samples from byte {part.start} on, {part.documents} when it was indexed: it has changed"
        )


def _read_tar(path: Path, part: Part | None) -> Iterator[Document | BadSample]:
    def members() -> Iterator[tuple[str, str, bytes | int]]:
        for tar, member, key, extension in _tar_members(path, part):
            if member.size > (MAX_LINE_BYTES if extension.rpartition(".")[2] in _TEXTS else MAX_MEMBER_BYTES):
                yield key, extension, member.size  # not read: what a gzip unpacks to may be larger than the memory
                continue
            extracted = tar.extractfile(member)
            assert extracted is not None
            data = extracted.read()
            if len(data) != member.size:
                raise UserError(f"{path}: truncated inside member {member.name}")
            yield key, extension, data

    for key, group in itertools.groupby(members(), key=operator.itemgetter(0)):
        sample: dict[str, bytes] = {}
        twice = large = None
        for _, extension, data in group:
            twice = extension if extension in sample else twice
            if isinstance(data, int):
                large = f"{TOO_LARGE}: member {extension!r} of {data} bytes"
            else:
                sample[extension] = data
        if large is not None:
            yield BadSample(key, large)
            continue
        try:
            if twice is not None:
                raise ValueError(f"two members {twice!r}")
            yield Document(key, _segments(key, sample))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            yield BadSample(key, f"{type(error).__name__}: {error}")


def _tar_keys(path: Path) -> Iterator[tuple[str, int]]:
    """(key, offset of its first header) of every sample."""
    last = None
    for _, member, key, _ in _tar_members(path, None):
        if key != last:
            yield key, member.offset
            last = key


def _tar_members(path: Path, part: Part | None) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo, str, str]]:
    """(tar, member, key, lower-case extension) of regular members with an extension, strictly.

    Python's tarfile takes a damaged header for the end of the archive, and webdataset with it: half a shard
    vanishes without a word. So whatever follows the last member must be the zeros that end a tar.
    """
    try:
        with gzip.open(path, "rb") if path.name.endswith(".gz") else open(path, "rb") as file:
            size = None if path.name.endswith(".gz") else os.fstat(file.fileno()).st_size
            file.seek(part.start if part else 0)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while member := tar.next():
                    if part and part.end is not None and member.offset >= part.end:
                        return
                    if size is not None and member.offset_data + member.size > size and member.sparse is None:
                        raise UserError(f"{path}: truncated inside member {member.name}")
                    name = KEY_AND_EXTENSION.match(member.name)
                    if member.isfile() and member.sparse is None and name is not None:
                        yield tar, member, name[1], name[2].lower()
                    tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every header otherwise
                file.seek(tar.offset)
                trailer = file.read(1024)
                if not trailer:
                    raise UserError(f"{path}: truncated: the zeros that end a tar are missing. Fetch the file again.")
                while block := trailer or file.read(1 << 20):
                    if block.strip(b"\0"):
                        raise UserError(
                            f"{path}: damaged near byte {tar.offset}: not a tar header there, and data follows. "
                            "Fetch the file again, or repack what is readable."
                        )
                    trailer = b""
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError):
            raise
        raise UserError(f"{path}: not a readable tar: {error}") from error


def _read_json_lines(path: Path, part: Part | None) -> Iterator[Document | BadSample]:
    where = (part.start, part.first, part.end) if part else (0, 0, None)
    for key, _, line in json_lines(path, *where):
        try:
            if isinstance(line, int):
                yield BadSample(key, f"{TOO_LARGE}: line of {line} bytes")
            else:
                yield Document(key, (Segment("text", text_of(line)),))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            yield BadSample(key, f"{type(error).__name__}: {error}")


def _segments(key: str, parts: dict[str, bytes]) -> tuple[Segment, ...]:
    if pickled := [name for name in parts if name.split(".")[-1] in PICKLES]:
        raise ValueError(f"member {pickled[0]!r} holds Python objects, which could run code: refused")
    meta = json.loads(parts["json"]) if "json" in parts else {}
    if "segments" in meta:
        return tuple(_declared(segment, parts) for segment in meta["segments"])
    if "images" in meta and "texts" in meta:
        return _obelics(meta, parts)

    media = [Segment("image", parts[e]) for e in IMAGE_EXTENSIONS if e in parts]
    media += [Segment("speech", parts[e]) for e in SPEECH_EXTENSIONS if e in parts]
    texts = [Segment("text", parts["txt"].decode("utf-8"))] if "txt" in parts else []
    if not media and not texts:
        raise ValueError(f"no text, picture or recording among its members ({', '.join(sorted(parts))})")
    text_first = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest(), "little") < (
        TEXT_FIRST_SHARE * 2**32
    )
    return tuple(texts + media if text_first else media + texts)


def _declared(segment: dict[str, Any], parts: dict[str, bytes]) -> Segment:
    if segment["type"] == "text":
        if not isinstance(segment["text"], str):
            raise TypeError("a text segment's 'text' is not a string")
        return Segment("text", segment["text"])
    if "ids" in segment:
        if "part" in segment:
            raise ValueError("a segment has either 'ids' or a 'part', not both")
        return Segment(segment["type"], as_npy(segment["ids"]))
    if segment["part"] not in parts:
        raise ValueError(f"part {segment['part']!r} is not in the tar")
    return Segment(segment["type"], parts[segment["part"]])


def _obelics(meta: dict[str, Any], parts: dict[str, bytes]) -> tuple[Segment, ...]:
    images, texts = meta["images"], meta["texts"]
    if len(images) != len(texts):
        raise ValueError(f"'images' has {len(images)} entries and 'texts' {len(texts)}; they must be parallel")
    segments = []
    pictures = 0
    for image, text in zip(images, texts, strict=True):
        if text is not None:
            segments.append(Segment("text", text))
        elif image is not None:
            names = [str(image), *(f"{pictures}.{e}" for e in IMAGE_EXTENSIONS)]
            name = next((n for n in names if n in parts), None)
            if name is None:
                raise ValueError(f"picture {pictures} ({image!r}) is not in the tar")
            segments.append(Segment("image", parts[name]))
            pictures += 1
    return tuple(segments)
