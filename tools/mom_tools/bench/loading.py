"""Time how fast documents become batches, beside other readers of the same documents.

    mom bench-data --synthetic transfusion
    mom bench-data --data TOKENS [TOKENS ...] --json bench.json

A core-second is a second of CPU time, user and system, of every process involved, starting the workers included; each
figure is the best of --repeats. Files are in the page cache. Tokens are the input tokens of documents (a latent patch
is one): ours with BOS, EOS and brackets and without padding, the peers' as stored. MB are 10^6 bytes of the documents'
stored tokens and latents; for a plan, which reads none, of those it plans for.
"""

from __future__ import annotations

import mom_tokenizers  # noqa: F401  # isort: skip  # before torch: how its threads wait

import gc
import json
import multiprocessing
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy
import torch
import webdataset

from mom_data.batches.batch import build_batch
from mom_data.batches.loader import Share, batches
from mom_data.order.packing import Piece
from mom_data.order.plan import Lane, Plan, Source
from mom_data.shards.dataset import TokenDataset
from mom_data.shards.format import ShardWriter, TokenSegment, write_manifest
from mom_tokenizers.errors import UserError, exit_clearly
from mom_tokenizers.vocab import VocabLayout
from mom_tools.options import add_json, command_parser
from mom_tools.output import write_json

SIZES = {"text": 32000, "image": 8192, "speech": 500}
KINDS = ("text", "transfusion", "chameleon")

LITDATA = """
import json, sys, time
import litdata, numpy as np
payload, offsets, folder = sys.argv[1:4]
data, at = np.fromfile(payload, np.uint8), np.load(offsets)
def sample(i):
    return {"document": data[at[i]:at[i + 1]].tobytes()}
if __name__ == "__main__":
    litdata.optimize(sample, list(range(len(at) - 1)), folder, num_workers=1, chunk_bytes="64MB", start_method="fork")
    best = None
    for _ in range(int(sys.argv[4])):
        cpu, wall = time.process_time(), time.perf_counter()
        n = sum(len(s["document"]) for s in litdata.StreamingDataset(folder, shuffle=False))
        took = time.process_time() - cpu, time.perf_counter() - wall
        best = min(best or took, took)
    assert n == len(data), (n, len(data))
    print(json.dumps({"cpu": best[0], "wall": best[1]}))
"""


class Measured(NamedTuple):
    """A row of the table: the CPU seconds and clock seconds that a number of tokens and bytes took."""

    name: str
    tokens: int
    bytes: int
    cpu: float
    wall: float
    worker_rss: int = 0

    def figures(self) -> dict[str, Any]:
        return self._asdict() | {
            "tokens_per_core_second": self.tokens / self.cpu,
            "mb_per_core_second": self.bytes / self.cpu / 1e6,
            "tokens_per_second": self.tokens / self.wall,
        }


def synthetic_document(kind: str, rng: np.random.Generator) -> list[TokenSegment]:
    """Lengths as guessed for real corpora: log-normal text of median 500 tokens; half of the mixed kinds is text, then
    captions with a picture, interleaved pages with 1 to 8, and for Chameleon speech of 4 to 15 s at 25 units/s."""

    def codes(modality: str, n: int) -> TokenSegment:
        number = list(SIZES).index(modality)
        return TokenSegment(number, rng.integers(0, SIZES[modality], n, dtype=np.uint16))

    def text(median: int, sigma: float) -> TokenSegment:
        return codes("text", int(np.clip(rng.lognormal(np.log(median), sigma), 1, 60_000)))

    def picture() -> TokenSegment:
        if kind == "chameleon":
            return codes("image", 1024)
        return TokenSegment(1, rng.standard_normal((256, 16), dtype=np.float32).astype(np.float16))

    x = rng.random()
    if kind == "text" or x < 0.5:
        return [text(500, 1.1)]
    if x < 0.8:
        return [text(30, 0.5), picture()] if rng.random() < 0.5 else [picture(), text(30, 0.5)]
    if kind == "chameleon" and x > 0.9:
        return [text(40, 0.5), codes("speech", int(rng.uniform(4, 15) * 25))]
    return [s for _ in range(rng.integers(1, 9)) for s in (text(60, 0.8), picture())]


