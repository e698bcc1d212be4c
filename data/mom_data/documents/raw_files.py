"""File formats of raw input: which files are read, by their names, and how their bytes are unpacked while reading.

The first bytes of a file decide how it is unpacked, not its name, because some servers and download tools unpack a .gz
file and keep its name.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from mom_tokenizers.errors import UserError

_OPENERS: dict[bytes, Callable[..., Any]] = {
    b"\x1f\x8b\x08": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open,
}  # fmt: skip
# What follows "BZh" and a digit in a bzip2 file. "BZh" alone does not suffice: a tar may begin with any letters.
_BZIP2_BLOCK = (b"1AY&SY", b"\x17rE8P\x90")
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
LINE_SUFFIXES = tuple(f".{name}{packed}" for name in ("jsonl", "ndjson") for packed in ("", ".gz", ".bz2", ".xz"))
READ_SUFFIXES = (*TAR_SUFFIXES, *LINE_SUFFIXES)
UNREAD_PACKING = (".zst", ".lz4", ".zip", ".7z", ".rar")


def is_lines(path: Path) -> bool:
    """Whether a file holds JSON lines; otherwise it is a tar. Raises UserError for a format that is not read."""
    name = path.name.lower()
    if name.endswith(UNREAD_PACKING):
        raise UserError(f"{path}: {Path(name).suffix} files are not read: unpack it to a plain .tar or .jsonl first")
    return name.endswith(LINE_SUFFIXES)


def is_compressed(path: Path) -> bool:
    """Whether the file's first bytes are those of a compression that is unpacked while reading."""
    return _opener(path) is not open


def _opener(path: Path) -> Callable[..., Any]:
    try:
        with open(path, "rb") as file:
            head = file.read(10)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    if head.startswith(b"BZh") and head[4:] not in _BZIP2_BLOCK:
        return open
    return next((opener for magic, opener in _OPENERS.items() if head.startswith(magic)), open)


def opened(path: Path) -> IO[bytes]:
    """The file, opened so that reading gives its unpacked bytes. Raises UserError where it cannot be opened."""
    opener = _opener(path)
    try:
        return opener(path, "rb")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error


@contextmanager
def readable(path: Path, kind: str) -> Iterator[None]:
    """Turn the exceptions that a damaged file raises into a UserError that names the file."""
    try:
        yield
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        raise UserError(f"{path}: not a readable {kind}: {error}") from error
