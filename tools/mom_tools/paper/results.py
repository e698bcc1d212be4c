"""The report of the miniature: report.md and results.json, with Tables 2, 3, 4 and 7 beside the published ones."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mom_tools.compare.curves import WINDOW, Comparison, Run, compare
from mom_tools.compare.match_loss import as_json, cells, draw, label, notes, percent
from mom_tools.compare.published import TABLES, Published, read
from mom_tools.compare.report import page
from mom_tools.output import markdown_table
from mom_tools.paper.plan import (
    ABLATION,
    DENSE,
    EXPERIMENTS,
    EXPERIMENTS_IN,
    MIXTURE,
    SETTINGS,
    TRANSFORMER,
    State,
    common_seeds,
    done_seeds,
    epochs,
    sweep_steps,
    tried,
    tuned_as,
    variants,
)
from mom_train.config.model import PROJECTIONS, ModelConfig
from mom_train.config.run import RunConfig
from mom_train.cost.flops import TRAINING_FACTOR, active_parameters, parameters, training_flops_per_token

TABLE_OF = {"chameleon_speech": 2, "transfusion": 4, "chameleon": 7}
SMALLEST = {2: "37M", 4: "163M", 7: "37M"}
ALL = "+".join(PROJECTIONS)
METHOD = """\
{steps} steps a run, matrix products in {precision}. The learning rates were tried with one seed and runs of {short}
steps, their own cosine included; a short run may prefer a larger rate than a long one. Ablation rows take the
mixture's. The same seed sees the same data in every model of a setting, so seeds are compared in pairs; brackets are
95 % t intervals over them. Training losses are means over the last {window:g} % of the FLOPs. Epochs: tokens seen over
tokens stored; where a modality was seen often, believe the held-out loss. *better* and *worse*: the interval of the
gain leaves out 0, for each loss by itself; of twenty such statements one may be chance."""


EXPERIMENTS_SAID = """\
docs/explanation/experiments.md says what each asks. They are trained at the mixture's learning rate, on the tokens that
dense and mixture saw, and compared over the seeds that all three have finished; the verdict is against the mixture.
Dense Mamba reads no mask, so a corrupted one leaves it as it is. FLOPs are counted as everywhere, once per token and
without routers; what these add is in the last column."""


def verdict(result: Comparison) -> str:
    if result.gain_interval is None or result.interval_from == "blocks":
        return "one seed"
    low, high = result.gain_interval
    return "better" if low > 0 else "worse" if high < 0 else "not decided"


def runs_of(output: Path, setting: str, variant: str, seeds: Sequence[int]) -> list[Run]:
    return [Run(output / "runs" / setting / variant / f"seed-{k}") for k in seeds]


def compared(
    output: Path, state: State, setting: str, variant: str, seeds: int
) -> tuple[list[int], dict[str, Comparison]]:
    """(the seeds with which both variants are finished, the comparison with the dense model over them). Both are empty
    where there are none."""
    common = common_seeds(state, setting, (DENSE, variant), seeds)
    if not common:
        return [], {}
    return common, compare(runs_of(output, setting, DENSE, common), runs_of(output, setting, variant, common))


def table_lines(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Lines of the report: a Markdown table, whose header is the first row, and an empty line."""
    return [markdown_table(rows[0], rows[1:], left), ""]


def main_table(found: dict[str, Comparison], published: list[Published]) -> list[str]:
    head = ["loss", "dense", "mixture", "gain, %", "FLOPs to match, %", "verdict", "paper: gain, %", "paper: FLOPs, %"]
    rows = [cells(name, result, published) for name, result in found.items()]
    return table_lines([head, *([*r[:5], verdict(found[r[0]]), *r[5:]] for r in rows)])


def transformer_table(found: dict[str, Comparison]) -> list[str]:
    head = ["loss", "dense", "Transformer", "gain over dense, %", "FLOPs to match, %", "verdict", "paper: gain, %"]
    rows = [head]
    published = [p for p in read(4) if p.row == SMALLEST[4]]
    for name, x in found.items():
        beside = [
            f"{100 * (1 - p.transformer_loss / p.dense_loss):+.2f}{label(p)}"
            for p in published
            if p.transformer_loss and p.belongs_to(name)
        ]
        losses = [f"{x.baseline_loss:.4f}", f"{x.candidate_loss:.4f}"]
        gain = percent(x.gain_percent, x.gain_interval, sign=True)
        flops = percent(x.relative_flops_percent, x.relative_flops_interval)
        rows.append([name, *losses, gain, flops, verdict(x), ", ".join(beside)])
    return table_lines(rows)


