"""Verifies that a dataset is whole: every byte of it is read and checked, and everything that is wrong is listed.

Reading the tars is not enough, because readers take a damaged header for the end of the archive and silently drop what
follows. So each tar is walked header by header, beyond damage too, and compared with the index; the index is compared
with the tables in the blocks, every document with its crc32, and the counts with the manifest.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.numpy

from mom_data.shards.format import LATENT_BIT, SCHEMA, TAR_HEADER, crc32, index_block, join_index, sha256_of
from mom_data.shards.manifest import (
    MANIFEST,
    Manifest,
    Problem,
    ShardRecord,
    index_counts,
    index_problems,
    shapes_of,
)
from mom_data.shards.manifest import read_manifest as manifest_of
from mom_data.shards.storage import LocalFolder
from mom_tokenizers.errors import UserError
from mom_tokenizers.files import write_whole

INDEX_BYTES = 40
"""The most bytes per document that an index should take. In short shards it takes more, because of its header."""
_COPY = "copy {} again from where it is whole, or delete it and run tools/tokenize_shards.py again"


class Member(NamedTuple):
    """A member of a tar. Its header begins at byte `header`, and its content is bytes [start, end)."""

    header: int
    name: str
    start: int
    end: int


class Damage(NamedTuple):
    """Something wrong at a byte of a tar. `hides` says that other tar readers take it for the end and drop the rest."""

    position: int
    what: str
    hides: bool = False


@dataclass
class ShardReport:
    """Everything that was found in one shard."""

    name: str
    documents: int = 0
    bytes: int = 0
    index_bytes: int = 0
    tokens: dict[str, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def walk_tar(content: bytes | mmap.mmap) -> Iterator[Member | Damage]:
    """The members of a tar in order, and the damage between them. After damage it goes on at the next sound header.

    A tar is expected to be as TarWriter makes it: plain files one after the other, then at least two blocks of zeros.
    """
    at, size = 0, len(content)
    while at < size:
        header = content[at : at + TAR_HEADER]
        if not header.strip(b"\0"):
            data = _next_data(content, at)
            if data is None:
                if size - at < 2 * TAR_HEADER:
                    break
                return
            if data < at + 2 * TAR_HEADER:
                yield Damage(at, f"zeros where a header belongs, with data behind them from byte {data:,}", True)
            else:
                yield Damage(data, "data after the tar's end mark, where zeros belong")
            at = _next_header(content, data)
            if at < 0:
                return
            continue
        try:
            info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
            if not info.isreg():
                raise tarfile.HeaderError(f"type {info.type!r}, not a plain file")
        except tarfile.HeaderError as error:
            yield Damage(at, f"damaged tar header ({error})", True)
            at = _next_header(content, at + TAR_HEADER)
            if at < 0:
                return
            continue
        start, end = at + TAR_HEADER, at + TAR_HEADER + info.size
        yield Member(at, info.name, start, min(end, size))
        at = -(-end // TAR_HEADER) * TAR_HEADER
        if end > size:
            yield Damage(size, f"the file ends here, {end - size:,} bytes before the end of member {info.name}")
            return
        if content[end:at].strip(b"\0"):
            yield Damage(end, f"data in the padding after member {info.name}, where zeros belong")
    yield Damage(size, "the tar's end mark (two blocks of zeros) is missing: it was cut, maybe between two members")


def _next_data(content: bytes | mmap.mmap, at: int) -> int | None:
    while at < len(content):
        chunk = content[at : at + (1 << 20)]
        if rest := len(chunk.lstrip(b"\0")):
            return at + len(chunk) - rest
        at += len(chunk)
    return None


def _next_header(content: bytes | mmap.mmap, at: int) -> int:
    """The byte of the first sound header in or after the block that contains byte `at`, or -1 where there is none."""
    at = at // TAR_HEADER * TAR_HEADER
    found = content.find(b"ustar", at)
    while found >= 0:
        header = found - 257  # the place of the magic in a POSIX header
        if header >= at and header % TAR_HEADER == 0:
            try:
                tarfile.TarInfo.frombuf(content[header : header + TAR_HEADER], "utf-8", "surrogateescape")
                return header
            except tarfile.HeaderError:
                pass
        found = content.find(b"ustar", found + 1)
    return -1


def _keys(content: bytes | mmap.mmap, start: int) -> list[str]:
    """The keys of the documents of the block at byte `start`, from its safetensors header alone. The list is empty
    where that header is damaged."""
    begin = start + 8
    try:
        header = json.loads(content[begin : begin + int.from_bytes(content[start:begin], "little")])
        return [str(key) for key in json.loads(header["__metadata__"][SCHEMA])["keys"]]
    except (ValueError, KeyError, TypeError):
        return []


def document_keys(shard: Path) -> list[str]:
    """The key of every document of a sound shard, in order. They are read from its blocks; the index has no keys."""
    with _opened(shard) as content:
        return [key for m in walk_tar(content) if isinstance(m, Member) for key in _keys(content, m.start)]


@contextmanager
def _opened(path: Path) -> Iterator[bytes | mmap.mmap]:
    with open(path, "rb") as file:
        if not path.stat().st_size:
            yield b""  # an empty file cannot be mapped
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            yield content


def read_manifest(folder: Path) -> tuple[Manifest | None, list[Problem]]:
    """(the manifest of a folder or None where it cannot be understood, everything that is wrong within it)."""
    try:
        _, manifest, problems = manifest_of(LocalFolder(folder))
    except (FileNotFoundError, NotADirectoryError):
        remedy = "copy it again, or run tools/tokenize_shards.py again (finished shards are kept)"
        return None, [Problem(MANIFEST, "it is missing, so there is no finished dataset", remedy)]
    return manifest, problems


def rebuild_index(folder: Path, record: ShardRecord) -> None:
    """Write a shard's index again from its tar alone, with the same bytes that the writer made.

    Raises UserError where the tar is not the one in the manifest, because an index of damaged data would hide the
    damage.
    """
    tar = folder / record.name
    if not tar.is_file():
        raise UserError(f"{tar} is missing, so its index cannot be made again; {_COPY.format('the shard')}")
    if sha256_of(tar) != record.sha256:
        raise UserError(
            f"{tar} is damaged itself (its sha256 is not the manifest's), so no index is made from it; "
            f"{_COPY.format('the shard')}"
        )
    blocks = []
    with _opened(tar) as content:
        for item in walk_tar(content):
            if isinstance(item, Damage):
                raise UserError(f"{tar} at byte {item.position:,}: {item.what}")
            blocks.append(index_block(content[item.start : item.end], item.start))
    index = join_index(blocks)
    if hashlib.sha256(index).hexdigest() != record.index_sha256:
        raise UserError(
            f"{tar} is whole, but the index made from it is not the one of the manifest: another version wrote it, or "
            "manifest.json is damaged. Run tools/tokenize_shards.py again."
        )
    write_whole(tar.with_suffix(".idx"), index)


def verify_shard(folder: Path, record: ShardRecord, manifest: Manifest) -> ShardReport:
    """Read all of one shard and list everything that is wrong with it."""
    report = ShardReport(record.name)
    path = folder / record.name
    index = _verified_index(path.with_suffix(".idx"), record, report)
    if not path.is_file():
        report.problems.append(Problem(path.name, "it is missing", _COPY.format("it")))
        return report
    report.bytes = path.stat().st_size
    with _opened(path) as content:
        if report.bytes != record.bytes:
            what = f"{report.bytes:,} bytes, the manifest says {record.bytes:,}"
            report.problems.append(Problem(path.name, what, _COPY.format("it")))
        digest = hashlib.sha256(content).hexdigest()
        if digest != record.sha256:
            what = f"its sha256 is {digest}, the manifest says {record.sha256}"
            report.problems.append(Problem(path.name, what, _COPY.format("it")))
        blocks, keys = _verify_blocks(content, index, record, manifest, report)
        if index is None:  # then only the blocks can be counted
            index = safetensors.numpy.load(join_index(blocks))
        else:
            _verify_documents(content, index, keys, manifest, report)
    counts = index_counts(index, len(manifest.modalities))
    report.documents = len(index["crc32"])
    report.tokens = dict(zip(manifest.modalities, counts, strict=False))
    remedy = _COPY.format("the shard and manifest.json")
    shapes = shapes_of(manifest.modalities, {m: t.model_dump() for m, t in manifest.tokenizers.items()})
    wrong = index_problems(index, record.documents, record.tokens, manifest.modalities, shapes)
    report.problems += [Problem(path.name, what, remedy) for what in wrong]
    return report


def _verified_index(path: Path, record: ShardRecord, report: ShardReport) -> dict[str, np.ndarray] | None:
    """The arrays of the index, or None where its checksum is not the manifest's. Problems are added to the report."""
    remedy = "run tools/verify_shards.py with --rebuild-index, which makes it from the tar, or copy it again"
    if not path.is_file():
        report.problems.append(Problem(path.name, "it is missing", remedy))
        return None
    content = path.read_bytes()
    report.index_bytes = len(content)
    digest = hashlib.sha256(content).hexdigest()
    if digest != record.index_sha256:
        what = f"its sha256 is {digest}, the manifest says {record.index_sha256}"
        report.problems.append(Problem(path.name, what, remedy))
        return None
    return safetensors.numpy.load(content)


