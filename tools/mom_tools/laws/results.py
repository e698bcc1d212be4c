"""The report of `mom laws`: report.md, results.json and laws.svg, from the runs of a grid that are finished."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from mom_tools.compare.curves import Run
from mom_tools.laws.grid import State, best_rate, tried
from mom_tools.laws.law import LEVEL, Cost, Law, fit, flops_to_match, frontier, interval, parabola
from mom_tools.output import markdown_table
from mom_tools.paper.plan import DENSE, MIXTURE, epochs
from mom_train.config.run import RunConfig
from mom_train.cost.flops import active_parameters

REPLICATES = 1000
HOLDS = 1.1
"""The advantage is said to hold where the interval of its change over the grid is within this factor of 1."""
_LOSS = "val/held_out/loss/"
_COLOURS = {DENSE: "#57606a", MIXTURE: "#d1690e", "transformer": "#1f77b4"}
METHOD = """\
N counts the parameters that a token is multiplied with: the blocks with one modality's weights, the norms and the
head, not the embedding. D counts trained tokens of all modalities, and FLOPs are those of training
(docs/explanation/judging.md). Every loss is of the same held-out rows, at the end of the decay. The law is L(N, D) = E
+ A (N / n0)^-alpha + B (D / d0)^-beta, fitted by least squares to all seeds. Intervals are of {level:.0f} %, from
{replicates} replicates of a wild cluster bootstrap, where a trunk with its branches is a cluster and models are
resampled in pairs. They hold the law to be right in form, so believe those inside the grid before those beyond it."""


@dataclass(frozen=True)
class Point:
    """One finished branch."""

    model: str
    size: str
    seed: int
    budget: int
    parameters: float
    tokens: float
    flops: float
    losses: dict[str, float]
    """Modality, or total -> held-out loss in nats."""


@dataclass(frozen=True)
class Points:
    """The points of one model."""

    model: str
    points: tuple[Point, ...]

    @property
    def sizes_P(self) -> np.ndarray:
        return np.array([p.parameters for p in self.points])

    @property
    def tokens_P(self) -> np.ndarray:
        return np.array([p.tokens for p in self.points])

    @property
    def flops_P(self) -> np.ndarray:
        return np.array([p.flops for p in self.points])

    def losses_P(self, name: str) -> np.ndarray:
        return np.array([p.losses[name] for p in self.points])

    @property
    def budgets_G(self) -> np.ndarray:
        """The budgets: the geometric means of what the points of each have spent."""
        found = sorted({p.budget for p in self.points})
        return np.array([np.exp(np.mean([np.log(p.flops) for p in self.points if p.budget == k])) for k in found])

    def cost(self) -> Cost:
        by_size = {s: [p for p in self.points if p.size == s] for s in dict.fromkeys(p.size for p in self.points)}
        ordered = sorted((found[0].parameters, found) for found in by_size.values())
        return Cost(
            tuple(n for n, _ in ordered), tuple(float(np.mean([p.flops / p.tokens for p in f])) for _, f in ordered)
        )

    def law(self, name: str, replicates: int = REPLICATES) -> Law:
        clusters = [(p.size, p.seed) for p in self.points]
        return fit(self.sizes_P, self.tokens_P, self.losses_P(name), clusters, replicates)


def computing_parameters(config: RunConfig) -> int:
    """The number of parameters that one token is multiplied with: all active ones but the embedding."""
    counts = active_parameters(config.model, config.layout.size)
    return sum(n for part, n in counts.items() if part != "embedding")


def points_of(output: Path, state: State, model: str, seeds: int) -> Points:
    """The finished branches of a model."""
    found = []
    for size in state.sizes:
        for seed in range(seeds):
            for budget in range(state.budgets):
                job = f"{model}/{size}/seed-{seed}/budget-{budget}"
                if (last := state.finished.get(job)) is None:
                    continue
                config = RunConfig.model_validate(Run(output / "runs" / job).config)
                found.append(
                    Point(
                        model, size, seed, budget, computing_parameters(config),
                        sum(v for k, v in last.items() if k.startswith("tokens/")), last["flops/total"],
                        {k.removeprefix(_LOSS): v for k, v in last.items() if k.startswith(_LOSS)},
                    )
                )  # fmt: skip
    return Points(model, tuple(found))


# ---- tables -----------------------------------------------------------------------------------------------------


def shown(value: float, ends: tuple[float, float], digits: int = 3) -> str:
    """An estimate with its interval, such as `0.381 [0.35, 0.42]`. Ends that are not finite are shown as they are."""

    def number(x: float) -> str:
        return "-" if math.isnan(x) else "more" if math.isinf(x) else f"{x:.{digits}g}"

    return f"{number(value)} [{number(ends[0])}, {number(ends[1])}]"


def losses_table(groups: Sequence[Points]) -> str:
    """The mean total held-out losses over seeds, by model, size and budget."""
    budgets = sorted({p.budget for group in groups for p in group.points})
    rows = []
    for group in groups:
        for size in dict.fromkeys(p.size for p in group.points):
            of_size = [p for p in group.points if p.size == size]
            cells = []
            for k in budgets:
                losses = [p.losses["total"] for p in of_size if p.budget == k]
                spread = f" ± {np.std(losses, ddof=1):.3f}" if len(losses) > 1 else ""
                cells.append(f"{np.mean(losses):.3f}{spread}" if losses else "-")
            tokens = max(p.tokens for p in of_size)
            rows.append([f"{group.model} {size}", f"{of_size[0].parameters:.3g}", f"{tokens:.2g}", *cells])
    flops = [f"{f:.2e}" for f in groups[0].budgets_G]
    return markdown_table(["model", "N", "most tokens", *flops[: len(budgets)]], rows)


def laws_table(laws: Mapping[tuple[str, str], Law]) -> str:
    rows = []
    for (name, model), law in laws.items():
        values = [law.E_R, law.A_R, law.alpha_R, law.B_R, law.beta_R]
        cells = [shown(float(x[0]), interval(x)) for x in values]
        rows.append([name, model, *cells, f"{law.residual:.4f}", f"{100 * law.at_a_bound:.0f}"])
    return markdown_table(["loss", "model", "E", "A", "alpha", "B", "beta", "residual", "at a bound, %"], rows, 2)


def best_sizes_table(groups: Mapping[str, Points], laws: Mapping[tuple[str, str], Law]) -> tuple[str, dict[str, Any]]:
    """The size that is best for each budget, by the law and by parabolas, and how it grows."""
    rows, figures = [], {}
    for (name, model), law in laws.items():
        group = groups[model]
        budgets_G = group.budgets_G
        sizes_RG = frontier(law, group.cost(), budgets_G)[1]
        slope_R = np.log(sizes_RG[:, -1] / sizes_RG[:, 0]) / math.log(budgets_G[-1] / budgets_G[0])
        minima = []
        for k in sorted({p.budget for p in group.points}):
            chosen = np.array([p.budget == k for p in group.points])
            found = parabola(group.sizes_P[chosen], group.losses_P(name)[chosen])
            minima.append("at an edge" if found is None else f"{found[0]:.2g}")
        ends = [shown(float(sizes_RG[0, k]), interval(sizes_RG[:, k]), 2) for k in (0, -1)]
        exponent = shown(float(slope_R[0]), interval(slope_R), 2)
        rows.append([name, model, *ends, exponent, ", ".join(minima)])
        figures[f"{name}/{model}"] = {"exponent": float(slope_R[0]), "exponent_interval": interval(slope_R)}
    head = ["loss", "model", "smallest budget: best N", "largest", "exponent", "IsoFLOP minima, N"]
    return markdown_table(head, rows, 2), figures


def match_table(
    groups: Mapping[str, Points], laws: Mapping[tuple[str, str], Law], candidate: str, baseline: str
) -> tuple[str, dict[str, Any]]:
    """The candidate's FLOPs for the baseline's loss, at the budgets of the grid and ten times beyond, and whether its
    advantage grows with scale."""
    budgets_G = np.r_[groups[baseline].budgets_G, 10 * groups[baseline].budgets_G[-1]]
    rows, figures = [], {}
    for name in dict.fromkeys(n for n, _ in laws):
        c, b = laws[name, candidate], laws[name, baseline]
        ratios_RG = flops_to_match(c, b, groups[candidate].cost(), groups[baseline].cost(), budgets_G)
        change_R = ratios_RG[:, -2] / ratios_RG[:, 0]
        low, high = interval(change_R)
        trend = (
            "grows" if high < 1 else "shrinks" if low > 1
            else "holds" if low >= 1 / HOLDS and high <= HOLDS else "not decided"
        )  # fmt: skip
        cells = [shown(float(ratios_RG[0, k]), interval(ratios_RG[:, k]), 2) for k in range(len(budgets_G))]
        rows.append([name, *cells, shown(float(change_R[0]), (low, high), 2), trend])
        figures[name] = {
            "flops": budgets_G.tolist(),
            "ratio": ratios_RG[0].tolist(),
            "interval": [interval(ratios_RG[:, k]) for k in range(len(budgets_G))],
            "change": float(change_R[0]),
            "change_interval": (low, high),
            "advantage": trend,
        }
    head = ["loss", *(f"{f:.1e}" for f in budgets_G[:-1]), f"{budgets_G[-1]:.1e} (beyond)", "change", "advantage"]
    return markdown_table(head, rows), figures


# ---- picture ----------------------------------------------------------------------------------------------------


def draw(groups: Mapping[str, Points], laws: Mapping[tuple[str, str], Law], out: Path) -> None:
    """For every loss, above: the loss over N at each budget, with the laws as lines. Below: the mixture's FLOPs for the
    dense model's loss over the budget, with its interval."""
    names = list(dict.fromkeys(n for n, _ in laws))
    matched = DENSE in groups and MIXTURE in groups
    with matplotlib.rc_context({"svg.hashsalt": "laws", "font.size": 8}):
        figure = Figure(figsize=(3.4 * len(names), 5.6 if matched else 3.0))
        grid = figure.subplots(2 if matched else 1, len(names), squeeze=False)
        for column, name in enumerate(names):
            axes = grid[0, column]
            for model, group in groups.items():
                law, cost = laws[name, model], group.cost()
                sizes_S = np.geomspace(group.sizes_P.min() / 1.5, group.sizes_P.max() * 1.5, 60)
                budgets = group.budgets_G
                for k, flops in enumerate(budgets):
                    strength = 0.3 + 0.7 * (k + 1) / len(budgets)
                    line = law.loss(sizes_S, flops / cost(sizes_S))[0]
                    style = "--" if model == DENSE else "-"
                    axes.plot(sizes_S, line, style, color=_COLOURS[model], alpha=strength, linewidth=0.9)
                    chosen = np.array([p.budget == k for p in group.points])
                    axes.scatter(
                        group.sizes_P[chosen], group.losses_P(name)[chosen], s=9, color=_COLOURS[model],
                        alpha=strength, label=model if k == len(budgets) - 1 else None,
                    )  # fmt: skip
            axes.set(xscale="log", title=name, xlabel="N", ylabel="held-out loss" if not column else "")
            axes.grid(alpha=0.2)
            axes.legend(fontsize=7)
            if not matched:
                continue
            below = grid[1, column]
            dense, mixture = groups[DENSE], groups[MIXTURE]
            budgets_G = np.geomspace(dense.budgets_G[0], 10 * dense.budgets_G[-1], 25)
            ratios_RG = flops_to_match(laws[name, MIXTURE], laws[name, DENSE], mixture.cost(), dense.cost(), budgets_G)
            ends = np.array([interval(ratios_RG[:, k]) for k in range(len(budgets_G))])
            top = 2.0
            below.fill_between(
                budgets_G, ends[:, 0], np.minimum(ends[:, 1], top), color=_COLOURS[MIXTURE], alpha=0.2, linewidth=0
            )
            below.plot(budgets_G, ratios_RG[0], color=_COLOURS[MIXTURE])
            below.axhline(1, color=_COLOURS[DENSE], linestyle="--", linewidth=0.8)
            below.axvline(dense.budgets_G[-1], color="#999999", linestyle=":", linewidth=0.8)
            below.set(xscale="log", ylim=(0, top), xlabel="FLOPs of the dense model")
            below.set_ylabel("" if column else "FLOPs of the mixture for its loss, share")
            below.grid(alpha=0.2)
        figure.tight_layout()
        figure.savefig(out, metadata={"Date": None})


