"""Time every stage of tokenizing in CPU-seconds, on the first documents of each raw file.

    mom bench-tokenizers --tokenizers TOKENIZERS.yaml --input 'raw/*.tar' --documents 200

CPU-seconds do not depend on how busy the machine is. One thread is used, so that rates are per core.
Every stage runs once before it is measured.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from mom_data.documents.document import BadSample, Document, expand_inputs, read_documents
from mom_data.shards.format import ShardWriter, TokenSegment
from mom_tokenizers.bundle import PICTURES, READY, Tokenizers
from mom_tokenizers.errors import UserError, exit_clearly
from mom_tokenizers.image.autoencoder import preprocess
from mom_tokenizers.media.pictures import decode_image
from mom_tokenizers.media.recordings import decode_audio
from mom_tokenizers.speech.units import SpeechTokenizer
from mom_tools.options import add_input, add_json, command_parser
from mom_tools.output import write_json

AT_ONCE = 32  # values a batch, as Tokenizers.encode_many makes them


def sample(files: Sequence[Path], documents: int) -> list[Document]:
    """The first readable documents of each file, up to an equal share of `documents`."""
    share = -(-documents // len(files))
    found = []
    for file in tqdm(files, desc="reading", unit="file", disable=None):
        readable = (d for d in read_documents(file) if not isinstance(d, BadSample) and d.segments)
        found += list(islice(readable, share))
    if not found:
        raise UserError(f"no document could be read from the {len(files)} inputs")
    return found[:documents]


def measured(work: Callable[[Any], Any], values: Sequence[Any]) -> tuple[list[Any], float]:
    """Results and CPU-seconds of `work` on each item. Items that it cannot read give no result; their time counts."""
    results = []
    for value in values[:1]:
        _tried(work, value)
    start = time.process_time()
    for value in values:
        results += _tried(work, value)
    return results, time.process_time() - start


def _tried(work: Callable[[Any], Any], value: Any) -> list[Any]:
    try:
        return [work(value)]
    except ValueError:
        return []


def in_batches(values: Sequence[Any]) -> list[Sequence[Any]]:
    return [values[i : i + AT_ONCE] for i in range(0, len(values), AT_ONCE)]


def stage(modality: str, name: str, seconds: float, **amounts: float) -> dict[str, Any]:
    """A row of the table. `amounts`: how much was processed, by unit."""
    per_second = {unit: amount / seconds if seconds else None for unit, amount in amounts.items()}
    return {
        "modality": modality,
        "stage": name,
        "cpu_seconds": seconds,
        "amounts": amounts,
        "per_cpu_second": per_second,
    }


def text_stages(tokenizer: Any, modality: str, texts: Sequence[str]) -> Iterator[dict[str, Any]]:
    encoded, seconds = measured(tokenizer.encode_batch, in_batches(texts))
    tokens = sum(len(ids) for batch in encoded for ids in batch)
    yield stage(modality, "encode", seconds, MB=sum(len(t.encode()) for t in texts) / 1e6, tokens=tokens)


def image_stages(tokenizer: Any, kind: str, modality: str, parts: Sequence[bytes]) -> Iterator[dict[str, Any]]:
    by_format: dict[str, list[bytes]] = {}
    for part in parts:
        by_format.setdefault(
            "JPEG" if part[:2] == b"\xff\xd8" else "PNG" if part[1:4] == b"PNG" else "other", []
        ).append(part)
    pictures = []
    for name, some in sorted(by_format.items()):
        decoded, seconds = measured(decode_image, some)
        pictures += decoded
        pixels = sum(p.width * p.height for p in decoded) / 1e6
        yield stage(
            modality, f"decode {name}", seconds, pictures=len(decoded), megapixels=pixels, MB=sum(map(len, some)) / 1e6
        )
    _, resize = measured(lambda p: preprocess(p, tokenizer.resolution), pictures)
    yield stage(modality, "resize", resize, pictures=len(pictures))
    encoded, both = measured(tokenizer.encode_batch, in_batches(pictures))
    tokens = sum(len(ids) for batch in encoded for ids in batch)
    # encode_batch resizes first
    yield stage(modality, f"encode ({kind})", max(0.0, both - resize), pictures=len(pictures), tokens=tokens)


def speech_stages(tokenizer: SpeechTokenizer, modality: str, parts: Sequence[bytes]) -> Iterator[dict[str, Any]]:
    waveforms, seconds = measured(decode_audio, parts)
    heard = sum(len(w) / rate for w, rate in waveforms)
    yield stage(
        modality, "decode", seconds, clips=len(waveforms), seconds_of_sound=heard, MB=sum(map(len, parts)) / 1e6
    )
    _, resample = measured(tokenizer.resampled, waveforms)
    yield stage(modality, "resample", resample, clips=len(waveforms), seconds_of_sound=heard)
    _, features = measured(tokenizer.features, waveforms)
    yield stage(modality, "features", max(0.0, features - resample), clips=len(waveforms), seconds_of_sound=heard)
    encoded, whole = measured(tokenizer.encode_batch, in_batches(waveforms))
    tokens = sum(len(ids) for batch in encoded for ids in batch)
    yield stage(modality, "nearest unit", max(0.0, whole - features), seconds_of_sound=heard, tokens=tokens)


def whole_path(tokenizers: Tokenizers, documents: Sequence[Document]) -> Iterator[dict[str, Any]]:
    """Encoding as tokenize_shards.py does it, and writing what comes out."""
    places = [(d, s) for d, document in enumerate(documents) for s, _ in enumerate(document.segments)]
    encoded: dict[tuple[int, int], np.ndarray | Exception] = {}
    start = time.process_time()
    for modality in tokenizers.modalities:
        where = [(d, s) for d, s in places if documents[d].segments[s].modality == modality]
        results = tokenizers.encode_many(modality, [documents[d].segments[s].data for d, s in where])
        encoded.update(zip(where, results, strict=True))
    encoding = time.process_time() - start
    rows = []
    for d, document in enumerate(documents):
        found = [(s.modality, encoded.get((d, i))) for i, s in enumerate(document.segments)]
        segments = [TokenSegment.of(tokenizers.modalities.index(m), v) for m, v in found if isinstance(v, np.ndarray)]
        if len(segments) == len(found) and all(len(s.values) for s in segments):
            rows.append((document.key, segments))
    tokens = sum(len(s.values) for _, segments in rows for s in segments)
    dtype = np.uint16 if max(t.size for t in tokenizers.by_modality.values()) <= 1 << 16 else np.uint32
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bench-00000.tar"
        start = time.process_time()
        with ShardWriter(path, tokenizers.modalities, dtype) as writer:
            for key, segments in rows:
                writer.add(key, segments)
        writing = time.process_time() - start
        megabytes = path.stat().st_size / 1e6
    yield stage("all", "write", writing, documents=len(rows), tokens=tokens, MB=megabytes)
    yield stage("all", "whole path", encoding + writing, documents=len(documents), tokens=tokens)


def bench(path: Path, files: Sequence[Path], documents: int) -> dict[str, Any]:
    """{"documents", "stages": [...]}: every stage's CPU-seconds, amounts, and amounts per CPU-second."""
    import torch

    torch.set_num_threads(1)
    tokenizers = Tokenizers.load(path)
    drawn = sample(files, documents)
    stages: list[dict[str, Any]] = []
    kinds = {modality: described["kind"] for modality, described in tokenizers.describe().items()}
    for modality, kind in tqdm(kinds.items(), desc="measuring", disable=None):
        values = [s.data for d in drawn for s in d.segments if s.modality == modality]
        tokenizer: Any = tokenizers.tokenizer(modality)
        if not values or kind == READY:
            continue
        texts = [v for v in values if isinstance(v, str)]
        parts = [v for v in values if isinstance(v, bytes)]
        if kind == "bpe":
            stages += text_stages(tokenizer, modality, texts)
        elif kind in PICTURES:
            stages += image_stages(tokenizer, str(kind), modality, parts)
        else:
            stages += speech_stages(tokenizer, modality, parts)
    return {"documents": len(drawn), "stages": stages + list(whole_path(tokenizers, drawn))}


