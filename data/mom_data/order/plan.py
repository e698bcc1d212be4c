"""The order of the data, planned from the indices alone. The tokens are read afterwards, by mom_data.batches.

The i-th packed sequence is a pure function of (manifests, data config, seed, i). So the order does not depend on
the number of ranks, loader workers, prefetch, micro-batch or batch. To resume, a run needs only the number of the next
sequence; the cursors of the lanes spare it from planning all earlier sequences again.

    sequence i  = the next sequence of lane i mod lanes
    lane        = one of a fixed number of parts of the order; with many documents, each is planned without the others
    stream      = the rows that lanes take theirs from. Where the sources together have few documents there is one
                  stream, and the lanes take its rows in turn; otherwise each lane has a stream of its own
    epoch       = one pass over a source: its units (shards, or ranges of their documents) in a hashed order, dealt to
                  the streams in turn. A stream shuffles the documents of `pool` of its units together, and goes through
                  the source epoch after epoch; the source furthest behind its share of tokens gives the next document
    chunk       = the stream's next `window` pieces of documents and a few more, until they nearly fill whole rows. Each
                  chunk is packed on its own, and no piece is carried over to the next
    part        = documents of a chunk that may stand in any order: from each source, those of one epoch only. A chunk's
                  parts are packed one after another. After a short epoch the next part continues in the row that was
                  left emptiest; after a long one it begins a new row
    phase       = a plan with other sources or weights, which holds from a given sequence on. Each stream ends the chunk
                  it is in, then goes on from where it stood in every source, so no document is repeated or left out
"""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from mom_data.order.packing import Piece, Segments, assembled_lengths, best_fit, concatenate, cut
from mom_data.shards.dataset import TokenDataset
from mom_data.shards.format import LATENT_BIT
from mom_tokenizers.errors import UserError

# Part of the order's identity. Raise it with every change, here or in packing.py, that alters which sequence is i-th.
PLAN_VERSION = 3
ONE_STREAM_DOCUMENTS = 1 << 17
"""Up to this number of documents in all sources together there is one stream, and every process plans all rows, which
takes little time."""
_UNIT_DOCUMENTS = 4096
_UNITS_PER_STREAM = 16
_FEW = 64  # units of at most this many documents are cached, because a small source is visited again and again
_LONG_EPOCH = 32  # rows; in an epoch of this length, half a row of padding at its end does not matter
_CHUNKS_KEPT = 16  # cached chunks of a stream that all lanes share

Packing = Literal["best_fit", "concatenate"]


class Source(NamedTuple):
    """A dataset and its share of the tokens."""

    dataset: TokenDataset
    weight: float
    """The share of the tokens, relative to the weights of the other sources. It is 0 for a source that only an earlier
    phase uses."""


