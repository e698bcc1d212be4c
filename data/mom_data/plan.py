"""The order of the data, planned from the indices alone; payloads are read afterwards.

The i-th packed sequence is a pure function of (manifests, data config, seed, i). So the order does not depend on
the number of ranks, loader workers, prefetch, micro-batch or batch, and all that a resume needs is one integer;
cursors of the lanes make it immediate.

    sequence i  = the next sequence of lane i mod lanes
    lane        = its own units (shards, or ranges of their documents) of every source, `pool` at a time in a hashed
                  order, their documents shuffled together, epoch after epoch; the source furthest behind its share of
                  tokens gives the next document
    chunk       = the lane's next `window` pieces of documents and a few more, until they nearly fill whole rows;
                  packed on its own, nothing is carried over
    phase       = from a given sequence on, other sources or weights: each lane ends the chunk it is in, then goes on
                  from where it stood in every source, so nothing is repeated and nothing left out
"""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from mom_data.dataset import TokenDataset
from mom_data.packing import Piece, Segments, assembled_lengths, best_fit, concatenate, cut
from mom_data.shards import LATENT_BIT
from mom_tokenizers.errors import UserError

# Part of the order's identity: raise it whenever any change here or in packing.py alters which sequence is the i-th.
PLAN_VERSION = 2
_UNIT_DOCUMENTS = 4096
_UNITS_PER_LANE = 16

Packing = Literal["best_fit", "concatenate"]


class Source(NamedTuple):
    dataset: TokenDataset
    weight: float
    """Share of the tokens, relative to the other sources'; 0 for one that an earlier phase had and this one has not."""


