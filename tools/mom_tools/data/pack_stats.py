"""Predict from the index of a dataset how it will be packed: padding, cut documents, the mixture, epochs.

    mom pack-stats configs/demo.yaml data.sequence_length=1024
    mom pack-stats --data tokens/books tokens/captions --length 4096

Only indices are read. The figures are exactly those of the run's first sequences; the table beside them shows
the same data packed in other ways. A warning follows where padding is above 2 %, or
where a run repeats a source more than four times.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mom_data.order.forecast import predict
from mom_data.order.plan import Plan, Source
from mom_data.shards.dataset import TokenDataset
from mom_tokenizers.errors import UserError, exit_clearly
from mom_tools.options import add_json, add_packing, command_parser
from mom_tools.output import write_json


def text(found: dict[str, Any]) -> str:
    """The figures as a text for people."""
    total = sum(found["tokens"].values())
    mixture = ", ".join(f"{m} {100 * n / total:.1f} %" for m, n in found["tokens"].items())
    lines = [f"first {found['sequences']:,} sequences of {found['length']:,} positions: {mixture} of {total:,} tokens"]
    if found["run_tokens"] is not None:
        lines[0] += f"; the run takes {found['run_tokens']:,}, and sees its " + ", its ".join(
            f"{modality} {n:.1f} times" for modality, n in found["epochs"].items()
        )
    lines += ["", f"{'packing':<12}{'window':>8}{'cut spans':>11}{'padding %':>11}{'split %':>9}{'documents/row':>15}"]
    for way, mark in [(found, "  <- configured"), *((a, "") for a in found["alternatives"])]:
        lines.append(
            f"{way['packing']:<12}{way['window']:>8,}{'yes' if way['cut_spans'] else 'no':>11}"
            f"{way['padding_percent']:>11.2f}{way['documents_split_percent']:>9.1f}{way['documents_per_row']:>15.2f}{mark}"
        )
    lines += ["", f"{'documents':>12}{'tokens/epoch':>16}{'share %':>9}{'wanted %':>10}{'epochs':>8}  source"]
    for s in found["sources"]:
        epochs = "" if s["epochs"] is None else f"{s['epochs']:.2f}"
        lines.append(
            f"{s['documents']:>12,}{s['tokens_per_epoch']:>16,}{s['share_percent']:>9.2f}{s['wanted_percent']:>10.2f}"
            f"{epochs:>8}  {s['path']}"
        )
    return "\n".join(lines + [f"warning: {w}" for w in found["warnings"]])


def configured(config: Path, overrides: Sequence[str]) -> tuple[Plan, int]:
    """(the training plan of a run's config, the number of sequences that the run takes)."""
    from mom_train.config.files import load_config  # here, for these import torch
    from mom_train.data import Datasets, training_plan

    run = load_config(config, overrides)
    plan, _ = training_plan(run, Datasets(run))
    return plan, run.training.sequences_before(run.training.steps)


def unconfigured(folders: Sequence[str], arguments: argparse.Namespace) -> Plan:
    """A plan over whole folders of token shards, with the options of `add_packing` and --seed."""
    sources = tuple(Source(TokenDataset(folder), 1.0) for folder in folders)
    return Plan(sources, arguments.length, arguments.lanes, arguments.window, arguments.seed)


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("config", nargs="*", metavar="CONFIG key=value", help="a run's config, and overrides of it")
    parser.add_argument("--data", nargs="+", metavar="FOLDER", help="token shards, in place of a config")
    add_packing(parser, length=4096, lanes=16)
    parser.add_argument("--seed", type=int, default=0, help="seed of the order, with --data (%(default)s)")
    parser.add_argument("--sequences", type=int, default=2048, help="rows to plan (default: %(default)s)")
    add_json(parser)
    arguments = parser.parse_intermixed_args()
    with exit_clearly():
        if bool(arguments.config) == bool(arguments.data):
            raise UserError("give either a CONFIG, or --data FOLDER ... and --length")
        if min(arguments.sequences, arguments.length, arguments.lanes, arguments.window) < 1:
            raise UserError("--sequences, --length, --lanes and --window must be at least 1")
        if arguments.config:
            plan, run_sequences = configured(Path(arguments.config[0]), arguments.config[1:])
        else:
            plan, run_sequences = unconfigured(arguments.data, arguments), None
        found = predict(plan, arguments.sequences, run_sequences)
        if write_json(arguments.json, found):
            print(text(found))


if __name__ == "__main__":
    main()
