"""Raw documents in, token shards out: resumable, parallel over input files, the same bytes on every run.

    python tools/tokenize_shards.py --config TOKENIZERS.yaml --input 'raw/*.tar' --output OUT --workers 8

Killed at any moment and started again, it goes on with the input files that are not finished. Samples that cannot
be read are skipped, counted and listed in OUT/skipped.jsonl; the dataset exists once OUT/manifest.json does.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mom_data.document import BadSample, Document, expand_inputs, read_documents
from mom_data.errors import exit_clearly
from mom_data.shards import ShardWriter, TokenSegment, write_manifest
from mom_tokenizers.bundle import Tokenizers

_GROUP = 64  # documents encoded together
_progress: Any = None  # shared counters of documents and tokens, set in each worker


@dataclass(frozen=True)
class Job:
    """One input file; everything that decides its output."""

    source: Path
    name: str
    tokenizers: Path
    described: dict[str, dict[str, Any]]
    output: Path
    split: str | None
    holdout: float
    drop: tuple[str, ...]
    shard_bytes: int
    threads: int

    @property
    def part(self) -> Path:
        """The record of a finished input: its shards and what was skipped."""
        return self.output / ".parts" / f"{self.name}.json"

    def identity(self) -> dict[str, Any]:
        return {
            "source": self.source.name,
            "bytes": self.source.stat().st_size,
            "tokenizers": self.described,
            "split": [self.split, self.holdout] if self.split else None,
            "shard_bytes": self.shard_bytes,
            **({"drop": sorted(self.drop)} if self.drop else {}),
        }

    def finished(self) -> dict[str, Any] | None:
        """The record, where the input is done, with the same settings, and its shards are there."""
        if not self.part.exists():
            return None
        record = json.loads(self.part.read_text())
        files = [self.output / s["name"] for s in record["shards"]]
        there = all(f.is_file() and f.with_suffix(".idx").is_file() for f in files)
        return record if there and record["identity"] == self.identity() else None


def wanted(key: str, split: str | None, holdout: float) -> bool:
    """Whether a document belongs to the split: a share `holdout` of keys, by hash, is val and the rest train."""
    if split is None:
        return True
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") < holdout * 2**64) == (split == "val")


def encode_documents(
    documents: Sequence[Document], tokenizers: Tokenizers
) -> Iterator[tuple[str, list[TokenSegment] | str]]:
    """(key, segments, or why the document is skipped) of each; pictures and recordings go through in batches."""
    modalities = tokenizers.modalities
    positions: dict[str, list[tuple[int, int]]] = {}
    encoded: dict[tuple[int, int], np.ndarray | ValueError] = {}
    for d, document in enumerate(documents):
        for s, segment in enumerate(document.segments):
            positions.setdefault(segment.modality, []).append((d, s))
    for modality, where in positions.items():
        if modality not in modalities:
            error = ValueError(f"no tokenizer for modality '{modality}'")
            encoded.update(dict.fromkeys(where, error))
            continue
        values = [documents[d].segments[s].data for d, s in where]
        encoded.update(zip(where, tokenizers.encode_many(modality, values), strict=True))
    for d, document in enumerate(documents):
        segments: list[TokenSegment] = []
        reason = None if document.segments else "no segments"
        for s, segment in enumerate(document.segments):
            ids = encoded[d, s]
            if isinstance(ids, ValueError):
                reason = f"segment {s} ({segment.modality}): {ids}"
                break
            if len(ids):
                segments.append(TokenSegment(modalities.index(segment.modality), ids))
        yield document.key, reason or segments or "empty"


def tokenize(job: Job) -> dict[str, Any]:
    """Tokenize one input file into one or more shards. Raises ValueError where the file itself is damaged."""
    import torch

    torch.set_num_threads(job.threads)
    tokenizers = Tokenizers.load(job.tokenizers)
    dtype = token_dtype(job.described)
    records: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []

    def documents() -> Iterator[Document]:
        for item in read_documents(job.source):
            if not wanted(item.key, job.split, job.holdout):
                continue
            if isinstance(item, BadSample):
                skipped.append({"shard": job.source.name, "key": item.key, "reason": item.reason})
            elif kept := tuple(s for s in item.segments if s.modality not in job.drop):
                yield replace(item, segments=kept)
            elif not item.segments:
                yield item

    stream = documents()
    more = True
    while more:
        path = job.output / f"{job.name}-{len(records):05d}.tar"
        with ShardWriter(path, tokenizers.modalities, dtype) as writer:
            while writer.bytes_written < job.shard_bytes:
                group = list(islice(stream, _GROUP))
                if not group:
                    more = False
                    break
                tokens = 0
                for key, result in encode_documents(group, tokenizers):
                    if isinstance(result, str):
                        skipped.append({"shard": job.source.name, "key": key, "reason": result})
                    else:
                        writer.add(key, result)
                        tokens += sum(len(s.values) for s in result)
                if _progress is not None:
                    with _progress.get_lock():
                        _progress[0] += len(group)
                        _progress[1] += tokens
        records.append(writer.record())
    record = {"identity": job.identity(), "shards": records, "skipped": skipped}
    partial = job.part.with_suffix(".partial")
    partial.write_text(json.dumps(record))
    partial.rename(job.part)
    return record


def token_dtype(described: dict[str, dict[str, Any]]) -> type:
    """The smallest type that holds every modality's local ids."""
    return np.uint16 if max(t["size"] for t in described.values()) <= 1 << 16 else np.uint32


