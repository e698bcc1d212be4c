"""Identifies the contents of a raw file by the sha256 of all its bytes. Results made from a file are kept under this
checksum, never under the file's name and size, which another file can share.

A file is read completely once, and again only after its size, its times or its inode have changed. Reading takes a core
1 s for 0.4 to 1.5 GB where the storage is as fast; tokenizing the same bytes takes tens to thousands of times longer.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock

from mom_data.shards.format import sha256_of
from mom_tokenizers.errors import UserError
from mom_tokenizers.files import write_whole

_known: dict[tuple[str, ...], str] = {}  # _appearance of a file -> its sha256, as this process has found it


def content_of(source: Path, memory: Path) -> str:
    """The sha256 of a file. It is remembered in the folder `memory`, and computed only where the file has changed.

    Raises UserError where the file cannot be read, or changes while it is read.
    """
    path = source.absolute()
    try:
        seen = _appearance(path)
        key = hashlib.sha256(os.fsencode(path)).hexdigest()[:32]
        file = memory / f"{key}.sha256"
        if seen in _known and file.exists():
            return _known[seen]
        memory.mkdir(parents=True, exist_ok=True)
        with FileLock(memory / f"{key}.sha256.lock"):
            digest = _known.get(seen) or _remembered(file, seen)
            if digest is None:
                digest = sha256_of(path)
                if _appearance(path) != seen:
                    raise UserError(f"{source} changes while it is read: start again once it is complete")
            if _remembered(file, seen) is None:
                write_whole(file, json.dumps({"seen": seen, "sha256": digest}))
    except OSError as error:
        raise UserError(f"{source} cannot be read: {error}") from None
    _known[seen] = digest
    return digest


def _appearance(path: Path) -> tuple[str, ...]:
    """What changes when a file is written to, or when another file takes its place. The values are text, because not
    every JSON reader keeps integers of this size exactly."""
    status = path.stat()
    return (str(path), *map(str, (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)))


def _remembered(file: Path, seen: tuple[str, ...]) -> str | None:
    try:
        value = json.loads(file.read_text())
        return str(value["sha256"]) if tuple(value["seen"]) == seen else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None  # the file does not exist, or a crash cut it short


def keep_inputs(folder: Path, files: Sequence[Path]) -> None:
    """Record in FOLDER/inputs.json the input files, and their contents, that everything in `folder` is made from.

    Raises UserError where the record names other files or other contents. The error names the first that differs.
    """
    record = folder / "inputs.json"
    now = {str(file.absolute()): content_of(file, folder / ".contents") for file in files}
    if record.exists():
        before = json.loads(record.read_text())
        other = sorted(f for f in now.keys() | before.keys() if now.get(f) != before.get(f))
        if other:
            gone = "is new" if other[0] not in before else "is gone" if other[0] not in now else "has other contents"
            raise UserError(
                f"{folder} was made from other inputs: {other[0]} {gone} since then. Take another folder, or delete "
                "this one to make it anew"
            )
        return
    write_whole(record, json.dumps(now, indent=1) + "\n")
