"""The entry for reading raw input: WebDataset tars and JSON-lines files, cut into parts and read in order.

`expand_inputs` finds the files, `index_parts` cuts a file into parts, and `read_documents` yields the documents of a
part. How the members of a sample become a document is decided in sample.py; tars.py finds the members in a tar, and
account.py counts what became of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mom_data.documents import account as why
from mom_data.documents.account import Account, shown
from mom_data.documents.json_lines import lines
from mom_data.documents.raw_files import READ_SUFFIXES, UNREAD_PACKING, is_compressed, is_lines, readable
from mom_data.documents.sample import DEFAULT, BadSample, Document, Reading, Segment, read_line, read_sample
from mom_data.documents.tars import cuts, headers, samples, stream_samples
from mom_data.documents.tars import read_samples as read_tar_samples
from mom_tokenizers.errors import UserError
from mom_tokenizers.media.pictures import TooManyPixels, picture_size
from mom_tokenizers.media.recordings import recording_seconds

__all__ = [
    "BadSample", "Document", "Limits", "Part", "Reading", "Segment",
    "documents_at_the_head", "expand_inputs", "index_parts", "read_documents",
]  # fmt: skip

_DESCRIPTIONS = ("", ".md", ".html", ".pdf", ".yaml", ".yml", ".log", ".sh", ".py", ".sha256", ".md5", ".sha1")
_DESCRIBING = {
    "readme",
    "license",
    "licence",
    "credits",
    "attribution",
    "summary",
    "stats",
    "manifest",
    "metadata",
    "info",
    "dataset_info",
    "checksums",
}
"""Names of files that describe a data set, whatever their extension. Any other .json or .txt file may be data."""
_READ_AT_ONCE = 256 << 20  # bytes of a tar whose headers are held while its samples are read


@dataclass(frozen=True)
class Part:
    """A run of consecutive samples of a raw file.

    It lies in bytes [start, end) of the unpacked file; an `end` of None means the end of the file. It holds `documents`
    samples, the first of which has number `first`, and `wanted` of them are on the chosen side of a split.
    """

    start: int
    end: int | None
    first: int
    documents: int
    wanted: int


@dataclass(frozen=True)
class Limits:
    """The largest size that a segment may have; None means no limit. Sizes are read from the headers of pictures and
    recordings, without decompressing them."""

    pixels: int | None = None
    seconds: float | None = None
    characters: int | None = None

    def exceeded(self, segment: Segment) -> str | None:
        """Why the segment is too large, or None where it is not. A header that cannot be read gives None too, because
        the tokenizer reports that error later."""
        if isinstance(segment.data, str):
            n = len(segment.data)
            return f"{n} characters" if self.characters is not None and n > self.characters else None
        try:
            if segment.modality == "image" and self.pixels is not None:
                width, height = picture_size(segment.data)
                return f"picture of {width} x {height}" if width * height > self.pixels else None
            if segment.modality == "speech" and self.seconds is not None:
                seconds = recording_seconds(segment.data)
                return f"recording of {seconds:.1f} s" if seconds > self.seconds else None
        except TooManyPixels as error:
            return str(error)
        except ValueError:
            pass
        return None


def expand_inputs(patterns: list[str], account: Account | None = None) -> list[Path]:
    """The files that paths, globs and folders name, each once, in the order of the patterns and sorted within each.
    Folders are searched for tars and JSON-lines files; their other files are counted in the account.

    Raises a UserError that names every pattern which matches nothing.
    """
    found: dict[Path, None] = {}
    unread: dict[Path, str] = {}
    empty = []
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            inside = sorted(f for f in path.rglob("*") if f.is_file())
            files = [f for f in inside if f.name.lower().endswith(READ_SUFFIXES) and not f.name.startswith(".")]
            tars = {(f.parent, f.name.split(".")[0]) for f in files}
            unread |= {f: _why_unread(f, tars) for f in inside if f not in set(files)}
        elif path.is_file():
            files = [path]
        else:
            anchor = Path(path.anchor) if path.is_absolute() else Path()
            files = [f for f in anchor.glob(str(path.relative_to(anchor))) if f.is_file()]
        if not files:
            empty.append(pattern)
        found.update(dict.fromkeys(sorted(files)))
    if empty:
        not_read = [str(f) for f in unread if why.is_damage(unread[f])]
        raise UserError(
            "no input matches "
            + ", ".join(repr(p) for p in empty)
            + " (a .tar, .tar.gz or .jsonl file, a glob, or a folder)"
            + (f"; what is there is not read, e.g. {not_read[0]}" if not_read else "")
        )
    if account is not None:
        account.files += len(found)
        for file, reason in unread.items():
            if file not in found:
                account.leave_file(file, reason)
    return list(found)


def _why_unread(file: Path, read: set[tuple[Path, str]]) -> str:
    """Why a file of an input folder is not read. `read` holds (folder, name up to the first dot) of the files that are
    read. A file named after one of them describes it, as 00000.parquet and 00000_stats.json describe 00000.tar."""
    if file.name.startswith(".") or any(part.startswith(".") for part in file.parts[-3:-1]):
        return why.SYSTEM
    stem = file.name.split(".")[0]
    described = any(folder == file.parent and stem.removesuffix("_stats") == name for folder, name in read)
    if described and not file.name.lower().endswith(UNREAD_PACKING):
        return why.SIDECAR
    describes = shown(file.name) in _DESCRIPTIONS or stem.lower() in _DESCRIBING
    return why.SIDECAR if describes else why.NOT_READ


def index_parts(path: Path, part_bytes: int, wanted: Callable[[str], bool] | None = None) -> list[Part]:
    """Cut a raw file into parts of at least `part_bytes`, from its headers alone (for JSON lines, from its line ends).

    The parts depend only on the file and `part_bytes`, and no sample is in two parts. A compressed file is a single
    part, because it cannot be read from the middle. `wanted` says whether the document with a given key counts as
    wanted. Raises UserError where the file is damaged, or where it is compressed and the members of a sample do not
    stand side by side.
    """
    if not is_lines(path):
        return _index_tar(path, part_bytes, wanted)
    parts: list[Part] = []
    start = first = documents = chosen = 0
    for key, at, _ in lines(path):
        if documents and at - start >= part_bytes and not is_compressed(path):
            parts.append(Part(start, at, first, documents, chosen))
            start, first, documents, chosen = at, first + documents, 0, 0
        documents += 1
        chosen += wanted is None or wanted(key)
    return [*parts, Part(start, None, first, documents, chosen)]


def _index_tar(path: Path, part_bytes: int, wanted: Callable[[str], bool] | None) -> list[Part]:
    members = list(headers(path))
    places = [] if is_compressed(path) else cuts(members, part_bytes)
    parts: list[Part] = []
    first = 0
    for begin, until in zip([0, *places], [*places, len(members)], strict=True):
        found, together = samples(members[begin:until])
        if together and is_compressed(path):
            raise UserError(
                f"{path}: the members of a sample do not stand side by side, and what is compressed cannot be entered "
                "in the middle to bring them together: unpack it to a plain .tar first (gunzip or the like)"
            )
        start = members[begin].offset if begin else 0
        end = members[until].offset if until < len(members) else None
        parts.append(Part(start, end, first, len(found), sum(wanted is None or wanted(key) for key, _ in found)))
        first += len(found)
    return parts


def read_documents(
    path: str | Path, part: Part | None = None, reading: Reading = DEFAULT, account: Account | None = None
) -> Iterator[Document | BadSample]:
    """The documents of one raw file, or of a part of it, in file order. Nothing is unpickled or unpacked to disk.

    The account counts all members that are met, and decides those that belong to no sample. The caller decides what
    becomes of each sample and reports it with `Account.sample`. Raises UserError where the file itself is damaged
    (truncated, or with a broken header), or has changed since it was indexed.
    """
    path, account = Path(path), account or Account()
    for own in [part] if part else _parts_to_read(path):
        number = 0
        for number, document in enumerate(_read_part(path, own, reading, account), 1):  # noqa: B007  # counted below
            yield document
        if number != own.documents and not (part is None and is_lines(path)):
            raise UserError(
                f"{path}: {number} samples from byte {own.start} on, {own.documents} when it was indexed: "
                "it has changed"
            )


def documents_at_the_head(path: Path, reading: Reading = DEFAULT) -> Iterator[Document | BadSample]:
    """The documents of a file, for looking at the first few. The headers of the whole file are not read beforehand, so
    members of one sample that do not stand side by side become separate documents."""
    if is_lines(path):
        yield from read_documents(path, None, reading)
        return
    for key, found in stream_samples(path, Account()):
        yield read_sample(key, found, reading)


def _parts_to_read(path: Path) -> list[Part]:
    """The parts of a file that is read as a whole. JSON lines need no index, because each line is a document."""
    return [Part(0, None, 0, 0, 0)] if is_lines(path) else index_parts(path, _READ_AT_ONCE)


def _read_part(path: Path, part: Part, reading: Reading, account: Account) -> Iterator[Document | BadSample]:
    if is_lines(path):
        for key, _, line in lines(path, part.start, part.first, part.end):
            account.members += 1
            yield read_line(key, line, reading)
        return
    for key, found in read_tar_samples(path, part.start, part.end, account):
        with readable(path, "tar"):  # read_sample reads the members' bytes
            item = read_sample(key, found, reading)
        yield item
