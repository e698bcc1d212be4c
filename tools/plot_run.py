"""The curves of one or more runs as a picture: loss by modality, training and validation, over tokens seen.

    python tools/plot_run.py runs/demo/run [RUN ...] --out curves.png

A RUN/unigram.json, where there is one, is drawn as the baseline.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from mom_data.errors import exit_clearly
from mom_train.metrics import read_metrics

_SMOOTHING = 0.9  # of the exponential average that is drawn over the raw training loss


def smooth(values: list[float], weight: float = _SMOOTHING) -> list[float]:
    """Exponential moving average, corrected for its start."""
    averages, total, norm = [], 0.0, 0.0
    for value in values:
        total = weight * total + (1 - weight) * value
        norm = weight * norm + (1 - weight)
        averages.append(total / norm)
    return averages


def _tokens(line: dict[str, float]) -> float:
    return sum(n for name, n in line.items() if name.startswith("tokens/")) / 1e6


def draw(axes: Axes, run: Path, modality: str, colour: str, label: str) -> None:
    lines = read_metrics(run)
    points = [(_tokens(line), line[f"loss/{modality}"]) for line in lines if f"loss/{modality}" in line]
    if points:
        x, y = zip(*points, strict=True)
        axes.plot(x, y, color=colour, alpha=0.2, linewidth=0.8)
        axes.plot(x, smooth(list(y)), color=colour, linewidth=1.6, label=f"{label}training (smoothed)")
    sets = sorted({n.split("/")[1] for line in lines for n in line if n.startswith("val/") and n.endswith(modality)})
    for name in sets:
        key = f"val/{name}/loss/{modality}"
        x, y = zip(*[(_tokens(line), line[key]) for line in lines if key in line], strict=True)
        axes.plot(x, y, "o-", color=colour, markersize=4, linewidth=1, label=f"{label}validation, {name}")
    baseline = run / "unigram.json"
    if baseline.exists() and modality in (losses := json.loads(baseline.read_text())):
        axes.axhline(losses[modality], color=colour, linestyle=":", linewidth=1.2, label=f"{label}unigram baseline")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run directories")
    parser.add_argument("--out", type=Path, required=True, help="the picture: .png, .svg or .pdf")
    arguments = parser.parse_args()
    with exit_clearly("plot_run"):
        for run in arguments.runs:
            if not (run / "metrics.jsonl").is_file():
                raise ValueError(f"{run}: no metrics.jsonl, so not a run directory (or one that has not begun)")
        names = [n for run in arguments.runs for line in read_metrics(run) for n in line if n.startswith("loss/")]
        modalities = [m for m in dict.fromkeys(n.removeprefix("loss/") for n in names) if m != "total"]
        figure, grid = plt.subplots(1, len(modalities), figsize=(4.6 * len(modalities), 3.8), squeeze=False)
        colours = plt.rcParams["axes.prop_cycle"].by_key()["color"]
        for axes, modality in zip(grid[0], modalities, strict=True):
            for i, run in enumerate(arguments.runs):
                label = f"{run.name}: " if len(arguments.runs) > 1 else ""
                draw(axes, run, modality, colours[i % len(colours)], label)
            axes.set(title=modality, xlabel="tokens seen (millions, all modalities)", ylabel="loss (nats per token)")
            axes.grid(alpha=0.25)
            axes.legend(fontsize=7)
        figure.tight_layout()
        figure.savefig(arguments.out, dpi=130)


if __name__ == "__main__":
    main()
