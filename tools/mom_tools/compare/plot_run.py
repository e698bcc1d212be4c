"""Draw the curves of one or more runs: training and validation loss by modality.

    mom plot runs/demo/run [RUN ...] --out curves.png [--x steps|tokens|flops]

A RUN/unigram.json, where there is one, is drawn as the baseline.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from mom_tokenizers.errors import UserError, exit_clearly
from mom_tools.compare.curves import AXES, WINDOW, Run, smoothed
from mom_tools.options import command_parser
from mom_train.baseline import read_baseline


def draw(axes: Axes, run: Run, modality: str, axis: str, colour: str, label: str) -> None:
    for name in (n for n in run.names if n.rpartition("/")[2] == modality):
        x, y = run.over(name, axis)
        if name.startswith("val/"):
            title = f"{label}validation, {name.split('/')[1]}"
            axes.plot(x, y, "o-", color=colour, markersize=4, linewidth=1, label=title)
        else:
            axes.plot(x, y, color=colour, alpha=0.2, linewidth=0.8)
            axes.plot(x, smoothed(x, y, WINDOW), color=colour, linewidth=1.6, label=f"{label}training (smoothed)")
    for name, losses in read_baseline(run.path).items():
        if modality in losses:
            axes.axhline(losses[modality], color=colour, linestyle=":", linewidth=1.2, label=f"{label}unigram, {name}")


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run directories")
    parser.add_argument("--out", type=Path, required=True, help="the picture: .png, .svg or .pdf")
    parser.add_argument("--x", choices=AXES, default="tokens", help="horizontal axis (default: %(default)s)")
    arguments = parser.parse_args()
    with exit_clearly():
        runs = [Run(path) for path in arguments.runs]
        names = [name.rpartition("/")[2] for run in runs for name in run.names]
        modalities = [m for m in dict.fromkeys(names) if m != "total"]
        if not modalities:
            raise UserError(f"{', '.join(map(str, arguments.runs))}: no losses logged yet")
        figure, grid = plt.subplots(1, len(modalities), figsize=(4.6 * len(modalities), 3.8), squeeze=False)
        colours = plt.rcParams["axes.prop_cycle"].by_key()["color"]
        for axes, modality in zip(grid[0], modalities, strict=True):
            for i, run in enumerate(runs):
                label = f"{run.path.name}: " if len(runs) > 1 else ""
                draw(axes, run, modality, arguments.x, colours[i % len(colours)], label)
            axes.set(title=modality, xlabel=AXES[arguments.x], ylabel="loss (nats per token)")
            axes.grid(alpha=0.25)
            axes.legend(fontsize=7)
        figure.tight_layout()
        figure.savefig(arguments.out, dpi=130)


if __name__ == "__main__":
    main()
