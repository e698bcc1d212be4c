"""The format of token shards: ordinary WebDataset tars of blocks of documents, an index beside each tar, and one
manifest per dataset.

    DATASET/manifest.json       immutable, written last: tokenizers, shards with sizes and checksums, counts
    DATASET/manifest.sha256     the manifest's own checksum, as sha256sum writes it
    DATASET/NAME.tar            samples are blocks of documents (about 1 MiB) in one .safetensors member
    DATASET/NAME.idx            where each document lies in the tar, its lengths and crc32 (also safetensors)

A block holds `tokens` (modality-local ids); `latents` (fp16 patch rows), where there are any; `segments` (S, 4) int32,
whose columns are modality, count, offset into tokens or latents, and flags; and `docs` (D+1,) int32, the number of the
first segment of each document. Where a picture is not square, there is also `grids` (S, 2) int32, the rows and columns
of each segment, 0 and 0 for all others. BOS, EOS and the tokens around pictures and speech are added when a batch is
assembled. The trainer reads documents at the absolute offsets in the index and never parses a tar.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from mom_tokenizers.media.shapes import Grid

try:  # computes the same checksum as zlib, several times faster
    from isal.isal_zlib import crc32
except ImportError:
    from zlib import crc32

SCHEMA = "mom-tokens-1"
SCHEMA_OF_SHAPES = "mom-tokens-2"
"""The schema of a manifest whose pictures need not be square. A program that does not know them refuses the dataset."""
BLOCK_BYTES = 1 << 20
BLOCK_DOCUMENTS = 512
LATENT = 1  # the flag of a segment whose values are latent patches
LATENT_BIT = 0x80  # the same flag in the one-byte modality of the index
TAR_HEADER = 512
SIDE = (1 << 16) - 1  # the most rows or columns of a picture


@dataclass(frozen=True)
class TokenSegment:
    """A run of one modality. `values` are unsigned local ids (n,), or latent patches (n, C*p*p) float16. `grid` is the
    (rows, columns) of a picture that is not square, whose values stand row after row."""

    modality: int
    values: np.ndarray
    grid: Grid | None = None

    @classmethod
    def of(cls, modality: int, values: np.ndarray) -> TokenSegment:
        """The segment of what a tokenizer gave: (n,) or (n, W), or for a picture of any shape (rows, columns) or (rows,
        columns, W)."""
        tokens = values.ndim - (values.dtype == np.float16)  # axes of tokens
        if tokens == 1:
            return cls(modality, values)
        rows, columns = values.shape[:2]
        return cls(modality, values.reshape(-1, *values.shape[2:]), None if rows == columns else (rows, columns))

    @property
    def shaped(self) -> np.ndarray:
        """The values as their tokenizer decodes them: with rows and columns where the picture is not square."""
        return self.values if self.grid is None else self.values.reshape(*self.grid, *self.values.shape[1:])

    @property
    def latent(self) -> bool:
        """Whether the values are latent patches."""
        return self.values.dtype == np.float16


class ShardWriter:
    """Writes NAME.tar and NAME.idx, each under a temporary name first. The same documents give the same bytes.

    `token_dtype` is uint16 or uint32, whichever holds every modality's local ids. The ids of each modality must be
    below its size in `sizes`. Use it as a context manager: after an exception no file is left.
    """

    def __init__(
        self,
        path: Path,
        modalities: Sequence[str],
        token_dtype: type = np.uint16,
        sizes: Mapping[str, int] | None = None,
    ):
        import webdataset  # late, because it imports torch, which readers of shards do not need

        self.path, self.modalities, self.token_dtype = path, tuple(modalities), np.dtype(token_dtype)
        most = 1 << 8 * self.token_dtype.itemsize  # a larger id would silently become another one
        self._sizes = [min(most, (sizes or {}).get(modality, most)) for modality in modalities]
        self.documents = 0
        self.counts = dict.fromkeys(modalities, 0)
        self._partial = path.with_name(f".{path.name}.partial")
        self._file: IO[bytes] = open(self._partial, "wb")  # noqa: SIM115  # closed in __exit__
        self._tar = webdataset.TarWriter(self._file, encoder=False, mtime=0)
        self._position = 0
        self._blocks = 0
        self._pending: list[tuple[str, Sequence[TokenSegment]]] = []
        self._pending_bytes = 0
        self._index: list[dict[str, np.ndarray]] = []
        self.latent_width = 0
        self.latents_at_limit = 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            self._finish()
        else:
            self._file.close()
            self._partial.unlink(missing_ok=True)

    def add(self, key: str, segments: Sequence[TokenSegment]) -> None:
        """Add a document. Raises ValueError, and adds nothing, where an id is not below its modality's size, or where a
        picture has another number of tokens than its grid."""
        for segment in segments:
            if segment.grid is not None:
                rows, columns = segment.grid
                if segment.modality == 0 or min(rows, columns) < 1 or rows * columns != len(segment.values):
                    name = self.modalities[segment.modality]
                    raise ValueError(f"{rows} rows of {columns} columns for {len(segment.values)} {name} tokens")
            if not segment.latent and len(segment.values):
                low, high = int(segment.values.min()), int(segment.values.max())
                name, size = self.modalities[segment.modality], self._sizes[segment.modality]
                if low < 0 or high >= size:
                    raise ValueError(f"{name} ids run from {low} to {high}, but its tokenizer has {size}")
        self._pending.append((key, segments))
        self._pending_bytes += sum(s.values.nbytes for s in segments)
        self.documents += 1
        for segment in segments:
            self.counts[self.modalities[segment.modality]] += len(segment.values)
            if segment.latent:
                self.latents_at_limit += _at_limit(segment.values)
        if self._pending_bytes >= BLOCK_BYTES or len(self._pending) >= BLOCK_DOCUMENTS:
            self._flush()

    @property
    def bytes_written(self) -> int:
        """The size of the tar so far in bytes, with the values that are not yet written."""
        return self._position + self._pending_bytes

    def _flush(self) -> None:
        if not self._pending:
            return
        tokens, latents, table, starts, grids = [], [], [], [0], []
        n_tokens = n_latents = 0
        for _, segments in self._pending:
            for s in segments:
                offset = n_latents if s.latent else n_tokens
                table.append((s.modality, len(s.values), offset, LATENT if s.latent else 0))
                grids.append(s.grid or (0, 0))
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
        if any(rows for rows, _ in grids):
            arrays["grids"] = np.array(grids, np.int32)
        # A single entry, because safetensors writes several in no fixed order, and the bytes must be reproducible.
        metadata = {SCHEMA: json.dumps({"keys": [key for key, _ in self._pending]})}
        block = safetensors.numpy.save(arrays, metadata=metadata)
        self._tar.write({"__key__": f"{self._blocks:08d}", "safetensors": block})

        self._index.append(index_block(block, self._position + TAR_HEADER))
        self._position += TAR_HEADER + -(-len(block) // 512) * 512
        self._blocks += 1
        self._pending, self._pending_bytes = [], 0

    def _finish(self) -> None:
        self._flush()
        self._tar.close()
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        index = self.path.with_suffix(".idx")
        partial = index.with_name(f".{index.name}.partial")
        partial.write_bytes(join_index(self._index))
        self._partial.rename(self.path)
        partial.rename(index)

    def record(self) -> dict[str, Any]:
        """The shard's entry in the manifest. Call it after the context manager has ended without an exception."""
        return {
            "name": self.path.name,
            "bytes": self.path.stat().st_size,
            "sha256": sha256_of(self.path),
            "index_sha256": sha256_of(self.path.with_suffix(".idx")),
            "documents": self.documents,
            "tokens": self.counts,
            "latent_width": self.latent_width,
            **({"latents_at_limit": self.latents_at_limit} if self.latents_at_limit else {}),
        }


