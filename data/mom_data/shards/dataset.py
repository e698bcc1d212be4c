"""Opens a finished token dataset for reading: its manifest, its indices, and single documents by their offsets."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from mom_data.shards.format import LATENT_BIT, TokenSegment, crc32
from mom_data.shards.manifest import MANIFEST, index_problems, read_manifest, shapes_of
from mom_data.shards.storage import CACHE_BYTES, RemoteFolder, Stored, folder_at
from mom_tokenizers.errors import UserError
from mom_tokenizers.media.shapes import Grid, Shapes

log = logging.getLogger(__name__)

_OPEN_FILES = 64
_INDEX_BYTES = 192 << 20  # the most bytes of indices held in memory, per dataset and process
_NOTE_EVERY = 5.0  # seconds between two notes to the cache that an open shard is still in use

_NO_LATENTS = np.zeros((0, 0), np.float16)


@dataclass(frozen=True)
class ShardIndex:
    """Where the documents of one shard lie. The arrays are those of the index file."""

    token_offset: np.ndarray
    crc32: np.ndarray
    segment_start: np.ndarray
    segment_length: np.ndarray
    segment_modality: np.ndarray
    latent_offset: np.ndarray | None
    segment_grid: np.ndarray | None = None
    checked: bytearray = field(init=False, repr=False)
    """For each document 1 once this process has found its checksum right, and 0 before."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "checked", bytearray(len(self.crc32)))

    @functools.cached_property
    def at(self) -> tuple[memoryview, memoryview, memoryview]:
        """The offsets of tokens, the offsets of latents, and the crc32 of each document. They are memoryviews, because
        reading a single value takes a third of the time that it takes from an array."""
        latents = self.token_offset if self.latent_offset is None else self.latent_offset
        return self.token_offset.data, latents.data, self.crc32.data

    @functools.cached_property
    def _table(self) -> tuple[memoryview, memoryview, memoryview]:
        return self.segment_start.data, self.segment_length.data, self.segment_modality.data

    def segments(self, document: int) -> tuple[list[int], list[int], list[bool]]:
        """The lengths, modalities and latent flags of a document's segments."""
        starts, lengths, modalities = self._table
        s, e = starts[document], starts[document + 1]
        kinds = modalities[s:e].tolist()
        return lengths[s:e].tolist(), [k & ~LATENT_BIT for k in kinds], [k >= LATENT_BIT for k in kinds]

    def grids(self, document: int) -> list[Grid | None] | None:
        """The (rows, columns) of each of a document's segments, None for those that are no picture, or a square one.
        None instead of the list where the shard has only such segments."""
        if self.segment_grid is None:
            return None
        s, e = self._table[0][document], self._table[0][document + 1]
        return [(rows, columns) if rows else None for rows, columns in self.segment_grid[s:e].tolist()]


