"""The order of the data, planned from the indices alone; payloads are read afterwards.

The i-th packed sequence is a pure function of (manifests, data config, seed, i). So the order does not depend on
the number of ranks, loader workers, prefetch, micro-batch or batch, and all that a resume needs is one integer.

    sequence i  = the next sequence of lane i mod lanes
    lane        = its own units (ranges of documents) of every source, visited in a hashed order, epoch after epoch;
                  the source furthest behind its share of tokens gives the next document
    chunk       = the lane's next `window` pieces of documents, packed best fit first; nothing is carried over
"""

from __future__ import annotations

import bisect
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from mom_data.dataset import TokenDataset

# Part of the order's identity: raise it whenever any change below alters which sequence is the i-th.
PLAN_VERSION = 1
_UNIT_DOCUMENTS = 4096
_BRACKETS = 2  # opening and closing token around a span that is not text; also BOS and EOS of a document


class Piece(NamedTuple):
    """Positions [start, end) of an assembled document (BOS, text, brackets, spans, EOS), inside one row."""

    source: int
    shard: int
    document: int
    start: int
    end: int


class Source(NamedTuple):
    dataset: TokenDataset
    weight: float


@dataclass(frozen=True)
class Plan:
    """What decides the order: sources with token shares, seed, lanes, row length, packing window (in pieces)."""

    sources: tuple[Source, ...]
    length: int
    lanes: int
    window: int
    seed: int
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        identity: list[object] = [PLAN_VERSION, self.length, self.lanes, self.window, self.seed]
        identity += [[s.dataset.fingerprint, [x["name"] for x in s.dataset.shards], s.weight] for s in self.sources]
        digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
        object.__setattr__(self, "fingerprint", digest[:16])
        for source in self.sources:
            documents = sum(s["documents"] for s in source.dataset.shards)
            if documents < self.lanes:
                raise ValueError(
                    f"{source.dataset.folder}: {documents} documents cannot be dealt to {self.lanes} lanes; "
                    "lower data.lanes"
                )

    def units(self, source: int) -> list[tuple[int, int, int]]:
        """(shard, first document, end) of each unit: small enough that every lane has several."""
        shards = self.sources[source].dataset.shards
        total = sum(s["documents"] for s in shards)
        size = max(1, min(_UNIT_DOCUMENTS, total // (4 * self.lanes)))
        return [
            (k, a, min(a + size, s["documents"])) for k, s in enumerate(shards) for a in range(0, s["documents"], size)
        ]


def hashed(n: int, *key: int | str) -> np.ndarray:
    """uint64[n], uniform, by hashing (splitmix64): the same in any version of any library."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    x = np.arange(n, dtype=np.uint64) ^ np.uint64(int.from_bytes(digest, "little"))
    with np.errstate(over="ignore"):
        x += np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    return x


def permutation(n: int, *key: int | str) -> np.ndarray:
    """A permutation of range(n), a function of the key alone."""
    return np.argsort(hashed(n, *key), kind="stable")


def cut(lengths: Sequence[int], modalities: Sequence[int], latent: Sequence[bool], row: int) -> list[tuple[int, int]]:
    """[start, end) of the pieces of a document, each at most `row` positions.

    Text is cut anywhere; a span of another modality only if it alone exceeds a row, and latents never: ValueError.
    """
    parts = [(1, False)]  # BOS
    for n, modality, is_latent in zip(lengths, modalities, latent, strict=True):
        if is_latent and n + _BRACKETS > row:
            raise ValueError(f"a picture of {n} patches does not fit a row of {row} positions")
        span = modality != 0
        parts.append((n + _BRACKETS * span, span and n + _BRACKETS <= row))
    parts.append((1, False))  # EOS
    pieces, start, at = [], 0, 0
    for size, atomic in parts:
        end = at + size
        if atomic and end - start > row:
            pieces.append((start, at))
            start = at
        while end - start > row:
            pieces.append((start, start + row))
            start += row
        at = end
    pieces.append((start, at))
    return [p for p in pieces if p[1] > p[0]]


def pack(pieces: Sequence[Piece], row: int) -> list[list[Piece]]:
    """Best-fit-decreasing: each piece, longest first, into the fullest row that still takes it."""
    rows: list[list[Piece]] = []
    free: list[tuple[int, int]] = []  # (positions left, row), sorted
    for piece in sorted(pieces, key=lambda p: p.start - p.end):
        size = piece.end - piece.start
        at = bisect.bisect_left(free, (size, -1))
        left, target = free.pop(at) if at < len(free) else (row, len(rows))
        if target == len(rows):
            rows.append([])
        rows[target].append(piece)
        if left > size:
            bisect.insort(free, (left - size, target))
    return rows


class Lane:
    """One lane's sequences, in order, without end. Planning alone: nothing is read but indices."""

    def __init__(self, plan: Plan, number: int):
        self._plan, self._number = plan, number
        self._cursor = [[0, 0, 0] for _ in plan.sources]  # epoch, unit, document within the unit
        self._unit: list[tuple[tuple[int, int], int, np.ndarray] | None] = [None] * len(plan.sources)
        self._used = [0] * len(plan.sources)
        self._chunk = 0
        self._rows: list[list[Piece]] = []

    def __iter__(self) -> Lane:
        return self

    def __next__(self) -> list[Piece]:
        if not self._rows:
            rows = pack(self._pieces(), self._plan.length)
            shuffled = permutation(len(rows), self._plan.seed, "rows", self._number, self._chunk)
            self._rows = [rows[i] for i in reversed(shuffled.tolist())]
            self._chunk += 1
        return self._rows.pop()

    def _pieces(self) -> list[Piece]:
        """The next window of pieces. It ends early where a source's epoch does, so that a corpus smaller than a window
        is seen whole before any of it is seen again; sources too small to fill a part of a window are exempt."""
        pieces: list[Piece] = []
        while len(pieces) < self._plan.window:
            source = min(range(len(self._used)), key=lambda s: self._used[s] / self._plan.sources[s].weight)
            epoch = self._cursor[source][0]
            shard, document = self._next_document(source)
            dataset = self._plan.sources[source].dataset
            spans = cut(*dataset.index(shard).segments(document), self._plan.length)
            pieces += [Piece(source, shard, document, s, e) for s, e in spans]
            self._used[source] += spans[-1][1]
            if self._cursor[source][0] != epoch and self._documents(source, epoch) >= self._plan.window // 8:
                break
        return pieces

    def _next_document(self, source: int) -> tuple[int, int]:
        epoch, unit, at = self._cursor[source]
        current = self._unit[source]
        if current is None or current[0] != (epoch, unit):
            shard, first, end = self._units(source, epoch)[unit]
            order = first + permutation(end - first, self._plan.seed, "documents", source, epoch, shard, first)
            current = self._unit[source] = ((epoch, unit), shard, order)
        _, shard, order = current
        document = int(order[at])
        if at + 1 < len(order):
            self._cursor[source] = [epoch, unit, at + 1]
        elif unit + 1 < len(self._units(source, epoch)):
            self._cursor[source] = [epoch, unit + 1, 0]
        else:
            self._cursor[source] = [epoch + 1, 0, 0]
        return shard, document

    def _documents(self, source: int, epoch: int) -> int:
        return sum(end - first for _, first, end in self._units(source, epoch))

    def _units(self, source: int, epoch: int) -> list[tuple[int, int, int]]:
        units = self._plan.units(source)
        shuffled = permutation(len(units), self._plan.seed, "units", source, epoch).tolist()
        return [units[i] for i in shuffled[self._number :: self._plan.lanes]]
