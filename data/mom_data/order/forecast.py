"""Forecasts what a run will see of its data, from the indices alone: padding, cut documents, the mixture of sources,
and how often each modality is repeated.

`predict` computes all figures, for tools/pack_stats.py. `remarks` computes only the warnings, cheaply enough to be
called at the start of every run.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from tqdm import tqdm

from mom_data.order.packing import Piece, assembled_lengths
from mom_data.order.plan import Lane, Packing, Plan
from mom_data.shards.dataset import TokenDataset
from mom_data.shards.format import LATENT_BIT
from mom_tokenizers.errors import UserError

PADDING_LIMIT = 2.0  # percent of padding above which there is a warning
EPOCHS_LIMIT = 4.0  # passes over the same data above which there is a warning
FEW_TARGETS = 2000
"""With fewer targets a mean loss says little. The losses of tokens have a standard deviation of about 2 nats, so the
standard error of their mean is 2 / sqrt(2000) = 0.045 nats, more than most changes of a model improve."""
_REMARK_ROWS, _REMARK_LANES = 256, 4  # planning these takes a fraction of a second
_BRACKETS = 2  # the tokens around a span that is not text; a document also has BOS and EOS
_WINDOWS = (256, 1024, 4096)


def first_rows(plan: Plan, sequences: int, lanes: int | None = None) -> Iterator[list[Piece]]:
    """The first `sequences` rows of a plan, in order. Where `lanes` is given, only rows of its first lanes."""
    lanes = min(lanes or plan.lanes, plan.lanes)
    opened = [Lane(plan, number) for number in range(min(lanes, sequences))]
    for i in range(sequences):
        yield next(opened[i % lanes])


def tokens_of(plan: Plan, piece: Piece) -> tuple[Counter[str], int]:
    """(input tokens of a piece by modality, length of its whole document). BOS, EOS and brackets count as text."""
    dataset = plan.sources[piece.source].dataset
    counts: Counter[str] = Counter()
    at = 1
    for n, modality, _ in zip(*dataset.index(piece.shard).segments(piece.document), strict=True):
        if modality:
            inside = min(at + 1 + n, piece.end) - max(at + 1, piece.start)
            counts[dataset.modalities[modality]] += max(0, inside)
        at += n + _BRACKETS * (modality != 0)
    counts[dataset.modalities[0]] += piece.end - piece.start - counts.total()
    return counts, at + 1


def measure(plan: Plan, sequences: int, lanes: int | None = None) -> dict[str, Any]:
    """Figures of the plan's first `sequences` rows, or of the same number of rows of its first `lanes` lanes.

    documents_split_percent is the share of the documents beginning in these rows that are cut. Tokens by modality are
    input tokens, as in `PackedBatch.real_tokens`.
    """
    tokens: Counter[str] = Counter()
    by_source = [0] * len(plan.sources)
    pieces = begun = split = 0
    whole_pieces: Counter[int] = Counter()  # length -> number of pieces of this length that must not be cut
    for row in first_rows(plan, sequences, lanes):
        pieces += len(row)
        for piece in row:
            counts, length = tokens_of(plan, piece)
            tokens += counts
            by_source[piece.source] += piece.end - piece.start
            begun += piece.start == 0
            split += piece.start == 0 and piece.end < length
            if not piece.divisible:
                whole_pieces[piece.end - piece.start] += 1
    real, positions = tokens.total(), sequences * plan.length
    return {
        "packing": plan.packing,
        "window": plan.window,
        "cut_spans": plan.cut_spans,
        "length": plan.length,
        "sequences": sequences,
        "padding_percent": 100 * (1 - real / positions),
        "documents_split_percent": 100 * split / max(1, begun),
        "documents_per_row": pieces / sequences,
        "tokens": {m: tokens[m] for m in dict.fromkeys(m for s in plan.sources for m in s.dataset.modalities)},
        "source_tokens": by_source,
        "indivisible_length": _median(whole_pieces),
    }


def _median(counts: Counter[int]) -> int | None:
    ordered = sorted(counts.elements())
    return ordered[len(ordered) // 2] if ordered else None


def scan(dataset: TokenDataset, length: int) -> dict[str, Any]:
    """The contents of one epoch of a source, and the pictures of latents too long for a row of `length` positions."""
    documents = tokens = too_long = largest = 0
    spans = False
    bar = tqdm(range(len(dataset.shards)), desc=f"index of {dataset.location}", unit="shard", leave=False,
               disable=not sys.stderr.isatty())  # fmt: skip
    for shard in bar:
        index = dataset.index(shard)
        modality, lengths = index.segment_modality, index.segment_length.astype(np.int64)
        documents += len(index.segment_start) - 1
        tokens += int(assembled_lengths(index.segment_start, index.segment_length, modality).sum())
        latent = lengths[modality >= LATENT_BIT] + _BRACKETS
        too_long += int((latent > length).sum())
        largest = max(largest, int(latent.max(initial=0)))
        spans |= bool(((modality > 0) & (modality < LATENT_BIT)).any())
    return {"documents": documents, "tokens": tokens, "too_long": too_long, "largest": largest, "spans": spans}


def predict(plan: Plan, sequences: int, run_sequences: int | None = None) -> dict[str, Any]:
    """All figures of a plan, measured on its first `sequences` rows. The figures about epochs need `run_sequences`, the
    number of sequences of the whole run, and are None without it.

    Raises UserError where a picture of latents is longer than a row.
    """
    active = [(k, s) for k, s in enumerate(plan.sources) if s.weight]
    scans = {k: scan(s.dataset, plan.length) for k, s in active}
    for k, source in active:
        if n := scans[k]["too_long"]:
            raise UserError(
                f"{source.dataset.location}: {n} pictures of latents never fit a row of {plan.length} positions, and "
                f"latents are not cut; the largest takes {scans[k]['largest']}. Raise data.sequence_length to that, or "
                "tokenize again with smaller pictures"
            )
    found = measure(plan, sequences)
    given, weights = found.pop("source_tokens"), sum(s.weight for _, s in active)
    indivisible = found.pop("indivisible_length")
    real = sum(given)
    run_tokens = None if run_sequences is None else run_sequences * real / sequences
    found["sources"] = [
        {
            "path": source.dataset.location,
            "documents": scans[k]["documents"],
            "tokens_per_epoch": scans[k]["tokens"],
            "wanted_percent": 100 * source.weight / weights,
            "share_percent": 100 * given[k] / real,
            "epochs": None if run_tokens is None else run_tokens * given[k] / real / scans[k]["tokens"],
        }
        for k, source in active
    ]
    found["run_tokens"] = None if run_tokens is None else round(run_tokens)
    found["epochs"] = None if run_sequences is None else epochs_by_modality(plan, found, run_sequences)
    spans = any(s["spans"] for s in scans.values())
    found["alternatives"] = alternatives(plan, sequences, spans)
    found["warnings"] = list(warnings(found, plan.length, indivisible))
    return found


def alternatives(plan: Plan, sequences: int, spans: bool) -> list[dict[str, Any]]:
    """Figures of the same sources packed in other ways. Cutting spans is tried too, where `spans` says that there are
    spans which may be cut."""
    ways: list[tuple[Packing, int, bool]] = [("best_fit", window, plan.cut_spans) for window in _WINDOWS]
    ways += [("concatenate", plan.window, plan.cut_spans)]
    if spans:
        ways += [("best_fit", plan.window, not plan.cut_spans), ("concatenate", plan.window, not plan.cut_spans)]
    wanted = ("packing", "window", "cut_spans", "padding_percent", "documents_split_percent", "documents_per_row")
    rows = []
    for packing, window, cut_spans in dict.fromkeys(ways):
        if (packing, window, cut_spans) != (plan.packing, plan.window, plan.cut_spans):
            measured = measure(replace(plan, packing=packing, window=window, cut_spans=cut_spans), sequences)
            rows.append({name: measured[name] for name in wanted})
    return rows


def warnings(found: dict[str, Any], length: int, indivisible: int | None) -> Iterator[str]:
    """Sentences that say what the user should change before the run, and how."""
    if (padding := found["padding_percent"]) > PADDING_LIMIT:
        reason = "documents are few, or the window is small"
        remedies = []
        if indivisible is not None and indivisible > length // 8:
            fit = length // indivisible
            share = 100 * found["tokens"].get("text", 0) / max(1, sum(found["tokens"].values()))
            reason = (
                f"half of the pieces that must stay whole take {indivisible} positions or more; {fit} such in a row "
                f"leave {length - fit * indivisible} of {length} free, and text, {share:.0f} % of the tokens, is too "
                "little to fill that"
            )
            longer = -(-(fit + 1) * indivisible // 64) * 64
            remedies = ["mix in more text", f"try data.sequence_length={longer}"]
        best = min(found["alternatives"], key=lambda a: a["padding_percent"], default=None)
        if best is not None and best["padding_percent"] < padding / 2:
            remedies.append(
                f"data.packing={best['packing']} data.pack_window={best['window']} "
                f"data.cut_spans={str(best['cut_spans']).lower()} would leave {best['padding_percent']:.2f} %"
            )
        advice = f" Remedies: {'; '.join(remedies)}." if remedies else ""
        yield f"padding is {padding:.1f} %, above {PADDING_LIMIT:g} %: {reason}.{advice}"
    for source in found["sources"]:
        if (source["epochs"] or 0) > EPOCHS_LIMIT:
            yield (
                f"{source['path']} is seen {source['epochs']:.1f} times, above {EPOCHS_LIMIT:g}: lower its weight, "
                "train fewer steps, or find more of it"
            )


def epochs_by_modality(plan: Plan, found: Mapping[str, Any], sequences: int) -> dict[str, float]:
    """How many times a run of `sequences` rows reads all tokens of each modality. `found` are the figures of `measure`.

    A modality that the sources do not contain is left out. BOS, EOS and brackets count as text.
    """
    datasets = [s.dataset for s in plan.sources if s.weight]
    share = sequences / found["sequences"]
    held: Counter[str] = Counter()
    for dataset in datasets:
        for shard in dataset.shards:
            held.update(shard["tokens"])
            held[dataset.modalities[0]] += 2 * shard["documents"]
    return {m: share * n / held[m] for m, n in found["tokens"].items() if held[m]}


def remarks(plan: Plan, sequences: int, validation: Mapping[str, Plan], limit: int | None) -> tuple[str, list[str]]:
    """(a line that says what a run of `sequences` rows does with its data, warnings about it).

    There are warnings about padding, about modalities that are repeated often, and about validation sets with few
    tokens of a modality, of which `limit` rows are used (None for all). Only the indices of a few lanes are read. For
    raw sources, which are tokenized while the run trains, no counts are known, and both results are empty.
    """
    if any("tokens" not in shard for s in plan.sources for shard in s.dataset.shards):
        return "", []
    found = measure(plan, min(_REMARK_ROWS, sequences), _REMARK_LANES)
    epochs = epochs_by_modality(plan, found, sequences)
    padding = found["padding_percent"]
    real = sequences * plan.length * (1 - padding / 100)
    line = f"data: {real:,.0f} tokens, {padding:.1f} % padding; the run sees its " + ", its ".join(
        f"{modality} {n:.1f} times" for modality, n in epochs.items()
    )
    said = []
    if padding > PADDING_LIMIT:
        said.append(
            f"padding is {padding:.1f} %, above {PADDING_LIMIT:g} %: tools/pack_stats.py says why and what helps"
        )
    said += [
        f"{modality} is seen {n:.1f} times, above {EPOCHS_LIMIT:g}: give its sources less weight, train fewer steps, "
        "or find more of it"
        for modality, n in epochs.items()
        if n > EPOCHS_LIMIT
    ]
    for name, held_out in validation.items():
        shards = [shard for s in held_out.sources for shard in s.dataset.shards]
        if not all("tokens" in shard for shard in shards):
            continue
        tokens: Counter[str] = Counter()
        for shard in shards:
            tokens.update(shard["tokens"])
        counted = 1.0 if limit is None else min(1.0, limit * held_out.length / max(1, tokens.total()))
        few = {m: round(n * counted) for m, n in tokens.items() if 0 < n * counted < FEW_TARGETS}
        if few:
            said.append(
                f"validation set '{name}' counts about "
                + ", ".join(f"{n:,} tokens of {modality}" for modality, n in few.items())
                + f": below {FEW_TARGETS:,}, its loss changes by chance alone. Hold more documents out"
                + (", or raise validation.sequences" if counted < 1 else "")
            )
    return line, said
