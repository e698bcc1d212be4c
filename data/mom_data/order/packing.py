"""Packing: documents are cut into pieces of at most one row, and pieces are put together into rows. All functions here
are pure functions of lengths.

An assembled document is BOS, its segments, and EOS. A segment that is not text stands between an opening and a closing
token. Text may be cut anywhere, a picture of latents never. Spans of codes or units are cut only where `cut_spans`
allows it, or where one span alone is longer than a row.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from mom_tokenizers.errors import UserError

_BRACKETS = 2  # the opening and closing token around a span that is not text; a document also has BOS and EOS
_ENOUGH = 0.005  # the share of padding that is low enough, so that no further row is dissolved


class Piece(NamedTuple):
    """Positions [start, end) of an assembled document (BOS, text, brackets, spans, EOS) that stand in one row."""

    source: int
    shard: int
    document: int
    start: int
    end: int
    divisible: bool = False
    """Whether the piece may be cut anywhere, because it holds nothing that must stay whole."""


Cut = tuple[int, int, bool]
"""A piece of a document: its start, its end, and whether it may be cut anywhere."""


def assembled_lengths(start: np.ndarray, length: np.ndarray, modality: np.ndarray) -> np.ndarray:
    """int64 (D,): the number of positions that each document takes when assembled. `start` (D+1,) is the number of each
    document's first segment. `length` and `modality` (S,) describe the segments; modality 0 is text."""
    before = np.zeros(len(length) + 1, np.int64)
    np.cumsum(length.astype(np.int64) + _BRACKETS * (modality != 0), out=before[1:])
    return before[start[1:].astype(np.int64)] - before[start[:-1].astype(np.int64)] + _BRACKETS


def cut(
    lengths: Sequence[int],
    modalities: Sequence[int],
    latent: Sequence[bool],
    row: int,
    *,
    room: int | None = None,
    cut_spans: bool = False,
) -> list[Cut]:
    """The pieces of a document. The first takes at most `room` positions, the others at most `row`. Without `room` the
    first takes at most `row` as well; with it, the first is empty where nothing fits. Raises UserError for a picture of
    latents that is longer than a row."""
    parts = [(1, True)]  # BOS
    for n, modality, is_latent in zip(lengths, modalities, latent, strict=True):
        if is_latent and n + _BRACKETS > row:
            raise UserError(f"a picture of {n} patches does not fit a row of {row} positions")
        size = n + _BRACKETS * (modality != 0)
        parts.append((size, modality == 0 or (not is_latent and (cut_spans or size > row))))
    parts.append((1, True))  # EOS
    pieces: list[Cut] = []
    start = at = 0
    limit = row if room is None else room
    free = True  # nothing between start and here must stay whole
    for size, divisible in parts:
        end = at + size
        if not divisible and end - start > limit:
            pieces.append((start, at, free))
            start, limit, free = at, row, True
        while end - start > limit:
            pieces.append((start, start + limit, free))
            start, limit, free = start + limit, row, True
        free = free and divisible
        at = end
    pieces.append((start, at, free))
    return [p for i, p in enumerate(pieces) if p[1] > p[0] or (i == 0 and room is not None)]


def best_fit(pieces: Sequence[Piece], row: int, begun: Sequence[Piece] = ()) -> list[list[Piece]]:
    """Best-fit-decreasing packing: each piece, longest first, goes into the fullest row that still has room for it.
    Then rows that hold only divisible pieces, the emptiest first, are dissolved into the gaps of the other rows. Where
    `begun` is given, its pieces stand at the start of the first row."""
    rows: list[list[Piece]] = [list(begun)] if begun else []
    used = sum(p.end - p.start for p in begun)
    free = [(row - used, 0)] if 0 < used < row else []  # (positions left, row), sorted
    for piece in sorted(pieces, key=lambda p: p.start - p.end):
        size = piece.end - piece.start
        at = bisect.bisect_left(free, (size, -1))
        left, target = free.pop(at) if at < len(free) else (row, len(rows))
        if target == len(rows):
            rows.append([])
        rows[target].append(piece)
        if left > size:
            bisect.insort(free, (left - size, target))
    return _fill_gaps(rows, free, row, 1 if begun else 0)


def _fill_gaps(rows: list[list[Piece]], free: Iterable[tuple[int, int]], row: int, fixed: int) -> list[list[Piece]]:
    """Dissolve rows of divisible pieces into the gaps of other rows; each dissolved row saves one row of padding. Gaps
    shorter than a 32nd of a row are not filled, so that documents are not cut into tiny pieces. The first `fixed` rows
    are never dissolved."""
    shortest = max(1, row // 32)
    left = dict.fromkeys(range(len(rows)), 0) | {target: n for n, target in free}
    wasted = sum(left.values())
    gaps = [(-n, target) for target, n in left.items() if n >= shortest]
    heapq.heapify(gaps)
    candidates = [r for r in left if r >= fixed and all(p.divisible for p in rows[r])]
    candidates.sort(key=lambda r: (-left[r], r))
    dissolved: set[int] = set()
    for r in candidates:
        if wasted <= _ENOUGH * row * (len(rows) - len(dissolved)):
            break
        content = row - left[r]
        if content > sum(-n for n, target in gaps if target != r and target not in dissolved):
            break
        moved: list[tuple[int, Piece]] = []
        taken: dict[int, int] = {}
        fits = True
        for piece in rows[r]:
            start = piece.start
            while start < piece.end:
                while gaps and (gaps[0][1] == r or gaps[0][1] in dissolved):
                    heapq.heappop(gaps)
                if not gaps:
                    fits = False
                    break
                n, target = heapq.heappop(gaps)
                rest = piece.end - start
                size = min(-n, rest)
                if 0 < rest - size < shortest and size > shortest:
                    size = max(shortest, rest - shortest)
                moved.append((target, piece._replace(start=start, end=start + size)))
                taken[target] = taken.get(target, 0) + size
                if -n - size >= shortest:
                    heapq.heappush(gaps, (n + size, target))
                start += size
            if not fits:
                break
        if not fits:
            break
        for target, piece in moved:
            rows[target].append(piece)
        for target, size in taken.items():
            left[target] -= size
        wasted -= row  # the row's own gap, and as much of the other rows' gaps as its pieces now fill
        dissolved.add(r)
    return [pieces for r, pieces in enumerate(rows) if r not in dissolved]


Segments = tuple[list[int], list[int], list[bool]]
"""The lengths, modalities and latent flags of a document's segments."""


def concatenate(
    documents: Sequence[Piece],
    row: int,
    segments_of: Callable[[Piece], Segments],
    cut_spans: bool = False,
    begun: Sequence[Piece] = (),
) -> list[list[Piece]]:
    """Rows of documents one after another, cut where a row ends. A span that must stay whole and does not fit begins
    the next row, and the last row may be partly empty. The pieces in `begun` stand at the start of the first row."""
    rows: list[list[Piece]] = [list(begun)]
    room = row - sum(p.end - p.start for p in begun)
    for document in documents:
        if document.end <= room:
            pieces: list[Cut] = [(0, document.end, document.divisible)]
        else:
            pieces = cut(*segments_of(document), row, room=room, cut_spans=cut_spans)
        for i, (start, end, divisible) in enumerate(pieces):
            if i or not room:
                rows.append([])
                room = row
            if end > start:
                rows[-1].append(document._replace(start=start, end=end, divisible=divisible))
                room -= end - start
    return [pieces for pieces in rows if pieces]
