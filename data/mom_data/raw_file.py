"""Raw files by their names: which are read, and their bytes, unpacked on the way."""

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

_OPENERS: dict[str, Callable[..., Any]] = {
    ".gz": gzip.open, ".tgz": gzip.open, ".bz2": bz2.open, ".tbz2": bz2.open, ".xz": lzma.open, ".txz": lzma.open,
}  # fmt: skip
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
LINE_SUFFIXES = tuple(f".{name}{packed}" for name in ("jsonl", "ndjson") for packed in ("", ".gz", ".bz2", ".xz"))
READ_SUFFIXES = (*TAR_SUFFIXES, *LINE_SUFFIXES)
UNREAD_PACKING = (".zst", ".lz4", ".zip", ".7z", ".rar")


def is_lines(path: Path) -> bool:
    """Whether a file is one of JSON lines; else it is a tar. Raises UserError for a packing that is not read."""
    name = path.name.lower()
    if name.endswith(UNREAD_PACKING):
        raise UserError(f"{path}: {Path(name).suffix} files are not read: unpack it to a plain .tar or .jsonl first")
    return name.endswith(LINE_SUFFIXES)


def is_compressed(path: Path) -> bool:
    return path.name.lower().endswith(tuple(_OPENERS))


def opened(path: Path) -> IO[bytes]:
    """The file's bytes, unpacked on the way. Raises UserError where it cannot be opened."""
    opener = next((o for suffix, o in _OPENERS.items() if path.name.lower().endswith(suffix)), open)
    try:
        return opener(path, "rb")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error


@contextmanager
def readable(path: Path, kind: str) -> Iterator[None]:
    """Turn what a damaged file raises into a UserError that names it."""
    try:
        yield
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        raise UserError(f"{path}: not a readable {kind}: {error}") from error
