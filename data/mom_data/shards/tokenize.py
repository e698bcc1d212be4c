"""Makes token shards from one part of a raw file. The same code, which makes the same bytes, runs before training
(tools/tokenize_shards.py) and during it (online.py).

    INPUT.tar  --index-->  parts (consecutive samples)  --tokenize_part-->  NAME-00000.tar, .idx, ..., and a record

The contents of a shard depend on the input, the settings and the tokenizers alone, not on the number of processes nor
on when one was killed. A model on another kind of processor may round differently, so pictures and speech give the same
codes only on the same kind of machine.
"""

from __future__ import annotations

import functools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from mom_data.documents.account import DROPPED, EMPTY, OTHER_SIDE, TOO_LARGE, UNREADABLE, Account
from mom_data.documents.document import BadSample, Document, Limits, Part, Reading, index_parts, read_documents
from mom_data.documents.inputs import Holdout, least_held_out
from mom_data.shards.content import content_of
from mom_data.shards.format import ShardWriter, TokenSegment
from mom_tokenizers.bundle import Tokenizers
from mom_tokenizers.errors import UserError
from mom_tokenizers.files import write_whole

_GROUP = 64  # the most documents that are encoded together
_GROUP_BYTES = 64 << 20  # a group also ends with the document by which it exceeds this size
RECORDS = ".parts"  # the folder beside the shards that holds the records of finished parts
UNFORESEEN = "unforeseen"  # stands in the reason where a tokenizer raised an unexpected exception
_HOPELESS = 64  # after this many unexpected exceptions in a row the tokenizer is at fault, not the documents
READER = 4  # raise this where the same raw file gives other documents than before, so that shards are made again


@dataclass(frozen=True)
class Settings:
    """Everything that decides the tokens beside the input."""

    tokenizers: Path
    described: Mapping[str, Mapping[str, Any]]
    """The description of the tokenizers, as `Tokenizers.describe` gives it."""
    part_bytes: int = 256 << 20
    """The size of a part, in bytes of the unpacked raw file. A part ends with the first document that exceeds it. A
    compressed file is one part."""
    shard_bytes: int | None = 128 << 20
    """The size of a shard. A shard ends with the first group of documents that exceeds it. None makes one shard of each
    part."""
    split: str | None = None
    """The side to take, "train" or "val", of a hold-out by document key. None takes all documents."""
    holdout: float = 0.03
    """The share of documents that is val."""
    drop: tuple[str, ...] = ()
    """Modalities to leave out."""
    limits: Limits = field(default_factory=Limits)
    reading: Reading = field(default_factory=Reading)
    keep_empty: bool = False
    """Whether a document without tokens (unreadable, too large, or empty) keeps its place as one without segments."""
    least: int | None = None
    """The hash of the key that is val at any share, set where the share alone takes no document (see `Holdout`)."""

    @property
    def token_dtype(self) -> type:
        """The smallest type that holds every modality's local ids."""
        return np.uint16 if max(t["size"] for t in self.described.values()) <= 1 << 16 else np.uint32

    def wanted(self, key: str) -> bool:
        """Whether a document belongs to the side of the split that is taken. The hash of its key decides the side."""
        return self.split is None or Holdout(self.holdout, self.least).held_out(key) == (self.split == "val")


