"""The interface of every tokenizer, and the fingerprint of a tokenizer's files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mom_tokenizers import errors
from mom_tokenizers.errors import UserError


class Tokenizer(Protocol):
    """The interface of every tokenizer.

    A value is a str, a PIL picture, (waveform, rate), or the bytes of a .npy file. It is encoded as ids (n,) uint32,
    which are below `size`, or as latent patches (n, width) float16, and then `size` is 1.
    """

    kind: str
    size: int

    def encode(self, value: Any) -> np.ndarray: ...
    def encode_batch(self, values: Sequence[Any]) -> list[np.ndarray]: ...
    def decode(self, ids: Sequence[int] | np.ndarray, /) -> Any: ...
    def fingerprint(self) -> str: ...
    def save(self, directory: str | Path) -> None: ...


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises a UserError that names the file where it holds anything else."""
    value = errors.read_json(file)
    if not isinstance(value, dict):
        raise UserError(f"{file}: expected a JSON object")
    return value


def fingerprint_files(kind: str, files: Mapping[str, Path]) -> str:
    """16 hexadecimal digits of a sha256 over the names and contents of config and weight files.

    JSON files are compared by value, without the keys that hold the library version or path of their writer.
    """
    digest = hashlib.sha256(kind.encode())
    for name in sorted(files):
        content = hashlib.sha256()
        if name.endswith(".json"):
            value = {k: v for k, v in read_json(files[name]).items() if k[0:1] != "_" and k != "transformers_version"}
            content.update(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())
        else:
            with open(files[name], "rb") as file:
                while block := file.read(1 << 20):
                    content.update(block)
        digest.update(name.encode() + b"\0" + content.digest())
    return digest.hexdigest()[:16]


def resolved_device(device: str) -> str:
    """The device itself, or for "auto" a GPU where there is one and otherwise the CPU."""
    if device != "auto":
        return device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
