"""Replaces files in one step, so that nobody reads a partly written file."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """Replace `path` by `content`, text as UTF-8.

    Whoever reads it meanwhile, or after a crash, finds the old content or the new content, never a part. The bytes are
    on the disk when this returns. Raises OSError; then the old content is still there.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