@dataclass(frozen=True)
class Job:
    """The task to tokenize one part of one input into shards in the folder `output`."""

    source: Path
    name: str
    part: Part
    settings: Settings
    output: Path
    content: str
    """The sha256 of the source, as `content_of` gives it."""

    @property
    def record_file(self) -> Path:
        """The file in which the record of the finished part is kept."""
        return self.output / RECORDS / f"{self.name}.json"

    def identity(self) -> dict[str, Any]:
        """Everything that the result depends on. A record is reused only where its identity is the same."""
        settings = self.settings
        identity = {
            "source": self.source.name,
            "sha256": self.content,
            "part": asdict(self.part),
            "tokenizers": settings.described,
            "split": [settings.split, settings.holdout, settings.least] if settings.split else None,
            "shard_bytes": settings.shard_bytes,
            "drop": sorted(settings.drop),
            "limits": asdict(settings.limits),
            "keep_empty": settings.keep_empty,
            "reader": READER,
            "reading": [settings.reading.text_keys, sorted(settings.reading.ignore)],
        }
        return json.loads(json.dumps(identity))

    def check_source(self) -> None:
        """Raises UserError where the source has changed since the job was planned."""
        if content_of(self.source, self.output / RECORDS) != self.content:
            raise UserError(
                f"{self.source}: damaged or changed since its headers were read. Put it back as it was, or start "
                "again and let all of it be tokenized as it is now."
            )

    def finished(self) -> dict[str, Any] | None:
        """The record of this part where it was finished with the same identity and its shards exist, or None."""
        if not self.record_file.exists():
            return None
        record = json.loads(self.record_file.read_text())
        files = [(self.output / s["name"], s["bytes"]) for s in record["shards"]]
        there = all(f.is_file() and f.stat().st_size == n and f.with_suffix(".idx").is_file() for f, n in files)
        return record if there and record["identity"] == self.identity() else None


def names_of(sources: Sequence[Path]) -> list[str]:
    """A name for each input's shards: the stem of its file, or folder-stem where the stems alone are not unique.

    Names contain no dots, because webdataset would take them for extensions.
    """
    stems = [path.name.split(".")[0] for path in sources]
    if len(set(stems)) < len(stems):
        stems = [f"{path.parent.name}-{stem}".replace(".", "_") for path, stem in zip(sources, stems, strict=True)]
    _unique(stems)
    return stems


def _unique(names: Sequence[str]) -> None:
    twice = [name for name, n in Counter(names).items() if n > 1]
    if twice:
        raise UserError(f"several inputs would write shards named {twice[0]}: give the files different names")


@dataclass(frozen=True)
class Index:
    """What the headers of an input say: its parts, and the lowest hash of its keys (see `Holdout`)."""

    parts: list[Part]
    lowest: int


def known_index(source: Path, name: str, settings: Settings, output: Path) -> Index | None:
    """The index of an input where `index` has made it before, or None."""
    file = output / RECORDS / f"{name}.index"
    if file.exists():
        known = json.loads(file.read_text())
        if known["made_from"] == _indexed_from(source, settings):
            return Index([Part(**part) for part in known["parts"]], known["lowest"])
    return None


def index(source: Path, name: str, settings: Settings, output: Path) -> Index:
    """The index of an input, which is made once and then remembered in the output folder."""
    file = output / RECORDS / f"{name}.index"
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_suffix(".index.lock")):
        found = known_index(source, name, settings, output)
        if found is None:
            made_from = _indexed_from(source, settings)
            holdout = Holdout(settings.holdout, settings.least)
            wanted = None
            if (split := settings.split) is not None:
                wanted = lambda key: holdout.held_out(key) == (split == "val")  # noqa: E731
            found = Index(index_parts(source, settings.part_bytes, wanted), holdout.lowest)
            parts = [asdict(part) for part in found.parts]
            _write(file, {"made_from": made_from, "parts": parts, "lowest": found.lowest})
    return found


def with_a_document_held_out(settings: Settings, indices: Sequence[Index]) -> Settings:
    """The settings, changed where necessary so that at least one document of the whole corpus is val. `indices` are
    those of all inputs. Where the result differs from the given settings, the inputs must be indexed again."""
    if settings.split is None:
        return settings
    return replace(settings, least=least_held_out(settings.holdout, [index.lowest for index in indices]))


