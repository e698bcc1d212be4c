"""Compute the losses of a checkpoint on any token shards, with the code that validates during training.

    mom eval runs/demo/run --shards tokens/val
    mom eval runs/demo/run --step best --shards tokens/val tokens/other --weights ema --json figures.json
    torchrun --nproc-per-node 8 tools/eval.py RUN/checkpoints/step-1000 --shards s3://bucket/val

A set is named by its folder, and taken whole, every document once, unless --sequences says less (training validates on
the first `validation.sequences` rows of the same pass). Figures: loss by modality of the target (nats per token; of
continuous pictures the squared error per channel), bits per byte of text where the tokenizers can be had, the squared
error by quarter of the timesteps, and the losses of counting (unigram/...), which a model must beat. The same rows and
noise for every checkpoint and any number of processes.
"""

from __future__ import annotations

import mom_tokenizers  # noqa: F401  # isort: skip  # before torch: how its threads wait

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from mom_tokenizers.errors import UserError, exit_clearly
from mom_tools.compare.curves import few_targets
from mom_tools.options import add_json, add_tokenizers, command_parser
from mom_tools.output import write_json
from mom_train.config.files import validated
from mom_train.config.preflight import check_datasets, check_run, check_there
from mom_train.config.run import RunConfig

if TYPE_CHECKING:  # torch takes seconds: it comes when the arguments are known to be right
    from mom_train.baseline import Baseline
    from mom_train.checkpoint.load import Weights
    from mom_train.checkpoint.store import Checkpoint
    from mom_train.distributed.ranks import Ranks
    from mom_train.model.language_model import LanguageModel


def named(places: list[str]) -> dict[str, str]:
    """Set name -> its shards. A name is the name of the folder, with as many of the folders above it as are needed to
    tell the sets apart."""
    parts = [place.rstrip("/").split("/") for place in places]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-depth:]) for p in parts]
        if len(set(names)) == len(names):
            return dict(zip(names, places, strict=True))
    raise UserError(f"--shards: one of {', '.join(places)} is named twice")


def sharded(config: RunConfig, checkpoint: Checkpoint, weights: Weights, ranks: Ranks) -> LanguageModel:
    """The model, with its parameters divided among the ranks. All ranks must call it together."""
    from mom_train.checkpoint.load import load_weights
    from mom_train.model.language_model import build_model, set_precision
    from mom_train.model.sharding import shard

    model = build_model(config)
    set_precision(model, config, ranks.device, required=False)
    model = shard(model, ranks.mesh)
    model.to_empty(device=ranks.device)
    load_weights(model, checkpoint, weights, alone=False)
    return model


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("run", help="run directory, or a checkpoint's folder or URL")
    parser.add_argument("--shards", nargs="+", required=True, metavar="PATH", help="folders or URLs of token shards")
    parser.add_argument("--step", help="checkpoint: a number, or 'best' (default: the newest)")
    parser.add_argument(
        "--weights",
        choices=["model", "ema"],
        default="model",
        help="take the weights, or their average (default: %(default)s)",
    )
    parser.add_argument("--sequences", type=int, help="only the first so many rows of each set (default: all of them)")
    parser.add_argument("--batch", type=int, help="sequences per process and forward pass (default: the run's)")
    add_tokenizers(parser, ", for bits per byte")
    add_json(parser)
    arguments = parser.parse_args()
    with exit_clearly():
        if any(n is not None and n < 1 for n in (arguments.sequences, arguments.batch)):
            raise UserError("--sequences, --batch: at least 1")
        if arguments.step not in (None, "best") and not arguments.step.isdigit():
            raise UserError(f"--step {arguments.step}: a number, or 'best'")
        named(arguments.shards)
        check_run(arguments.run)
        check_datasets(arguments.shards)
        check_there("--tokenizers", arguments.tokenizers)
        from mom_train.distributed.ranks import process_group

        with process_group() as ranks:
            figures = evaluate(arguments, ranks)
        if ranks.main:
            write(figures, arguments.json)


