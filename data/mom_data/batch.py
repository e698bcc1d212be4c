"""Packed rows become tensors: ids, modality masks, documents, labels, and the sort by modality."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mom_data.plan import Piece, Source, hashed
from mom_data.shards import TokenSegment
from mom_tokenizers.vocab import VocabLayout

IGNORE = -100


@dataclass(frozen=True)
class PackedBatch:
    """What the loader hands the trainer: B rows, L positions, M modalities, P latent patches.

    tokens           (B, L) int64    vocabulary ids; patch positions hold <null>, padding <pad>
    modality         (B, L) uint8    of the *input* token: routes the weights
    document         (B, L) int32    number of the document within the row; padding counts as one more
    labels           (B, L) int64    next token of the same piece, -100 where there is none
    latents          (P, C*p*p) fp16 patches in raster order
    latent_position  (P,) int64      flat position of each in B*L
    image_of_patch   (P,) int32      number of the picture within the batch
    image_leads      (I,) bool       no text stands before the picture in its document, but some does after it
    sequences        (B,) int64      numbers of the rows in the run's order: what random draws are derived from
    order            (B*L,) int32    time -> row of the stable sort by modality
    rows             (B*L,) int64    row -> time
    offsets          (M+1,) int64    segment bounds of the sorted rows; stays on the CPU
    real_tokens      (M,) int64      input tokens by modality without padding; stays on the CPU
    end_sequence     number of the next sequence of the whole run, over all ranks
    damaged          documents masked because of their checksum, as "shard#document"
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
    end_sequence: int = 0
    damaged: tuple[str, ...] = ()

    def to(self, device: torch.device) -> PackedBatch:
        moved: dict[str, Any] = {
            f.name: getattr(self, f.name).to(device, non_blocking=True)
            for f in fields(self)
            if isinstance(getattr(self, f.name), Tensor) and f.name not in ("offsets", "real_tokens")
        }
        return replace(self, **moved)

    def pin_memory(self) -> PackedBatch:
        """Called by the DataLoader where it pins."""
        pinned: dict[str, Any] = {
            f.name: v.pin_memory() for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)
        }
        return replace(self, **pinned)


def assemble_document(
    segments: Sequence[TokenSegment], modalities: Sequence[str], vocab: VocabLayout
) -> tuple[np.ndarray, np.ndarray, list[tuple[int, np.ndarray, bool]]]:
    """(ids int64 [A], modality uint8 [A], [(position, patches, leads its text)]) of BOS, the segments, EOS.

    `modalities` names the segments' modality numbers, which are the dataset's; the vocabulary's go out. Text
    segments follow one another bare; every other span stands between its brackets.
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
            ids.append(segment.values.astype(np.int64))
            routes.append(np.zeros(n, np.uint8))
            at += n
            continue
        opening, closing = vocab.brackets(name)
        if segment.latent:
            patches.append((at + 1, segment.values, bool(text) and i < text[0]))
            span = np.full(n, null)
        else:
            span = segment.values.astype(np.int64) + vocab.offsets[name]
        ids += [np.array([opening]), span, np.array([closing])]
        routes += [np.zeros(1, np.uint8), np.full(n, number, np.uint8), np.zeros(1, np.uint8)]
        at += n + 2
    ids.append(np.array([specials["eos"]]))
    routes.append(np.zeros(1, np.uint8))
    return np.concatenate(ids), np.concatenate(routes), patches


def build_batch(
    rows: Sequence[Sequence[Piece]],
    sources: Sequence[Source],
    vocab: VocabLayout,
    length: int,
    sequences: Sequence[int],
    corrupt_share: float = 0.0,
) -> PackedBatch:
    """Read the pieces of B rows and lay them out. A damaged document is masked in place: pad tokens that carry no
    loss, so that nothing else moves.

    `corrupt_share` of the positions, chosen by (sequence, position), are routed as another modality than their own:
    an experiment on how much the rule's mask matters. Tokens and labels stay.
    """
    B, M = len(rows), len(vocab.modalities)
    pad = vocab.specials["pad"]
    tokens = np.full((B, length), pad, np.int64)
    modality = np.zeros((B, length), np.uint8)
    document = np.zeros((B, length), np.int32)
    labels = np.full((B, length), IGNORE, np.int64)
    real = np.zeros((B, length), bool)
    latents: list[np.ndarray] = []
    latent_position: list[np.ndarray] = []
    image_of_patch: list[np.ndarray] = []
    image_leads: list[bool] = []
    damaged = []
    for b, pieces in enumerate(rows):
        at = 0
        for number, piece in enumerate(pieces):
            dataset = sources[piece.source].dataset
            end = at + piece.end - piece.start
            document[b, at:end] = number
            segments = dataset.read(piece.shard, piece.document)
            if segments is None:
                damaged.append(f"{dataset.folder / dataset.shards[piece.shard]['name']}#{piece.document}")
            else:
                ids, routes, patches = assemble_document(segments, dataset.modalities, vocab)
                tokens[b, at:end] = ids[piece.start : piece.end]
                modality[b, at:end] = routes[piece.start : piece.end]
                labels[b, at : end - 1] = ids[piece.start + 1 : piece.end]
                real[b, at:end] = True
                for position, values, leads in patches:
                    if piece.start <= position < piece.end:
                        start = at + position - piece.start
                        latents.append(values)
                        latent_position.append(b * length + np.arange(start, start + len(values)))
                        image_leads.append(leads)
                        image_of_patch.append(np.full(len(values), len(image_of_patch), np.int32))
                        # neither a patch nor the token before one predicts a token
                        labels[b, max(start - 1, 0) : start + len(values)] = IGNORE
            at = end
        document[b, at:] = len(pieces)

    real_tokens = np.bincount(modality[real], minlength=M)
    if corrupt_share and M > 1:
        for b, sequence in enumerate(sequences):
            hit = hashed(length, "corrupt", int(sequence)) < np.uint64(corrupt_share * (2**64 - 1))
            shift = 1 + hashed(length, "corrupt to", int(sequence)) % np.uint64(M - 1)
            modality[b] = np.where(hit, (modality[b] + shift) % M, modality[b])
    flat = modality.reshape(-1)
    order_of_rows = np.argsort(flat, kind="stable")
    order = np.empty(flat.size, np.int32)
    order[order_of_rows] = np.arange(flat.size, dtype=np.int32)
    offsets = np.zeros(M + 1, np.int64)
    offsets[1:] = np.bincount(flat, minlength=M).cumsum()
    tensor = torch.from_numpy
    return PackedBatch(
        tokens=tensor(tokens),
        modality=tensor(modality),
        document=tensor(document),
        labels=tensor(labels),
        latents=tensor(np.concatenate(latents)) if latents else torch.zeros(0, 0, dtype=torch.float16),
        latent_position=tensor(np.concatenate(latent_position)) if latents else torch.zeros(0, dtype=torch.int64),
        image_of_patch=tensor(np.concatenate(image_of_patch)) if latents else torch.zeros(0, dtype=torch.int32),
        image_leads=torch.tensor(image_leads, dtype=torch.bool),
        sequences=torch.tensor(sequences, dtype=torch.int64),
        order=tensor(order),
        rows=tensor(order_of_rows),
        offsets=tensor(offsets),
        real_tokens=tensor(real_tokens),
        documents_read=sum(map(len, rows)),
        damaged=tuple(damaged),
    )


def first_sequences(batch: PackedBatch, number: int) -> PackedBatch:
    """The batch with every row of a sequence beyond the first `number` left without labels and patches."""
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
