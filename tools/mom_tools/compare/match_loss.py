"""Compare the runs of two models: which loss each reaches for how many FLOPs, by modality and validation set.

    mom match-loss --baseline runs/dense-0 runs/dense-1 --candidate runs/mixture-0 runs/mixture-1 \\
        --json matched.json --plot matched.png --paper 7:37M

Gain: (baseline's final loss - candidate's) / baseline's. FLOPs to match: the candidate's when it first reaches the
baseline's final loss, over the baseline's at its end. Training losses are means over the last 10 % of the FLOPs spent
so far (--window); validation losses are as logged; between points the loss is linear in log FLOPs. Several runs
(seeds) a side give 95 % intervals. docs/explanation/judging.md says what they mean.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from mom_tokenizers.errors import exit_clearly, write_text
from mom_tools.compare.curves import WINDOW, Comparison, Interval, Model, Run, compare, few_targets, first_reach, unlike
from mom_tools.compare.published import Published, select
from mom_tools.options import add_json, command_parser
from mom_tools.output import markdown_table, write_json

GREY, ORANGE = "#6b7280", "#e07b00"


def as_json(found: Mapping[str, Comparison], published: Sequence[Published] = ()) -> dict[str, dict[str, object]]:
    """Loss name -> figures. Where rows of the paper were asked for, they are under `published`."""
    return {
        name: asdict(result)
        | ({"published": [asdict(p) for p in published if p.belongs_to(name)]} if published else {})
        for name, result in found.items()
    }


def percent(value: float | None, interval: Interval, sign: bool = False) -> str:
    if value is None:
        return "never"
    text = f"{value:+.2f}" if sign else f"{value:.1f}"
    if interval is None:
        return text
    return (
        f"{text} [{interval[0]:+.2f}, {interval[1]:+.2f}]" if sign else f"{text} [{interval[0]:.1f}, {interval[1]:.1f}]"
    )


def label(row: Published) -> str:
    """The validation set to which a published figure belongs."""
    return "" if row.metric == "training" else f" ({row.metric})"


def cells(name: str, result: Comparison, published: Sequence[Published] = ()) -> list[str]:
    """One row of the table as text: loss, baseline, candidate, gain, FLOPs, and the paper's gain and FLOPs."""
    row = [name, f"{result.baseline_loss:.4f}", f"{result.candidate_loss:.4f}"]
    row += [percent(result.gain_percent, result.gain_interval, sign=True)]
    row += [percent(result.relative_flops_percent, result.relative_flops_interval)]
    beside = [p for p in published if p.belongs_to(name)]
    row += [", ".join(f"{p.gain_percent:+.2f}{label(p)}" for p in beside)]
    return [*row, ", ".join(f"{p.relative_flops_percent:.1f}" for p in beside if p.relative_flops_percent is not None)]


HEADER = ["loss", "baseline", "candidate", "gain, %", "FLOPs to match, %", "paper: gain, %", "paper: FLOPs, %"]


def as_markdown(found: Mapping[str, Comparison], published: Sequence[Published] = ()) -> str:
    rows = [cells(name, result, published) for name, result in found.items()]
    width = len(HEADER) if published else len(HEADER) - 2
    return markdown_table(HEADER[:width], [row[:width] for row in rows]) + "\n"


def as_csv(found: Mapping[str, Comparison]) -> str:
    out = io.StringIO()
    names = ["loss", "baseline_loss", "candidate_loss", "gain_percent", "gain_low", "gain_high"]
    names += [
        "relative_flops_percent",
        "relative_flops_low",
        "relative_flops_high",
        "baseline_flops",
        "candidate_flops",
    ]
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*names, "baseline_runs", "candidate_runs", "interval_from"])
    for name, x in found.items():
        gain, flops = x.gain_interval or (None, None), x.relative_flops_interval or (None, None)
        writer.writerow(
            [name, x.baseline_loss, x.candidate_loss, x.gain_percent, *gain, x.relative_flops_percent, *flops,
             x.baseline_flops, x.candidate_flops, *x.runs, x.interval_from]
        )  # fmt: skip
    return out.getvalue()


def notes(found: Mapping[str, Comparison], window: float) -> str:
    """What the reader must know about the table: how losses were smoothed, and where intervals come from."""
    first = next(iter(found.values()))
    sources = {x.interval_from for x in found.values()}
    said = [f"Training losses: means over the last {100 * window:g} % of the FLOPs spent. Validation: as logged."]
    if "pairs" in sources:
        said.append(f"Brackets: 95 %, from {first.runs[0]} pairs of seeds.")
    elif "seeds" in sources:
        said.append(f"Brackets: 95 %, from {first.runs[0]} and {first.runs[1]} seeds, not paired.")
    elif "blocks" in sources:
        said.append("Brackets: 95 %, over blocks of the last training losses of one run; another seed may differ more.")
    else:
        said.append("No intervals: they need several seeds, or longer curves.")
    if any(x.relative_flops_percent is None for x in found.values()):
        said.append("never: the candidate does not reach the baseline's final loss.")
    early = [f"{name} {x.baseline_reach_percent:.0f} %" for name, x in found.items() if x.baseline_reach_percent < 97]
    if early:
        said.append(
            "The baseline itself first has its final loss after less than all of its FLOPs, because its curve is noisy "
            f"or rises: {', '.join(early)}. FLOPs to match say something only where they are well below that."
        )
    ratio = first.candidate_flops / first.baseline_flops
    if abs(ratio - 1) > 0.01:
        said.append(f"The candidate was trained for {100 * ratio:.1f} % of the baseline's FLOPs.")
    return " ".join(said)


