"""Token shards: ordinary WebDataset tars of blocks of documents, a sidecar index, and one manifest per dataset.

    DATASET/manifest.json       immutable, written last: tokenizers, shards with sizes and checksums, counts
    DATASET/NAME.tar            samples are blocks of documents (about 1 MiB) in one .safetensors member
    DATASET/NAME.idx            where each document lies in the tar, its lengths and crc32 (safetensors as well)

A block holds `tokens` (modality-local ids), `latents` (fp16 patch rows, when there are any), `segments` (S, 4)
int32 = modality, count, offset into tokens or latents, flags; and `docs` (D+1,) int32 = first segment of each
document. BOS, EOS and the brackets around pictures and speech are added when a batch is assembled. The trainer
reads documents at the index's absolute offsets and never parses a tar.
"""

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
from typing import IO, Any

import numpy as np
import safetensors.numpy
import webdataset

SCHEMA = "mom-tokens-1"
BLOCK_BYTES = 1 << 20
BLOCK_DOCUMENTS = 512
LATENT = 1  # flag of a segment whose values are latent patches
_LATENT_BIT = 0x80  # the same in the index's one-byte modality
_TAR_HEADER = 512


@dataclass(frozen=True)
class TokenSegment:
    """A run of one modality: local ids (n,) unsigned, or latent patches (n, C*p*p) float16."""

    modality: int
    values: np.ndarray

    @property
    def latent(self) -> bool:
        return self.values.dtype == np.float16


