"""Compare AdamW, Muon, and Muon with in_proj under AdamW, at several learning rates and seeds, in one process.

    python tools/dev/compare_optimizers.py configs/demo.yaml --rates 2.5e-3 5e-3 1e-2 --seeds 3 KEY=VALUE ...

Every run has the same model and, with the same seed, the same weights and data. Printed is a table with, for each
optimiser and rate, the validation loss after the last step as mean and standard deviation over seeds, and the seconds
of a step over those of AdamW at the same rate and seed, as the median over steps and then over seeds. The Newton-Schulz
iteration is in fp32, because few processors have instructions for bf16.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import torch

from mom_tools.output import markdown_table
from mom_train.config.files import load_config
from mom_train.config.run import RunConfig
from mom_train.distributed.ranks import Ranks, process_group
from mom_train.distributed.status import Stop
from mom_train.trainer import Trainer

KINDS = {
    "AdamW": [],
    "Muon": ["optimizer.kind=muon", "optimizer.muon={precision: fp32}"],
    "Muon, in_proj by AdamW": ["optimizer.kind=muon", "optimizer.muon={precision: fp32, exclude: [in_proj]}"],
}


def train(config: RunConfig, ranks: Ranks) -> tuple[dict[str, float], float]:
    """The validation losses after the last step, by name, and the median number of tokens per second."""
    stop = Stop(None)
    outcome, why = Trainer(config, ranks).run(stop)
    if outcome != "finished":  # asked to end, as a run is
        raise SystemExit(f"{config.run_dir}: {outcome}: {why}")
    lines = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    speeds = [line["perf/tokens_per_s"] for line in lines if "perf/tokens_per_s" in line]
    losses = {key.rsplit("/", 1)[1]: v for key, v in lines[-1].items() if key.startswith("val/") and "/loss/" in key}
    return losses, statistics.median(speeds)


def spread(values: list[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{deviation}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--rates", nargs="+", type=float, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    losses: dict[tuple[str, float], list[dict[str, float]]] = {}
    costs: dict[tuple[str, float], list[float]] = {}
    with process_group() as ranks, tempfile.TemporaryDirectory() as folder:
        for seed in range(given.seeds):
            for rate in given.rates:
                adamw = 0.0
                for kind, options in KINDS.items():
                    place = Path(folder) / f"{seed}-{rate}-{kind.replace(' ', '-')}"
                    ours = [f"run_dir={place}", f"seed={seed}", f"optimizer.learning_rate={rate}", *options]
                    found, speed = train(load_config(given.config, [*given.overrides, *ours]), ranks)
                    adamw = adamw or speed
                    losses.setdefault((kind, rate), []).append(found)
                    costs.setdefault((kind, rate), []).append(adamw / speed)
                    print(f"{kind}, rate {rate}, seed {seed}: {found}, step {adamw / speed:.2f} of AdamW's", flush=True)
    names = list(next(iter(losses.values()))[0])
    rows = [
        [
            kind,
            f"{rate:g}",
            *(spread([f[name] for f in found]) for name in names),
            f"{statistics.median(costs[kind, rate]):.2f}",
        ]
        for (kind, rate), found in sorted(losses.items(), key=lambda item: ([*KINDS].index(item[0][0]), item[0][1]))
    ]
    print(markdown_table(["", "rate", *names, "step / AdamW's"], rows))


if __name__ == "__main__":
    main()