def write_synthetic(folder: Path, kind: str, tokens: int, shards: int = 4) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    records = []
    for k in range(shards):
        with ShardWriter(folder / f"{kind}-{k:05d}.tar", list(SIZES)) as writer:
            while sum(writer.counts.values()) < tokens / shards:
                writer.add(f"{k}-{writer.documents}", synthetic_document(kind, rng))
        records.append(writer.record())
    made_by: dict[str, dict[str, Any]] = {
        m: {"kind": "synthetic", "fingerprint": m, "size": size} for m, size in SIZES.items()
    }
    if kind == "transfusion":
        made_by["image"] |= {"patch_width": 16, "latent_scale": 1.0, "latent_shift": 0.0}
    write_manifest(folder, records, made_by, np.uint16, {})


def best_of(repeats: int, run: Callable[[], None]) -> tuple[float, float]:
    """Least (CPU, clock) seconds of the process and of children that ended meanwhile."""

    def now() -> tuple[float, float]:
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return time.process_time() + children.ru_utime + children.ru_stime, time.perf_counter()

    took = []
    for _ in range(repeats):
        gc.collect()
        cpu, wall = now()
        run()
        after = now()
        took.append((after[0] - cpu, after[1] - wall))
    return min(took)


class Corpus:
    """Datasets, mixed by their sizes, and one epoch of them at most `tokens` long."""

    def __init__(self, folders: Sequence[Path], length: int, rows: int, tokens: int):
        self.datasets = [TokenDataset(folder) for folder in folders]
        self.folders, self.length, self.rows = folders, length, rows
        known: dict[str, int] = {}
        for dataset in self.datasets:
            for modality, made_by in dataset.tokenizers.items():
                known[modality] = max(known.get(modality, 0), made_by["size"])
        self.vocab = VocabLayout(known)
        sizes = [sum(dataset.manifest["tokens"].values()) for dataset in self.datasets]
        self.sources = tuple(Source(d, float(n)) for d, n in zip(self.datasets, sizes, strict=True))
        self.batches = max(1, min(tokens, sum(sizes)) // (length * rows))

    def plan(self) -> Plan:
        return Plan(self.sources, length=self.length, lanes=self.rows, window=1024, seed=0)

    def planned(self) -> list[list[list[Piece]]]:
        plan = self.plan()
        lanes = [Lane(plan, i) for i in range(self.rows)]
        return [[next(lane) for lane in lanes] for _ in range(self.batches)]

    def payload(self, documents: Sequence[tuple[int, int, int]]) -> tuple[int, int]:
        """Stored tokens and latents, and their bytes, of some (source, shard, document)."""
        tokens = size = 0
        for source, shard, document in documents:
            dataset = self.datasets[source]
            for n, latent in zip(*dataset.index(shard).segments(document)[::2], strict=True):
                tokens += n
                size += n * (2 * dataset.manifest["latent_width"] if latent else dataset.token_dtype.itemsize)
        return tokens, size


def ours(corpus: Corpus, repeats: int, workers: Sequence[int]) -> Iterator[Measured]:
    planned = corpus.planned()
    pieces = [piece for rows in planned for row in rows for piece in row]
    documents = list(dict.fromkeys((p.source, p.shard, p.document) for p in pieces))
    stored, size = corpus.payload(documents)

    def assemble(planned: list[list[list[Piece]]]) -> int:
        real = 0
        for step, rows in enumerate(planned):
            first = step * corpus.rows
            sequences = range(first, first + corpus.rows)
            batch = build_batch(rows, corpus.sources, corpus.vocab, corpus.length, sequences)
            assert not batch.damaged, batch.damaged
            real += int(batch.real_tokens.sum())
        return real

    def read() -> None:
        for source, shard, document in documents:
            assert corpus.datasets[source].read(shard, document) is not None

    real = assemble(planned)
    yield Measured("plan alone", real, size, *best_of(repeats, lambda: void(corpus.planned())))
    yield Measured("read alone, in the plan's order", stored, size, *best_of(repeats, read))
    cpu, wall = best_of(repeats, lambda: void(assemble(corpus.planned())))
    yield Measured("plan + read + assemble", real, size, cpu, wall)

    share = Share(rank=0, world_size=1, batch=corpus.rows, micro_batch=corpus.rows)
    for number in workers:
        rss = 0

        def stream(number: int = number) -> None:
            nonlocal rss
            made = batches(corpus.plan(), corpus.vocab, share, workers=number)
            got = sum(int(b.real_tokens.sum()) for b in islice(made, corpus.batches))
            assert got == real, (got, real)
            rss = max([rss, *(peak_rss(child.pid) for child in multiprocessing.active_children() if child.pid)])

        cpu, wall = best_of(repeats, stream)
        yield Measured(f"end to end, {number} loader workers", real, size, cpu, wall, rss)


def void(_: object) -> None:
    """A consumer that drops every item."""


def peak_rss(pid: int) -> int:
    """The most bytes of memory that a process has held, including the pages that it shares with its parent."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def peers(corpus: Corpus, folder: Path, repeats: int, litdata_python: str | None) -> Iterator[Measured]:
    """Other readers of the same documents; none of them shuffles, packs, masks or checks anything."""
    shards = [(k, n) for k, dataset in enumerate(corpus.datasets) for n in range(len(dataset.shards))]
    every = [(k, n, d) for k, n in shards for d in range(corpus.datasets[k].shards[n]["documents"])]
    limit, documents, total = corpus.batches * corpus.rows * corpus.length, [], 0
    for key in np.random.default_rng(0).permutation(len(every)).tolist():
        if total >= limit:
            break
        documents.append(every[key])
        total += corpus.payload([every[key]])[0]
    stored, size = corpus.payload(documents)

    (folder / "members").mkdir()
    token_file, bytes_file, offsets = folder / "tokens.bin", folder / "documents.bin", [0]
    pattern = str(folder / "members" / "%05d.tar")
    with (
        open(token_file, "wb") as tokens,
        open(bytes_file, "wb") as payload,
        webdataset.ShardWriter(pattern, maxsize=256 << 20, verbose=0) as writer,
    ):
        for i, (k, shard, document) in enumerate(documents):
            segments = corpus.datasets[k].read(shard, document)
            assert segments is not None
            arrays = {f"{j:03d}": np.ascontiguousarray(s.values) for j, s in enumerate(segments)}
            writer.write({"__key__": f"{i:08d}", "safetensors": safetensors.numpy.save(arrays)})
            for s in segments:
                payload.write(s.values.tobytes())
                tokens.write(s.values.astype(np.uint16).tobytes() if not s.latent else bytes(2 * len(s.values)))
            offsets.append(payload.tell())

    def tars(urls: list[str]) -> int:
        seen = 0
        for sample in webdataset.WebDataset(urls, shardshuffle=False, empty_check=False):
            arrays = safetensors.numpy.load(sample["safetensors"])
            table = arrays.get("segments")
            seen += sum(map(len, arrays.values())) if table is None else int(table[:, 1].sum())
        return seen

    blocks = [str(corpus.folders[k] / corpus.datasets[k].shards[n]["name"]) for k, n in shards]
    in_blocks = corpus.payload(every)
    assert tars(blocks) == in_blocks[0]
    yield Measured("webdataset, our blocks in order", *in_blocks, *best_of(repeats, lambda: void(tars(blocks))))
    members = sorted(str(p) for p in (folder / "members").glob("*.tar"))
    assert tars(members) == stored
    took = best_of(repeats, lambda: void(tars(members)))
    yield Measured("webdataset, a document per member", stored, size, *took)

    def memmap() -> None:
        rng = np.random.default_rng(0)
        data = np.memmap(token_file, np.uint16, "r")
        for _ in range(corpus.batches):
            at = rng.integers(0, len(data) - corpus.length - 1, corpus.rows).tolist()
            for shift in (0, 1):  # inputs and labels
                rows = [data[i + shift : i + shift + corpus.length].astype(np.int64) for i in at]
                torch.stack([torch.from_numpy(row) for row in rows])

    if stored > corpus.length + 1:
        yield Measured("memmap of uint16, random windows", limit, 2 * limit, *best_of(repeats, memmap))
    if litdata_python:
        np.save(folder / "offsets.npy", np.array(offsets))
        (folder / "read_litdata.py").write_text(LITDATA)
        command = [litdata_python, folder / "read_litdata.py", bytes_file, folder / "offsets.npy", folder / "lit"]
        done = subprocess.run([*map(str, command), str(repeats)], capture_output=True, text=True, timeout=600)
        if done.returncode:
            raise UserError(f"{litdata_python} could not run litdata:\n{done.stderr[-1500:]}")
        took_there = json.loads(done.stdout.splitlines()[-1])
        name = "litdata, a document's bytes per sample"
        yield Measured(name, stored, size, took_there["cpu"], took_there["wall"])


def sizes(corpus: Corpus) -> dict[str, float]:
    """Bytes that the format needs in addition to the stored tokens and latents."""
    keys = [(k, n) for k, d in enumerate(corpus.datasets) for n in range(len(d.shards))]
    tar = sum(s["bytes"] for d in corpus.datasets for s in d.shards)
    paths = [(corpus.folders[k] / corpus.datasets[k].shards[n]["name"]).with_suffix(".idx") for k, n in keys]
    documents = [(k, n, d) for k, n in keys for d in range(corpus.datasets[k].shards[n]["documents"])]
    tokens, payload = corpus.payload(documents)
    return {
        "documents": len(documents),
        "tokens": tokens,
        "tar_overhead_percent": 100 * (tar / payload - 1),
        "index_bytes_per_document": sum(p.stat().st_size for p in paths) / len(documents),
    }


def report(name: str, format_: dict[str, float], rows: Sequence[Measured]) -> str:
    lines = [
        f"{name}: {format_['documents']:,.0f} documents, {format_['tokens'] / 1e6:.1f} M stored tokens; the tars are "
        f"{format_['tar_overhead_percent']:.2f} % larger than their payload, the index has "
        f"{format_['index_bytes_per_document']:.1f} bytes a document",
        "",
        "| | M tokens / core-second | MB / core-second | M tokens / s | MB memory per worker |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        f = row.figures()
        rates = f"{f['tokens_per_core_second'] / 1e6:.1f} | {f['mb_per_core_second']:.0f}"
        rss = f"{row.worker_rss / 1e6:.0f}" if row.worker_rss else ""
        lines.append(f"| {row.name} | {rates} | {f['tokens_per_second'] / 1e6:.1f} | {rss} |")
    return "\n".join(lines)


def main() -> None:
    parser = command_parser(__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--data", nargs="+", type=Path, metavar="FOLDER", help="folders of token shards, on this machine"
    )
    source.add_argument("--synthetic", choices=KINDS, help="a corpus of random ids, made for the occasion")
    parser.add_argument("--tokens", type=float, default=8e6, help="about how many tokens to read (default 8e6)")
    parser.add_argument("--length", type=int, default=4096, help="positions of a row (default 4096)")
    parser.add_argument("--rows", type=int, default=4, help="rows of a batch (default 4)")
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 1, 2], help="loader workers (default 0 1 2)")
    parser.add_argument("--repeats", type=int, default=3, help="how often each reader is measured (default 3)")
    parser.add_argument("--litdata-python", metavar="PATH", help="a Python that has litdata, to measure it as well")
    add_json(parser)
    arguments = parser.parse_args()
    with exit_clearly(), tempfile.TemporaryDirectory() as scratch:
        for name in ("tokens", "length", "rows", "repeats"):
            if getattr(arguments, name) < 1:
                raise UserError(f"--{name} must be at least 1")
        torch.set_num_threads(1)
        folders = arguments.data or [Path(scratch) / "synthetic"]
        if arguments.synthetic:
            write_synthetic(folders[0], arguments.synthetic, int(arguments.tokens))
        corpus = Corpus(folders, arguments.length, arguments.rows, int(arguments.tokens))
        measured = []
        for row in chain(
            ours(corpus, arguments.repeats, arguments.workers),
            peers(corpus, Path(scratch), arguments.repeats, arguments.litdata_python),
        ):
            print(f"{row.name}: {row.tokens / row.cpu / 1e6:.1f} M tokens per core-second", file=sys.stderr)
            measured.append(row)
        name = arguments.synthetic or ", ".join(map(str, folders))
        figures = {"data": name, "format": sizes(corpus), "measured": [row.figures() for row in measured]}
        if write_json(arguments.json, figures, indent=2):
            print(report(name, sizes(corpus), measured))


if __name__ == "__main__":
    main()
