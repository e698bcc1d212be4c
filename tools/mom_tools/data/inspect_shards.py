"""Show what a token dataset holds and how its rows are packed, as one HTML page that needs no network.

    mom inspect tokens/train --output page.html --length 1024 --tokenizers tokenizers.yaml
    mom inspect --config configs/demo.yaml --output page.html

Shows packed rows, documents chosen by hash from every kind (text, pictures and speech decoded where the tokenizers are
given), counts and lengths by modality, padding, and sources.
"""

from __future__ import annotations

import base64
import functools
import io
import json
import sys
import wave
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from tqdm import tqdm

from mom_data.order.forecast import first_rows, measure, tokens_of
from mom_data.order.packing import Piece
from mom_data.order.plan import Plan, hashed
from mom_data.shards.dataset import TokenDataset
from mom_data.shards.format import LATENT_BIT, TokenSegment
from mom_data.shards.verify import document_keys
from mom_tokenizers.bundle import Tokenizers
from mom_tokenizers.errors import UserError, exit_clearly, write_text
from mom_tools.data.pack_stats import configured, unconfigured
from mom_tools.options import add_packing, command_parser

COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#9467bd", "#8c564b", "#e377c2")  # matplotlib's cycle; text first
_TEXT = 1200  # characters shown of a text
_IDS = 120  # ids shown where there is no tokenizer
_UNITS = 600  # units drawn of a recording
_HEARD = 200  # units made into sound: 8 s of them at the usual 25 a second
_MEASURED = 256  # sequences that the padding is measured over


@functools.lru_cache(maxsize=256)
def keys_of(location: str, shard: str) -> list[str]:
    """The keys of the documents in a local shard. A remote shard gives none, because it is not fetched only for
    that."""
    path = Path(location) / shard
    return document_keys(path) if path.is_file() else []


def name_of(dataset: TokenDataset, shard: int, document: int) -> str:
    file = dataset.shards[shard]["name"]
    keys = keys_of(dataset.location, file)
    return keys[document] if document < len(keys) else f"{file}#{document}"


def bars(plan: Plan, piece: Piece) -> list[tuple[int, int]]:
    """(modality number, positions) of the runs of one modality within a piece, in order."""
    dataset = plan.sources[piece.source].dataset
    runs = [(0, 1)]  # BOS
    for n, modality, _ in zip(*dataset.index(piece.shard).segments(piece.document), strict=True):
        runs += [(modality, n)] if modality == 0 else [(0, 1), (modality, n), (0, 1)]
    runs.append((0, 1))
    merged: list[tuple[int, int]] = []
    at = 0
    for modality, n in runs:
        inside = min(at + n, piece.end) - max(at, piece.start)
        at += n
        if inside > 0 and merged and merged[-1][0] == modality:
            merged[-1] = modality, merged[-1][1] + inside
        elif inside > 0:
            merged.append((modality, inside))
    return merged


def packed_rows(plan: Plan, count: int) -> list[dict[str, Any]]:
    rows = []
    for number, row in enumerate(first_rows(plan, count)):
        pieces: list[dict[str, Any]] = []
        for piece in row:
            dataset = plan.sources[piece.source].dataset
            counts, length = tokens_of(plan, piece)
            size = piece.end - piece.start
            part = "" if size == length else f", positions {piece.start:,} to {piece.end:,} of {length:,}"
            mixture = ", ".join(f"{n:,} {m}" for m, n in counts.items() if n)
            name = name_of(dataset, piece.shard, piece.document)
            pieces.append({"key": name, "size": size, "note": f"{size:,} tokens ({mixture}){part}",
                           "bars": bars(plan, piece)})  # fmt: skip
        used = sum(p["size"] for p in pieces)
        rows.append({"number": number, "pieces": pieces, "padding": plan.length - used})
    return rows


