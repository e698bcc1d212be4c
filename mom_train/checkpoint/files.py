"""Reads and writes the files of checkpoints, in a folder or at a URL, and computes checksums while writing."""

from __future__ import annotations

import io
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from torch.distributed.checkpoint import filesystem

from mom_tokenizers.errors import UserError, user_path

METADATA = ".metadata"
"""Name of the index of the tensors that DCP (torch.distributed.checkpoint) writes. A checkpoint that has it is
committed."""


@dataclass(frozen=True)
class Sum:
    """Size and checksum of a file."""

    size: int
    crc32: int


class _Summed(io.RawIOBase):
    """A file that is written from front to back, with the size and checksum of what was written."""

    def __init__(self, stream: Any):
        self._stream, self.size, self.crc32 = stream, 0, 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            self._stream.write(data)
        except OSError as error:
            self.error = error
            raise
        size = memoryview(data).nbytes
        self.size += size
        self.crc32 = zlib.crc32(data, self.crc32)
        return size

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        self._stream.flush()

    def fileno(self) -> int:
        return int(self._stream.fileno())


class Files(filesystem.FileSystemBase):
    """A folder or URL that DCP and this package read and write. Paths are strings.

    `written` has the size and checksum of each file that was written, by name.
    """

    def __init__(self, root: str):
        try:
            self.fs, self.root = url_to_fs(root, use_listings_cache=False)  # other ranks write too
        except (ImportError, ValueError) as error:
            raise UserError(f"{root}: {error}") from None
        self.local = isinstance(self.fs, LocalFileSystem)
        self.written: dict[str, Sum] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        with self.fs.open(str(path), mode) as stream:
            if "r" in mode:
                yield stream
                return
            summed = _Summed(stream)
            try:
                yield summed
            except Exception:
                if summed.error is not None:  # torch.save hides it behind "unexpected pos"
                    raise summed.error from None
                raise
            stream.flush()
            self.written[file_name(path)] = Sum(summed.size, summed.crc32)

    def read(self, path: str) -> bytes:
        """The content of a file. Raises FileNotFoundError, or UserError if the file is there but cannot be read."""
        try:
            return bytes(self.fs.cat_file(path))
        except FileNotFoundError:
            raise
        except OSError:
            with user_path(path):
                raise

    def write(self, path: str, data: bytes) -> None:
        """Writes a file completely or not at all. The data is on the disk when this returns."""
        self.written[file_name(path)] = Sum(len(data), zlib.crc32(data))
        if not self.local:
            self.fs.pipe_file(path, data)  # an object store shows an object only when it is complete
            return
        partial = f"{path}.partial"
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        self.rename(partial, path)

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        """Renames a file. On a local disk the change is on the disk when this returns."""
        if not self.local:
            self.fs.mv(str(path), str(new_path))
            return
        os.replace(path, new_path)
        folder = os.open(os.path.dirname(new_path), os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def remove(self, folder: str) -> None:
        """Removes a folder with its content, the index first, so that a half-removed checkpoint does not look
        committed."""
        if self.fs.exists(f"{folder}/{METADATA}"):
            self.fs.rm_file(f"{folder}/{METADATA}")
        if self.local:
            with suppress(FileNotFoundError):
                shutil.rmtree(folder)
        elif self.fs.exists(folder):
            self.fs.rm(folder, recursive=True)

    def names(self, folder: str) -> list[str]:
        """Names of the files and folders in `folder`."""
        try:
            return sorted(file_name(path) for path in self.fs.ls(folder, detail=False))
        except FileNotFoundError:
            return []

    def folders(self, folder: str) -> list[str]:
        """Names of the folders in `folder`."""
        try:
            found = self.fs.ls(folder, detail=True)
        except FileNotFoundError:
            return []
        return sorted(file_name(entry["name"]) for entry in found if entry["type"] == "directory")

    def size(self, path: str) -> int:
        return int(self.fs.size(path))

    def init_path(self, path: str | os.PathLike[str]) -> str:
        return str(path)

    def concat_path(self, path: str | os.PathLike[str], suffix: str) -> str:
        return f"{path}/{suffix}"

    def mkdir(self, path: str | os.PathLike[str]) -> None:
        self.fs.makedirs(str(path), exist_ok=True)

    def exists(self, path: str | os.PathLike[str]) -> bool:
        return bool(self.fs.exists(str(path)))

    def rm_file(self, path: str | os.PathLike[str]) -> None:
        self.fs.rm_file(str(path))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


def file_name(path: str | os.PathLike[str]) -> str:
    """The last part of a path or URL."""
    return str(path).rstrip("/").rsplit("/", 1)[-1]
