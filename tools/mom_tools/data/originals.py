"""Finds the raw documents from which documents of token shards were made."""

from __future__ import annotations

import sys
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tqdm import tqdm

from mom_data.documents.sample import BadSample, Document, Reading, Segment
from mom_data.shards.format import TokenSegment
from mom_tokenizers.bundle import Tokenizers

_PART_BYTES = 4 << 20
"""Raw files are cut into parts of this size, and only those that hold a wanted document are read."""


def documents_of(keys: Collection[str], raw: list[str], reading: Reading) -> dict[str, list[Document | BadSample]]:
    """The raw documents of the wanted keys, in the order of the files. A key that stands in several files has several.
    Raises UserError for a pattern that names no raw file, and for a damaged file."""
    from mom_data.documents.document import expand_inputs, index_parts, read_documents  # late: it imports torch

    wanted = set(keys)
    found: dict[str, list[Document | BadSample]] = {}
    files = expand_inputs(raw)
    for file in tqdm(files, desc="raw files", unit="file", disable=not sys.stderr.isatty()):
        for part in index_parts(file, _PART_BYTES, wanted.__contains__):
            if part.wanted:
                for document in read_documents(file, part, reading):
                    if document.key in wanted:
                        found.setdefault(document.key, []).append(document)
    return found


@dataclass
class Found:
    """What became of the search for the originals of the documents that are shown."""

    beside: int = 0
    """Documents that stand beside their original."""
    missing: list[str] = field(default_factory=list)
    """Keys that are in none of the raw files."""
    others: list[str] = field(default_factory=list)
    """A line for each key under which the raw files hold another document, or several that could be the original."""

    def __str__(self) -> str:
        said = [f"{self.beside} beside their original"]
        said += [f"{len(self.missing)} not in the raw files ({_some(self.missing)})"] if self.missing else []
        said += [f"{len(self.others)} otherwise in the raw files ({_some(self.others)})"] if self.others else []
        return ", ".join(said)


def _some(names: list[str]) -> str:
    return "; ".join(names[:3]) + ("; ..." if len(names) > 3 else "")


def original(
    key: str,
    segments: list[tuple[str, TokenSegment]],
    candidates: list[Document | BadSample],
    modalities: Collection[str],
    tokenizers: Tokenizers | None,
    found: Found,
) -> list[Segment] | None:
    """The raw segment of each segment of a document, given with its modality, or None where no raw document is its
    original. `modalities` are those of the dataset. What became of it is counted in `found`."""
    if not candidates:
        found.missing.append(key)
        return None
    tried = [_matched(segments, candidate, modalities, tokenizers) for candidate in candidates]
    fitting = [one for one in tried if isinstance(one, list)]
    same = [[segment.data for segment in one] for one in fitting]
    if fitting and all(data == same[0] for data in same):
        found.beside += 1
        return fitting[0]
    why = next((one for one in tried if isinstance(one, str)), "")
    found.others.append(f"{key}: {f'{len(fitting)} documents fit' if fitting else why}")
    return None


def _matched(
    segments: list[tuple[str, TokenSegment]],
    document: Document | BadSample,
    modalities: Collection[str],
    tokenizers: Any,
) -> list[Segment] | str:
    """The raw segment of each segment, or why the document is not the original."""
    if isinstance(document, BadSample):
        return f"not readable: {document.reason}"
    raw = [segment for segment in document.segments if segment.modality in modalities and len(segment.data)]
    # A dataset may have been made without some of the modalities that its tokenizers know (mom tokenize --drop).
    held = {modality for modality, _ in segments}
    for kept in (raw, [segment for segment in raw if segment.modality in held]):
        if [segment.modality for segment in kept] == [modality for modality, _ in segments]:
            break
    else:
        has, had = (", ".join(names) or "nothing" for names in (
            [modality for modality, _ in segments], [segment.modality for segment in raw]
        ))  # fmt: skip
        return f"it has {had}, the shards {has}"
    if tokenizers is not None and "text" in tokenizers.modalities:
        for (modality, segment), one in zip(segments, kept, strict=True):
            if modality == "text" and not np.array_equal(tokenizers.encode("text", one.data), segment.values):
                return "its text has other ids"
    return kept
