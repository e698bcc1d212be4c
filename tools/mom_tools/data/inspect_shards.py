"""Show what a token dataset holds and how its rows are packed, as one HTML page that needs no network.

    mom inspect tokens/train --output page.html --length 1024 --tokenizers tokenizers.yaml
    mom inspect --config configs/demo.yaml --output page.html
    mom inspect tokens/train --output page.html --tokenizers tokenizers.yaml --raw raw/    # beside the originals

Shows packed rows, documents chosen by hash from every kind (text, pictures and speech decoded where the tokenizers are
given), counts and lengths by modality, padding, and sources. With --raw, each picture and recording stands beside the
one that it was made from, which is found by the document's key.
"""

from __future__ import annotations

import functools
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mom_data.documents.sample import DEFAULT, Reading, Segment
from mom_data.order.forecast import first_rows, measure, tokens_of
from mom_data.order.packing import Piece
from mom_data.order.plan import Plan, hashed
from mom_data.shards.dataset import TokenDataset
from mom_data.shards.format import LATENT_BIT, TokenSegment
from mom_data.shards.verify import document_keys
from mom_tokenizers.bundle import Tokenizers
from mom_tokenizers.errors import UserError, exit_clearly, write_text
from mom_tokenizers.media.pictures import decode_image
from mom_tokenizers.media.recordings import decode_audio
from mom_tools.compare.page import picture, recordings, rendered
from mom_tools.data.originals import Found, documents_of, original
from mom_tools.data.pack_stats import configured, unconfigured
from mom_tools.options import add_packing, command_parser

_TEXT = 1200  # characters shown of a text
_IDS = 120  # ids shown where there is no tokenizer
_UNITS = 600  # units drawn of a recording
_DECODED = 4000  # the most units of a recording that are decoded; of more, as many from its beginning
_HEARD = 10.0  # seconds of a recording that the page plays
_MEASURED = 256  # sequences that the padding is measured over


@functools.lru_cache(maxsize=256)
def keys_of(location: str, shard: str) -> list[str]:
    """The keys of the documents in a local shard. A remote shard gives none, because it is not fetched only for
    that."""
    path = Path(location) / shard
    return document_keys(path) if path.is_file() else []


def stored_key(dataset: TokenDataset, shard: int, document: int) -> str | None:
    """The key of a document, or None where the shard is not on this machine."""
    keys = keys_of(dataset.location, dataset.shards[shard]["name"])
    return keys[document] if document < len(keys) else None


def name_of(dataset: TokenDataset, shard: int, document: int) -> str:
    return stored_key(dataset, shard, document) or f"{dataset.shards[shard]['name']}#{document}"


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


def shown(
    segment: TokenSegment, modality: str, tokenizers: Tokenizers | None, raw: Segment | None = None
) -> dict[str, Any]:
    """What the page shows of one segment, beside the `raw` one where that is given. Where it cannot be decoded, these
    are its ids and the reason."""
    n = len(segment.values)
    unit = "patches" if segment.latent else "tokens" if modality == "text" else "codes"
    part: dict[str, Any] = {"modality": modality, "number": segment.modality, "note": f"{n:,} {unit}", "clips": []}
    if segment.grid is not None:
        part["note"] += ", {} rows of {}".format(*segment.grid)
    if modality == "speech" and not segment.latent:
        part["units"] = [(int(u), int(u) * 137 % 360) for u in segment.values[:_UNITS]]  # hues far apart
        part["note"] = f"{n:,} units" + (f", the first {_UNITS} drawn" if n > _UNITS else "")
    decoded = None
    try:
        if tokenizers is None or modality not in tokenizers.modalities:
            raise UserError("no tokenizer given")
        tokenizer: Any = tokenizers.tokenizer(modality)
        values = segment.shaped
        if modality == "speech" and n > _DECODED:
            # Of several codebooks with a delay, only whole recordings can be decoded.
            codebooks = tokenizers.describe()[modality].get("codebooks", 1)
            values = values if codebooks > 1 else values[:_DECODED]
        decoded = tokenizer.decode(values)
        if isinstance(decoded, str):
            part["text"] = decoded[:_TEXT]
            if len(decoded) > _TEXT:
                part["note"] += f", {len(decoded) - _TEXT:,} more characters not shown"
    except ValueError as error:
        part["note"] += f" (not decoded: {error})"
        part["why"] = str(error)
        if segment.latent:
            values = segment.values.astype(np.float32)
            shape = "{} x {}".format(*values.shape)
            part["ids"] = f"latents {shape}, mean {values.mean():.3f}, deviation {values.std():.3f}"
        elif "units" not in part:
            ids = " ".join(map(str, segment.values[:_IDS].tolist()))
            part["ids"] = ids + (f" … {n - _IDS:,} more" if n > _IDS else "")
    try:
        before = None if raw is None else _read(raw, modality)
    except ValueError as error:  # such as a picture that only a newer library reads
        part["note"] += f" (original: {error})"
        before = None
    if modality == "text":
        if isinstance(before, str) and isinstance(decoded, str):
            part["note"] += ", the same as the original" if before == decoded else ", unlike the original:"
            part |= {} if before == decoded else {"original": before[:_TEXT]}
        elif isinstance(before, str):
            part["original"] = before[:_TEXT]
    elif isinstance(decoded, tuple) or isinstance(before, tuple):
        part["clips"] = _heard(before, decoded)
    elif decoded is not None or before is not None:
        part["pictures"] = _seen(before, decoded)
    return part