def ablation(output: Path, state: State, seeds: int) -> tuple[list[list[str]], dict[str, Any]]:
    """The rows of Table 3 in miniature, as text with the header first, and as figures."""
    printed = {p.row: p.gain_percent for p in read(3)}
    names = {row: row for row in ABLATION} | {MIXTURE: ALL}
    rows = [["decoupled", "seeds", "training loss: gain, %", "held out: gain, %", "verdict", "paper: training, %"]]
    figures: dict[str, Any] = {}
    for variant, row in names.items():
        common, found = compared(output, state, "chameleon_speech", variant, seeds)
        if not found:
            continue
        held_out = next(n for n in found if n.startswith("val/") and n.endswith("/total"))
        both = [found["loss/total"], found[held_out]]
        gains = [percent(x.gain_percent, x.gain_interval, sign=True) for x in both]
        rows.append([row, str(len(common)), *gains, verdict(both[1]), f"{printed[row]:+.2f}"])
        figures[row] = as_json(found)
    return rows, figures


def router_parameters(config: ModelConfig, modalities: int) -> int:
    """The number of parameters of the routers of a Mamba. Each decoupled projection has a router, which reads the
    projection's input and scores all of its matrices."""
    if config.router == "rule" and config.experts == 1:
        return 0
    inputs = {"in_proj": config.dim, "x_proj": config.inner, "dt_proj": config.rank, "out_proj": config.inner}
    return config.blocks * modalities * config.experts * sum(inputs.get(part, 0) for part in config.decoupled)


def sizes(run: Run) -> dict[str, float]:
    """Parameters in all, parameters that one token uses, and the FLOPs of the routers in percent of the counted
    FLOPs."""
    config = RunConfig.model_validate(run.config)
    vocabulary, modalities = config.layout.size, len(config.layout.modalities)
    routers = router_parameters(config.model, modalities)
    counted = training_flops_per_token(config.model, vocabulary)
    return {
        "parameters": sum(parameters(config.model, vocabulary, modalities).values()),
        "active_parameters": sum(active_parameters(config.model, vocabulary).values()) + routers,
        "router_flops_percent": 100 * TRAINING_FACTOR * 2 * routers / counted,
    }


def experiments_section(output: Path, state: State, seeds: int) -> tuple[list[str], dict[str, Any]]:
    """Lines and figures of the experiments that share a seed with the dense model and the mixture. Both are empty where
    none does."""
    models = [["model", "seeds", "parameters, M", "of them active, M", "routers' FLOPs, %"]]
    losses = [
        ["model", "held-out loss", "dense", "mixture", "this", "gain over dense, %", "over mixture, %", "verdict"]
    ]
    figures: dict[str, Any] = {}
    for name in EXPERIMENTS:
        common = common_seeds(state, EXPERIMENTS_IN, (DENSE, MIXTURE, name), seeds)
        if not common:
            continue
        dense, mixture, this = (runs_of(output, EXPERIMENTS_IN, v, common) for v in (DENSE, MIXTURE, name))
        over_dense, over_mixture = compare(dense, this), compare(mixture, this)
        size = sizes(this[0])
        millions = [f"{size[key] / 1e6:.2f}" for key in ("parameters", "active_parameters")]
        models.append([name, str(len(common)), *millions, f"{size['router_flops_percent']:.2f}"])
        for loss, x in over_mixture.items():
            if loss.startswith("val/"):
                ends = [over_dense[loss].baseline_loss, x.baseline_loss, x.candidate_loss]
                gains = [percent(y.gain_percent, y.gain_interval, sign=True) for y in (over_dense[loss], x)]
                last = loss.rpartition("/")[2]
                losses.append([name, last, *(f"{end:.4f}" for end in ends), *gains, verdict(x)])
        figures[name] = {"seeds": common, **size} | {
            "over_dense": as_json(over_dense),
            "over_mixture": as_json(over_mixture),
        }
    if not figures:
        return [], {}
    lines = [
        "## Experiments: Chameleon + Speech",
        "",
        EXPERIMENTS_SAID,
        "",
        *table_lines(losses, left=2),
        *table_lines(models),
    ]
    return lines, figures