def _verify_blocks(
    content: bytes | mmap.mmap,
    index: dict[str, np.ndarray] | None,
    record: ShardRecord,
    manifest: Manifest,
    report: ShardReport,
) -> tuple[list[dict[str, np.ndarray]], dict[int, str]]:
    """Walk the tar and compare every block with the index. Returns (the `index_block` arrays of sound blocks, the keys
    of documents by their number)."""
    blocks: list[dict[str, np.ndarray]] = []
    keys: dict[int, str] = {}

    def problem(what: str, position: int, first: int | None = None) -> None:
        report.problems.append(Problem(record.name, what, _COPY.format("it"), position, first))

    def documents_between(start: int, end: int) -> slice:
        assert index is not None
        # A document without tokens at the end of a block begins where the block ends.
        return slice(*np.searchsorted(index["token_offset"], [start, end + 1]).tolist())

    for item in walk_tar(content):
        if isinstance(item, Damage):
            lost = ""
            if item.hides and index is not None:
                rest = documents_between(item.position, len(content))
                lost = f"; tar readers stop here without a word and lose {rest.stop - rest.start:,} documents"
                for d, key in enumerate(_keys(content, item.position + TAR_HEADER), rest.start):
                    keys[d] = key  # the block after a damaged header is often whole
            problem(item.what + lost, item.position)
            continue
        block = content[item.start : item.end]
        mine = documents_between(item.start, item.end) if index is not None else slice(0, 0)
        first = mine.start if index is not None else sum(len(b["crc32"]) for b in blocks)
        keys.update(enumerate(_keys(content, item.start), first))
        try:
            arrays = index_block(block, item.start)
        except ValueError as error:
            problem(f"block {item.name} is damaged: {error}", item.start)
            continue
        blocks.append(arrays)
        for what in _bad_values(safetensors.numpy.load(block), record, manifest):
            problem(f"block {item.name}: {what}", item.start)
        if index is None:
            continue
        segments = slice(int(index["segment_start"][mine.start]), int(index["segment_start"][mine.stop]))
        stored = {
            "token_offset": index["token_offset"][mine],
            "segments": np.diff(index["segment_start"][mine.start : mine.stop + 1]),
            "segment_length": index["segment_length"][segments],
            "segment_modality": index["segment_modality"][segments],
            "segment_grid": index.get("segment_grid", np.zeros((segments.stop, 2), np.uint16))[segments],
        }
        if "latent_offset" in index:
            stored["latent_offset"] = index["latent_offset"][mine]
        for name, expected in stored.items():
            if not np.array_equal(expected, arrays[name]):
                problem(f"the index and block {item.name} disagree about {name}", item.start, mine.start)
                break
    return blocks, keys


