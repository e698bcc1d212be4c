"""The rules that a token dataset's manifest must satisfy, in itself and against the indices of its shards.

Every program that opens a dataset (training, tools/verify_shards.py, ...) uses this module, so that all accept and
refuse the same datasets. Without these checks, a manifest that was changed and is still valid JSON would silently make
a run train on other documents.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError, field_validator

from mom_data.shards.format import LATENT_BIT, SCHEMA, SCHEMA_OF_SHAPES, grid_problem
from mom_tokenizers.media.shapes import Shapes

MANIFEST, CHECKSUM = "manifest.json", "manifest.sha256"
_NAME = re.compile(r"[^/\\\0]+\.tar")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_AGAIN = "copy it again, or run tools/tokenize_shards.py again (finished shards are kept)"


class _Record(BaseModel):
    model_config = ConfigDict(strict=True)


class ShardRecord(_Record):
    """A shard's entry in the manifest."""

    name: str
    bytes: NonNegativeInt
    sha256: str
    index_sha256: str
    documents: NonNegativeInt
    tokens: dict[str, NonNegativeInt]
    latent_width: NonNegativeInt
    latents_at_limit: NonNegativeInt = 0
    """Number of values of latents that were clipped to the largest of float16. Only shards with some record it."""


class TokenizerRecord(_Record):
    """A tokenizer's entry in the manifest. It may have further keys, which are not checked here."""

    kind: str
    fingerprint: str
    size: PositiveInt
    shapes: dict[str, int | float] | None = None

    @field_validator("shapes")
    @classmethod
    def _possible(cls, value: dict[str, int | float] | None) -> dict[str, int | float] | None:
        return value if value is None else Shapes.of(value).as_json()