class Census:
    """Counts from one pass over the indices: tokens and lengths by modality, and a few documents of every kind, chosen
    by hash.

    A kind is a source and the set of modalities in the document.
    """

    def __init__(self, datasets: Sequence[TokenDataset], documents: int, seed: int):
        self.tokens: Counter[str] = Counter()
        self.bins: dict[str, Counter[int]] = {}  # modality -> floor(log2(tokens in a document)) -> documents
        best: dict[tuple[int, int], list[tuple[int, int, int]]] = {}  # kind -> (hash, shard, document)
        for number, dataset in enumerate(datasets):
            for shard in range(len(dataset.shards)):
                index = dataset.index(shard)
                starts = index.segment_start.astype(np.int64)
                modality = index.segment_modality & ~np.uint8(LATENT_BIT)
                kinds = np.zeros(len(starts) - 1, np.int64)
                for m, name in enumerate(dataset.modalities):
                    mine = np.r_[0, np.where(modality == m, index.segment_length.astype(np.int64), 0).cumsum()]
                    lengths = np.diff(mine[starts])
                    self.tokens[name] += int(mine[-1])
                    held = lengths[lengths > 0]
                    counts = np.bincount(np.log2(held).astype(int)) if len(held) else ()
                    self.bins.setdefault(name, Counter()).update({k: int(n) for k, n in enumerate(counts)})
                    kinds |= (lengths > 0).astype(np.int64) << m
                order = hashed(len(kinds), "inspect", seed, number, shard)
                for kind in np.unique(kinds).tolist():
                    where = np.flatnonzero(kinds == kind)
                    first = where[np.argsort(order[where], kind="stable")[:documents]].tolist()
                    merged = best.get((number, kind), []) + [(int(order[d]), shard, d) for d in first]
                    best[number, kind] = sorted(merged)[:documents]
        queues = [[(key[0], shard, d) for _, shard, d in best[key]] for key in sorted(best)]
        chosen = [queue[i] for i in range(documents) for queue in queues if i < len(queue)]
        self.chosen = sorted(chosen[:documents])


def histogram(bins: Counter[int]) -> list[dict[str, Any]]:
    """The columns of a histogram over powers of two: label (the lower bound), count, height in percent."""
    top, tallest = max((k for k, n in bins.items() if n), default=-1), max(bins.values(), default=0)
    labels = [str(1 << k) if k < 10 else f"{1 << (k - 10)}k" for k in range(top + 1)]
    return [{"label": label, "count": bins[k], "height": 100 * bins[k] / tallest} for k, label in enumerate(labels)]


def as_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def png(image: Any) -> str:
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return as_uri("image/png", file.getvalue())


def sound(waveform: np.ndarray, rate: int) -> dict[str, Any]:
    """A WAV that the page can play, and the outline of its samples."""
    kept = np.clip(waveform, -1, 1)
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes((kept * 32767).astype("<i2").tobytes())
    columns = np.array_split(kept, min(300, len(kept)))
    loudest = max(1e-9, float(np.abs(kept).max()))
    upper, lower = ([float(f(c)) / loudest for c in columns] for f in (np.max, np.min))
    points = [f"{x},{20 - 19 * y:.1f}" for x, y in enumerate(upper)]
    points += [f"{x},{20 - 19 * y:.1f}" for x, y in reversed(list(enumerate(lower)))]
    return {"wav": as_uri("audio/wav", file.getvalue()), "outline": " ".join(points), "columns": len(columns),
            "seconds": len(kept) / rate}  # fmt: skip


def shown(segment: TokenSegment, modality: str, tokenizers: Tokenizers | None) -> dict[str, Any]:
    """What the page shows of one segment. Where it cannot be decoded, these are its ids and the reason."""
    n = len(segment.values)
    unit = "patches" if segment.latent else "tokens" if modality == "text" else "codes"
    part: dict[str, Any] = {"modality": modality, "number": segment.modality, "note": f"{n:,} {unit}"}
    if segment.grid is not None:
        part["note"] += ", {} rows of {}".format(*segment.grid)
    if modality == "speech" and not segment.latent:
        part["units"] = [(int(u), int(u) * 137 % 360) for u in segment.values[:_UNITS]]  # hues far apart
        part["note"] = f"{n:,} units" + (f", the first {_UNITS} drawn" if n > _UNITS else "")
    try:
        if tokenizers is None or modality not in tokenizers.modalities:
            raise UserError("no tokenizer given")
        speech = modality == "speech"
        decoded = tokenizers.tokenizer(modality).decode(segment.values[:_HEARD] if speech else segment.shaped)
        if modality == "text":
            part["text"] = decoded[:_TEXT]
            if len(decoded) > _TEXT:
                part["note"] += f", {len(decoded) - _TEXT:,} more characters not shown"
        elif isinstance(decoded, tuple):
            part["sound"] = sound(*decoded)
            part["note"] += f"; to hear: {min(n, _HEARD)} of them, {part['sound']['seconds']:.1f} s, as decoded"
        else:
            part["png"] = png(decoded)
    except ValueError as error:
        part["note"] += f" (not decoded: {error})"
        if segment.latent:
            values = segment.values.astype(np.float32)
            shape = "{} x {}".format(*values.shape)
            part["ids"] = f"latents {shape}, mean {values.mean():.3f}, deviation {values.std():.3f}"
        elif "units" not in part:
            ids = " ".join(map(str, segment.values[:_IDS].tolist()))
            part["ids"] = ids + (f" … {n - _IDS:,} more" if n > _IDS else "")
    return part