def _read(raw: Segment, modality: str) -> Any:
    """The text, picture, or (waveform, rate) of a raw segment. Raises ValueError for one that cannot be read."""
    if isinstance(raw.data, str):
        return raw.data
    if modality == "image":
        return decode_image(raw.data)
    if modality == "speech":
        return decode_audio(raw.data)
    raise UserError(f"{len(raw.data):,} bytes, which are not decoded here")


def _heard(before: Any, decoded: Any) -> list[dict[str, Any]]:
    """The original and the decoded recording, whichever there are, as long as the page plays them."""
    named = [(name, one) for name, one in (("original", before), ("from its tokens", decoded)) if one is not None]
    cut = [(np.asarray(waveform)[: round(_HEARD * rate)], rate) for _, (waveform, rate) in named]
    clips = []
    for (name, (waveform, rate)), clip in zip(named, recordings(cut), strict=True):
        seconds = len(waveform) / rate
        more = f", the first {_HEARD:g} s here" if seconds > _HEARD else ""
        clips.append({"name": name, "note": f"{seconds:.2f} s at {rate / 1000:g} kHz{more}", "sound": clip})
    return clips


def _seen(before: Any, decoded: Any) -> list[dict[str, Any]]:
    """The original as the tokenizer reads it, resized and cropped, and the decoded picture with its PSNR, whichever
    there are."""
    if before is None:
        return [{"name": "from its tokens", "note": "{} x {}".format(*decoded.size), "picture": picture(decoded)}]
    size = "{} x {}".format(*before.size)
    if decoded is None:
        return [{"name": "original", "note": size, "picture": picture(before)}]
    from PIL import Image

    from mom_tokenizers.image.autoencoder import fitted
    from mom_tokenizers.image.measures import psnr

    read_CHW = (fitted(before, decoded.height, decoded.width) + 1) / 2
    cropped = Image.fromarray((255 * read_CHW).round().astype(np.uint8).transpose(1, 2, 0))
    decoded_CHW = np.asarray(decoded.convert("RGB"), np.float32).transpose(2, 0, 1) / 255
    score = psnr(decoded_CHW[None], read_CHW[None])
    as_read = "" if before.size == decoded.size else ", read as {} x {}".format(*decoded.size)
    return [
        {"name": "original", "note": size + as_read, "picture": picture(cropped)},
        {"name": "from its tokens", "note": f"PSNR {score:.1f} dB", "picture": picture(decoded)},
    ]


