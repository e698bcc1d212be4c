"""Turns packed rows into tensors: token ids, modalities, document numbers, labels, and the sort by modality."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mom_data.order.packing import Piece
from mom_data.order.plan import Source, hashed
from mom_data.shards.dataset import TokenDataset
from mom_data.shards.format import TokenSegment
from mom_tokenizers.media.shapes import Grid
from mom_tokenizers.vocab import VocabLayout

IGNORE = -100


@dataclass(frozen=True)
class PackedBatch:
    """A batch as the trainer receives it: B rows of L positions, with M modalities, P latent patches and I pictures.

    tokens           (B, L) int64    vocabulary ids; patch positions hold <null>, padding <pad>
    modality         (B, L) uint8    modality of the *input* token, which selects the weights
    document         (B, L) int32    number of the document within the row; padding counts as one more
    labels           (B, L) int64    next token of the same piece, -100 where there is none
    latents          (P, C*p*p) fp16 patches in raster order
    latent_position  (P,) int64      position of each patch among the B*L positions
    image_of_patch   (P,) int32      number of the picture within the batch
    image_leads      (I,) bool       whether text stands only after the picture in its document, none before it
    sequences        (B,) int64      numbers of the rows in the run's order, from which random draws are derived
    order            (B*L,) int32    place of each position in the stable sort by modality
    rows             (B*L,) int64    position at each place of that sort, the inverse of `order`
    offsets          (M+1,) int64    bounds of the modalities in that sort
    real_tokens      (M,) int64      input tokens by modality without padding; stays on the CPU
    end_sequence     number of the next sequence of the whole run, over all ranks
    documents_read   number of documents that begin in these rows
    documents_damaged  number of these that are masked because they are damaged
    damaged          documents masked because of a wrong checksum or a wrong id, as "shard#document"
    unreadable       raw documents masked because they could not be read, as "shard#document: reason"
    left_out         raw documents masked because they are empty, too large or of dropped modalities, in the same form
    cursors          for each lane, where the chunk of its last row in this batch began; a resume starts from there
    """

    tokens: Tensor
    modality: Tensor
    document: Tensor
    labels: Tensor
    latents: Tensor
    latent_position: Tensor
    image_of_patch: Tensor
    image_leads: Tensor
    sequences: Tensor
    order: Tensor
    rows: Tensor
    offsets: Tensor
    real_tokens: Tensor
    documents_read: int = 0
    documents_damaged: int = 0
    end_sequence: int = 0
    damaged: tuple[str, ...] = ()
    unreadable: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    cursors: dict[int, Any] = field(default_factory=dict)

    def to(self, device: torch.device) -> PackedBatch:
        moved: dict[str, Any] = {
            f.name: getattr(self, f.name).to(device, non_blocking=True)
            for f in fields(self)
            if isinstance(getattr(self, f.name), Tensor) and f.name != "real_tokens"
        }
        return replace(self, **moved)

    def pin_memory(self) -> PackedBatch:
        """The batch in pinned memory. The DataLoader calls this where it pins batches."""
        pinned: dict[str, Any] = {
            f.name: v.pin_memory() for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)
        }
        return replace(self, **pinned)


def sort_by_modality(modality: torch.Tensor, modalities: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The stable sort of B*L positions by modality: (order, rows, offsets), as the fields of `PackedBatch`.

    `modality` (B, L) uint8 on any device. `order` (B*L,) int32, `rows` (B*L,) int64 and `offsets` (M+1,) int64 are on
    that device, and nothing waits for it. `build_batch` reaches the same without sorting, because it places whole
    spans.
    """
    flat = modality.reshape(-1).long()
    rows = flat.argsort(stable=True)
    order = torch.empty(len(rows), dtype=torch.int32, device=rows.device)
    order[rows] = torch.arange(len(rows), dtype=torch.int32, device=rows.device)
    below = torch.arange(modalities + 1, device=flat.device).unsqueeze(1) > flat  # (M+1, B*L)
    offsets = below.sum(1)
    return order, rows, offsets