class TokenDataset:
    """A folder of token shards, opened for reading. `location` is a path, http(s)://, s3://, or another URL that fsspec
    supports; `shards` is a pattern of the names of the shards to use.

    Remote shards are fetched whole into `cache`, a folder on this node that never grows beyond `cache_bytes`.
    `storage.RemoteFolder` says what happens when a fetch fails. A dataset may be pickled and forked, but only one
    thread may use it at a time.

    Raises a UserError that lists everything wrong: a manifest that is missing, was changed, or contradicts itself (see
    `mom_data.shards.manifest`), and shards that are missing or have another size than the manifest says.
    """

    def __init__(
        self,
        location: str | Path,
        shards: str = "*",
        cache: Path | None = None,
        cache_bytes: int = CACHE_BYTES,
        *,
        attempts: int = 5,
        timeout: float = 60.0,
        pause: float = 60.0,
    ):
        self._folder = folder_at(location, cache, cache_bytes, attempts=attempts, timeout=timeout, pause=pause)
        self.location = self._folder.location
        try:
            content, manifest, problems = read_manifest(self._folder)
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(
                f"{self.location}: no manifest.json, so no finished dataset. tools/tokenize_shards.py writes one; if "
                "it was interrupted, start it again with the same arguments and it goes on."
            ) from None
        except OSError as error:
            raise UserError(f"{self.where(MANIFEST)} cannot be read: {error}") from None
        if problems or manifest is None:
            raise UserError(f"{self.location}/" + " ".join(map(str, problems)))
        self.fingerprint = hashlib.sha256(content).hexdigest()[:16]
        self.manifest: dict[str, Any] = json.loads(content)
        self.modalities: list[str] = self.manifest["modalities"]
        self.tokenizers: dict[str, dict[str, Any]] = self.manifest["tokenizers"]
        self.token_dtype = np.dtype(f"<u{self.manifest['token_bytes']}")
        self._latent_width: int = self.manifest["latent_width"]
        self.shards = [s for s in self.manifest["shards"] if fnmatch(s["name"], shards)]
        if not any(s["documents"] for s in self.shards):
            raise UserError(f"{self.location}: no document in the shards that match {shards!r}")
        self._tars = [Stored(s["name"], s["sha256"], s["bytes"]) for s in self.shards]
        self._index_files = self._complete()
        self._forget_process()

    def _complete(self) -> list[Stored]:
        """The index files of the shards, after checking that every file of the dataset is there with the right size."""
        names = [(tar.name, f"{tar.name.removesuffix('.tar')}.idx") for tar in self._tars]
        try:
            sizes = self._folder.sizes([name for pair in names for name in pair])
        except OSError as error:
            raise UserError(f"{self.location}: its shards cannot be had: {error}") from None
        problems = []
        for tar, pair in zip(self._tars, names, strict=True):
            problems += [f"{name} is missing" for name in pair if name not in sizes]
            if sizes.get(tar.name, tar.bytes) not in (tar.bytes, None):
                problems.append(f"{tar.name} has {sizes[tar.name]} bytes, the manifest says {tar.bytes}")
        if problems:
            raise UserError(
                f"{self.location}: " + "; ".join(problems) + ". Copy them again, or run tools/tokenize_shards.py again."
            )
        indices = [
            Stored(index, shard["index_sha256"], sizes[index])
            for (_, index), shard in zip(names, self.shards, strict=True)
        ]
        largest = max([*self._tars, *indices], key=lambda file: file.bytes or 0)
        if isinstance(self._folder, RemoteFolder) and (largest.bytes or 0) > self._folder.cache.limit:
            raise UserError(
                f"{self.where(largest.name)} has {largest.bytes} bytes, more than the cache may hold "
                f"({self._folder.cache.limit}): raise data.cache_gib"
            )
        return indices

    def _forget_process(self) -> None:
        self._files: OrderedDict[int, tuple[int, float]] = OrderedDict()  # shard -> (descriptor, time of last note)
        self._indices: OrderedDict[int, tuple[ShardIndex, int]] = OrderedDict()  # shard -> (index, its size in bytes)
        self._unavailable: set[int] = set()
        self._foreign: set[int] = set()  # shards for which a warning about an id beyond its tokenizer's was logged
        self._sizes = [int(self.tokenizers[m]["size"]) for m in self.modalities]
        self._smallest = min(self._sizes)
        self._shapes = shapes_of(self.modalities, self.tokenizers)

    @property
    def shapes(self) -> Shapes | None:
        """The shapes that the dataset's pictures may have, None where all are square."""
        return next(iter(self._shapes.values()), None)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_files", "_indices", "_unavailable", "_foreign")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget_process()

    def where(self, shard: int | str) -> str:
        """How messages name a shard, given by its number, or a file of the dataset, given by its name."""
        return f"{self.location}/{shard if isinstance(shard, str) else self.shards[shard]['name']}"

    def index(self, shard: int) -> ShardIndex:
        """The index of a shard. Raises UserError where it cannot be read, is damaged, or does not have the counts of
        documents and tokens that the manifest gives."""
        if shard in self._indices:
            self._indices.move_to_end(shard)
            return self._indices[shard][0]
        file = self._index_files[shard]
        try:
            data = self._folder.checked(file)
        except UserError as error:
            raise UserError(f"{self.where(file.name)}: {error}") from None
        except OSError as error:
            raise UserError(
                f"{self.where(file.name)}: it was there when the dataset was opened, and now cannot be read: {error}. "
                "Bring it back (tools/verify_shards.py --rebuild-index makes it from its tar) and start again."
            ) from None
        arrays = safetensors.numpy.load(data)
        if problems := index_problems(arrays, *self._counts(shard), self.modalities, self._shapes):
            raise UserError(
                f"{self.where(file.name)} contradicts manifest.json: {'; '.join(problems)}. See what "
                "tools/verify_shards.py finds, and tokenize again where it cannot be mended."
            )
        index = ShardIndex(
            arrays["token_offset"],
            arrays["crc32"],
            arrays["segment_start"],
            arrays["segment_length"],
            arrays["segment_modality"],
            arrays.get("latent_offset"),
            arrays.get("segment_grid"),
        )
        self._indices[shard] = index, len(data)
        while len(self._indices) > 1 and sum(size for _, size in self._indices.values()) > _INDEX_BYTES:
            self._indices.popitem(last=False)
        return index

    def _counts(self, shard: int) -> tuple[int, Mapping[str, int]]:
        """The number of documents, and of tokens by modality, that a shard's index must hold."""
        record = self.shards[shard]
        return record["documents"], record["tokens"]

    def prefetch(self, shard: int) -> None:
        """Start fetching a shard from which documents will be read soon. Neither waits nor raises."""
        self._folder.prefetch(self._tars[shard])

    def read(self, shard: int, document: int) -> list[TokenSegment] | None:
        """A document's segments, or None where its bytes cannot be read or do not match their checksum, or where an id
        is not below its tokenizer's size."""
        lengths, modalities, latent = self.index(shard).segments(document)
        n_latents = sum(n for n, is_latent in zip(lengths, latent, strict=True) if is_latent)
        whole = (0, sum(lengths) - n_latents), (0, n_latents)
        values = self.values(shard, document, (whole[0][1], n_latents), *whole)
        if values is None:
            return None
        segments, at = [], [0, 0]
        grids = self.index(shard).grids(document) or [None] * len(lengths)
        for n, modality, is_latent, grid in zip(lengths, modalities, latent, grids, strict=True):
            begin = at[is_latent]
            segments.append(TokenSegment(modality, values[is_latent][begin : begin + n], grid))
            at[is_latent] += n
        return segments

    def values(
        self, shard: int, document: int, whole: tuple[int, int], tokens: tuple[int, int], latents: tuple[int, int]
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Ranges of a document's stored tokens (n,) and latents (n, C*p*p). None where the document is damaged or
        cannot be read, or where an id is not below its tokenizer's size.

        `whole` is the number of tokens and of latents of the whole document, which its checksum covers. The checksum is
        verified whenever the whole document is read, and the first time that this process reads a part of it. After
        that, reading a part reads only its own bytes.
        """
        index = self.index(shard)
        token_at, latent_at, checksum = index.at
        size, width = self.token_dtype.itemsize, 2 * self._latent_width
        complete = not index.checked[document] or (tokens == (0, whole[0]) and latents == (0, whole[1]))
        (t, t_end), (p, p_end) = ((0, whole[0]), (0, whole[1])) if complete else (tokens, latents)
        try:
            file = self._open(shard)
            if file is None:
                return None
            token_bytes = os.pread(file, (t_end - t) * size, token_at[document] + t * size)
            latent_bytes = b""
            if p_end > p:
                latent_bytes = os.pread(file, (p_end - p) * width, latent_at[document] + p * width)
        except OSError:
            return None
        if len(token_bytes) != (t_end - t) * size or len(latent_bytes) != (p_end - p) * width:
            return None
        token_values = np.frombuffer(token_bytes, self.token_dtype)
        if complete:
            if crc32(latent_bytes, crc32(token_bytes)) != checksum[document]:
                return None
            if not index.checked[document] and (said := self._foreign_id(index, document, token_values)) is not None:
                self._note_foreign_id(shard, document, said)
                return None
            index.checked[document] = 1
        latent_values = _NO_LATENTS
        if latent_bytes:
            latent_values = np.frombuffer(latent_bytes, np.float16).reshape(-1, self._latent_width)
        if (t, t_end, p, p_end) == (*tokens, *latents):
            return token_values, latent_values
        return token_values[tokens[0] : tokens[1]], latent_values[latents[0] : latents[1]]

    def _foreign_id(self, index: ShardIndex, document: int, tokens: np.ndarray) -> str | None:
        """A message about the first segment with an id that is not below its tokenizer's size, or None where there is
        none. Such an id would become an id of another modality, or of no token. `tokens` (n,) are all tokens stored
        for the document."""
        if not len(tokens) or tokens.max() < self._smallest:
            return None
        lengths, modalities, latent = index.segments(document)
        at = 0
        for n, modality, is_latent in zip(lengths, modalities, latent, strict=True):
            if is_latent or not n:
                continue
            if (largest := int(tokens[at : at + n].max())) >= self._sizes[modality]:
                return f"{self.modalities[modality]} id {largest}, but its tokenizer has {self._sizes[modality]} ids"
            at += n
        return None

    def _note_foreign_id(self, shard: int, document: int, what: str) -> None:
        if shard not in self._foreign:
            self._foreign.add(shard)
            log.warning(
                "%s, document %d has %s: it and others like it in this shard are masked. Its writer was faulty: "
                "tools/verify_shards.py lists them; tokenize again.",
                self.where(shard), document, what,
            )  # fmt: skip

    def left_out(self, shard: int, document: int) -> tuple[str, bool] | None:
        """For a document without values: (why it was left out when it was tokenized, whether it could not be read).
        None where its values are damaged or cannot be read. In token shards the result is always None, because they
        contain no document that was left out."""
        return None

    def _open(self, shard: int) -> int | None:
        """A file descriptor of the shard's tar, which is fetched first where it is remote. None where it cannot be read
        now."""
        now = time.monotonic()
        descriptor, noted = self._files.get(shard) or (None, 0.0)
        if descriptor is None:
            descriptor, noted = self._opened(shard), now
            if descriptor is None:
                return None
        elif now - noted > _NOTE_EVERY:
            self._folder.used(descriptor)
            noted = now
        self._files[shard] = descriptor, noted
        self._files.move_to_end(shard)
        return descriptor

    def _opened(self, shard: int) -> int | None:
        try:
            descriptor = self._folder.open(self._tars[shard])
        except OSError as error:
            if shard not in self._unavailable:
                self._unavailable.add(shard)
                log.warning(
                    "%s cannot be had, its documents are masked until it can: %s. Bring it back: past "
                    "data.max_bad_fraction of all documents, training stops.",
                    self.where(shard), error,
                )  # fmt: skip
            return None
        if shard in self._unavailable:
            self._unavailable.discard(shard)
            log.warning("%s can be had again", self.where(shard))
        # A file that was evicted from the cache takes space on the disk until it is closed.
        evicted = [k for k, (file, _) in self._files.items() if not os.fstat(file).st_nlink]
        oldest = list(self._files)[: max(0, len(self._files) + 1 - _OPEN_FILES)]
        for k in {*evicted, *oldest}:
            os.close(self._files.pop(k)[0])
        return descriptor


def check_agreement(
    datasets: Sequence[TokenDataset],
    vocabulary: Mapping[str, int],
    tokenizers: Mapping[str, Mapping[str, Any]] | None = None,
    shapes: Shapes | None = None,
) -> None:
    """Raise UserError, naming both sides, where datasets do not belong together or do not fit the run.

    All datasets must be made by the same tokenizers. These must be the run's own where it names them, and their ids
    must fit into the run's vocabulary. `shapes` are those of the run's vocabulary, which must have every grid that a
    dataset may have. A dataset of square pictures fits any.
    """
    for dataset in datasets:
        if dataset.shapes is not None and not {*dataset.shapes.grids} <= {*(shapes.grids if shapes else ())}:
            own, given = dataset.shapes.as_json(), shapes.as_json() if shapes else "not set, so all are square"
            raise UserError(
                f"{dataset.location} holds pictures of several shapes ({own}), and the run's picture_shapes is "
                f"{given}: set picture_shapes in the config to {own}"
            )
    known: dict[str, tuple[str, str]] = {m: (_named(t), "the run's tokenizers") for m, t in (tokenizers or {}).items()}
    for dataset in datasets:
        for modality, made_by in dataset.tokenizers.items():
            if not dataset.manifest["tokens"].get(modality):
                continue
            size = vocabulary.get(modality)
            if size is None:
                raise UserError(
                    f"{dataset.location} holds modality '{modality}', which the config's vocabulary "
                    f"({', '.join(vocabulary)}) lacks"
                )
            if made_by["size"] > size:
                raise UserError(
                    f"{dataset.location}: its {modality} tokenizer has {made_by['size']} ids, but the config has "
                    f"vocabulary.{modality}={size}"
                )
            name, where = known.setdefault(modality, (_named(made_by), dataset.location))
            if name.split()[0] != made_by["fingerprint"]:
                raise UserError(
                    f"{modality} tokenizers differ: {dataset.location} was made with {_named(made_by)}, "
                    f"{where} has {name}. Tokenize again with one of them, or point the config at the right one."
                )


def _named(described: Mapping[str, Any]) -> str:
    """A tokenizer's fingerprint, and where it makes latents their width: that is what a user can recognise."""
    width = described.get("patch_width")
    return f"{described['fingerprint']}" + (f" (patches of {width} values)" if width else "")