@dataclass(frozen=True)
class Plan:
    """Everything that decides the order: sources with their shares of tokens, row length, number of lanes, packing
    window (in pieces), seed, and the fields below.

    A plan may continue another one, `before`, which holds until sequence `since`. Its sources then come first.
    """

    sources: tuple[Source, ...]
    length: int
    lanes: int
    window: int
    seed: int
    pool: int = 16
    """Number of units of a source whose documents are shuffled together, since shards are often sorted by content."""
    packing: Packing = "best_fit"
    cut_spans: bool = False
    before: Plan | None = None
    since: int = 0
    """The first sequence of this plan."""
    once: bool = False
    """Whether to end after one epoch of every source instead of going on without end. This needs lanes=1."""
    identities: tuple[str, ...] = field(init=False)
    """The `source_identity` of each source, which does not depend on where its files lie."""
    phase: int = field(init=False)
    """The number of plans before this one."""
    streams: int = field(init=False)
    """The number of streams: 1, or the number of lanes. A plan that continues another one keeps its number."""
    fingerprint: str = field(init=False)
    _only_stream: _Stream = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        sources = {source_identity(s.dataset): s for s in self.sources}
        if len(sources) < len(self.sources):
            raise UserError(
                f"{_twice(self.sources)} is named more than once as a source; name it once, with one weight"
            )
        if (before := self.before) is not None:
            assert (before.length, before.lanes, before.seed) == (self.length, self.lanes, self.seed)
            assert self.since >= before.since
            kept = {
                identity: sources.pop(identity, s._replace(weight=0.0))
                for identity, s in zip(before.identities, before.sources, strict=True)
            }
            sources = kept | sources
        object.__setattr__(self, "sources", tuple(sources.values()))
        object.__setattr__(self, "identities", tuple(sources))
        object.__setattr__(self, "phase", 0 if before is None else before.phase + 1)
        identity: list[object] = [PLAN_VERSION, self.length, self.lanes, self.window, self.seed, self.pool]
        identity += [self.packing, self.cut_spans, self.since, self.once, before and before.fingerprint]
        identity += [[i, s.weight] for i, s in sources.items()]
        digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
        object.__setattr__(self, "fingerprint", digest[:16])
        active = [k for k, source in enumerate(self.sources) if source.weight]
        for k in active:
            if not self.documents(k):
                raise UserError(f"{self.sources[k].dataset.location} holds no documents; leave this source out")
        few = sum(map(self.documents, active)) <= ONE_STREAM_DOCUMENTS
        streams = before.streams if before is not None else 1 if few else self.lanes
        object.__setattr__(self, "streams", streams)
        object.__setattr__(self, "_only_stream", _Stream(self, 0))
        assert self.lanes == 1 or not self.once

    def documents(self, source: int) -> int:
        """The number of documents of a source."""
        return sum(s["documents"] for s in self.sources[source].dataset.shards)

    def at(self, sequence: int) -> Plan:
        """The phase of a chunk whose first row is this sequence."""
        plan = self
        while plan.before is not None and sequence < plan.since:
            plan = plan.before
        return plan

    def stream(self, lane: int) -> _Stream:
        """The stream that a lane takes its rows from."""
        assert 0 <= lane < self.lanes
        return self._only_stream if self.streams == 1 else _Stream(self, lane)

    @functools.lru_cache(maxsize=64)  # noqa: B019  # a plan lives as long as its process
    def units(self, source: int) -> list[tuple[int, int, int]]:
        """(shard, first document, end) of each unit. Units are whole shards where every stream gets several of them, so
        that a node fetches few shards; otherwise they are ranges of documents small enough for that."""
        shards = self.sources[source].dataset.shards
        if len(shards) >= _UNITS_PER_STREAM * self.streams:
            return [(k, 0, s["documents"]) for k, s in enumerate(shards) if s["documents"]]
        size = max(1, min(_UNIT_DOCUMENTS, self.documents(source) // (_UNITS_PER_STREAM * self.streams)))
        return [
            (k, a, min(a + size, s["documents"])) for k, s in enumerate(shards) for a in range(0, s["documents"], size)
        ]

    def _first_unit(self, stream: int, source: int, epoch: int) -> int:
        """The place of a stream's first unit in an epoch's order. Units are dealt to the streams in turn, and each
        epoch begins with the stream that is next in turn, so that in the long run all streams get equally many."""
        return (stream - epoch * len(self.units(source))) % self.streams

    def epoch_from(self, stream: int, source: int, epoch: int) -> int:
        """The first epoch from this one on in which the stream has a unit. A source may have fewer units than there
        are streams, and then a stream has none in some epochs."""
        while self._first_unit(stream, source, epoch) >= len(self.units(source)):
            epoch += 1
        return epoch

    @functools.lru_cache(maxsize=256)  # noqa: B019
    def pools(self, stream: int, source: int, epoch: int) -> list[list[tuple[int, int, int]]]:
        """The units that a stream visits in an epoch, in order, grouped into pools of `pool` units."""
        units = self.units(source)
        order = permutation(len(units), self.seed, "units", self.identities[source], epoch)
        own = [units[i] for i in order[self._first_unit(stream, source, epoch) :: self.streams].tolist()]
        return [own[i : i + self.pool] for i in range(0, len(own), self.pool)]


def _twice(sources: tuple[Source, ...]) -> str:
    seen: set[str] = set()
    for source in sources:
        if (identity := source_identity(source.dataset)) in seen:
            return str(source.dataset.location)
        seen.add(identity)
    raise AssertionError


def source_identity(dataset: TokenDataset) -> str:
    """16 hexadecimal digits that identify which documents a dataset has and in which order."""
    names = [s["name"] for s in dataset.shards]
    return hashlib.sha256(json.dumps([dataset.fingerprint, names]).encode()).hexdigest()[:16]


def hashed(n: int, *key: int | str) -> np.ndarray:
    """uint64 (n,) of uniform random values, made by hashing with splitmix64. They depend on `n` and the key alone, not
    on the version of any library."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    x = np.arange(n, dtype=np.uint64) ^ np.uint64(int.from_bytes(digest, "little"))
    with np.errstate(over="ignore"):
        x += np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    return x


def permutation(n: int, *key: int | str) -> np.ndarray:
    """int64 (n,): a random permutation of range(n) that depends on `n` and the key alone."""
    return np.argsort(hashed(n, *key), kind="stable")


class Cursor(NamedTuple):
    """Where a stream stood before a chunk, in plain numbers, so that a checkpoint can hold them as JSON."""

    rows: int = 0
    """Rows that the stream had given before this chunk."""
    phase: int = 0
    """The phase of the chunk before."""
    sources: tuple[tuple[int, int, int, int], ...] = ()
    """For each source: its epoch, pool, document within the pool, and the tokens that it has given in this phase."""


class _Chunk(NamedTuple):
    """A planned chunk of a stream."""

    cursor: Cursor
    """Where the stream stood before this chunk."""
    rows: list[list[Piece]]
    """The rows of the chunk. The list is empty where the plan has ended."""
    next: Cursor
    """Where the stream stands after this chunk."""
    entered: list[tuple[int, int]]
    """(source, shard) of the pools opened for this chunk and of the pools that follow. `Lane` takes them over and
    clears the list."""


class _Pool(NamedTuple):
    """An opened pool: its documents in the order they are visited."""

    place: tuple[int, int]  # epoch, number among the stream's pools in this epoch
    shards: np.ndarray  # int32 (D,)
    documents: np.ndarray  # int32 (D,)
    lengths: np.ndarray  # int32 (D,)
    divisible: np.ndarray  # bool (D,)


class _Stream:
    """A sequence of chunks. Each is a pure function of the cursor at which it begins. The last few are cached."""

    def __init__(self, plan: Plan, number: int):
        self.plan, self.number = plan, number
        self._pools: dict[int, _Pool] = {}
        self._chunks: dict[int, _Chunk] = {}  # by the number of their first row
        self._kept = 1 if plan.streams > 1 else _CHUNKS_KEPT

    @property
    def beginning(self) -> Cursor:
        first = self.plan
        while first.before is not None:
            first = first.before
        return Cursor(max(0, -(-(first.since - self.number) // self.plan.streams)))

    def holding(self, row: int, cursor: Cursor) -> _Chunk:
        """The chunk that contains the stream's row number `row`, which must not lie before `cursor`. The chunk has no
        rows where the plan ends before that row."""
        known = [first for first in self._chunks if cursor.rows <= first <= row]
        chunk = self._chunks[max(known)] if known else self._chunk(cursor)
        while chunk.rows and chunk.next.rows <= row:
            chunk = self._chunk(chunk.next)
        return chunk

    def _chunk(self, cursor: Cursor) -> _Chunk:
        if cursor.rows not in self._chunks:
            planned = self._planned(cursor)
            while len(self._chunks) >= self._kept:
                del self._chunks[next(iter(self._chunks))]
            self._chunks[cursor.rows] = planned
        return self._chunks[cursor.rows]

    def _planned(self, cursor: Cursor) -> _Chunk:
        plan = self.plan.at(cursor.rows * self.plan.streams + self.number)
        entered: list[tuple[int, int]] = []
        at = [list(s) for s in cursor.sources]
        at += [[plan.epoch_from(self.number, k, 0), 0, 0, 0] for k in range(len(at), len(plan.sources))]
        if plan.phase != cursor.phase:
            for source in at:
                source[3] = 0  # the new shares hold from here on
        active = [(k, s.weight) for k, s in enumerate(plan.sources) if s.weight and not (plan.once and at[k][0])]
        # Where each of many streams gets at most about one document of an epoch, its epochs need not be kept apart.
        apart = {k for k, _ in active if plan.streams == 1 or plan.documents(k) >= 2 * plan.streams}
        parts: list[list[Piece]] = [[]]
        own_row: list[bool] = [True]  # whether a part begins a new row
        epoch_of: dict[int, int] = {}  # source -> epoch of its documents in the last part
        row = plan.length
        documents = pieces = tokens = 0
        # Stop a little short of whole rows: pieces never fill all rows to the last position, and what is left over
        # would need one more row, nearly empty.
        while active and (
            pieces < plan.window or (not row // 32 <= -tokens % row <= row // 10 and pieces < 1.25 * plan.window)
        ):
            k = min(active, key=lambda s: at[s[0]][3] / s[1])[0] if len(active) > 1 else active[0][0]
            epoch, number, i, _ = at[k]
            if k in apart and epoch_of.setdefault(k, epoch) != epoch:
                parts.append([])
                rows_of_epoch = plan.documents(k) * tokens // (documents * plan.streams * row)  # about
                own_row.append(rows_of_epoch >= _LONG_EPOCH)
                epoch_of = {k: epoch}
            pool = self._open(plan, k, epoch, number, entered)
            length = int(pool.lengths[i])
            document = Piece(k, int(pool.shards[i]), int(pool.documents[i]), 0, length, bool(pool.divisible[i]))
            if length <= row or plan.packing == "concatenate":
                parts[-1].append(document)
                pieces += 1
            else:
                spans = cut(*self._segments(document), row, cut_spans=plan.cut_spans)
                parts[-1] += [document._replace(start=s, end=e, divisible=d) for s, e, d in spans]
                pieces += len(spans)
            documents += 1
            tokens += length
            at[k][3] += length
            if i + 1 < len(pool.documents):
                at[k][2] = i + 1
            elif number + 1 < len(plan.pools(self.number, k, epoch)):
                at[k][1:3] = [number + 1, 0]
            else:
                at[k][:3] = [plan.epoch_from(self.number, k, epoch + 1), 0, 0]
                if plan.once:
                    active = [s for s in active if s[0] != k]
        rows: list[list[Piece]] = []
        for group in self._packed(plan, parts, own_row):
            order = permutation(len(group), plan.seed, "rows", self.number, cursor.rows + len(rows))
            rows += [group[i] for i in order.tolist()]
        after = Cursor(cursor.rows + len(rows), plan.phase, tuple((a, b, c, d) for a, b, c, d in at))
        return _Chunk(cursor, rows, after, entered)

    def _packed(self, plan: Plan, parts: list[list[Piece]], own_row: list[bool]) -> list[list[list[Piece]]]:
        """Groups of rows; the rows of a group may be shuffled. Two neighbouring parts share at most one row, the last
        of the first part and the first of the second, which is a group of its own."""
        groups: list[list[list[Piece]]] = [[]]
        for part, new in zip(parts, own_row, strict=True):
            begun: list[Piece] = []
            if not new:
                last = groups[-1]
                begun = last.pop(min(range(len(last)), key=lambda r: sum(p.end - p.start for p in last[r])))
            if plan.packing == "concatenate":
                rows = concatenate(part, plan.length, self._segments, plan.cut_spans, begun)
            else:
                rows = best_fit(part, plan.length, begun)
            groups += [rows[:1], rows[1:]] if begun and len(rows) > 1 else [rows]
        return groups

    def _segments(self, piece: Piece) -> Segments:
        return self.plan.sources[piece.source].dataset.index(piece.shard).segments(piece.document)

    def _open(self, plan: Plan, source: int, epoch: int, number: int, entered: list[tuple[int, int]]) -> _Pool:
        pool = self._pools.get(source)
        if pool is not None and pool.place == (epoch, number):
            return pool
        pools = plan.pools(self.number, source, epoch)
        entered += [(source, shard) for units in pools[number : number + 2] for shard, _, _ in units]
        columns = [
            (_few_documents if end - first <= _FEW else _documents)(plan, source, shard, first, end)
            for shard, first, end in pools[number]
        ]
        key = (plan.seed, "documents", plan.identities[source], epoch, self.number, number)
        order = permutation(sum(len(c[0]) for c in columns), *key)
        pool = _Pool((epoch, number), *(np.concatenate(c)[order] for c in zip(*columns, strict=True)))
        self._pools[source] = pool
        return pool


class Lane:
    """An iterator over the rows of one lane, in order and without end unless the plan has `once`. It only plans, and
    reads nothing but indices.

    `cursor` is where the current chunk of the lane's stream began. `Lane(plan, number, cursor)` continues from the
    lane's first row at or after it.
    """

    def __init__(self, plan: Plan, number: int, cursor: Cursor | None = None):
        self.plan, self.number = plan, number
        self._stream = plan.stream(number)
        self.cursor = cursor or self._stream.beginning
        self.given = self.cursor.rows
        if plan.streams < plan.lanes:
            self.given = max(0, -(-(self.cursor.rows - number) // plan.lanes))
        self.entered: list[tuple[int, int]] = []
        """(source, shard) of the shards that recent rows came from and coming rows need, so that the caller can fetch
        them ahead."""

    def __iter__(self) -> Lane:
        return self

    def __next__(self) -> list[Piece]:
        row = self.given if self.plan.streams == self.plan.lanes else self.given * self.plan.lanes + self.number
        chunk = self._stream.holding(row, self.cursor)
        self.cursor = chunk.cursor
        if not chunk.rows:
            raise StopIteration
        self.entered += chunk.entered
        chunk.entered.clear()
        self.given += 1
        return chunk.rows[row - chunk.cursor.rows]

    def skip_to(self, given: int) -> None:
        """Continue as if `given` rows of the lane had been returned."""
        assert given >= self.given
        self.given = given


def _documents(plan: Plan, source: int, shard: int, first: int, end: int) -> tuple[np.ndarray, ...]:
    """Four arrays (end - first,) about the documents [first, end) of a shard: shard, number, assembled length, and
    whether each may be cut anywhere."""
    index = plan.sources[source].dataset.index(shard)
    start = index.segment_start[first : end + 1].astype(np.int64)
    modality = index.segment_modality[start[0] : start[-1]]
    lengths = assembled_lengths(start - start[0], index.segment_length[start[0] : start[-1]], modality)
    whole = modality >= LATENT_BIT if plan.cut_spans else modality != 0
    before = np.zeros(len(whole) + 1, np.int64)
    np.cumsum(whole, out=before[1:])
    divisible = np.diff(before[start - start[0]]) == 0
    documents = np.arange(first, end, dtype=np.int32)
    return np.full(end - first, shard, np.int32), documents, lengths.astype(np.int32), divisible


_few_documents = functools.lru_cache(maxsize=1024)(_documents)
