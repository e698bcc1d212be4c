"""Finds the members of a tar and groups them into samples. Every header is read, every member either belongs to a
sample or is counted as left out, and none is unpacked to disk.

The members of a sample are those of one key, wherever they stand. A compressed tar can only be read from its start on,
so there the members of a sample must stand side by side.
"""

from __future__ import annotations

import functools
import os
import posixpath
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from webdataset.tariterators import base_plus_ext

from mom_data.documents import account as why
from mom_data.documents import json_lines
from mom_data.documents.account import Account, shown
from mom_data.documents.raw_files import is_compressed, opened, readable
from mom_data.documents.sample import CAPTION_EXTENSIONS, TEXT_EXTENSIONS, Found, LeftOut
from mom_tokenizers.errors import UserError

MAX_MEMBER_BYTES = 4 << 30
"""The largest file of a picture or a recording. Two hours of sound in two channels of 24 bits take half of it."""
_TEXTS = (*TEXT_EXTENSIONS, *CAPTION_EXTENSIONS, "json", "npy")  # members with the smaller size limit of a text
_SYSTEM_FILES = ("thumbs.db", "desktop.ini")
_LINKS = 40  # links followed from one to the next; more are taken for a circle


@dataclass(frozen=True, slots=True)
class Header:
    """What a tar's header says about a member.

    `key` is None where the member belongs to no sample, and `unfit` then says why. For a member of a sample, `unfit`
    says why its bytes cannot be read. `link` is the name of the member that holds the bytes, where this one is a link.
    `offset` is the byte where the header begins, and `data` the byte where the content begins.
    """

    name: str
    key: str | None
    extension: str
    offset: int
    data: int
    size: int
    unfit: str | None
    link: str | None


Sample = tuple[str, list[Header]]


def _header(member: tarfile.TarInfo) -> Header:
    name = member.name
    base = posixpath.basename(name)
    sample, suffix = base_plus_ext(name)
    stray = unfit = link = None
    if member.isdir():
        stray = why.DIRECTORY
    elif base.startswith(".") or base.lower() in _SYSTEM_FILES or "__MACOSX" in name.split("/"):
        stray = why.SYSTEM
    elif sample is None:
        stray = why.NO_EXTENSION
    if member.issym():
        link = posixpath.normpath(posixpath.join(posixpath.dirname(name), member.linkname))
    elif member.islnk():
        link = posixpath.normpath(member.linkname)
    elif member.sparse is not None:
        unfit = why.SPARSE
    elif not member.isfile():
        unfit = why.SPECIAL
    key = None if stray else sample
    extension = (suffix or "").lower()
    text = extension.rpartition(".")[2] in _TEXTS
    if member.size > (json_lines.MAX_LINE_BYTES if text else MAX_MEMBER_BYTES):
        unfit = unfit or why.TOO_LARGE  # not read, because what a gzip unpacks to may not fit into memory
    return Header(name, key, extension, member.offset, member.offset_data, member.size, stray or unfit, link)


def _members(path: Path, start: int, end: int | None) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """The members whose headers lie in bytes [start, end) of the unpacked file.

    Python's tarfile, and so webdataset, takes a damaged header for the end of the archive and silently drops the rest.
    So this function checks that only the zeros that end a tar follow the last member.
    """
    with readable(path, "tar"), opened(path) as file:
        size = None if is_compressed(path) else os.fstat(file.fileno()).st_size
        file.seek(start)
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while member := tar.next():
                if end is not None and member.offset >= end:
                    return
                if size is not None and member.offset_data + member.size > size and member.sparse is None:
                    raise UserError(f"{path}: truncated inside member {member.name}")
                yield tar, member
                tar.members = []  # type: ignore[attr-defined]  # otherwise tarfile keeps every header in memory
            file.seek(tar.offset)
            trailer = file.read(1024)
            if not trailer:
                raise UserError(f"{path}: truncated: the zeros that end a tar are missing. Fetch the file again.")
            while block := trailer or file.read(1 << 20):
                if block.strip(b"\0"):
                    raise UserError(
                        f"{path}: damaged near byte {tar.offset}: not a tar header there, and data follows. "
                        "Fetch the file again, or repack what is readable (also of tars put together with cat)."
                    )
                trailer = b""


def headers(path: Path, start: int = 0, end: int | None = None) -> Iterator[Header]:
    """The headers in bytes [start, end) of the unpacked file, in order. Raises UserError where the tar is damaged."""
    return (_header(member) for _, member in _members(path, start, end))