def _bad_values(arrays: dict[str, np.ndarray], record: ShardRecord, manifest: Manifest) -> Iterator[str]:
    """What is wrong with a block's values: ids that are not below their tokenizer's size, tokens of another size in
    bytes, or latents of another width than the manifest says."""
    modality, count, _, flags = arrays["segments"].T
    of_token = np.repeat(modality, np.where(flags, 0, count))
    for number, name in enumerate(manifest.modalities):
        ids = arrays["tokens"][of_token == number]
        if name in manifest.tokenizers and len(ids) and (largest := int(ids.max())) >= manifest.tokenizers[name].size:
            yield f"{name} id {largest}, but its tokenizer has {manifest.tokenizers[name].size} ids"
    if (size := arrays["tokens"].itemsize) != manifest.token_bytes:
        yield f"tokens of {size} bytes, the manifest says {manifest.token_bytes}"
    if "latents" in arrays and (width := arrays["latents"].shape[1]) != record.latent_width:
        yield f"latents of width {width}, the manifest says {record.latent_width}"


def _verify_documents(
    content: bytes | mmap.mmap,
    index: dict[str, np.ndarray],
    keys: dict[int, str],
    manifest: Manifest,
    report: ShardReport,
) -> None:
    """Check the crc32 of every document, which is read as the trainer reads it, by the index alone."""
    latent = index["segment_modality"] >= LATENT_BIT

    def bytes_of(mine: np.ndarray, size: int) -> np.ndarray:
        values = np.r_[0, np.where(mine, index["segment_length"].astype(np.int64), 0).cumsum()]
        return np.diff(values[index["segment_start"]]) * size

    token_bytes, latent_bytes = (
        bytes_of(~latent, manifest.token_bytes).tolist(),
        bytes_of(latent, 2 * manifest.latent_width).tolist(),
    )
    token_at = index["token_offset"].tolist()
    latent_at = index["latent_offset"].tolist() if "latent_offset" in index else [0] * len(token_at)
    for d, crc in enumerate(index["crc32"].tolist()):
        if max(token_at[d] + token_bytes[d], latent_at[d] + latent_bytes[d]) > len(content):
            what = "it lies beyond the end of the file"
        else:
            found = crc32(content[token_at[d] : token_at[d] + token_bytes[d]])
            if crc32(content[latent_at[d] : latent_at[d] + latent_bytes[d]], found) == crc:
                continue
            what = "its bytes do not match their crc32"
        remedy = _COPY.format("the shard") + "; until then training masks this document"
        report.problems.append(Problem(report.name, what, remedy, token_at[d], d, keys.get(d)))