def chosen_documents(
    datasets: Sequence[TokenDataset], chosen: Sequence[tuple[int, int, int]], tokenizers: Tokenizers | None
) -> list[dict[str, Any]]:
    documents = []
    for source, shard, d in tqdm(chosen, desc="documents", unit="doc", disable=not sys.stderr.isatty()):
        dataset = datasets[source]
        segments = dataset.read(shard, d)
        parts = [shown(s, dataset.modalities[s.modality], tokenizers) for s in segments or ()]
        documents.append({"key": name_of(dataset, shard, d), "place": f"{dataset.where(shard)}, document {d}",
                          "damaged": segments is None, "parts": parts})  # fmt: skip
    return documents


def page(plan: Plan, tokenizers: Tokenizers | None, rows: int, documents: int, seed: int) -> str:
    """The whole page as HTML. Raises ValueError where the tokenizers are not those of the shards."""
    datasets = [s.dataset for s in plan.sources]
    modalities = list(dict.fromkeys(m for d in datasets for m in d.modalities))
    described = tokenizers.describe() if tokenizers is not None else {}
    for dataset in datasets:
        if dataset.modalities != modalities:
            raise UserError(f"{dataset.location} has modalities {dataset.modalities}, others have {modalities}")
        for modality, made_by in dataset.tokenizers.items():
            given = described.get(modality)
            if given is not None and given["fingerprint"] != made_by["fingerprint"]:
                raise UserError(
                    f"{dataset.location}: its {modality} was made with tokenizer {made_by['fingerprint']}, the one "
                    f"given is {given['fingerprint']}, which would show nonsense. Give --tokenizers of the dataset."
                )
    census = Census(datasets, documents, seed)
    measured = measure(plan, max(rows, _MEASURED))
    weights, given = sum(s.weight for s in plan.sources), sum(measured["source_tokens"])
    sources = [
        {"path": s.dataset.location, "manifest": s.dataset.manifest, "fingerprint": s.dataset.fingerprint,
         "shards": len(s.dataset.shards), "bytes": sum(x["bytes"] for x in s.dataset.shards),
         "documents": sum(x["documents"] for x in s.dataset.shards), "wanted": 100 * s.weight / weights,
         "share": 100 * n / given}
        for s, n in zip(plan.sources, measured["source_tokens"], strict=True)
    ]  # fmt: skip
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    return environment.get_template("inspect_shards.html").render(
        plan=plan,
        modalities=modalities,
        colours=[COLOURS[i % len(COLOURS)] for i in range(len(modalities))],
        tokens=census.tokens,
        histograms={m: histogram(census.bins[m]) for m in modalities},
        sources=sources,
        measured=measured,
        rows=packed_rows(plan, rows),
        documents=chosen_documents(datasets, census.chosen, tokenizers),
        tokenizers=datasets[0].tokenizers,
    )


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("dataset", nargs="*", help="folders of token shards (default: the config's data.train)")
    parser.add_argument("--output", type=Path, required=True, help="the page to write")
    parser.add_argument("--config", type=Path, help="config of a run, for row length, packing, seed and tokenizers")
    add_packing(parser, length=1024, lanes=4)
    parser.add_argument("--tokenizers", type=Path, help="tokenizers.yaml, to decode documents (default: the config's)")
    parser.add_argument("--rows", type=int, default=24, help="packed rows to draw (default: %(default)s)")
    parser.add_argument("--documents", type=int, default=12, help="documents to show (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice of documents, and of the order")
    arguments = parser.parse_args()
    with exit_clearly():
        if min(arguments.length, arguments.lanes, arguments.window, arguments.rows, arguments.documents + 1) < 1:
            raise UserError("--length, --lanes, --window and --rows must be at least 1, --documents at least 0")
        path: Path | None = arguments.tokenizers
        if arguments.config is not None:
            from mom_train.config.files import load_config

            folders = json.dumps([{"path": d} for d in arguments.dataset])
            overrides = [f"data.train={folders}"] if arguments.dataset else []
            plan, _ = configured(arguments.config, overrides)
            path = path or load_config(arguments.config, overrides).tokenizers
        elif arguments.dataset:
            plan = unconfigured(arguments.dataset, arguments)
        else:
            raise UserError("give a DATASET folder, or --config with data.train")
        tokenizers = Tokenizers.load(path) if path is not None else None
        html = page(plan, tokenizers, arguments.rows, arguments.documents, arguments.seed)
        write_text(arguments.output, html)
        print(f"{arguments.output}: {len(html) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
