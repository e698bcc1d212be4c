"""Compare named variants of a recipe over learning rates and seeds, in one process.

    python tools/dev/compare_variants.py optimizers configs/demo.yaml --rates 5e-3 1e-2 2e-2 --seeds 0 1 2 \\
        --output runs/optimizers KEY=VALUE ...
    python tools/dev/compare_variants.py stability configs/demo.yaml --output runs/stability   # only what a step costs

    optimizers   AdamW, Muon, and Muon with in_proj under AdamW. The Newton-Schulz iteration is in fp32, because few
                 processors have instructions for bf16
    stability    a mixture as it is, with model.normalise, with a z-loss, and with both; a Mixture-of-Transformers as it
                 is, with model.qk_norm, and with a z-loss

Runs with the same seed have the same data, and those whose parameters have the same shapes begin with the same weights.
Results are kept in OUTPUT/results.jsonl, and runs that it has are not made again. OUTPUT/results.md has three tables:
the held-out losses after the last step, those in total by rate, and for each variant what follows from them.

A run has diverged if its steps stayed bad, or if it ended with a higher held-out loss than it began with. It counts
with the loss it began with.

The range of usable rates of a seed is the number of octaves (factors of two) of the learning rate at which the held-out
loss in total is within --margin nats of the best one: the variant's own best at any rate, or the best of all variants
with the same plain one. Between the rates that were tried, the loss is a straight line over the logarithm of the rate.
Where the first or the last rate is usable, the range is as tried, and marked as a lower bound.

What a step costs is the CPU time of the whole process for passes, clipping and update, over that of the plain variant
in the same step. All variants take turns step by step, in an order that reverses each time. The data is read outside.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mom_tokenizers.errors import UserError, exit_clearly
from mom_tools.output import markdown_table
from mom_train.config.files import load_config
from mom_train.config.run import RunConfig
from mom_train.distributed.ranks import Ranks, process_group
from mom_train.distributed.status import Stop
from mom_train.trainer import Trainer

_UNTIMED = 3  # steps before those that are timed

Curve = dict[float, float]
"""The held-out loss in total by learning rate, of one variant and seed."""


@dataclass(frozen=True)
class Variant:
    """One of the recipes that are compared."""

    name: str
    plain: str
    """Name of the variant that it is held against, which may be itself."""
    changes: tuple[str, ...] = ()
    """Overrides of the config."""


_ADAMW = ("optimizer.kind=adamw", "optimizer.muon=null")  # whatever the config has
_MUON = ("optimizer.kind=muon",)
_TRANSFORMER = (
    *_ADAMW,
    "model.architecture=transformer",
    "model.heads=4",
    "model.decoupled=[attention, feed_forward, norm]",
)
_Z = "objective.z_loss=1e-4"  # PaLM's

SETS = {
    "optimizers": (
        Variant("AdamW", "AdamW", _ADAMW),
        Variant("Muon", "AdamW", (*_MUON, "optimizer.muon={precision: fp32}")),
        Variant("Muon, in_proj by AdamW", "AdamW", (*_MUON, "optimizer.muon={precision: fp32, exclude: [in_proj]}")),
    ),
    "stability": (
        Variant("mixture", "mixture", _ADAMW),
        Variant("mixture, normalise", "mixture", (*_ADAMW, "model.normalise=true")),
        Variant("mixture, z-loss", "mixture", (*_ADAMW, _Z)),
        Variant("mixture, normalise, z-loss", "mixture", (*_ADAMW, "model.normalise=true", _Z)),
        Variant("Transformer", "Transformer", _TRANSFORMER),
        Variant("Transformer, QK-norm", "Transformer", (*_TRANSFORMER, "model.qk_norm=true")),
        Variant("Transformer, z-loss", "Transformer", (*_TRANSFORMER, _Z)),
    ),
}


@dataclass(frozen=True)
class Result:
    """What came of one run."""

    variant: str
    rate: float
    seed: int
    losses: dict[str, float]
    """The held-out losses after the last step, in total and by modality."""
    start: float
    """The held-out loss in total before the first step."""
    diverged: bool
    skipped: int
    """Steps whose update was skipped, because their loss or gradient was not finite."""

    @property
    def loss(self) -> float:
        """The held-out loss in total; of a run that diverged the one it began with."""
        return self.start if self.diverged else self.losses["total"]


# ---- runs -------------------------------------------------------------------------------------------------


def train(config: RunConfig, ranks: Ranks, variant: str) -> Result:
    """Trains one run, and reads its result from its figures."""
    outcome, why = Trainer(config, ranks).run(Stop(None))
    if outcome not in ("finished", "failed"):  # asked to end, as a run is
        raise UserError(f"{config.run_dir}: {outcome}: {why}")
    lines = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    prefix = f"val/{next(iter(config.data.validation))}/loss/"
    end = lines[-1] if outcome == "finished" else {}
    losses = {key.removeprefix(prefix): v for key, v in end.items() if key.startswith(prefix)}
    start = lines[0][f"{prefix}total"]
    diverged = not losses.get("total", math.inf) < start
    skipped = max(int(line.get("anomaly/skipped", 0)) for line in lines)
    return Result(variant, config.optimizer.learning_rate, config.seed, losses, start, diverged, skipped)


def train_all(
    variants: Sequence[Variant], given: argparse.Namespace, ranks: Ranks, known: Sequence[Result]
) -> list[Result]:
    """Trains the runs that are not `known`, seed by seed, and adds each to OUTPUT/results.jsonl once it has ended."""
    found = list(known)
    done = {(r.variant, r.rate, r.seed) for r in known}
    for seed in given.seeds:
        for rate in given.rates:
            for variant in variants:
                if (variant.name, rate, seed) in done:
                    continue
                place = given.output / "run"
                shutil.rmtree(place, ignore_errors=True)  # left by a run that was cut short
                config = config_of(variant, given, place, f"seed={seed}", f"optimizer.learning_rate={rate}")
                begun = time.process_time()
                result = train(config, ranks, variant.name)
                with open(given.output / "results.jsonl", "a") as file:
                    file.write(json.dumps(vars(result)) + "\n")
                found.append(result)
                said = "diverged" if result.diverged else f"{result.loss:.4f}"
                took = time.process_time() - begun
                print(f"seed {seed}, rate {rate:g}, {variant.name}: {said} ({took:.1f} CPU seconds)", flush=True)
                shutil.rmtree(place)
                gc.collect()
    return found


def config_of(variant: Variant, given: argparse.Namespace, run_dir: Path, *more: str) -> RunConfig:
    """The config of a run of `variant` in `run_dir`."""
    return load_config(given.config, [*given.overrides, *variant.changes, f"run_dir={run_dir}", *more])


# ---- what a step costs ------------------------------------------------------------------------------------


def step_costs(variants: Sequence[Variant], given: argparse.Namespace, ranks: Ranks) -> dict[str, list[float]]:
    """For each variant, the CPU time of each of `given.cost_steps` steps over that of its plain variant."""
    place = given.output / "cost"
    shutil.rmtree(place, ignore_errors=True)
    trainers = {v.name: Trainer(config_of(v, given, place / str(n)), ranks) for n, v in enumerate(variants)}
    streams = {name: trainer.stream() for name, trainer in trainers.items()}
    ratios: dict[str, list[float]] = {v.name: [] for v in variants}
    stop = Stop(None)
    for n in range(_UNTIMED + given.cost_steps):
        took = {}
        for name in [*trainers][:: -1 if n % 2 else 1]:
            trainer = trainers[name]
            batches = [trainer.passes.prepared(b) for b in islice(streams[name], trainer.accumulation)]
            agreement = trainer.agree(batches, stop)
            begun = time.process_time()
            sums = trainer.passes.forward_backward(batches, agreement.counts)
            trainer.step(sums, agreement.counts, batches)
            took[name] = time.process_time() - begun
            trainer.advance(batches, agreement)
        if n >= _UNTIMED:
            for variant in variants:
                ratios[variant.name].append(took[variant.name] / took[variant.plain])
    for trainer in trainers.values():
        trainer.timeline.close()
    shutil.rmtree(place)
    return ratios


# ---- what follows -----------------------------------------------------------------------------------------


def usable(curve: Mapping[float, float], limit: float) -> tuple[float, float | None, bool]:
    """(octaves of the rate at which the loss is at most `limit`; the highest such rate, or None; whether the first or
    the last rate is one of them, so that the range may go on)."""
    rates = sorted(curve)
    octaves, highest = 0.0, None
    for low, high in pairwise(rates):
        a, b, width = curve[low], curve[high], math.log2(high / low)
        if max(a, b) <= limit:
            part = 1.0
        elif min(a, b) > limit:
            part = 0.0
        else:
            part = (limit - min(a, b)) / abs(a - b)
        octaves += part * width
        if b <= limit:
            highest = high
        elif a <= limit:
            highest = low * 2 ** (part * width)
    return octaves, highest, curve[rates[0]] <= limit or curve[rates[-1]] <= limit


def curves(results: Sequence[Result]) -> dict[str, dict[int, Curve]]:
    """The losses by rate, for each variant and seed that has been trained at every rate of the results."""
    rates = {r.rate for r in results}
    found: dict[str, dict[int, Curve]] = {}
    for r in results:
        found.setdefault(r.variant, {}).setdefault(r.seed, {})[r.rate] = r.loss
    return {name: {s: c for s, c in of.items() if c.keys() == rates} for name, of in found.items()}


def spread(values: Sequence[float], digits: int = 3) -> str:
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{deviation}"


def octave_text(ranges: Sequence[tuple[float, float | None, bool]]) -> str:
    bound = "≥ " if any(open_ended for *_, open_ended in ranges) else ""
    return bound + spread([octaves for octaves, *_ in ranges], 2)


def summary(
    variants: Sequence[Variant], results: Sequence[Result], costs: Mapping[str, Sequence[float]], margin: float
) -> str:
    """The table of what follows for each variant."""
    of_variant = curves(results)
    rows = []
    for variant in variants:
        alike = [v.name for v in variants if v.plain == variant.plain]
        own, common, best_rates = [], [], []
        mine = of_variant.get(variant.name, {})
        for seed, curve in mine.items():
            best_rates.append(min(curve, key=curve.__getitem__))
            own.append(usable(curve, min(curve.values()) + margin))
            seeds = [of_variant.get(name, {}).get(seed) for name in alike]
            if None not in seeds:
                common.append(usable(curve, min(min(c.values()) for c in seeds if c) + margin))
        highest = [rate for _, rate, _ in own if rate is not None]
        diverged = sum(r.diverged for r in results if r.variant == variant.name)
        cost = costs.get(variant.name, [])
        low, middle, high = np.percentile(cost, [25, 50, 75]) if cost else (0.0, 0.0, 0.0)
        rows.append(
            [
                variant.name,
                " ".join(f"{rate:g}" for rate in sorted(set(best_rates))),
                spread([min(c.values()) for c in mine.values()]) if mine else "",
                octave_text(own) if own else "",
                octave_text(common) if common else "",
                f"{statistics.geometric_mean(highest):.3g}" if highest else "",
                f"{diverged} of {sum(r.variant == variant.name for r in results)}",
                f"{middle:.3f} [{low:.3f}, {high:.3f}]" if cost else "",
            ]
        )
    header = ["", "best rate of a seed", "lowest loss", "octaves, own best", "octaves, common best", "usable up to"]
    return markdown_table([*header, "diverged", "step / plain"], rows)


def by_rate(variants: Sequence[Variant], results: Sequence[Result]) -> str:
    """The table of losses in total, with a column for each rate."""
    rates = sorted({r.rate for r in results})
    rows = []
    for variant in variants:
        cells = []
        for rate in rates:
            here = [r for r in results if (r.variant, r.rate) == (variant.name, rate)]
            lost = sum(r.diverged for r in here)
            cells.append(
                (spread([r.loss for r in here]) if here else "")
                + (f" ({lost} of {len(here)} diverged)" if lost else "")
            )
        rows.append([variant.name, *cells])
    return markdown_table(["", *(f"{rate:g}" for rate in rates)], rows)


def by_modality(variants: Sequence[Variant], results: Sequence[Result]) -> str:
    """The table of losses in total and by modality, with a row for each variant and rate, over runs that did not
    diverge."""
    ended = [r for r in results if not r.diverged]
    names = list(dict.fromkeys(name for r in ended for name in r.losses))
    rows = []
    for variant in variants:
        for rate in sorted({r.rate for r in ended if r.variant == variant.name}):
            here = [r for r in ended if (r.variant, r.rate) == (variant.name, rate)]
            cells = [[r.losses[name] for r in here if name in r.losses] for name in names]
            rows.append([variant.name, f"{rate:g}", str(len(here)), *(spread(c) if c else "" for c in cells)])
    return markdown_table(["", "rate", "runs", *names], rows)


def begin(variants: Sequence[Variant], given: argparse.Namespace) -> None:
    """Checks every variant's config. Raises UserError where one is wrong, or where OUTPUT was begun with others."""
    if len(set(given.seeds)) < len(given.seeds) or len(set(given.rates)) < len(given.rates):
        raise UserError("--rates and --seeds: one is named twice")
    configs = {v.name: config_of(v, given, given.output / "run") for v in variants}
    if not next(iter(configs.values())).data.validation:
        raise UserError("data.validation: name a set, whose loss after the last step is what is compared")
    settings: dict[str, Any] = {name: c.model_dump(mode="json", exclude={"seed"}) for name, c in configs.items()}
    for values in settings.values():
        del values["optimizer"]["learning_rate"]
    settings = json.loads(json.dumps(settings))
    path = given.output / "begun.json"
    if path.is_file() and json.loads(path.read_text()) != settings:
        raise UserError(f"{given.output} was begun with other settings ({path}); take another --output")
    given.output.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings, indent=1) + "\n")