def assemble_document(
    segments: Sequence[TokenSegment], modalities: Sequence[str], vocab: VocabLayout
) -> tuple[np.ndarray, np.ndarray, list[tuple[int, np.ndarray, bool]]]:
    """(ids int64 (A,), modality uint8 (A,), [(position, patches, leads its text)]) of BOS, the segments, and EOS.

    `modalities` names the modality numbers of the segments, which are the dataset's; the result has the vocabulary's
    numbers. Text segments follow one another directly. Every other span stands between its opening and closing token;
    the opening of a picture that is not square says its shape.
    """
    specials, null = vocab.specials, vocab.specials["null"]
    ids: list[np.ndarray] = [np.array([specials["bos"]])]
    routes: list[np.ndarray] = [np.zeros(1, np.uint8)]
    patches = []
    text = [i for i, s in enumerate(segments) if modalities[s.modality] == "text"]
    at = 1
    for i, segment in enumerate(segments):
        name = modalities[segment.modality]
        number = vocab.modalities.index(name)
        n = len(segment.values)
        if number == 0:
            ids.append(vocab.ids(name, segment.values))
            routes.append(np.zeros(n, np.uint8))
            at += n
            continue
        opening, closing = vocab.opening(name, segment.grid), vocab.brackets(name)[1]
        if segment.latent:
            patches.append((at + 1, segment.values, bool(text) and i < text[0]))
            span = np.full(n, null)
        else:
            span = vocab.ids(name, segment.values)
        ids += [np.array([opening]), span, np.array([closing])]
        routes += [np.zeros(1, np.uint8), np.full(n, number, np.uint8), np.zeros(1, np.uint8)]
        at += n + 2
    ids.append(np.array([specials["eos"]]))
    routes.append(np.zeros(1, np.uint8))
    return np.concatenate(ids), np.concatenate(routes), patches


class _Kind(NamedTuple):
    """One of a dataset's modalities in the vocabulary: its number there, and its opening and closing token."""

    name: str
    number: int
    opening: int
    closing: int
    shaped: Mapping[Grid, int]
    """The opening token of a picture of each grid."""


class _Run(NamedTuple):
    """The values of one segment inside a piece: [first, end) of the document's stored tokens, or of its latents."""

    at: int  # position in the assembled document
    kind: _Kind
    latent: bool
    first: int
    end: int
    leads: bool  # whether it stands before all text of a document that has text


def _kinds(dataset: TokenDataset, vocab: VocabLayout) -> dict[int, _Kind]:
    """The modalities by their number in the dataset. One that the vocabulary lacks is left out; the dataset then holds
    no documents with it. Raises UserError where the vocabulary lacks a shape that pictures of the dataset may have."""
    known = vocab.modalities
    return {
        k: _Kind(
            name,
            known.index(name),
            *(vocab.brackets(name) if known.index(name) else (0, 0)),
            {grid: vocab.opening(name, grid) for grid in (dataset.shapes.grids if dataset.shapes else ())}
            if name == "image"
            else {},
        )
        for k, name in enumerate(dataset.modalities)
        if name in known
    }


def _runs(
    segments: tuple[list[int], list[int], list[bool]],
    kinds: Mapping[int, _Kind],
    start: int,
    end: int,
    grids: Sequence[Grid | None] | None = None,
) -> tuple[list[_Run], list[tuple[int, int]], tuple[int, int], int]:
    """(runs of stored values, (position, id) of each bracket, (stored tokens, latents), positions).

    The runs and brackets are those at positions [start, end) of the document, without BOS and EOS. The counts of
    stored tokens, latents and positions are those of the whole document. `grids` are those of the segments, None where
    all pictures are square.
    """
    runs: list[_Run] = []
    brackets: list[tuple[int, int]] = []
    at, n_tokens, n_latents, text = 1, 0, 0, False
    for i, (n, modality, latent) in enumerate(zip(*segments, strict=True)):
        kind = kinds[modality]
        if kind.number:
            if start <= at < end:
                grid = None if grids is None else grids[i]
                brackets.append((at, kind.opening if grid is None else kind.shaped[grid]))
            at += 1
        else:
            text = True
        first = start if start > at else at
        until = end if end < at + n else at + n
        if first < until:
            assert not latent or until - first == n, "a picture of latents is never cut"
            shift = (n_latents if latent else n_tokens) - at
            runs.append(_Run(first, kind, latent, first + shift, until + shift, not text))
        at += n
        if latent:
            n_latents += n
        else:
            n_tokens += n
        if kind.number:
            if start <= at < end:
                brackets.append((at, kind.closing))
            at += 1
    if not text:
        runs = [run._replace(leads=False) for run in runs]
    assert end <= at + 1, f"positions {start} to {end} of a document that has {at + 1}"
    return runs, brackets, (n_tokens, n_latents), at + 1


