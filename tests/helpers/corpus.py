"""Small token datasets for the tests."""

import hashlib
import json
from itertools import pairwise

import numpy as np

from mom_data.shards.dataset import ShardIndex
from mom_data.shards.format import LATENT_BIT, ShardWriter, TokenSegment, write_manifest
from mom_tokenizers.vocab import VocabLayout

MODALITIES = ("text", "image", "speech")
VOCAB = VocabLayout({"text": 100, "image": 32, "speech": 20})
TOKENIZERS = {m: {"kind": "test", "fingerprint": f"{m}-1", "size": s} for m, s in VOCAB.sizes}


def random_document(rng, latent_width=0):
    segments = []
    for _ in range(rng.integers(1, 5)):
        modality = int(rng.integers(0, 3))
        if modality == 1 and latent_width:
            values = rng.standard_normal((16, latent_width)).astype(np.float16)
        else:
            n = 16 if modality == 1 else int(rng.integers(1, 90))
            values = rng.integers(0, VOCAB.sizes[modality][1], n).astype(np.uint16)
        segments.append(TokenSegment(modality, values))
    return segments


def write_dataset(folder, documents=60, shards=3, seed=0, latent_width=0, tokenizers=TOKENIZERS, make=random_document):
    """Write token shards. Returns {(shard, document): segments}."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    truth, records = {}, []
    for k in range(shards):
        with ShardWriter(folder / f"part-{k:05d}.tar", MODALITIES) as writer:
            for d in range(documents // shards):
                truth[k, d] = make(rng, latent_width)
                writer.add(f"key{k}-{d}", truth[k, d])
        records.append(writer.record())
    write_manifest(folder, records, tokenizers, np.uint16, {})
    return truth


def rewrite_manifest(folder, manifest):
    """Replace the manifest in the folder of a dataset, with a checksum that fits it."""
    content = json.dumps(manifest).encode()
    (folder / "manifest.json").write_bytes(content)
    (folder / "manifest.sha256").write_text(f"{hashlib.sha256(content).hexdigest()}  manifest.json\n")


class Indices:
    """What a plan reads of a dataset, held in memory without files or payloads.

    `documents` has the segments of each document, (length, modality, latent) each, and `shards` has the number of
    documents in each shard.
    """

    def __init__(self, name, documents, shards):
        self.location = self.fingerprint = name
        self.shards = [{"name": f"{k}.tar", "documents": n} for k, n in enumerate(shards)]
        first = np.cumsum([0, *shards])
        assert first[-1] == len(documents)
        self._indices = [self._index(documents[a:b]) for a, b in pairwise(first)]
        self.lengths = {
            (k, d): 2 + sum(n + 2 * (m > 0) for n, m, _ in documents[a + d])
            for k, (a, size) in enumerate(zip(first, shards, strict=False))
            for d in range(size)
        }

    def index(self, shard):
        return self._indices[shard]

    @staticmethod
    def _index(documents):
        flat = [segment for document in documents for segment in document]
        nothing = np.zeros(len(documents), np.uint64)
        return ShardIndex(
            nothing,
            nothing.astype(np.uint32),
            np.cumsum([0, *map(len, documents)]).astype(np.uint32),
            np.array([n for n, _, _ in flat], np.uint32),
            np.array([m | LATENT_BIT * latent for _, m, latent in flat], np.uint8),
            None,
        )
