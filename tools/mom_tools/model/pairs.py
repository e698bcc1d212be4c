"""Finds held-out documents of one text and one picture or recording, with which samples are compared."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mom_tokenizers.errors import UserError
from mom_tools.model.scores import normalised
from mom_train.validation.pairs import Pair, find_pairs

if TYPE_CHECKING:
    from mom_data.shards.dataset import TokenDataset
    from mom_tokenizers.bundle import Tokenizers

FEWEST = 4  # two halves, each with a covariance


def chosen_pairs(dataset: TokenDataset, modality: str, count: int, longest: int, text: Any) -> list[Pair]:
    """The first `count` pairs in an order by hash, so that a larger count contains a smaller one. `longest` is the
    largest number of units of a recording. Pairs whose text, decoded by `text`, has no words are left out. Raises
    ValueError for fewer than FEWEST."""
    pairs = find_pairs(
        [dataset],
        modality,
        count,
        fits=lambda _, length: modality != "speech" or length <= longest,
        keep=lambda ids: bool(normalised(text.decode(ids))),
    )
    if len(pairs) < FEWEST:
        kind = f"documents of one text and one {modality} segment"
        raise UserError(f"{dataset.location}: {len(pairs)} {kind}; at least {FEWEST} are needed")
    return pairs


def originals(dataset: TokenDataset, pairs: Sequence[Pair], tokenizers: Tokenizers, raw: list[str]) -> list[Any]:
    """The raw bytes of the picture or recording of each pair, or None where they are not in the files. A raw document
    belongs to a pair where its key and the ids of its text are the same. Raises ValueError where none is found."""
    from tqdm import tqdm

    from mom_data.documents.document import BadSample, expand_inputs, read_documents
    from mom_data.shards.verify import document_keys

    by_key: dict[str, list[int]] = {}
    for shard in sorted({pair.shard for pair in pairs}):
        tar = Path(dataset.where(shard))
        if not tar.is_file():
            raise UserError(f"--raw: documents' keys are read from shards on this machine, and {tar} is not")
        keys = document_keys(tar)
        for i, pair in enumerate(pairs):
            if pair.shard == shard:
                by_key.setdefault(keys[pair.document], []).append(i)
    found: list[Any] = [None] * len(pairs)
    for path in tqdm(expand_inputs(raw), desc="raw documents", unit="file", disable=None):
        for document in read_documents(path):
            if isinstance(document, BadSample) or len(document.segments) != 2:
                continue
            for i in by_key.get(document.key, ()):
                text = [s.data for s in document.segments if s.modality == "text"]
                if len(text) == 1 and np.array_equal(tokenizers.encode("text", text[0]), pairs[i].text):
                    found[i] = next(s.data for s in document.segments if s.modality != "text")
    if all(data is None for data in found):
        raise UserError(f"--raw: none of the {len(pairs)} documents chosen from {dataset.location} is in these files")
    return found
