"""Evaluate a checkpoint by likelihood: retrieval, conditional gains, and minimal pairs, on any token shards.

    mom evaluate runs/demo/run --shards tokens/val
    mom evaluate runs/demo/run --shards tokens/val --minimal-pairs tokens/swuggy --pairs 512 --pool 32 --json out.json
    torchrun --nproc-per-node 8 -m mom_tools evaluate RUN/checkpoints/step-1000 --shards s3://bucket/val

Retrieval: of --pool pictures, is that of a text likeliest after it, and the reverse? Chance stands beside it, and the
same for shuffled pairs, which must be at chance. Gains: the loss of a picture or recording without and with its text
before it. Minimal pairs: is an utterance likelier than itself with its parts in another order, or than its counterpart
in shards of --minimal-pairs? Intervals are of 95 %, by bootstrap over queries, pairs or clips. What the figures mean
and how they are computed: docs/how-to/evaluate.md.
"""

from __future__ import annotations

import mom_tokenizers  # noqa: F401  # isort: skip  # before torch: how its threads wait

import argparse
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from mom_tokenizers.errors import UserError, exit_clearly
from mom_tools.model.eval import named, sharded, the_config
from mom_tools.model.scores import interval
from mom_tools.options import add_json, command_parser
from mom_tools.output import markdown_table, write_json
from mom_train.config.evaluation import EvaluationConfig
from mom_train.config.files import checked
from mom_train.config.preflight import check_datasets, check_run

if TYPE_CHECKING:  # torch takes seconds
    from mom_train.distributed.ranks import Ranks
    from mom_train.validation.evaluations import Figure


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("run", help="run directory, or a checkpoint's folder or URL")
    parser.add_argument("--shards", nargs="+", default=[], metavar="PATH", help="folders or URLs of token shards")
    parser.add_argument(
        "--minimal-pairs", nargs="+", default=[], metavar="PATH",
        help="token shards whose documents are two recordings, the right one and then the altered one",
    )  # fmt: skip
    parser.add_argument("--pairs", type=int, default=256, help="most documents of each kind (default: %(default)s)")
    parser.add_argument("--pool", type=int, default=32, help="candidates of a query (default: %(default)s)")
    parser.add_argument(
        "--draws", type=int, default=8, help="draws of noise for a continuous picture (default: %(default)s)"
    )
    parser.add_argument("--step", help="checkpoint: a number, or 'best' (default: the newest)")
    parser.add_argument("--weights", choices=["model", "ema"], default="model", help="the weights, or their average")
    parser.add_argument("--batch", type=int, help="rows of full length per process and pass (default: the run's)")
    add_json(parser)
    arguments = parser.parse_args()
    with exit_clearly():
        if not arguments.shards and not arguments.minimal_pairs:
            raise UserError("give --shards or --minimal-pairs")
        settings = checked(EvaluationConfig, {name: getattr(arguments, name) for name in ("pairs", "pool", "draws")})
        if arguments.batch is not None and arguments.batch < 1:
            raise UserError("--batch: at least 1")
        if arguments.step not in (None, "best") and not arguments.step.isdigit():
            raise UserError(f"--step {arguments.step}: a number, or 'best'")
        named([*arguments.shards, *arguments.minimal_pairs])
        check_run(arguments.run)
        check_datasets([*arguments.shards, *arguments.minimal_pairs])
        from mom_train.distributed.ranks import process_group

        with process_group() as ranks:
            figures = evaluate(arguments, settings, ranks)
        if ranks.main and write_json(arguments.json, figures):
            print(as_text(figures))


def evaluate(arguments: argparse.Namespace, settings: EvaluationConfig, ranks: Ranks) -> dict[str, Any]:
    from mom_train import data
    from mom_train.checkpoint.load import find_checkpoint
    from mom_train.distributed.context import Context
    from mom_train.distributed.ranks import agreed
    from mom_train.passes import Passes
    from mom_train.validation.evaluations import Evaluations

    step = arguments.step if arguments.step in (None, "best") else int(arguments.step)
    checkpoint = agreed(lambda: find_checkpoint(arguments.run, step))
    agreed(checkpoint.check)
    arguments.sequences, arguments.tokenizers = None, None
    given, arguments.shards = arguments.shards, [*arguments.shards, *arguments.minimal_pairs]
    config = agreed(lambda: the_config(arguments, checkpoint))
    datasets = data.Datasets(config)
    opened = {
        name: [source.dataset for source in datasets.sources(entries)]
        for name, entries in config.data.validation.items()
    }
    config = agreed(lambda: data.check(config, datasets))
    names = named(arguments.shards)
    sets = {name: some for name, some in opened.items() if names[name] in given}
    minimal = {name: some for name, some in opened.items() if names[name] not in given}
    model = sharded(config, checkpoint, arguments.weights, ranks)
    passes = Passes(config, config.layout, ranks, model, Context.of(ranks, 1))
    found = agreed(lambda: Evaluations(settings, passes, sets, minimal, control=True))
    if ranks.main:
        for note in found.notes:
            print(f"NOTE: {note}", file=sys.stderr)
    with tqdm(desc="rounds of forward passes", unit="", disable=None if ranks.main else True) as bar:

        def never() -> bool:
            bar.update()
            return False

        figures = found.figures(never)
    assert figures is not None, "nothing interrupts it"
    return {
        "checkpoint": str(checkpoint),
        "step": checkpoint.step,
        "weights": arguments.weights,
        **settings.model_dump(include={"pairs", "pool", "draws"}),
        "notes": found.notes,
        "sets": {place: {name: described(one) for name, one in of.items()} for place, of in figures.items()},
    }


def described(figure: Figure) -> dict[str, Any]:
    """The figure with its interval, as JSON values."""
    values, counts = np.asarray(figure.values, np.float64), np.asarray(figure.counts, np.float64)
    same = bool((values == values[0] * counts / counts[0]).all())  # a bootstrap of equal values has no width
    return {
        "value": figure.value,
        "interval": [figure.value, figure.value] if same else interval(values, counts),
        "chance": figure.chance,
        "n": len(values),
    }


def as_text(figures: dict[str, Any]) -> str:
    """A Markdown table for each set."""
    lines = [f"{figures['checkpoint']}, {figures['weights']} weights"]
    for place, of in figures["sets"].items():
        rows = []
        for name, one in of.items():
            ends = "-" if one["interval"] is None else "{:.3f} to {:.3f}".format(*one["interval"])
            chance = "-" if one["chance"] is None else f"{one['chance']:.3f}"
            rows.append([name, f"{one['value']:.4f}", ends, chance, f"{one['n']:,}"])
        table = markdown_table([place, "value", "95 % interval", "chance", "n"], rows)
        lines += ["", table]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
