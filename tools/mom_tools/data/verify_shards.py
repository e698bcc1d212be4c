"""Read every byte of a token dataset and list everything that is wrong with it, and what to do.

    mom verify tokens/train
    mom verify tokens/train --rebuild-index --workers 8

Compares sizes and checksums with the manifest, and checks each tar header and each document's crc32, ids and counts.
The exit code is 0 where all is well and 2 where anything is wrong. --rebuild-index first makes lost or damaged index
files again from their tars, with the same bytes.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mom_data.shards.format import sha256_of
from mom_data.shards.manifest import Manifest, Problem, ShardRecord
from mom_data.shards.verify import INDEX_BYTES, ShardReport, read_manifest, rebuild_index, verify_shard
from mom_tokenizers.errors import EXIT_USER_ERROR, UserError, exit_clearly
from mom_tools.options import add_json, command_parser
from mom_tools.output import write_json

_BYTES_PER_PROCESS = 128 << 20  # less is read before another process has started


def verify_one(folder: Path, record: ShardRecord, manifest: Manifest, rebuild: bool) -> tuple[ShardReport, bool]:
    """The report of a shard, and whether its index had to be made again (which was done)."""
    index = (folder / record.name).with_suffix(".idx")
    if not rebuild or (index.is_file() and sha256_of(index) == record.index_sha256):
        return verify_shard(folder, record, manifest), False
    try:
        rebuild_index(folder, record)
    except UserError as error:
        report = verify_shard(folder, record, manifest)
        refused = Problem(index.name, f"not made again: {error}", "mend the shard first, then call this again")
        report.problems.append(refused)
        return report, False
    return verify_shard(folder, record, manifest), True


def verify(
    folder: Path, manifest: Manifest, records: Sequence[ShardRecord], workers: int, rebuild: bool
) -> Iterator[tuple[ShardReport, bool]]:
    if workers == 1:
        yield from (verify_one(folder, record, manifest, rebuild) for record in records)
        return
    context = multiprocessing.get_context("forkserver")  # torch is imported once for all
    context.set_forkserver_preload(["mom_data.shards.verify"])
    with ProcessPoolExecutor(workers, context) as pool:
        for done in as_completed([pool.submit(verify_one, folder, r, manifest, rebuild) for r in records]):
            yield done.result()


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("dataset", type=Path, help="folder of token shards")
    parser.add_argument("--rebuild-index", action="store_true", help="make lost or damaged index files from the tars")
    parser.add_argument(
        "--workers", type=int, help="number of processes (default: by the cores and the size of the data)"
    )
    add_json(parser)
    arguments = parser.parse_args()
    with exit_clearly():
        folder: Path = arguments.dataset
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder")
        manifest, problems = read_manifest(folder)
        reports: list[ShardReport] = []
        rebuilt: list[str] = []
        if manifest is not None:
            records = manifest.shards
            total = sum(r.bytes for r in records)
            enough = min(len(os.sched_getaffinity(0)), total // _BYTES_PER_PROCESS)
            workers = max(1, min(arguments.workers or enough, len(records)))
            bar = tqdm(total=total, unit="B", unit_scale=True, desc=f"verify {folder.name}",
                       dynamic_ncols=True, mininterval=0.5 if sys.stderr.isatty() else 10)  # fmt: skip
            with bar:
                for report, made in verify(folder, manifest, records, workers, arguments.rebuild_index):
                    reports.append(report)
                    rebuilt += [Path(report.name).with_suffix(".idx").name] * made
                    bar.update(report.bytes)
            order = {record.name: i for i, record in enumerate(records)}
            reports.sort(key=lambda report: order[report.name])
        problems += [problem for report in reports for problem in report.problems]
        documents = sum(r.documents for r in reports)
        per_document = sum(r.index_bytes for r in reports) / max(1, documents)
        tokens = {m: sum(r.tokens.get(m, 0) for r in reports) for m in (manifest.modalities if manifest else [])}
        found: dict[str, Any] = {
            "dataset": str(folder),
            "whole": not problems,
            "problems": [asdict(problem) for problem in problems],
            "rebuilt": sorted(rebuilt),
            "shards": len(reports),
            "documents": documents,
            "tokens": tokens,
            "bytes": sum(r.bytes for r in reports),
            "index_bytes_per_document": round(per_document, 2),
            "latents_at_limit": sum(r.latents_at_limit for r in manifest.shards) if manifest else 0,
        }
        if write_json(arguments.json, found):
            for name in found["rebuilt"]:
                print(f"{name}: made again from its tar, as the manifest has it")
            for problem in problems:
                print(problem)
            counts = ", ".join(f"{n:,} {m}" for m, n in tokens.items())
            print(
                f"{folder}: {documents:,} documents in {len(reports)} shards, {counts} tokens, index of "
                f"{per_document:.1f} B a document (aim: {INDEX_BYTES}): "
                + (f"{len(problems)} problems" if problems else "all whole")
                + (f"; {found['latents_at_limit']:,} values clipped" if found["latents_at_limit"] else "")
            )
        if problems:
            sys.exit(EXIT_USER_ERROR)


if __name__ == "__main__":
    main()