class ShardWriter:
    """Writes NAME.tar and NAME.idx, each to a temporary name first. The same documents give the same bytes.

    `token_dtype` is uint16 or uint32, whichever holds every modality's local ids. Use as a context manager: an
    exception leaves nothing behind.
    """

    def __init__(self, path: Path, modalities: Sequence[str], token_dtype: type = np.uint16):
        self.path, self.modalities, self.token_dtype = path, tuple(modalities), np.dtype(token_dtype)
        self.documents = 0
        self.counts = dict.fromkeys(modalities, 0)
        self._partial = path.with_name(f".{path.name}.partial")
        self._file: IO[bytes] = open(self._partial, "wb")  # noqa: SIM115  # closed in __exit__
        self._tar = webdataset.TarWriter(self._file, encoder=False, mtime=0)
        self._position = 0
        self._blocks = 0
        self._pending: list[tuple[str, Sequence[TokenSegment]]] = []
        self._pending_bytes = 0
        self._token_offset: list[int] = []
        self._latent_offset: list[int] = []
        self._crc: list[int] = []
        self._segment_start = [0]
        self._segment_length: list[int] = []
        self._segment_modality: list[int] = []
        self.latent_width = 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            self._finish()
        else:
            self._file.close()
            self._partial.unlink(missing_ok=True)

    def add(self, key: str, segments: Sequence[TokenSegment]) -> None:
        self._pending.append((key, segments))
        self._pending_bytes += sum(s.values.nbytes for s in segments)
        self.documents += 1
        for segment in segments:
            self.counts[self.modalities[segment.modality]] += len(segment.values)
        if self._pending_bytes >= BLOCK_BYTES or len(self._pending) >= BLOCK_DOCUMENTS:
            self._flush()

    @property
    def bytes_written(self) -> int:
        return self._position + self._pending_bytes

    def _flush(self) -> None:
        if not self._pending:
            return
        tokens, latents, table, starts = [], [], [], [0]
        token_at, latent_at = [], []
        n_tokens = n_latents = 0
        for _, segments in self._pending:
            token_at.append(n_tokens)
            latent_at.append(n_latents)
            for s in segments:
                offset = n_latents if s.latent else n_tokens
                table.append((s.modality, len(s.values), offset, LATENT if s.latent else 0))
                if s.latent:
                    assert self.latent_width in (0, s.values.shape[1]), "one latent width per dataset"
                    self.latent_width = s.values.shape[1]
                    latents.append(s.values)
                    n_latents += len(s.values)
                else:
                    tokens.append(s.values.astype(self.token_dtype))
                    n_tokens += len(s.values)
            starts.append(len(table))
        arrays: dict[str, np.ndarray] = {
            "tokens": np.concatenate(tokens) if tokens else np.zeros(0, self.token_dtype),
            "segments": np.array(table, np.int32).reshape(-1, 4),
            "docs": np.array(starts, np.int32),
        }
        if latents:
            arrays["latents"] = np.concatenate(latents)
        # one entry alone: safetensors writes several in no fixed order, and the bytes must be reproducible
        metadata = {SCHEMA: json.dumps({"keys": [key for key, _ in self._pending]})}
        block = safetensors.numpy.save(arrays, metadata=metadata)
        self._tar.write({"__key__": f"{self._blocks:08d}", "safetensors": block})

        header_length = int.from_bytes(block[:8], "little")
        header = json.loads(block[8 : 8 + header_length])
        data_at = self._position + _TAR_HEADER + 8 + header_length
        tokens_at = data_at + header["tokens"]["data_offsets"][0]
        latents_at = data_at + header["latents"]["data_offsets"][0] if latents else 0
        width = self.latent_width * 2
        for (_, segments), t, p in zip(self._pending, token_at, latent_at, strict=True):
            self._token_offset.append(tokens_at + t * self.token_dtype.itemsize)
            self._latent_offset.append(latents_at + p * width)
            crc = 0
            for wanted in (False, True):
                for s in segments:
                    if s.latent == wanted:
                        values = s.values if s.latent else s.values.astype(self.token_dtype)
                        crc = zlib.crc32(values.tobytes(), crc)
            self._crc.append(crc)
            for s in segments:
                self._segment_length.append(len(s.values))
                self._segment_modality.append(s.modality | (_LATENT_BIT if s.latent else 0))
            self._segment_start.append(len(self._segment_length))
        self._position += _TAR_HEADER + -(-len(block) // 512) * 512
        self._blocks += 1
        self._pending, self._pending_bytes = [], 0

    def _finish(self) -> None:
        self._flush()
        self._tar.close()
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        arrays: dict[str, np.ndarray] = {
            "token_offset": np.array(self._token_offset, np.uint64),
            "crc32": np.array(self._crc, np.uint32),
            "segment_start": np.array(self._segment_start, np.uint32),
            "segment_length": np.array(self._segment_length, np.uint32),
            "segment_modality": np.array(self._segment_modality, np.uint8),
        }
        if any(m & _LATENT_BIT for m in self._segment_modality):
            arrays["latent_offset"] = np.array(self._latent_offset, np.uint64)
        index = self.path.with_suffix(".idx")
        partial = index.with_name(f".{index.name}.partial")
        partial.write_bytes(safetensors.numpy.save(arrays))
        self._partial.rename(self.path)
        partial.rename(index)

    def record(self) -> dict[str, Any]:
        """The shard's entry in the manifest, after a clean end."""
        return {
            "name": self.path.name,
            "bytes": self.path.stat().st_size,
            "sha256": _sha256(self.path),
            "index_sha256": _sha256(self.path.with_suffix(".idx")),
            "documents": self.documents,
            "tokens": self.counts,
            "latent_width": self.latent_width,
        }


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
        return digest.hexdigest()


def write_manifest(
    folder: Path,
    shards: Sequence[Mapping[str, Any]],
    tokenizers: Mapping[str, Mapping[str, Any]],
    token_dtype: type,
    skipped: Mapping[str, int],
) -> None:
    """Commit a dataset: until this file exists, there is none.

    `tokenizers`: modality -> {"kind", "fingerprint", "size"}, text first; their order numbers the modalities. One of
    latents adds {"patch_width", "latent_scale", "latent_shift"}.
    """
    manifest = {
        "schema": SCHEMA,
        "modalities": list(tokenizers),
        "tokenizers": tokenizers,
        "token_bytes": np.dtype(token_dtype).itemsize,
        "latent_width": max((s["latent_width"] for s in shards), default=0),
        "documents": sum(s["documents"] for s in shards),
        "tokens": {m: sum(s["tokens"].get(m, 0) for s in shards) for m in tokenizers},
        "skipped": dict(skipped),
        "shards": list(shards),
    }
    partial = folder / ".manifest.partial"
    partial.write_text(json.dumps(manifest, indent=1) + "\n")
    partial.rename(folder / "manifest.json")


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
            (modality & ~np.uint8(_LATENT_BIT)).tolist(),
            (modality >= _LATENT_BIT).tolist(),
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
        if _sha256(path) != self.shards[shard]["index_sha256"]:
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