def draw(sides: Mapping[str, Sequence[Run]], names: Sequence[str], window: float, out: Path) -> None:
    """Draw the paper's two figures for every loss of `sides`, the baseline first. One has the curves over FLOPs. The
    other shows where the candidate reaches the lowest loss of the baseline so far, in percent of the FLOPs of the
    baseline; below the diagonal it reaches it earlier."""
    kinds = list(dict.fromkeys(name.rpartition("/")[0] for name in names))  # a pair of rows: training, or one set
    modalities = list(dict.fromkeys(name.rpartition("/")[2] for name in names))
    size = (3.6 * len(modalities), 5.6 * len(kinds))
    figure, grid = plt.subplots(2 * len(kinds), len(modalities), figsize=size, squeeze=False)
    for row, kind in enumerate(kinds):
        for column, modality in enumerate(modalities):
            above, below = grid[2 * row : 2 * row + 2, column]
            if f"{kind}/{modality}" in names:
                _draw_one(above, below, sides, f"{kind}/{modality}", window)
            else:
                above.set_axis_off()
                below.set_axis_off()
    figure.tight_layout()
    figure.savefig(out, dpi=110)
    plt.close(figure)


def _draw_one(above: Axes, below: Axes, sides: Mapping[str, Sequence[Run]], name: str, window: float) -> None:
    models = [Model.of(runs, name, window) for runs in sides.values()]
    first, second = sides
    shown = []
    for model, colour, side in zip(models, (GREY, ORANGE), sides, strict=True):
        seeds = len(model.loss_RG)
        for loss in model.loss_RG if seeds > 1 else ():
            above.plot(model.flops_G, loss, color=colour, alpha=0.3, linewidth=0.7)
        title = f"{side}, {seeds} seeds" if seeds > 1 else side
        marker = "o" if name.startswith("val/") else None
        loss = model.loss(model.all)
        above.plot(model.flops_G, loss, color=colour, marker=marker, markersize=3, label=title)
        shown.append(loss[model.flops_G >= 0.05 * model.flops_G[-1]])
    together = np.concatenate(shown)
    room = 0.05 * float(np.ptp(together)) or 0.1
    dense, other = models
    lowest = np.minimum.accumulate(dense.loss(dense.all))
    above.axhline(dense.loss(dense.all)[-1], color=GREY, linestyle=":", linewidth=0.8)
    above.set(title=name, xlabel="training FLOPs", ylim=(together.min() - room, together.max() + room))
    above.legend(fontsize=7)
    end = dense.flops_G[-1]
    matched = first_reach(other.flops_G, other.loss(other.all), lowest)
    below.plot(100 * dense.flops_G / end, 100 * matched / end, color=ORANGE)
    below.plot([0, 100], [0, 100], color=GREY, linestyle="--", linewidth=1)
    below.set(
        xlim=(0, 100), ylim=(0, 110), xlabel=f"FLOPs of the {first}, %", ylabel=f"of the {second} at that loss, %"
    )
    above.grid(alpha=0.25)
    below.grid(alpha=0.25)


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument(
        "--baseline",
        nargs="+",
        type=Path,
        required=True,
        metavar="RUN",
        help="runs of the dense model, one for each seed",
    )
    parser.add_argument(
        "--candidate",
        nargs="+",
        type=Path,
        required=True,
        metavar="RUN",
        help="runs of the other model, one for each seed",
    )
    parser.add_argument(
        "--window",
        type=float,
        default=WINDOW,
        help="share of the FLOPs over which training losses are averaged; 0 is none (%(default)s)",
    )
    parser.add_argument(
        "--paper", metavar="TABLE:ROW", help="show these figures of the paper beside, such as 7:1.5B or 4:163M"
    )
    add_json(parser)
    parser.add_argument("--csv", type=Path, metavar="OUT")
    parser.add_argument("--markdown", type=Path, metavar="OUT", help="file for the table, which is always printed")
    parser.add_argument("--plot", type=Path, metavar="OUT", help="file for the two figures: .png, .svg or .pdf")
    arguments = parser.parse_args()
    with exit_clearly():
        published = select(arguments.paper) if arguments.paper else []
        baseline, candidate = ([Run(p) for p in side] for side in (arguments.baseline, arguments.candidate))
        found = compare(baseline, candidate, arguments.window)
        table = as_markdown(found, published) + f"\n{notes(found, arguments.window)}\n"
        if (warning := unlike(baseline, candidate)) is not None:
            table += f"\nWARNING: {warning}\n"
        counts = {name: n for name in found if (n := baseline[0].targets(name)) is not None}
        if (warning := few_targets(counts)) is not None:
            table += f"\nWARNING: {warning}\n"
        print(table, file=sys.stderr if arguments.json == "-" else sys.stdout)
        write_json(arguments.json, as_json(found, published))
        if arguments.csv:
            write_text(arguments.csv, as_csv(found))
        if arguments.markdown:
            write_text(arguments.markdown, table)
        if arguments.plot:
            draw({"baseline": baseline, "candidate": candidate}, list(found), arguments.window, arguments.plot)


if __name__ == "__main__":
    main()