def compare(given: argparse.Namespace) -> str:
    """Makes the runs that are missing. Returns the tables."""
    variants = SETS[given.set]
    begin(variants, given)
    kept = given.output / "results.jsonl"
    results = [Result(**json.loads(line)) for line in kept.read_text().splitlines()] if kept.exists() else []
    torch.set_num_threads(1)
    measured = given.output / "costs.json"
    costs: dict[str, list[float]] = json.loads(measured.read_text()) if measured.exists() else {}
    with process_group() as ranks:
        if given.cost_steps and not costs:
            costs = step_costs(variants, given, ranks)
            measured.write_text(json.dumps(costs) + "\n")
        results = train_all(variants, given, ranks, results)
    tables = [summary(variants, results, costs, given.margin)]
    if results:
        tables = [by_modality(variants, results), by_rate(variants, results), *tables]
    text = "\n\n".join(tables) + "\n"
    (given.output / "results.md").write_text(text)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=SETS, help="the variants that are compared")
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes of the config, for all runs")
    parser.add_argument(
        "--rates", nargs="+", type=float, default=[], help="learning rates; none measures only the cost"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--output", type=Path, required=True, help="folder for results; goes on where it was begun")
    parser.add_argument("--margin", type=float, default=0.1, help="nats within which a rate is usable (%(default)s)")
    parser.add_argument("--cost-steps", type=int, default=40, help="timed steps of each variant (%(default)s)")
    given = parser.parse_intermixed_args()
    with exit_clearly():
        print(compare(given), end="")


if __name__ == "__main__":
    main()