class Manifest(_Record):
    """The part of manifest.json that describes the shards."""

    schema_name: str = Field(alias="schema")
    modalities: list[str]
    tokenizers: dict[str, TokenizerRecord]
    token_bytes: int
    latent_width: NonNegativeInt
    documents: NonNegativeInt
    tokens: dict[str, NonNegativeInt]
    shards: list[ShardRecord]


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a dataset. `position` is a byte of `file`; `document` is a document's number in the
    shard, and `key` its key."""

    file: str
    what: str
    remedy: str
    position: int | None = None
    document: int | None = None
    key: str | None = None

    def __str__(self) -> str:
        where = self.file
        if self.position is not None:
            where += f" at byte {self.position:,}"
        if self.document is not None:
            where += f", document {self.document}" + (f" ({self.key!r})" if self.key is not None else "")
        return f"{where}: {self.what}. What to do: {self.remedy}."


class Readable(Protocol):
    """A folder of any storage from which files can be read."""

    def read(self, name: str) -> bytes: ...


def read_manifest(folder: Readable) -> tuple[bytes, Manifest | None, list[Problem]]:
    """(the bytes of a dataset's manifest, the manifest or None where it cannot be understood, all problems with it).

    Raises OSError where the storage fails. FileNotFoundError or NotADirectoryError mean that there is no manifest.
    """
    content = folder.read(MANIFEST)
    problems = _checksum_problems(folder, content)
    try:
        raw = json.loads(content)
    except (ValueError, RecursionError) as error:
        return content, None, [*problems, Problem(MANIFEST, f"it is damaged, not JSON: {error}", _AGAIN)]
    schema = raw.get("schema") if isinstance(raw, dict) else None
    if isinstance(raw, dict) and schema not in (SCHEMA, SCHEMA_OF_SHAPES):
        what = f"schema {schema!r}; this version reads {SCHEMA!r} and {SCHEMA_OF_SHAPES!r}"
        return content, None, [*problems, Problem(MANIFEST, what, "run tools/tokenize_shards.py again")]
    try:
        manifest = Manifest.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        return content, None, [*problems, Problem(MANIFEST, f"{where}: {first['msg']}", _AGAIN)]
    return content, manifest, problems + [Problem(MANIFEST, what, _AGAIN) for what in _contradictions(manifest)]


def _checksum_problems(folder: Readable, content: bytes) -> list[Problem]:
    """Problems where the manifest is not the one that was written, which its sha256 tells."""
    anew = (
        "copy both again, or run tools/tokenize_shards.py again (finished shards are kept); where the manifest is as "
        f"you want it and tools/verify_shards.py finds nothing else: sha256sum {MANIFEST} > {CHECKSUM}, in that folder"
    )
    try:
        said = folder.read(CHECKSUM)
    except FileNotFoundError:
        return [Problem(CHECKSUM, f"it is missing, so nobody knows whether {MANIFEST} was changed", anew)]
    found = hashlib.sha256(content).hexdigest()
    if said != f"{found}  {MANIFEST}\n".encode():
        was = said[:64].decode(errors="replace")
        return [Problem(MANIFEST, f"it was changed or damaged: its sha256 is {found}, {CHECKSUM} says {was!r}", anew)]
    return []


def _contradictions(manifest: Manifest) -> list[str]:
    """Statements of a manifest that cannot be true, or that do not agree with the rest of it."""
    shards, modalities = manifest.shards, manifest.modalities
    problems = []
    for shard in shards:
        if not _NAME.fullmatch(shard.name):
            problems.append(f"a shard's name must be a plain NAME.tar, not {shard.name!r}")
        if not (_SHA256.fullmatch(shard.sha256) and _SHA256.fullmatch(shard.index_sha256)):
            problems.append(f"{shard.name} has no proper sha256")
        if set(shard.tokens) != set(modalities):
            problems.append(f"{shard.name} counts tokens of {sorted(shard.tokens)}, the modalities are {modalities}")
    names = [shard.name for shard in shards]
    if twice := sorted({name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else ()):
        problems.append(f"shards are named more than once: {', '.join(twice)}")
    shaped = any(t.shapes is not None for t in manifest.tokenizers.values())
    if shaped != (manifest.schema_name == SCHEMA_OF_SHAPES):
        with_or_without = "with" if shaped else "without"
        problems.append(f"its schema is {manifest.schema_name!r}, but its tokenizers are {with_or_without} shapes")
    if modalities[:1] != ["text"]:
        problems.append(f"the first modality must be 'text', not {modalities[:1]}")
    largest = max((t.size for t in manifest.tokenizers.values()), default=0)
    if manifest.token_bytes not in (2, 4) or largest > 256**manifest.token_bytes:
        problems.append(f"{manifest.token_bytes} bytes a token cannot hold the {largest} ids of its largest tokenizer")
    counted: list[tuple[str, object, object]] = [
        ("modalities", modalities, list(manifest.tokenizers)),
        ("documents", manifest.documents, sum(s.documents for s in shards)),
        ("latent_width", manifest.latent_width, max((s.latent_width for s in shards), default=0)),
        ("tokens", manifest.tokens, {m: sum(s.tokens.get(m, 0) for s in shards) for m in modalities}),
    ]
    return problems + [
        f"{name}: {said!r}, but its own entries give {true!r}" for name, said, true in counted if said != true
    ]


def shapes_of(modalities: Sequence[str], tokenizers: Mapping[str, Mapping[str, Any]]) -> dict[int, Shapes]:
    """The shapes of pictures by the number of their modality, from the tokenizers of a manifest. A modality that is not
    there has square pictures alone, or none."""
    declared = ((k, tokenizers[name].get("shapes")) for k, name in enumerate(modalities) if name in tokenizers)
    return {k: Shapes.of(shapes) for k, shapes in declared if shapes is not None}


def index_problems(
    index: Mapping[str, np.ndarray],
    documents: int,
    tokens: Mapping[str, int],
    modalities: Sequence[str],
    shapes: Mapping[int, Shapes],
) -> list[str]:
    """How a shard's index contradicts itself, or the counts that the manifest gives for its shard.

    `index` holds the arrays of the index file. The order of `modalities` numbers the modalities. `documents` and
    `tokens` (by the name of the modality) are the counts of the manifest, and `shapes` is as `shapes_of` gives it.
    """
    try:
        start, length, modality = (index[name] for name in ("segment_start", "segment_length", "segment_modality"))
        number = len(index["crc32"])
        whole = (
            len(start) == number + 1 == len(index["token_offset"]) + 1
            and len(index.get("latent_offset", index["crc32"])) == number
            and len(length) == len(modality) == start[-1]
            and start[0] == 0
            and bool((start[1:] >= start[:-1]).all())
        )
    except KeyError as error:
        return [f"it has no {error}"]
    if not whole:
        return ["its table of segments does not fit its documents"]
    if wrong := _grid_problems(index, shapes):
        return wrong
    counts = index_counts(index, len(modalities))
    found = [("documents", number, documents)]
    found += [(f"{m} tokens", n, tokens.get(m, 0)) for m, n in zip(modalities, counts, strict=False)]
    found += [(f"tokens of modality number {m}", n, 0) for m, n in enumerate(counts) if m >= len(modalities)]
    return [f"{n:,} {name} found, the manifest says {said:,}" for name, n, said in found if n != said]


def _grid_problems(index: Mapping[str, np.ndarray], shapes: Mapping[int, Shapes]) -> list[str]:
    grids = index.get("segment_grid")
    if grids is None:
        return []
    modality = index["segment_modality"] & ~np.uint8(LATENT_BIT)
    if grids.shape != (len(modality), 2):
        return ["its table of rows and columns does not fit its segments"]
    if said := grid_problem(grids, index["segment_length"], modality):
        return [said]
    for k in np.unique(modality[grids[:, 0] != 0]).tolist():
        known = shapes[k].grids if k in shapes else ()
        for rows, columns in np.unique(grids[(modality == k) & (grids[:, 0] != 0)], axis=0).tolist():
            if (rows, columns) not in known:
                return [f"a picture has {rows} rows of {columns} columns, which the manifest's shapes do not have"]
    return []


def index_counts(index: Mapping[str, np.ndarray], modalities: int) -> list[int]:
    """The number of tokens of each modality, by its number. The list has at least `modalities` entries, and more where
    the index contains higher modality numbers."""
    modality = index["segment_modality"] & ~np.uint8(LATENT_BIT)
    return np.bincount(modality, index["segment_length"], minlength=modalities).astype(int).tolist()
