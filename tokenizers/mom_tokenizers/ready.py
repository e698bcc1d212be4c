"""Ready-made ids: a modality of any kind whose ids were made by another program, with a tokenizer unknown here.

    music: {kind: ids, size: 2048, made_by: "MusicGen's EnCodec, 32 kHz, first codebook"}

Documents hold them as .npy members, or as JSON lists, which are converted to .npy.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.lib import format as npy

from mom_tokenizers.errors import UserError

MAGIC = npy.MAGIC_PREFIX
KEYS = {"kind", "size", "made_by"}
_LARGEST = 1 << 31


def as_npy(ids: Sequence[int]) -> bytes:
    """A list of ids as the bytes of a .npy file. Raises UserError for anything but whole numbers of 32 bits."""
    if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < 1 << 32 for i in ids):
        raise UserError("'ids' must be a list of whole numbers from 0 on")
    file = io.BytesIO()
    npy.write_array(file, np.array(ids, np.uint32), allow_pickle=False)
    return file.getvalue()


def read_npy(data: bytes) -> np.ndarray:
    """The array (n,) of integers in the bytes of a .npy file. It never unpickles, and takes no memory beyond the bytes.

    Raises UserError for anything else.
    """
    if not data.startswith(MAGIC):
        raise UserError("not a .npy file, which is how ready-made ids come")
    file = io.BytesIO(data)
    try:
        version = npy.read_magic(file)
        header = npy.read_array_header_1_0(file) if version == (1, 0) else npy.read_array_header_2_0(file)
    except Exception as error:  # the header is parsed as Python text, which can raise many kinds of exceptions
        raise UserError(f"not a .npy file that can be read: {error}") from error
    shape, _, dtype = header
    if dtype.kind not in "iu" or len(shape) != 1:
        raise UserError(f"expected a row of integers, got {dtype} of shape {shape}")
    if len(data) - file.tell() != shape[0] * dtype.itemsize:
        raise UserError(f"its header promises {shape[0]} ids of {dtype}, and {len(data) - file.tell()} bytes follow")
    return np.frombuffer(data, dtype, offset=file.tell())


class ReadyIds:
    """The tokenizer for ready-made ids: it reads and checks the ids in the bytes of a .npy file. It cannot decode."""

    kind = "ids"

    def __init__(self, size: int, made_by: str):
        """All ids are from 0 to below `size`. `made_by` says in words what made them; where it differs, the ids belong
        to another tokenizer."""
        if type(size) is not int or not 0 < size <= _LARGEST:
            raise UserError(f"size must be a whole number from 1 to {_LARGEST}, got {size!r}")
        if not isinstance(made_by, str) or not made_by.strip():
            raise UserError(f"made_by must say in words what made the ids, got {made_by!r}")
        self.size, self.made_by = size, made_by

    def encode(self, value: bytes) -> np.ndarray:
        """The ids, uint32 (n,). Raises UserError for an id that is not below `size`."""
        ids = read_npy(value)
        low, high = (int(ids.min()), int(ids.max())) if len(ids) else (0, 0)
        if low < 0 or high >= self.size:
            raise UserError(f"ids run from {low} to {high}, but 0 to {self.size - 1} is all there is (size)")
        return ids.astype(np.uint32)

    def encode_batch(self, values: Sequence[bytes]) -> list[np.ndarray]:
        return [self.encode(value) for value in values]

    def decode(self, ids: Sequence[int] | np.ndarray, /) -> NoReturn:
        raise UserError(f"made by {self.made_by}, which is not here to decode them")

    def fingerprint(self) -> str:
        """16 hexadecimal digits of a sha256 over the declared kind, size and maker."""
        declared = json.dumps([self.kind, self.size, self.made_by])
        return hashlib.sha256(declared.encode()).hexdigest()[:16]

    def save(self, directory: str | Path) -> NoReturn:
        raise UserError("ready-made ids have no files: they are declared in tokenizers.yaml")

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "fingerprint": self.fingerprint(), "size": self.size, "made_by": self.made_by}