@dataclass(frozen=True)
class Plan:
    """What decides the order: sources with token shares, row length, lanes, packing window (in pieces), seed.

    A plan that goes on from another one (`before`, until sequence `since`) lists that one's sources first.
    """

    sources: tuple[Source, ...]
    length: int
    lanes: int
    window: int
    seed: int
    pool: int = 16
    """Units of a source that a lane draws from at once: shards are often sorted by what is in them."""
    packing: Packing = "best_fit"
    cut_spans: bool = False
    before: Plan | None = None
    since: int = 0
    identities: tuple[str, ...] = field(init=False)
    """One per source, wherever its files lie."""
    phase: int = field(init=False)
    """How many plans came before."""
    fingerprint: str = field(init=False)

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
        identity += [self.packing, self.cut_spans, self.since, before and before.fingerprint]
        identity += [[i, s.weight] for i, s in sources.items()]
        digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
        object.__setattr__(self, "fingerprint", digest[:16])
        for k, source in enumerate(self.sources):
            if source.weight and len(self.units(k)) < self.lanes:
                documents = sum(s["documents"] for s in source.dataset.shards)
                raise UserError(
                    f"{source.dataset.location}: {documents} documents cannot be dealt to {self.lanes} lanes; "
                    "lower data.lanes"
                )

    def at(self, sequence: int) -> Plan:
        """The phase that a chunk belongs to whose first row is that sequence."""
        plan = self
        while plan.before is not None and sequence < plan.since:
            plan = plan.before
        return plan

    def units(self, source: int) -> list[tuple[int, int, int]]:
        """(shard, first document, end) of each unit: whole shards where every lane gets several, so that a node
        fetches few of them; else ranges small enough for that."""
        shards = self.sources[source].dataset.shards
        total = sum(s["documents"] for s in shards)
        if len(shards) >= _UNITS_PER_LANE * self.lanes:
            return [(k, 0, s["documents"]) for k, s in enumerate(shards) if s["documents"]]
        size = max(1, min(_UNIT_DOCUMENTS, total // (_UNITS_PER_LANE * self.lanes)))
        return [
            (k, a, min(a + size, s["documents"])) for k, s in enumerate(shards) for a in range(0, s["documents"], size)
        ]

    @functools.lru_cache(maxsize=256)  # noqa: B019  # a plan lives as long as its process
    def pools(self, lane: int, source: int, epoch: int) -> list[list[tuple[int, int, int]]]:
        """The units that a lane visits in an epoch, in order, by pool."""
        units = self.units(source)
        order = permutation(len(units), self.seed, "units", self.identities[source], epoch)[lane :: self.lanes]
        own = [units[i] for i in order.tolist()]
        return [own[i : i + self.pool] for i in range(0, len(own), self.pool)]


def _twice(sources: tuple[Source, ...]) -> str:
    seen: set[str] = set()
    for source in sources:
        if (identity := source_identity(source.dataset)) in seen:
            return str(source.dataset.location)
        seen.add(identity)
    raise AssertionError


def source_identity(dataset: TokenDataset) -> str:
    """Which documents a dataset has, in which order; 16 hexadecimal digits."""
    names = [s["name"] for s in dataset.shards]
    return hashlib.sha256(json.dumps([dataset.fingerprint, names]).encode()).hexdigest()[:16]


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


class Cursor(NamedTuple):
    """Where a lane stood before its current chunk: plain numbers, so that a checkpoint can hold them as JSON."""

    rows: int = 0
    """Rows that the lane had given before this chunk."""
    phase: int = 0
    """Of the chunk before."""
    sources: tuple[tuple[int, int, int, int], ...] = ()
    """Of each source: epoch, pool, document within the pool, and tokens given in this phase."""


class _Pool(NamedTuple):
    """An opened pool: its documents in the order they are visited."""

    place: tuple[int, int]  # epoch, number among the lane's pools
    shards: np.ndarray  # int32 (D,)
    documents: np.ndarray  # int32 (D,)
    lengths: np.ndarray  # int32 (D,)
    divisible: np.ndarray  # bool (D,)


class Lane:
    """One lane's sequences, in order, without end. Planning alone: nothing is read but indices.

    `cursor` is where the current chunk began; `Lane(plan, number, cursor)` goes on from its first row.
    """

    def __init__(self, plan: Plan, number: int, cursor: Cursor | None = None):
        self.plan, self.number = plan, number
        self.cursor = self._next = cursor or Cursor()
        self.given = self.cursor.rows
        self.entered: list[tuple[int, int]] = []
        """(source, shard) of the pools opened and of those that follow them, for whoever fetches ahead."""
        self._rows: list[list[Piece]] = []
        self._pools: dict[int, _Pool] = {}

    def __iter__(self) -> Lane:
        return self

    def __next__(self) -> list[Piece]:
        if not self._rows:
            self._plan_chunk()
        self.given += 1
        return self._rows.pop()

    def skip_to(self, given: int) -> None:
        """Go on until `given` rows of the lane have been given."""
        assert given >= self.given
        while self.given < given:
            if not self._rows:
                self._plan_chunk()
            n = min(given - self.given, len(self._rows))
            del self._rows[len(self._rows) - n :]
            self.given += n

    def _plan_chunk(self) -> None:
        self.cursor = self._next
        plan = self.plan.at(self.given * self.plan.lanes + self.number)
        at = [list(s) for s in self.cursor.sources] + [
            [0, 0, 0, 0] for _ in range(len(plan.sources) - len(self.cursor.sources))
        ]
        if plan.phase != self.cursor.phase:
            for source in at:
                source[3] = 0  # the new shares hold from here on
        active = [(k, s.weight) for k, s in enumerate(plan.sources) if s.weight]
        pieces: list[Piece] = []
        row = plan.length
        whole = plan.packing == "concatenate"
        tokens = 0
        # Not quite whole rows: pieces never fill all of them to the last position, and one row more would stay empty.
        while len(pieces) < plan.window or (
            not row // 32 <= -tokens % row <= row // 10 and len(pieces) < 1.25 * plan.window
        ):
            k = min(active, key=lambda s: at[s[0]][3] / s[1])[0] if len(active) > 1 else active[0][0]
            pool = self._open(plan, k, at[k][0], at[k][1])
            i = at[k][2]
            length = int(pool.lengths[i])
            place = int(pool.shards[i]), int(pool.documents[i])
            document = Piece(k, *place, 0, length, bool(pool.divisible[i]))
            if whole or length <= row:
                pieces.append(document)
            else:
                spans = cut(*self._segments(document), row, cut_spans=plan.cut_spans)
                pieces += [document._replace(start=s, end=e, divisible=d) for s, e, d in spans]
            tokens += length
            at[k][3] += length
            if i + 1 < len(pool.documents):
                at[k][2] = i + 1
                continue
            pools = plan.pools(self.number, k, at[k][0])
            if at[k][1] + 1 < len(pools):
                at[k][1:3] = [at[k][1] + 1, 0]
                continue
            at[k][:3] = [at[k][0] + 1, 0, 0]
            # A chunk ends where the epoch of a source does, so that a corpus smaller than a window is seen whole before
            # any of it is seen again; sources too small to fill a part of a window are exempt.
            if sum(end - first for units in pools for _, first, end in units) >= plan.window // 8:
                break
        rows = concatenate(pieces, row, self._segments, plan.cut_spans) if whole else best_fit(pieces, row)
        order = permutation(len(rows), plan.seed, "rows", self.number, self.given)
        self._rows = [rows[i] for i in reversed(order.tolist())]
        self._next = Cursor(self.given + len(rows), plan.phase, tuple((a, b, c, d) for a, b, c, d in at))

    def _segments(self, piece: Piece) -> Segments:
        return self.plan.sources[piece.source].dataset.index(piece.shard).segments(piece.document)

    def _open(self, plan: Plan, source: int, epoch: int, number: int) -> _Pool:
        pool = self._pools.get(source)
        if pool is not None and pool.place == (epoch, number):
            return pool
        pools = plan.pools(self.number, source, epoch)
        self.entered += [(source, shard) for units in pools[number : number + 2] for shard, _, _ in units]
        columns = [_documents(plan, source, *unit) for unit in pools[number]]
        key = (plan.seed, "documents", plan.identities[source], epoch, self.number, number)
        order = permutation(sum(len(c[0]) for c in columns), *key)
        pool = _Pool((epoch, number), *(np.concatenate(c)[order] for c in zip(*columns, strict=True)))
        self._pools[source] = pool
        return pool


def _documents(plan: Plan, source: int, shard: int, first: int, end: int) -> tuple[np.ndarray, ...]:
    """Of the documents [first, end) of a shard: shard, number, assembled length, whether each may be cut anywhere."""
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
