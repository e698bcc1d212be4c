"""Files of JSON lines, with one {"text": ...} on each line, read in bounded memory: a line that is longer than a text
may be is skipped and never held whole, even where it is unpacked from a small compressed file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import IO

from mom_data.documents.raw_files import opened, readable
from mom_tokenizers.errors import UserError

MAX_CHARACTERS = 10_000_000
"""The largest number of characters of a text, about three very long novels. Cut longer texts where it makes sense."""
MAX_LINE_BYTES = 12 * MAX_CHARACTERS + (1 << 20)
"""The bytes that such a text may take as JSON: 12 for each escaped character, and 1 MiB for the other fields."""
_BLOCK = 1 << 20


def lines(
    path: Path, start: int = 0, number: int = 0, end: int | None = None
) -> Iterator[tuple[str, int, bytes | int]]:
    """(key, offset, line) of each line that begins in bytes [start, end) of the unpacked file. `number` lines stand
    before `start`. A line longer than MAX_LINE_BYTES is given by its length in bytes instead of its content.

    Raises UserError where the file is damaged, or is UTF-16.
    """
    at = start
    with readable(path, "file of lines"), opened(path) as file:
        if file.read(2) in (b"\xff\xfe", b"\xfe\xff"):
            raise UserError(f"{path} is UTF-16: make it UTF-8 first, e.g. with iconv -f UTF-16 -t UTF-8")
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


def _skip_line(file: IO[bytes]) -> int:
    """Read on to the end of the line, and return how many bytes were skipped."""
    skipped = 0
    while block := file.readline(_BLOCK):
        skipped += len(block)
        if block.endswith(b"\n"):
            break
    return skipped