def _at_limit(values: np.ndarray) -> int:
    """The number of float16 values that are the largest, 65,504, or beyond it. A tokenizer clips latents to it."""
    return int(np.count_nonzero(values.view(np.uint16) & 0x7FFF >= 0x7BFF))


def index_block(block: bytes, at: int) -> dict[str, np.ndarray]:
    """The arrays of the index for the documents of one block, whose bytes begin at byte `at` of the tar.

    Raises ValueError where the bytes are not a block of this format, or its table does not fit its contents.
    """
    try:
        arrays = safetensors.numpy.load(block)
        tokens, table, docs = arrays["tokens"], arrays["segments"].astype(np.int64), arrays["docs"].astype(np.int64)
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"not a block of documents: {error}") from error
    header_length = int.from_bytes(block[:8], "little")
    header = json.loads(block[8 : 8 + header_length])
    begins = {name: at + 8 + header_length + header[name]["data_offsets"][0] for name in arrays}
    latents = arrays.get("latents", np.zeros((0, 0), np.float16))
    modality, count, offset, flags = table.T if table.ndim == 2 and table.shape[1] == 4 else np.zeros((4, 0), np.int64)
    if not (
        tokens.ndim == 1 and latents.ndim == 2 and docs.ndim == 1 and len(docs) > 0 and docs[0] == 0
        and (np.diff(docs) >= 0).all() and docs[-1] == len(modality) == len(table)
    ):  # fmt: skip
        raise ValueError("its table of segments does not fit its documents")
    latent = flags == LATENT
    # In a sound block the tokens of each document follow those of the document before; so do its latents.
    until = {name: np.r_[0, np.where(mine, count, 0).cumsum()] for name, mine in (("t", ~latent), ("p", latent))}
    expected = np.where(latent, until["p"][:-1], until["t"][:-1])
    if not (
        (count >= 0).all() and (modality >= 0).all() and (modality < LATENT_BIT).all() and (flags & ~LATENT == 0).all()
        and (offset == expected).all() and until["t"][-1] == len(tokens) and until["p"][-1] == len(latents)
    ):  # fmt: skip
        raise ValueError("its table of segments does not fit its tokens")
    width = latents.shape[1] * latents.itemsize
    token_at, latent_at = until["t"][docs], until["p"][docs]
    token_bytes, latent_bytes = tokens.tobytes(), latents.tobytes()
    grids = arrays.get("grids", np.zeros((len(table), 2), np.int32)).astype(np.int64)
    if grids.shape != (len(table), 2) or grids.min(initial=0) < 0 or grids.max(initial=0) > SIDE:
        raise ValueError("its table of rows and columns does not fit its segments")
    if said := grid_problem(grids, count, modality):
        raise ValueError(said)
    size = tokens.itemsize
    crc = [
        crc32(latent_bytes[p * width : q * width], crc32(token_bytes[t * size : u * size]))
        for t, u, p, q in zip(token_at[:-1], token_at[1:], latent_at[:-1], latent_at[1:], strict=True)
    ]
    return {
        "token_offset": (begins["tokens"] + token_at[:-1] * size).astype(np.uint64),
        "latent_offset": (begins.get("latents", 0) + latent_at[:-1] * width).astype(np.uint64),
        "crc32": np.array(crc, np.uint32),
        "segments": np.diff(docs).astype(np.uint32),
        "segment_length": count.astype(np.uint32),
        "segment_modality": (modality | np.where(latent, LATENT_BIT, 0)).astype(np.uint8),
        "segment_grid": grids.astype(np.uint16),
    }


