"""JSON lines, one {"text": ...} a line, read within bounds: a line is never held whole where it is longer than a text
may be, however small the gzip that it comes from."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from io import BufferedIOBase
from pathlib import Path

from mom_tokenizers.errors import UserError

MAX_CHARACTERS = 10_000_000
"""Of a text: that is three of the longest novels. Longer ones belong cut at places that make sense."""
MAX_LINE_BYTES = 12 * MAX_CHARACTERS + (1 << 20)
"""What such a text may take as JSON, where every character is escaped (12 bytes each), beside other fields."""
_BLOCK = 1 << 20


def lines(
    path: Path, start: int = 0, number: int = 0, end: int | None = None
) -> Iterator[tuple[str, int, bytes | int]]:
    """(key, offset, line) of the lines that begin in bytes [start, end) of the file as unpacked, `number` of them being
    before. A line longer than MAX_LINE_BYTES gives its length in place of its bytes.

    Raises UserError where the gzip is damaged.
    """
    at = start
    try:
        with gzip.open(path, "rb") if path.name.endswith(".gz") else open(path, "rb") as file:
            file.seek(at)
            while end is None or at < end:
                line = file.readline(MAX_LINE_BYTES)
                if not line:
                    return
                size = len(line)
                if size == MAX_LINE_BYTES and not line.endswith(b"\n"):
                    rest = _skip_line(file)
                    size += rest
                number += 1
                yield f"{path.name}:{number}", at, line if size == len(line) else size
                at += size
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: not readable as gzip: {error}") from error


def _skip_line(file: BufferedIOBase) -> int:
    """Read on to the end of the line; how many bytes that were."""
    skipped = 0
    while block := file.readline(_BLOCK):
        skipped += len(block)
        if block.endswith(b"\n"):
            break
    return skipped


def text_of(line: bytes) -> str:
    """The text of a line. Raises ValueError, KeyError, TypeError or RecursionError where it has none."""
    text = json.loads(line)["text"]
    if not isinstance(text, str):
        raise TypeError("'text' is not a string")
    return text
