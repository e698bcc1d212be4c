"""Finds held-out documents of a certain form: a text and one other segment, an utterance, or two recordings.

All are taken in an order by hash, so that a larger number of them contains a smaller one, and every rank finds the
same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mom_data.order.plan import hashed
from mom_data.shards.dataset import ShardIndex, TokenDataset
from mom_data.shards.format import LATENT_BIT, TokenSegment
from mom_tokenizers.errors import UserError
from mom_tokenizers.media.shapes import Grid
from mom_tokenizers.speech.delay import delayed, undelayed
from mom_tokenizers.vocab import VocabLayout

BLOCK = 5
"""The number of frames of each of the two stretches that change places when an utterance is altered; 0.2 seconds at 25
a second. A frame is a unit, or with several codebooks one unit of each."""


@dataclass(frozen=True)
class Pair:
    """A held-out document of one text and one picture or recording, in either order."""

    name: str
    shard: int
    document: int
    text: np.ndarray
    """Local ids (n,)."""
    values: np.ndarray
    """Local ids (n,), or latents (P, W)."""
    grid: Grid | None = None
    """The (rows, columns) of a picture that is not square."""

    def segment(self, number: int) -> TokenSegment:
        """The picture or recording as a segment, where `number` is that of its modality."""
        return TokenSegment(number, self.values, self.grid)


def find_pairs(
    datasets: Sequence[TokenDataset],
    modality: str,
    count: int,
    fits: Callable[[int, int], bool],
    keep: Callable[[np.ndarray], bool] = lambda text: True,
) -> list[Pair]:
    """The first `count` documents that consist of one text and one segment of `modality`, where there are so many.

    `fits` is asked about the lengths of the two segments before a document is read, and `keep` about the ids of its
    text afterwards. Documents that are damaged are passed over.
    """
    found = []
    for dataset, shard, document in _by_hash(datasets, lambda dataset, index: _two(dataset, index, modality, fits)):
        segments = dataset.read(shard, document)
        if segments is None:  # a damaged one
            continue
        of = {dataset.modalities[segment.modality]: segment for segment in segments}
        if not keep(of["text"].values):
            continue
        name = f"{dataset.shards[shard]['name'].removesuffix('.tar')}-{document}"
        found.append(Pair(name, shard, document, of["text"].values, of[modality].values, of[modality].grid))
        if len(found) == count:
            break
    return found


def find_utterances(
    datasets: Sequence[TokenDataset], modality: str, count: int, longest: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The first `count` utterances and what each becomes when it is altered, local ids (n,) and (n,).

    An utterance is the first segment of `modality` in a document. It is altered by letting two neighbouring stretches
    of BLOCK frames in its middle change places, so both have the same units, equally many. Utterances of fewer than
    4 BLOCK frames or more than `longest` units are passed over, and those that do not change.
    """
    found = []
    for dataset, shard, document in _by_hash(datasets, lambda dataset, index: _holding(dataset, index, modality)):
        number = dataset.modalities.index(modality)
        segments = dataset.read(shard, document) or ()
        units = next((s.values for s in segments if s.modality == number and not s.latent), np.zeros(0, np.uint16))
        made_by = dataset.tokenizers[modality]
        codebooks = int(made_by.get("codebooks", 1))
        if not 4 * BLOCK * codebooks <= len(units) <= longest:
            continue
        other = altered(units, codebooks, int(made_by["size"]) // codebooks)
        if not np.array_equal(units, other):
            found.append((units, other))
        if len(found) == count:
            break
    return found


def altered(units: np.ndarray, codebooks: int = 1, size: int = 0) -> np.ndarray:
    """The units (n,) with the BLOCK frames before the middle and the BLOCK behind it in each other's place.

    Units of several codebooks of `size` codes each are in the delay pattern, and so is the result: without it, their
    order alone would say which of the two is the altered one.
    """
    codes_TK = undelayed(units, codebooks, size) if codebooks > 1 else units[:, None]
    middle = len(codes_TK) // 2
    before, behind = codes_TK[middle - BLOCK : middle], codes_TK[middle : middle + BLOCK]
    other_TK = np.concatenate([codes_TK[: middle - BLOCK], behind, before, codes_TK[middle + BLOCK :]])
    return delayed(other_TK, size).astype(units.dtype) if codebooks > 1 else other_TK[:, 0]


def find_minimal_pairs(
    dataset: TokenDataset, vocab: VocabLayout, longest: int
) -> list[tuple[TokenSegment, TokenSegment]]:
    """All minimal pairs of a dataset, each the right segment and the altered one, with the modality numbers of the
    vocabulary.

    In such a dataset every document consists of two segments of one modality, the right one first. Raises UserError
    where a document has another form, is damaged, or is longer than `longest`: a figure of some of the pairs would be
    compared with others' figures of all.
    """
    found: list[tuple[TokenSegment, TokenSegment]] = []
    for _, shard, document in _by_hash([dataset], lambda _, index: np.arange(len(index.segment_start) - 1)):
        where = f"{dataset.where(shard)}#{document}"
        lengths, modalities, latent = dataset.index(shard).segments(document)
        if len(lengths) != 2 or len(set(modalities)) != 1 or any(latent):
            names = ", ".join(dataset.modalities[m] for m in modalities)
            raise UserError(
                f"{where} has the segments {names}: a document of minimal pairs consists of two segments of one "
                "modality, the right one first and the altered one after it"
            )
        if max(lengths) > longest:
            raise UserError(
                f"{where} has a segment of {max(lengths)} units, more than the {longest} that the model is trained on "
                "at once (data.sequence_length): leave it out"
            )
        segments = dataset.read(shard, document)
        if segments is None:
            raise UserError(f"{where} is damaged: see what `mom verify` finds, and tokenize again")
        number = vocab.modalities.index(dataset.modalities[modalities[0]])
        right, wrong = (TokenSegment(number, segment.values, segment.grid) for segment in segments)
        found.append((right, wrong))
    return found


def _by_hash(
    datasets: Sequence[TokenDataset], matches: Callable[[TokenDataset, ShardIndex], np.ndarray]
) -> Iterator[tuple[TokenDataset, int, int]]:
    """(dataset, shard, document) of all documents that match, in the order of a hash of shard and document."""
    found = []
    for number, dataset in enumerate(datasets):
        for shard in range(len(dataset.shards)):
            index = dataset.index(shard)
            order = hashed(len(index.segment_start) - 1, "score", shard)
            found += [(int(order[d]), number, shard, d) for d in matches(dataset, index).tolist()]
    for _, number, shard, document in sorted(found):
        yield datasets[number], shard, document


def _two(dataset: TokenDataset, index: ShardIndex, modality: str, fits: Callable[[int, int], bool]) -> np.ndarray:
    """The documents of one text and one segment of `modality` whose lengths fit."""
    if modality not in dataset.modalities:
        return np.zeros(0, np.int64)
    wanted = sorted((dataset.modalities.index("text"), dataset.modalities.index(modality)))
    kept = []
    for document in np.flatnonzero(np.diff(index.segment_start.astype(np.int64)) == 2).tolist():
        first = int(index.segment_start[document])
        kinds = (index.segment_modality[first : first + 2] & ~np.uint8(LATENT_BIT)).tolist()
        if sorted(kinds) != wanted:
            continue
        at = first + kinds.index(dataset.modalities.index(modality))
        lengths = index.segment_length
        if fits(int(lengths[2 * first + 1 - at]), int(lengths[at])):
            kept.append(document)
    return np.array(kept, np.int64)


def _holding(dataset: TokenDataset, index: ShardIndex, modality: str) -> np.ndarray:
    """The documents that hold a segment of `modality`."""
    if modality not in dataset.modalities:
        return np.zeros(0, np.int64)
    segments = np.flatnonzero((index.segment_modality & ~np.uint8(LATENT_BIT)) == dataset.modalities.index(modality))
    return np.unique(np.searchsorted(index.segment_start, segments, side="right") - 1)