def grid_problem(grids: np.ndarray, count: np.ndarray, modality: np.ndarray) -> str | None:
    """What is wrong with the rows and columns (S, 2) of segments with these counts of tokens and modalities (S,), each
    without the flag of latents; None where nothing is."""
    rows, columns = grids.astype(np.int64).T
    there = (rows != 0) | (columns != 0)
    bad = there & ((rows * columns != count) | (modality == 0))
    if not bad.any():
        return None
    s = int(bad.argmax())
    what = "text" if modality[s] == 0 else "a picture"
    return f"segment {s} is {what} of {count[s]} tokens, and its grid is {rows[s]} rows of {columns[s]} columns"


def join_index(blocks: Sequence[Mapping[str, np.ndarray]]) -> bytes:
    """The bytes of a shard's index file, from the `index_block` of each of its blocks in order. They depend on the
    blocks alone."""

    def joined(name: str, dtype: type) -> np.ndarray:
        return np.concatenate([np.zeros(0, dtype), *(block[name] for block in blocks)])

    arrays = {
        "token_offset": joined("token_offset", np.uint64),
        "crc32": joined("crc32", np.uint32),
        "segment_start": np.r_[0, joined("segments", np.uint32).cumsum()].astype(np.uint32),
        "segment_length": joined("segment_length", np.uint32),
        "segment_modality": joined("segment_modality", np.uint8),
    }
    if (arrays["segment_modality"] >= LATENT_BIT).any():
        arrays["latent_offset"] = joined("latent_offset", np.uint64)
    if any(block["segment_grid"].any() for block in blocks):
        arrays["segment_grid"] = np.concatenate([block["segment_grid"] for block in blocks])
    return safetensors.numpy.save(arrays)


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hexadecimal digits. The file is never held whole in memory."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
        return digest.hexdigest()


def schema_of(tokenizers: Mapping[str, Mapping[str, Any]]) -> str:
    """The schema of a dataset that these tokenizers made."""
    return SCHEMA_OF_SHAPES if any("shapes" in described for described in tokenizers.values()) else SCHEMA


def write_manifest(
    folder: Path,
    shards: Sequence[Mapping[str, Any]],
    tokenizers: Mapping[str, Mapping[str, Any]],
    token_dtype: type,
    skipped: Mapping[str, int],
    account: Mapping[str, Any] | None = None,
) -> None:
    """Write the manifest, which finishes a dataset: without this file a folder is not a dataset.

    `tokenizers` maps each modality to {"kind", "fingerprint", "size"}, text first; their order numbers the modalities.
    A tokenizer of latents adds {"patch_width", "latent_scale", "latent_shift"}, and one of pictures that need not be
    square {"shapes"}. `account` is the account of the raw
    input, as `Account.as_json` gives it.
    """
    manifest = {
        "schema": schema_of(tokenizers),
        "modalities": list(tokenizers),
        "tokenizers": tokenizers,
        "token_bytes": np.dtype(token_dtype).itemsize,
        "latent_width": max((s["latent_width"] for s in shards), default=0),
        "documents": sum(s["documents"] for s in shards),
        "tokens": {m: sum(s["tokens"].get(m, 0) for s in shards) for m in tokenizers},
        "skipped": dict(skipped),
        **({"account": account} if account is not None else {}),
        "shards": list(shards),
    }
    partial = folder / ".manifest.partial"
    partial.write_text(json.dumps(manifest, indent=1) + "\n")
    # The checksum stands in a file of its own: inside the manifest it would change the fingerprint of the dataset.
    (folder / "manifest.sha256").write_text(f"{sha256_of(partial)}  manifest.json\n")
    partial.rename(folder / "manifest.json")