def undecoded(documents: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each modality of which segments are shown by their ids or as figures, with the first reason."""
    parts: dict[str, list[dict[str, Any]]] = {}
    for document in documents:
        for part in document["parts"]:
            parts.setdefault(part["modality"], []).append(part)
    lines = []
    for modality, shown_parts in parts.items():
        why = [part["why"] for part in shown_parts if "why" in part]
        if why:
            lines.append(f"{modality}: {len(why)} of {len(shown_parts)} segments here are not decoded: {why[0]}.")
    return lines


def chosen_documents(
    datasets: Sequence[TokenDataset],
    chosen: Sequence[tuple[int, int, int]],
    tokenizers: Tokenizers | None,
    raw: Sequence[str] = (),
    reading: Reading = DEFAULT,
) -> tuple[list[dict[str, Any]], Found | None]:
    """What the page shows of the chosen documents, and where `raw` names files, what became of the search for their
    originals. Raises UserError where these hold the original of none."""
    keys = [stored_key(datasets[source], shard, d) for source, shard, d in chosen]
    known = [key for key in keys if key is not None]
    if raw and chosen and not known:
        raise UserError("--raw: documents are found by their keys, which are read from shards on this machine only")
    originals = documents_of(known, list(raw), reading) if raw else {}
    found = Found() if raw else None
    documents = []
    bar = tqdm(chosen, desc="documents", unit="doc", disable=not sys.stderr.isatty())
    for key, (source, shard, d) in zip(keys, bar, strict=True):
        dataset = datasets[source]
        read = dataset.read(shard, d)
        segments = [(dataset.modalities[s.modality], s) for s in read or ()]
        name = name_of(dataset, shard, d)
        before: Sequence[Segment] | None = None
        if found is not None and segments:
            candidates = originals.get(key, []) if key is not None else []
            before = original(name, segments, candidates, dataset.modalities, tokenizers, found)
        each: Sequence[Segment | None] = before or [None for _ in segments]
        parts = [shown(s, m, tokenizers, one) for (m, s), one in zip(segments, each, strict=True)]
        documents.append({"key": name, "place": f"{dataset.where(shard)}, document {d}",
                          "damaged": read is None, "parts": parts,
                          "alone": found is not None and segments and before is None})  # fmt: skip
    if found is not None and chosen and not found.beside:
        raise UserError(
            f"--raw {' '.join(raw)}: none of the {len(chosen)} documents chosen has its original there; {found}. Name "
            "the files that the shards were made from, with the --text-key and --ignore that they were read with"
        )
    return documents, found


def page(
    plan: Plan,
    tokenizers: Tokenizers | None,
    rows: int,
    documents: int,
    seed: int,
    raw: Sequence[str] = (),
    reading: Reading = DEFAULT,
) -> str:
    """The whole page as HTML. Raises ValueError where the tokenizers are not those of the shards, or the `raw` files
    not those that they were made from."""
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
    shown_documents, found = chosen_documents(datasets, census.chosen, tokenizers, raw, reading)
    if found is not None:
        print(f"originals: {found}")
    return rendered(
        Path(__file__).with_name("inspect_shards.html"),
        plan=plan,
        modalities=modalities,
        tokens=census.tokens,
        histograms={m: histogram(census.bins[m]) for m in modalities},
        sources=sources,
        measured=measured,
        rows=packed_rows(plan, rows),
        documents=shown_documents,
        found=found,
        undecoded=undecoded(shown_documents),
        tokenizers=datasets[0].tokenizers,
    )


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("dataset", nargs="*", help="folders of token shards (default: the config's data.train)")
    parser.add_argument("--output", type=Path, required=True, help="the page to write")
    parser.add_argument("--config", type=Path, help="config of a run, for row length, packing, seed and tokenizers")
    add_packing(parser, length=1024, lanes=4)
    parser.add_argument("--tokenizers", type=Path, help="tokenizers.yaml, to decode documents (default: the config's)")
    parser.add_argument("--raw", nargs="+", default=[], metavar="RAW",
                        help="the raw documents that the shards were made from, to show them beside what the tokens "
                             "bring back: tars, JSON lines, globs or folders")  # fmt: skip
    parser.add_argument("--text-key", nargs="+", default=(), metavar="KEY", help="with --raw: as for mom tokenize")
    parser.add_argument("--ignore", nargs="+", default=(), metavar="EXTENSION", help="with --raw: as for mom tokenize")
    parser.add_argument("--rows", type=int, default=24, help="packed rows to draw (default: %(default)s)")
    parser.add_argument("--documents", type=int, default=12, help="documents to show (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice of documents, and of the order")
    arguments = parser.parse_args()
    with exit_clearly():
        if min(arguments.length, arguments.lanes, arguments.window, arguments.rows, arguments.documents + 1) < 1:
            raise UserError("--length, --lanes, --window and --rows must be at least 1, --documents at least 0")
        if not arguments.raw and (arguments.text_key or arguments.ignore):
            raise UserError("--text-key and --ignore say how raw documents are read: name these with --raw")
        if arguments.raw:
            from mom_data.documents.document import expand_inputs  # late: it imports torch

            expand_inputs(arguments.raw)  # before the shards are counted, which takes long
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
        reading = Reading(tuple(arguments.text_key), frozenset(e.lower().lstrip(".") for e in arguments.ignore))
        html = page(plan, tokenizers, arguments.rows, arguments.documents, arguments.seed, arguments.raw, reading)
        write_text(arguments.output, html)
        print(f"{arguments.output}: {len(html) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