def evaluate(arguments: argparse.Namespace, ranks: Ranks) -> dict[str, Any]:
    from mom_train import data
    from mom_train.checkpoint.load import find_checkpoint
    from mom_train.distributed.context import Context
    from mom_train.distributed.ranks import agreed
    from mom_train.passes import Passes
    from mom_train.validation.losses import rows_of, score

    step = arguments.step if arguments.step in (None, "best") else int(arguments.step)
    checkpoint = agreed(lambda: find_checkpoint(arguments.run, step))
    agreed(checkpoint.check)
    config = agreed(lambda: the_config(arguments, checkpoint))
    datasets = data.Datasets(config)
    plans = agreed(lambda: data.validation_plans(config, datasets))
    config = agreed(lambda: data.check(config, datasets))
    bytes_of_id = agreed(lambda: data.text_bytes(config))
    model = sharded(config, checkpoint, arguments.weights, ranks)
    context = Context.of(ranks, 1)
    passes = Passes(config, config.layout, ranks, model, context)
    at_once = config.training.micro_batch * ranks.world_size
    sets: dict[str, dict[str, Any]] = {}
    for name, plan in plans.items():
        rows, more = rows_of(plan, config.validation.sequences)
        with tqdm(total=-(-rows // at_once), desc=name, unit="pass", disable=None if ranks.main else True) as bar:

            def interrupted(bar: tqdm[Any] = bar) -> bool:
                bar.update()
                return False

            scores = score(passes, plan, rows, bytes_of_id, interrupted)
        assert scores is not None, "nothing interrupts it"
        targets = dict(zip(config.layout.modalities, scores.counts.targets_M.tolist(), strict=True))
        sets[name] = {
            "sequences": rows,
            "whole": not more,
            **scores.figures("", passes),
            **{f"targets/{m}": n for m, n in targets.items()},
            **({"targets/patches": scores.counts.patches} if config.objective.diffusion is not None else {}),
        }
    if ranks.main:  # no collective follows
        for name, losses in counted(config).items():
            sets[name] |= {f"unigram/{modality}": loss for modality, loss in losses.items()}
    return {
        "checkpoint": str(checkpoint),
        "step": checkpoint.step,
        "weights": arguments.weights,
        "sets": sets,
    }


def counted(config: RunConfig) -> Baseline:
    """The unigram baseline of each set. Where the training data of the run are not here, the result is empty and a
    message says so."""
    from mom_train.baseline import unigram

    try:
        return unigram(config)
    except UserError as error:
        print(f"no unigram baseline, which counts in the run's training data: {error}", file=sys.stderr)
        return {}


def the_config(arguments: argparse.Namespace, checkpoint: Checkpoint) -> RunConfig:
    """The config of the checkpoint, with these shards as its validation sets. Raises UserError where the checkpoint
    does not have the weights that are asked for."""
    from mom_train.checkpoint.load import check_weights

    check_weights(checkpoint, arguments.weights)
    values = checkpoint.config().model_dump(mode="json")
    values["data"]["validation"] = {name: [{"path": place}] for name, place in named(arguments.shards).items()}
    values["validation"]["sequences"] = arguments.sequences
    values["training"]["micro_batch"] = arguments.batch or values["training"]["micro_batch"]
    values["checkpoint"]["best"] = None
    values["evaluation"] = {}
    values.setdefault("parallel", {})["context_ranks"] = 1
    if arguments.tokenizers is not None:
        values["tokenizers"] = str(arguments.tokenizers)
    elif values["tokenizers"] is not None and not Path(values["tokenizers"]).exists():
        print(f"{values['tokenizers']} is not here: no bits per byte", file=sys.stderr)
        values["tokenizers"], values["sampling"] = None, {}
    return validated(values, checkpoint)


def write(figures: dict[str, Any], out: str | None) -> None:
    if not write_json(out, figures):
        return
    print(f"{figures['checkpoint']}, {figures['weights']} weights\n")
    names = list(dict.fromkeys(name for values in figures["sets"].values() for name in values))
    width = max(12, *(len(name) + 2 for name in figures["sets"]))
    print(f"{'':24}" + "".join(f"{name:>{width}}" for name in figures["sets"]))
    for name in names:
        cells = (values.get(name) for values in figures["sets"].values())
        shown = ("-" if v is None else f"{v:,}" if isinstance(v, int) else f"{v:.4f}" for v in cells)
        print(f"{name:24}" + "".join(f"{text:>{width}}" for text in shown))
    counts = {
        f"{place}/{name.removeprefix('targets/')}": n
        for place, values in figures["sets"].items()
        for name, n in values.items()
        if name.startswith("targets/")
    }
    if (warning := few_targets(counts)) is not None:
        print(f"\nWARNING: {warning}")


if __name__ == "__main__":
    main()