def build_batch(
    rows: Sequence[Sequence[Piece]],
    sources: Sequence[Source],
    vocab: VocabLayout,
    length: int,
    sequences: Sequence[int],
    corrupt_share: float = 0.0,
) -> PackedBatch:
    """Read the pieces of B rows and lay them out as a batch. A document that is damaged, or that was left out when it
    was tokenized, is replaced in its place by <pad> tokens without labels, so that nothing else moves.

    `corrupt_share` is for an experiment on how much routing by modality matters: this share of the positions, chosen
    by (sequence, position), gets another modality than its own. Tokens and labels stay as they are.
    """
    B, M = len(rows), len(vocab.modalities)
    bos, eos, pad, null = (vocab.specials[name] for name in ("bos", "eos", "pad", "null"))
    kinds = [_kinds(source.dataset, vocab) for source in sources]
    # The rows lie one after another, so that every position is written once and all labels are made by one shift.
    tokens = np.empty(B * length, np.int64)
    modality = np.zeros(B * length, np.uint8)
    document: list[int] = []  # the number within its row of each piece and of each row's padding
    sizes: list[int] = []
    last: list[int] = []  # the last position of each piece, which has no next token
    unlabelled: list[tuple[int, int]] = []
    real = [0] * M
    latents: list[np.ndarray] = []
    latents_at: list[int] = []
    leads: list[bool] = []
    damaged: dict[str, None] = {}
    unreadable: list[str] = []
    left_out: list[str] = []
    documents_read = documents_damaged = 0
    at = 0
    for b, pieces in enumerate(rows):
        for number, piece in enumerate(pieces):
            start, end = piece.start, piece.end
            documents_read += start == 0
            dataset, kind_of = sources[piece.source].dataset, kinds[piece.source]
            index = dataset.index(piece.shard)
            segments, grids = index.segments(piece.document), index.grids(piece.document)
            runs, brackets, stored, positions = _runs(segments, kind_of, start, end, grids)
            t, p = (0, stored[0]), (0, stored[1])
            if end - start < positions:
                t, p = _extent(run for run in runs if not run.latent), _extent(run for run in runs if run.latent)
            base, at = at - start, at + end - start
            document.append(number)
            sizes.append(end - start)
            values = dataset.values(piece.shard, piece.document, stored, t, p)
            if values is None:
                name = f"{dataset.where(piece.shard)}#{piece.document}"
                if (why := dataset.left_out(piece.shard, piece.document)) is None:
                    damaged[name] = None
                    documents_damaged += start == 0
                else:
                    (unreadable if why[1] else left_out).append(f"{name}: {why[0]}")
                tokens[base + start : at] = pad
                unlabelled.append((base + start, at))
                continue
            last.append(at - 1)
            real[0] += end - start
            if start == 0:
                tokens[base] = bos
            if end == positions:
                tokens[at - 1] = eos
            for position, id_ in brackets:
                tokens[base + position] = id_
            for position, kind, latent, first, until, leading in runs:
                x, y = base + position, base + position + until - first
                if kind.number:
                    modality[x:y] = kind.number
                    real[0] -= until - first
                    real[kind.number] += until - first
                if latent:
                    tokens[x:y] = null
                    # Neither a patch nor the token before one predicts a token.
                    unlabelled.append((max(x - 1, 0), y))
                    latents.append(values[1][first - p[0] : until - p[0]])
                    latents_at.append(x)
                    leads.append(leading)
                else:
                    codes = values[0][first - t[0] : until - t[0]]
                    tokens[x:y] = vocab.ids(kind.name, codes) if kind.number else codes
        padding = (b + 1) * length - at
        assert padding >= 0, f"row {b} has {length + padding - at} positions, more than {length}"
        if padding:
            tokens[at : at + padding] = pad
            unlabelled.append((at, at + padding))
            document.append(len(pieces))
            sizes.append(padding)
            at += padding
    labels = np.empty_like(tokens)
    labels[:-1] = tokens[1:]
    labels[last] = IGNORE
    for x, y in unlabelled:
        labels[x:y] = IGNORE

    if corrupt_share and M > 1:
        for sequence, row in zip(sequences, modality.reshape(B, length), strict=True):
            limit = min(int(corrupt_share * (2**64 - 1)), 2**64 - 1)  # as a float, a share of 1 is above uint64
            hit = hashed(length, "corrupt", int(sequence)) <= np.uint64(limit)
            shift = 1 + hashed(length, "corrupt to", int(sequence)) % np.uint64(M - 1)
            row[:] = np.where(hit, (row + shift) % M, row)
    # The stable sort by modality is made of whole spans, because argsort would take half of the time of this function.
    segments_of = [np.flatnonzero(modality == m) for m in range(M)]
    in_rows = np.concatenate(segments_of)
    order = np.empty(B * length, np.int32)
    order[in_rows] = np.arange(B * length, dtype=np.int32)

    n_patches = np.array([len(x) for x in latents], np.int64)
    first_patch = np.cumsum(n_patches) - n_patches
    patches = np.arange(n_patches.sum())
    tensor = torch.from_numpy
    return PackedBatch(
        tokens=tensor(tokens).view(B, length),
        modality=tensor(modality).view(B, length),
        document=tensor(np.repeat(np.array(document, np.int32), sizes)).view(B, length),
        labels=tensor(labels).view(B, length),
        latents=tensor(np.concatenate(latents)) if latents else torch.zeros(0, 0, dtype=torch.float16),
        latent_position=tensor(np.repeat(np.array(latents_at, np.int64) - first_patch, n_patches) + patches),
        image_of_patch=tensor(np.repeat(np.arange(len(latents), dtype=np.int32), n_patches)),
        image_leads=tensor(np.array(leads, bool)),
        sequences=tensor(np.array(sequences, np.int64)),
        order=tensor(order),
        rows=tensor(in_rows),
        offsets=tensor(np.cumsum([0, *map(len, segments_of)])),
        real_tokens=tensor(np.array(real, np.int64)),
        documents_read=documents_read,
        documents_damaged=documents_damaged,
        damaged=tuple(damaged),
        unreadable=tuple(unreadable),
        left_out=tuple(left_out),
    )


def _extent(runs: Iterable[_Run]) -> tuple[int, int]:
    """[first, end) of the stored values that the runs of a document cover."""
    ends = [(run.first, run.end) for run in runs]
    return (ends[0][0], ends[-1][1]) if ends else (0, 0)


def first_sequences(batch: PackedBatch, number: int) -> PackedBatch:
    """The batch without the labels and patches of all rows whose sequence number is not below `number`."""
    beyond = batch.sequences >= number
    if not beyond.any():
        return batch
    labels = torch.where(beyond[:, None], IGNORE, batch.labels)
    kept = ~beyond[batch.latent_position // batch.tokens.shape[1]]
    image_of_patch = batch.image_of_patch[kept]
    pictures, image_of_patch = torch.unique_consecutive(image_of_patch, return_inverse=True)
    return replace(
        batch,
        labels=labels,
        latents=batch.latents[kept] if len(batch.latents) else batch.latents,
        latent_position=batch.latent_position[kept],
        image_of_patch=image_of_patch.to(torch.int32),
        image_leads=batch.image_leads[pictures.long()],
    )