def setting_section(output: Path, state: State, setting: str, seeds: int) -> tuple[list[str], dict[str, Any]]:
    number = TABLE_OF[setting]
    common, found = compared(output, state, setting, MIXTURE, seeds)
    lines = [f"## Table {number} in miniature: {TABLES[number]}", ""]
    if not found:
        return [*lines, "Not trained to the end within the budget.", ""], {}
    published = [p for p in read(number) if p.row == SMALLEST[number]]
    lines += [f"Seeds: {len(common)}. Beside it the paper's {SMALLEST[number]}.", "", *main_table(found, published)]
    lines += [notes(found, WINDOW), ""]
    figures: dict[str, Any] = {"mixture": as_json(found, published)}
    picture, curves = output / f"{setting}.png", output / f"{setting}.html"
    sides = {v: runs_of(output, setting, v, common) for v in (DENSE, MIXTURE)}
    draw(sides, list(found), WINDOW, picture)
    every = [r for v in SETTINGS[setting] for r in runs_of(output, setting, v, done_seeds(state, setting, v, seeds))]
    curves.write_text(page(every), encoding="utf-8")
    lines += [
        f"![loss curves and loss matching]({picture.name})",
        "",
        f"All of its runs: [{curves.name}]({curves.name})",
        "",
    ]
    if TRANSFORMER in SETTINGS[setting]:
        common, found = compared(output, state, setting, TRANSFORMER, seeds)
        if found:
            first = next(iter(found.values()))
            spent = 100 * first.candidate_flops / first.baseline_flops
            said = f"The Transformer (seeds: {len(common)}), the same tokens for {spent:.1f} % of the dense FLOPs:"
            lines += [said, "", *transformer_table(found)]
            figures["transformer"] = as_json(found)
    return lines, figures


def cost_section(output: Path, state: State, seeds: int) -> list[str]:
    """The part of the report with the learning rates, tokens and speed of every model."""
    rows = [["model", "learning rate (held-out loss of the others tried)", "seeds", "FLOPs", "tokens/s", "epochs"]]
    for setting in state.settings:
        manifest = json.loads((output / "tokens" / setting / "train" / "manifest.json").read_text())
        for variant in variants(setting, tuple(EXPERIMENTS)):
            done = done_seeds(state, setting, variant, seeds)
            if not done:
                continue
            runs = runs_of(output, setting, variant, done)
            last = runs[0].lines[-1]
            tokens = {k.removeprefix("tokens/"): v for k, v in last.items() if k.startswith("tokens/")}
            speeds = [x["perf/tokens_per_s"] for run in runs for x in run.lines if "perf/tokens_per_s" in x]
            rate = runs[0].config["optimizer"]["learning_rate"]
            others = ", ".join(f"{r:g}: {v:.3f}" for r, v in tried(state, setting, tuned_as(variant)).items())
            seen = ", ".join(f"{n:.2g} {m}" for m, n in epochs(tokens, manifest["tokens"]).items())
            speed = f"{statistics.median(speeds):,.0f}"
            flops = f"{last['flops/total']:.3g}"
            rows.append([f"{setting}/{variant}", f"{rate:g} ({others})", str(len(done)), flops, speed, seen])
    return table_lines(rows, left=2)


def write_report(output: Path, state: State, seeds: int, complete: bool) -> None:
    """Write OUTPUT/report.md and results.json, and a picture and a page for each setting, from the runs that are
    finished."""
    tables: dict[str, Any] = {}
    lines = ["# The paper in miniature", ""]
    if not complete:
        lines += ["**Not everything was trained within the budget**: tables rest on the seeds they name.", ""]
    for setting in state.settings:
        section, figures = setting_section(output, state, setting, seeds)
        lines += section
        if figures:
            tables[str(TABLE_OF[setting])] = figures
    if "chameleon_speech" in state.settings:
        rows, figures = ablation(output, state, seeds)
        if len(rows) > 1:
            lines += ["## Table 3 in miniature: ablation, Chameleon + Speech", "", *table_lines(rows)]
            lines += [
                "Gains here divide by the dense loss, as everywhere in this report; the paper's Table 3 divides by the "
                "mixture's. Published figures: 443M.",
                "",
            ]
            tables["3"] = figures
    section, experiments = experiments_section(output, state, seeds)
    lines += section
    lines += ["## How it was made", "", *cost_section(output, state, seeds)]
    short = sweep_steps(state.steps) if state.steps else 0
    known = {"steps": state.steps, "precision": state.precision or "fp32"}
    lines += [METHOD.format(short=short, window=100 * WINDOW, **known), ""]
    lines += [f"{state.spent / 3600:.2f} hours of training.", ""]
    if state.failed:
        lines += ["Failed twice and left out: " + ", ".join(f"{k} ({why})" for k, why in state.failed.items()), ""]
    (output / "report.md").write_text("\n".join(lines))
    results = {"steps": state.steps, "spent_seconds": state.spent, "complete": complete, "tables": tables}
    if experiments:
        results["experiments"] = experiments
    (output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