def stages_table(found: dict[str, Any]) -> str:
    lines = ["| modality | stage | CPU-s | per CPU-second (one core) |", "|---|---|---|---|"]
    for row in found["stages"]:
        rates = ", ".join(
            f"{rate:,.{2 if rate < 100 else 0}f} {unit.replace('_', ' ')}"
            for unit, rate in row["per_cpu_second"].items()
            if rate is not None
        )
        lines.append(f"| {row['modality']} | {row['stage']} | {row['cpu_seconds']:.3f} | {rates} |")
    return "\n".join(lines)


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument(
        "--tokenizers", type=Path, required=True, help="tokenizers.yaml, as train_tokenizers.py writes it"
    )
    add_input(parser)
    parser.add_argument(
        "--documents", type=int, default=200, help="number of documents over all inputs (default: %(default)s)"
    )
    add_json(parser)
    arguments = parser.parse_args()
    with exit_clearly():
        if arguments.documents < 1:
            raise UserError(f"--documents {arguments.documents}: at least one")
        # before the text tokenizer starts threads
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        with threadpool_limits(1):  # idle threads of the linear algebra spin, and that counts as CPU-seconds
            found = bench(arguments.tokenizers, expand_inputs(arguments.input), arguments.documents)
        if write_json(arguments.json, found, indent=2):
            print(f"{found['documents']} documents\n\n{stages_table(found)}")


if __name__ == "__main__":
    main()