# ---- report -----------------------------------------------------------------------------------------------------


def rates_table(state: State) -> str:
    rows = []
    for model, size in state.pairs:
        others = ", ".join(f"{r:g}: {v:.3f}" for r, v in tried(state, model, size).items())
        rate = best_rate(state, model, size)
        if rate is not None:
            rows.append([f"{model} {size}", f"{rate:g}", others or "-"])
    return markdown_table(["model", "learning rate", "held-out loss of those tried"], rows, 3)


def epochs_line(output: Path, state: State, groups: Sequence[Points]) -> str:
    """A sentence that says how often the longest run saw the stored tokens of each modality."""
    longest = max((p for g in groups for p in g.points), key=lambda p: p.tokens)
    last = state.finished[f"{longest.model}/{longest.size}/seed-{longest.seed}/budget-{longest.budget}"]
    tokens = {k.removeprefix("tokens/"): v for k, v in last.items() if k.startswith("tokens/")}
    stored = json.loads((output / "tokens" / state.setting / "train" / "manifest.json").read_text())["tokens"]
    seen = ", ".join(f"{n:.2g} of {m}" for m, n in epochs(tokens, stored).items())
    return f"Epochs of the longest run ({longest.size}): {seen}."


def write_report(output: Path, state: State, seeds: int, complete: bool) -> str:
    """Write OUTPUT/report.md, results.json and laws.svg. Returns the report."""
    groups = {m: g for m in state.models if (g := points_of(output, state, m, seeds)).points}
    lines = ["# Scaling laws by modality", ""]
    if not complete:
        lines += ["**Not everything was trained within the time**: the laws rest on the points below.", ""]
    enough = groups and all(len({(p.size, p.budget) for p in g.points}) > 5 for g in groups.values())
    figures: dict[str, Any] = {"complete": complete, "spent_seconds": state.spent}
    if groups:
        lines += ["## Held-out losses (total)", "", losses_table(list(groups.values())), ""]
        lines += [epochs_line(output, state, list(groups.values())), ""]
    if enough:
        names = sorted({n for g in groups.values() for n in g.points[0].losses}, key=lambda n: (n == "total", n))
        laws = {(n, m): g.law(n) for n in names for m, g in groups.items()}
        best, best_figures = best_sizes_table(groups, laws)
        lines += ["## Laws", "", laws_table(laws), "", "## The best size for a budget", "", best, ""]
        figures |= {"laws": {f"{n}/{m}": _as_json(law) for (n, m), law in laws.items()}, "best": best_figures}
        for model in groups:
            if model != DENSE and DENSE in groups:
                table, matched = match_table(groups, laws, model, DENSE)
                said = f"## FLOPs of the {model} for the loss of the dense model, as a share, over the dense FLOPs"
                lines += [said, "", table, ""]
                figures[f"match/{model}"] = matched
        draw(groups, laws, output / "laws.svg")
        lines += ["![IsoFLOP curves and FLOPs to match](laws.svg)", ""]
    else:
        lines += ["Too few points for a law yet.", ""]
    lines += ["## How it was made", "", rates_table(state), ""]
    lines += [METHOD.format(level=100 * LEVEL, replicates=REPLICATES), "", f"{state.spent / 3600:.2f} hours.", ""]
    if state.failed:
        lines += ["Failed twice and left out: " + ", ".join(f"{k} ({why})" for k, why in state.failed.items()), ""]
    text = "\n".join(lines)
    (output / "report.md").write_text(text)
    (output / "results.json").write_text(json.dumps(figures, indent=1) + "\n")
    return text


def _as_json(law: Law) -> dict[str, Any]:
    values = {"E": law.E_R, "A": law.A_R, "alpha": law.alpha_R, "B": law.B_R, "beta": law.beta_R}
    found: dict[str, Any] = {name: {"value": float(x[0]), "interval": interval(x)} for name, x in values.items()}
    return found | {"n0": law.n0, "d0": law.d0, "residual": law.residual, "at_a_bound": law.at_a_bound}
