"""Token datasets, opened for reading: the manifest, the indices, and documents by their offsets."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from mom_data.shards import LATENT_BIT, SCHEMA, TokenSegment, sha256_of


@dataclass(frozen=True)
class ShardIndex:
    """Where the documents of one shard lie; arrays as in the index file."""

    token_offset: np.ndarray
    crc32: np.ndarray
    segment_start: np.ndarray
    segment_length: np.ndarray
    segment_modality: np.ndarray
    latent_offset: np.ndarray | None

    def segments(self, document: int) -> tuple[list[int], list[int], list[bool]]:
        """Lengths, modalities and latent flags of a document's segments."""
        s, e = int(self.segment_start[document]), int(self.segment_start[document + 1])
        modality = self.segment_modality[s:e]
        return (
            self.segment_length[s:e].tolist(),
            (modality & ~np.uint8(LATENT_BIT)).tolist(),
            (modality >= LATENT_BIT).tolist(),
        )


class TokenDataset:
    """A folder of token shards, opened for reading.

    Raises ValueError listing everything that is wrong: no manifest, an unknown schema, shards that are missing or
    have another size than the manifest says.
    """

    def __init__(self, folder: Path, shards: str = "*"):
        self.folder = folder
        manifest = folder / "manifest.json"
        if not manifest.is_file():
            raise ValueError(
                f"{folder}: no manifest.json, so no finished dataset. tools/tokenize_shards.py writes one; if it was "
                "interrupted, start it again with the same arguments and it goes on."
            )
        text = manifest.read_bytes()
        self.fingerprint = hashlib.sha256(text).hexdigest()[:16]
        self.manifest = json.loads(text)
        if self.manifest.get("schema") != SCHEMA:
            raise ValueError(f"{manifest}: schema {self.manifest.get('schema')!r}; this version reads {SCHEMA!r}")
        self.modalities: list[str] = self.manifest["modalities"]
        self.tokenizers: dict[str, dict[str, Any]] = self.manifest["tokenizers"]
        self.token_dtype = np.dtype(f"<u{self.manifest['token_bytes']}")
        self.shards = [s for s in self.manifest["shards"] if fnmatch(s["name"], shards)]
        if not any(s["documents"] for s in self.shards):
            raise ValueError(f"{folder}: no document in the shards that match {shards!r}")
        problems = []
        for shard in self.shards:
            path = folder / shard["name"]
            for file in (path, path.with_suffix(".idx")):
                if not file.is_file():
                    problems.append(f"{file.name} is missing")
            if path.is_file() and path.stat().st_size != shard["bytes"]:
                problems.append(f"{path.name} has {path.stat().st_size} bytes, the manifest says {shard['bytes']}")
        if problems:
            raise ValueError(
                f"{folder}: " + "; ".join(problems) + ". Copy them again, or run tools/tokenize_shards.py again."
            )
        self._files: dict[int, int] = {}

    @functools.lru_cache(maxsize=64)  # noqa: B019  # a dataset lives as long as its process
    def index(self, shard: int) -> ShardIndex:
        path = (self.folder / self.shards[shard]["name"]).with_suffix(".idx")
        if sha256_of(path) != self.shards[shard]["index_sha256"]:
            raise ValueError(f"{path}: its checksum is not the manifest's; the index is damaged. Copy it again.")
        arrays = safetensors.numpy.load_file(path)
        return ShardIndex(
            arrays["token_offset"],
            arrays["crc32"],
            arrays["segment_start"],
            arrays["segment_length"],
            arrays["segment_modality"],
            arrays.get("latent_offset"),
        )

    def read(self, shard: int, document: int) -> list[TokenSegment] | None:
        """A document's segments, or None where its bytes do not match their checksum."""
        index = self.index(shard)
        lengths, modalities, latent = index.segments(document)
        n_tokens = sum(n for n, is_latent in zip(lengths, latent, strict=True) if not is_latent)
        n_latents = sum(lengths) - n_tokens
        file = self._open(shard)
        token_bytes = os.pread(file, n_tokens * self.token_dtype.itemsize, int(index.token_offset[document]))
        latent_bytes = b""
        if n_latents:
            width = self.manifest["latent_width"] * 2
            assert index.latent_offset is not None
            latent_bytes = os.pread(file, n_latents * width, int(index.latent_offset[document]))
        if zlib.crc32(latent_bytes, zlib.crc32(token_bytes)) != int(index.crc32[document]):
            return None
        tokens = np.frombuffer(token_bytes, self.token_dtype)
        patches = np.frombuffer(latent_bytes, np.float16).reshape(n_latents, -1) if n_latents else tokens
        segments, t, p = [], 0, 0
        for n, modality, is_latent in zip(lengths, modalities, latent, strict=True):
            if is_latent:
                segments.append(TokenSegment(modality, patches[p : p + n]))
                p += n
            else:
                segments.append(TokenSegment(modality, tokens[t : t + n]))
                t += n
        return segments

    def _open(self, shard: int) -> int:
        file = self._files.get(shard)
        if file is None:
            if len(self._files) >= 64:
                os.close(self._files.pop(next(iter(self._files))))
            file = self._files[shard] = os.open(self.folder / self.shards[shard]["name"], os.O_RDONLY)
        return file


def check_agreement(
    datasets: Sequence[TokenDataset],
    vocabulary: Mapping[str, int],
    tokenizers: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Raise ValueError, naming both sides, where shards do not belong together or to the run.

    Every dataset must be made by the same tokenizers, which must be the run's own where it names them, and their
    ids must fit the run's vocabulary.
    """
    known: dict[str, tuple[str, str]] = {
        m: (t["fingerprint"], "the run's tokenizers") for m, t in (tokenizers or {}).items()
    }
    for dataset in datasets:
        for modality, made_by in dataset.tokenizers.items():
            if not dataset.manifest["tokens"].get(modality):
                continue
            size = vocabulary.get(modality)
            if size is None:
                raise ValueError(
                    f"{dataset.folder} holds modality '{modality}', which the config's vocabulary "
                    f"({', '.join(vocabulary)}) lacks"
                )
            if made_by["size"] > size:
                raise ValueError(
                    f"{dataset.folder}: its {modality} tokenizer has {made_by['size']} ids, but the config has "
                    f"vocabulary.{modality}={size}"
                )
            fingerprint, where = known.setdefault(modality, (made_by["fingerprint"], str(dataset.folder)))
            if fingerprint != made_by["fingerprint"]:
                raise ValueError(
                    f"{modality} tokenizers differ: {dataset.folder} was made with {made_by['fingerprint']}, "
                    f"{where} has {fingerprint}. Tokenize again with one of them, or point the config at the right one."
                )
