"""Raw documents: what people have in their WebDataset tars, read into one shape.

Conventions, told apart per sample by its members:

    KEY.json with "segments"               interleaved (ours); parts lie beside it as KEY.0.jpg, KEY.1.flac
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
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from webdataset.tariterators import group_by_keys

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
SPEECH_EXTENSIONS = ("wav", "flac", "ogg", "opus", "mp3")
# Of captioned pairs, this share has its text first (text -> image); the rest is read image -> text.
TEXT_FIRST_SHARE = 0.8


@dataclass(frozen=True)
class Segment:
    """A run of one modality: `data` is the text, or the encoded bytes of a picture or a recording."""

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
        raise ValueError(
            "no input matches "
            + ", ".join(repr(p) for p in empty)
            + " (a .tar, .tar.gz or .jsonl file, a glob, or a folder)"
        )
    return list(found)


def read_documents(path: str | Path) -> Iterator[Document | BadSample]:
    """Documents of one raw file, in file order.

    Raises ValueError when the file itself is damaged (truncated, a broken header): what could still be read
    has been yielded by then.
    """
    path = Path(path)
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        yield from _read_json_lines(path)
        return
    for sample in group_by_keys(_tar_members(path)):
        key = sample["__key__"]
        try:
            yield Document(key, _segments(key, sample))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            yield BadSample(key, f"{type(error).__name__}: {error}")


def _tar_members(path: Path) -> Iterator[dict[str, Any]]:
    """Regular members as webdataset's {"fname", "data"}, strictly.

    Python's tarfile takes a damaged header for the end of the archive, and webdataset with it: half a shard
    vanishes without a word. So whatever follows the last member must be the zeros that end a tar.
    """
    try:
        with (
            gzip.open(path, "rb") if path.name.endswith(".gz") else open(path, "rb") as file,
            tarfile.open(fileobj=file, mode="r:") as tar,
        ):
            for member in tar:
                if member.isfile():
                    extracted = tar.extractfile(member)
                    assert extracted is not None
                    data = extracted.read()
                    if len(data) != member.size:
                        raise ValueError(f"{path}: truncated inside member {member.name}")
                    yield {"fname": member.name, "data": data, "__url__": str(path)}
                tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every header otherwise
            file.seek(tar.offset)
            trailer = file.read(1024)
            while block := trailer or file.read(1 << 20):
                if block.strip(b"\0"):
                    raise ValueError(
                        f"{path}: damaged near byte {tar.offset}: not a tar header there, and data follows. "
                        "Fetch the file again, or repack what is readable."
                    )
                trailer = b""
    except (tarfile.TarError, EOFError, gzip.BadGzipFile, OSError) as error:
        if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError):
            raise
        raise ValueError(f"{path}: not a readable tar: {error}") from error


def _read_json_lines(path: Path) -> Iterator[Document | BadSample]:
    with gzip.open(path, "rt") if path.name.endswith(".gz") else open(path) as lines:
        for number, line in enumerate(lines):
            key = f"{path.name}:{number + 1}"
            try:
                text = json.loads(line)["text"]
                if not isinstance(text, str):
                    raise TypeError("'text' is not a string")
                yield Document(key, (Segment("text", text),))
            except (ValueError, KeyError, TypeError) as error:
                yield BadSample(key, f"{type(error).__name__}: {error}")


def _segments(key: str, sample: dict[str, Any]) -> tuple[Segment, ...]:
    parts = {name: data for name, data in sample.items() if not name.startswith("__")}
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