def _indexed_from(source: Path, settings: Settings) -> list[Any]:
    status = source.stat()
    appearance = [str(source), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
    return [READER, *appearance, settings.part_bytes, settings.split, settings.holdout, settings.least]


def jobs_of(
    sources: Sequence[Path], names: Sequence[str], parts: Sequence[Sequence[Part]], settings: Settings, output: Path
) -> list[Job]:
    """A job for every part, in order. Where an input has a single part, its shards have the name of the input, without
    the number of the part. Raises UserError where no document is on the side of the split that is taken."""
    jobs = [
        Job(source, name if len(own) == 1 else f"{name}-p{k:05d}", part, settings, output, content)
        for source, name, own in zip(sources, names, parts, strict=True)
        for content in [content_of(source, output / RECORDS)]
        for k, part in enumerate(own)
    ]
    _unique([job.name for job in jobs])
    if settings.split is not None and jobs and not any(job.part.wanted for job in jobs):
        documents = sum(job.part.documents for job in jobs)
        raise UserError(
            f"none of the {documents} documents is {settings.split} with a hold-out of {settings.holdout}, by the hash "
            "of their keys (documents of one key go together). Choose another share (--holdout), or put the documents "
            "of each side into a folder of its own."
        )
    return jobs


@dataclass(frozen=True)
class Encoded:
    """The result of encoding a document: its segments, or the `reason` why it is skipped. `guilty` names the member
    that could not be read, and `lost` names the unreadable pictures of a web page that is kept without them."""

    segments: tuple[TokenSegment, ...] = ()
    reason: str | None = None
    guilty: str | None = None
    lost: tuple[str, ...] = ()


def encode_documents(documents: Sequence[Document], tokenizers: Tokenizers) -> Iterator[Encoded]:
    """The result for each document, in order. Pictures and recordings of all documents are encoded in batches."""
    modalities = tokenizers.modalities
    positions: dict[str, list[tuple[int, int]]] = {}
    encoded: dict[tuple[int, int], np.ndarray | Exception] = {}
    for d, document in enumerate(documents):
        for s, segment in enumerate(document.segments):
            positions.setdefault(segment.modality, []).append((d, s))
    for modality, where in positions.items():
        if modality not in modalities:
            error = ValueError(f"no tokenizer for modality '{modality}'")
            encoded.update(dict.fromkeys(where, error))
            continue
        values = [documents[d].segments[s].data for d, s in where]
        encoded.update(zip(where, tokenizers.encode_many(modality, values), strict=True))
    for d, document in enumerate(documents):
        yield _encoded(document, [encoded[d, s] for s in range(len(document.segments))], modalities)


def _encoded(document: Document, ids: Sequence[np.ndarray | Exception], modalities: Sequence[str]) -> Encoded:
    segments, lost = [], []
    for s, (segment, values) in enumerate(zip(document.segments, ids, strict=True)):
        if isinstance(values, ValueError) and document.page and segment.modality == "image" and "image" in modalities:
            lost.append(segment.member)
        elif isinstance(values, Exception):
            # A ValueError describes what is wrong with the data. Any other exception is unexpected.
            said = f"{values}" if isinstance(values, ValueError) else f"{UNFORESEEN} {type(values).__name__}: {values}"
            return Encoded((), f"{UNREADABLE}: segment {s} ({segment.modality}): {said}", segment.member)
        elif len(values):
            segments.append(TokenSegment.of(modalities.index(segment.modality), values))
    if not segments:
        reason = f"{UNREADABLE}: none of its {len(lost)} pictures, and it has no text" if lost else EMPTY
        return Encoded((), reason, lost[0] if lost else None)
    return Encoded(tuple(segments), None, None, tuple(lost))


def tokenize_part(
    job: Job, load: Callable[[], Tokenizers], progress: Callable[[int, int], None] = lambda documents, tokens: None
) -> dict[str, Any]:
    """Tokenize one part into one or more shards, and return its record. Returns at once where that was done before.

    The record is {"identity", "shards" (as in the manifest), "skipped" ({"shard", "key", "number", "reason"} of each
    document, whose number counts the part's wanted documents), "account" (`Account.as_json`)}.

    `load` is called only where there is work to do. `progress` is called with numbers of samples read and tokens
    written. The process may be killed at any moment, and several processes may do the same part. Raises UserError where
    the file itself is damaged.
    """
    settings = job.settings
    job.record_file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(job.record_file.with_suffix(".lock")):
        if (record := job.finished()) is not None:
            progress(job.part.documents, 0)
            return record
        job.check_source()
        tokenizers = load()
        sizes = {modality: int(described["size"]) for modality, described in settings.described.items()}
        shards: list[dict[str, Any]] = []
        skipped: list[dict[str, Any]] = []
        hopeless: list[str] = []
        number = 0
        account = Account()
        groups = _groups(_to_encode(job, progress, account))
        more = True
        while more:
            path = job.output / f"{job.name}-{len(shards):05d}.tar"
            with ShardWriter(path, tokenizers.modalities, settings.token_dtype, sizes) as writer:
                while settings.shard_bytes is None or writer.bytes_written < settings.shard_bytes:
                    group = next(groups, None)
                    if group is None:
                        more = False
                        break
                    tokens = 0
                    encoded = encode_documents([d for d in group if isinstance(d, Document)], tokenizers)
                    for item in group:
                        result = next(encoded) if isinstance(item, Document) else Encoded((), item.reason)
                        if result.reason is None:
                            try:
                                writer.add(item.key, result.segments)
                                tokens += sum(len(s.values) for s in result.segments)
                            except ValueError as error:  # an id is not below its tokenizer's size
                                result = Encoded((), f"{UNREADABLE}: {error}")
                        if result.reason is not None:
                            entry = {"key": item.key, "number": number, "reason": result.reason}
                            skipped.append({"shard": job.source.name, **entry})
                            if settings.keep_empty:
                                writer.add(item.key, [])
                        _account_for(account, job.source.name, item, result)
                        number += 1
                        unforeseen = UNFORESEEN in (result.reason or "")
                        hopeless = [*hopeless, f"{item.key}: {result.reason}"] if unforeseen else []
                        if len(hopeless) >= _HOPELESS:
                            raise RuntimeError(
                                f"{len(hopeless)} documents one after another could not be tokenized, so they are not "
                                f"the matter. The first is {hopeless[0]}"
                            )
                    progress(0, tokens)
            shards.append(writer.record())
        job.check_source()
        record = {"identity": job.identity(), "shards": shards, "skipped": skipped, "account": account.as_json()}
        _write(job.record_file, record)
        return record


def _account_for(account: Account, source: str, item: Document | BadSample, result: Encoded) -> None:
    members = item.members
    if result.lost:
        members = tuple(m._replace(kind=None, reason=UNREADABLE) if m.name in result.lost else m for m in members)
    account.sample(source, members, result.reason, result.guilty)
    if result.reason is None and isinstance(item, Document):
        account.lose(f"{source}: {item.key}: {name}" for name in item.missing)


def _to_encode(job: Job, progress: Callable[[int, int], None], account: Account) -> Iterator[Document | BadSample]:
    """The part's documents on the wanted side of the split, without segments of dropped modalities. A BadSample stands
    for a document that is left out. Documents that are not yielded at all are accounted for here."""
    settings = job.settings
    for item in read_documents(job.source, job.part, settings.reading, account):
        progress(1, 0)
        if not settings.wanted(item.key):
            account.sample(job.source.name, item.members, OTHER_SIDE)
            continue
        if isinstance(item, BadSample):
            yield item
            continue
        kept = tuple(s for s in item.segments if s.modality not in settings.drop)
        members = tuple(m._replace(kind=None, reason=DROPPED) if m.kind in settings.drop else m for m in item.members)
        if item.segments and not kept:
            if settings.keep_empty:
                yield BadSample(item.key, DROPPED, members)
            else:
                account.sample(job.source.name, members, DROPPED)
        elif too_large := next((e for s in kept if (e := settings.limits.exceeded(s))), None):
            yield BadSample(item.key, f"{TOO_LARGE}: {too_large}", members)
        else:
            yield replace(item, segments=kept, members=members)


def _groups(stream: Iterator[Document | BadSample]) -> Iterator[list[Document | BadSample]]:
    group: list[Document | BadSample] = []
    documents = size = 0
    for item in stream:
        group.append(item)
        if isinstance(item, Document):
            documents += 1
            size += sum(len(segment.data) for segment in item.segments)
        if documents == _GROUP or size > _GROUP_BYTES:
            yield group
            group, documents, size = [], 0, 0
    if group:
        yield group


def tokenizing(path: Path, device: str = "cpu") -> Tokenizers:
    """The tokenizers of a process that encodes, loaded once. torch is set to one thread, so that sums are rounded the
    same on any number of cores."""
    import torch

    torch.set_num_threads(1)
    torch.backends.cudnn.deterministic = True
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return _loaded(path, device)


@functools.lru_cache(maxsize=1)
def _loaded(path: Path, device: str) -> Tokenizers:
    return Tokenizers.load(path, device)


def _write(file: Path, value: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps(value))