def _start_worker(progress: Any) -> None:
    global _progress
    _progress = progress


def run(jobs: Sequence[Job], workers: int) -> dict[str, dict[str, Any]]:
    """The record of every job, by name, with a progress line; finished ones are not done again."""
    done = {job.name: record for job in jobs if (record := job.finished()) is not None}
    left = [job for job in jobs if job.name not in done]
    if not left:
        return done
    context = multiprocessing.get_context("spawn")  # forking beside torch's threads can hang
    progress = context.Array("q", 2)
    start = time.perf_counter()
    bar = tqdm(unit="doc", desc=f"tokenize {len(left)} of {len(jobs)} files", dynamic_ncols=True,
               mininterval=0.5 if sys.stderr.isatty() else 10)  # fmt: skip
    with bar, ProcessPoolExecutor(workers, context, _start_worker, (progress,)) as pool:
        futures: dict[Future[dict[str, Any]], Job] = {pool.submit(tokenize, job): job for job in left}
        waiting = set(futures)
        try:
            while waiting:
                finished, waiting = wait(waiting, timeout=0.5)
                bar.update(progress[0] - bar.n)
                rate = progress[1] / (time.perf_counter() - start)
                bar.set_postfix_str(f"{rate:,.0f} tok/s, {len(left) - len(waiting)}/{len(left)} files", refresh=False)
                for future in finished:
                    done[futures[future].name] = future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return done


def names(sources: Sequence[Path]) -> list[str]:
    """A name for each input's shards: its stem, with its folder's in front where that alone is not unique.

    No dots: webdataset would take them for extensions.
    """
    stems = [path.name.split(".")[0] for path in sources]
    if len(set(stems)) < len(stems):
        stems = [f"{path.parent.name}-{stem}".replace(".", "_") for path, stem in zip(sources, stems, strict=True)]
    twice = [stem for stem, n in Counter(stems).items() if n > 1]
    if twice:
        raise ValueError(f"several inputs would write shards named {twice[0]}: give the files different names")
    return stems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="tokenizers.yaml, as train_tokenizers.py writes it")
    parser.add_argument("--input", nargs="+", required=True, help="tars, JSON-lines files, globs or folders")
    parser.add_argument("--output", type=Path, required=True, help="folder of the dataset")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: cores)")
    parser.add_argument("--split", choices=["train", "val"], help="take one side of a hold-out by document key")
    parser.add_argument("--holdout", type=float, default=0.03, help="share of documents that is val (%(default)s)")
    parser.add_argument(
        "--drop-modalities",
        nargs="+",
        default=(),
        metavar="MODALITY",
        help="leave out segments of these, and documents of nothing else; neither counts as unreadable",
    )
    parser.add_argument("--max-bad-fraction", type=float, default=0.05, help="fail above it (default: %(default)s)")
    parser.add_argument("--shard-mib", type=int, default=128, help="start a new shard at this size (%(default)s)")
    arguments = parser.parse_args()
    with exit_clearly("tokenize_shards"):
        sources = expand_inputs(arguments.input)
        output: Path = arguments.output
        (output / ".parts").mkdir(parents=True, exist_ok=True)
        described = Tokenizers.load(arguments.config).describe()
        if both := [m for m in arguments.drop_modalities if m in described]:
            raise ValueError(
                f"--drop-modalities {both[0]}: {arguments.config} has a tokenizer for it; take it out there"
            )
        workers = max(1, min(arguments.workers, len(sources)))
        threads = max(1, len(os.sched_getaffinity(0)) // workers)
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false" if workers > 1 else "true")
        jobs = [
            Job(source, name, arguments.config, described, output, arguments.split, arguments.holdout,
                tuple(arguments.drop_modalities), arguments.shard_mib << 20, threads)
            for source, name in zip(sources, names(sources), strict=True)
        ]  # fmt: skip
        records = run(jobs, workers)
        ordered = [records[job.name] for job in jobs]
        shards = [s for record in ordered for s in record["shards"] if s["documents"]]
        skipped = [entry for record in ordered for entry in record["skipped"]]
        (output / "skipped.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in skipped))
        documents = sum(s["documents"] for s in shards)
        if not documents:
            raise ValueError(f"no document could be read from the {len(sources)} inputs; see {output}/skipped.jsonl")
        if len(skipped) > arguments.max_bad_fraction * (documents + len(skipped)):
            raise ValueError(
                f"{len(skipped)} of {documents + len(skipped)} documents could not be read, more than "
                f"--max-bad-fraction {arguments.max_bad_fraction}; {output}/skipped.jsonl lists them. What is done "
                "is kept: run again with a larger share to commit it."
            )
        reasons = Counter(entry["reason"].split(":")[0] for entry in skipped)
        write_manifest(output, shards, described, token_dtype(described), reasons)
        tokens = {m: sum(s["tokens"][m] for s in shards) for m in described}
        print(
            f"{output}: {documents:,} documents in {len(shards)} shards, "
            + ", ".join(f"{n:,} {m}" for m, n in tokens.items())
            + f" tokens, {len(skipped)} skipped"
        )


if __name__ == "__main__":
    main()