def samples(members: Iterable[Header]) -> tuple[list[Sample], bool]:
    """(samples in the order of their first members, whether a sample has members that stand apart).

    Members of one key that stand apart form one sample, as in a tar with all pictures before all texts. Where all runs
    of a key have the same extensions, each run is a sample of its own, as in tars that were joined.
    """
    runs: dict[str, list[list[Header]]] = {}
    order: list[tuple[str, int]] = []
    keyed = (header for header in members if header.key is not None)
    for key, run in groupby(keyed, key=_group):
        own = runs.setdefault(key, [])
        order.append((key, len(own)))
        own.append(list(run))
    found: list[Sample] = []
    together = False
    for key, number in order:
        own = runs[key]
        if len(own) > 1 and any({h.extension for h in run} != {h.extension for h in own[0]} for run in own):
            together = True
            if number:
                continue
            members_of_key = [header for run in own for header in run]
        else:
            members_of_key = own[number]
        found.append((str(members_of_key[0].key), members_of_key))
    return found, together


def _group(header: Header) -> str:
    """The key without a leading "./", since some names of one sample may have it and others not."""
    key = str(header.key)
    while key.startswith("./"):
        key = key[2:]
    return key


def cuts(members: list[Header], part_bytes: int) -> list[int]:
    """Positions in `members` at which new parts of at least `part_bytes` begin. No cut divides a sample."""
    last = {_group(header): i for i, header in enumerate(members) if header.key is not None}
    found = []
    start, until = 0, -1  # the first byte of the part; the last member of all samples begun in the part
    for i, header in enumerate(members):
        if header.key is None:
            continue
        if 0 <= until < i and header.offset - start >= part_bytes:
            found.append(i)
            start, until = header.offset, -1
        until = max(until, last[_group(header)])
    return found


def read_samples(path: Path, start: int, end: int | None, account: Account) -> Iterator[tuple[str, list[Found]]]:
    """(key, members) of every sample whose headers lie in bytes [start, end), in order. All members are counted in the
    account, and those that belong to no sample are counted there as left out."""
    if is_compressed(path):
        yield from stream_samples(path, account)
        return
    met = list(_counted(headers(path, start, end), path, account))

    @functools.cache
    def names() -> dict[str, Header]:
        return {posixpath.normpath(header.name): header for header in headers(path)}

    def data(header: Header) -> bytes:
        for _ in range(_LINKS):
            if header.link is None:
                break
            linked = names().get(header.link)
            if linked is None:
                raise LeftOut(why.LINK)
            header = linked
        if header.link is not None or header.unfit == why.DIRECTORY:
            raise LeftOut(why.LINK)
        if header.unfit is not None:
            raise _unfit(header)
        file.seek(header.data)
        content = file.read(header.size)
        if len(content) != header.size:
            raise tarfile.ReadError(f"it ends inside member {header.name}, where it went on before")
        return content

    with readable(path, "tar"), opened(path) as file:
        for key, members in samples(met)[0]:
            yield key, [Found(h.name, h.extension, functools.partial(data, h)) for h in members]


def stream_samples(path: Path, account: Account) -> Iterator[tuple[str, list[Found]]]:
    """(key, members) of samples in order, read in a single pass. Only members that stand side by side are grouped."""

    def found() -> Iterator[tuple[Header, Found]]:
        for tar, member in _members(path, 0, None):
            header = _header(member)
            for kept in _counted([header], path, account):
                if kept.key is not None:
                    extracted = tar.extractfile(member) if header.link is None and header.unfit is None else None
                    content = None if extracted is None else extracted.read()
                    if content is not None and len(content) != member.size:
                        raise UserError(f"{path}: truncated inside member {member.name}")
                    yield header, Found(header.name, header.extension, functools.partial(_streamed, header, content))

    for _, group in groupby(found(), key=lambda pair: _group(pair[0])):
        members = list(group)
        yield str(members[0][0].key), [one for _, one in members]


def _streamed(header: Header, content: bytes | None) -> bytes:
    if content is None:  # a link's target may lie before it in the stream and can no longer be read
        raise LeftOut(why.PACKED_LINK) if header.link is not None else _unfit(header)
    return content


def _unfit(header: Header) -> LeftOut:
    assert header.unfit is not None
    size = f"{header.size} bytes of " if header.unfit == why.TOO_LARGE else ""
    return LeftOut(header.unfit, header.extension, f"{size}{header.name}")


def _counted(members: Iterable[Header], path: Path, account: Account) -> Iterator[Header]:
    for header in members:
        account.members += 1
        if header.key is None:
            assert header.unfit is not None
            account.leave(f"{path.name}: {header.name}", shown(header.name), header.unfit)
        yield header
