"""Show whether the best learning rate of a narrow model is the best of wider ones, with and without width transfer.

    mom transfer configs/demo.yaml --widths 64 128 256 --rates 2e-3 4e-3 8e-3 1.6e-2 3.2e-2 KEY=VALUE ...

Trains the model of a config at every width, learning rate and seed, dense and as the config has it (the mixture), in
the standard parametrisation and with `model.base_dim` set to the first width (muP; docs/explanation/width-transfer.md).
At the first width the two are the same and are trained once. OUTPUT gets transfer.md, transfer.json and transfer.svg.
A command that was killed goes on when it is started again, and more rates and seeds may be asked for then.

The best rate of a model is where a parabola through the held-out losses at the best rate and its two neighbours, over
the logarithm of the rate, is lowest.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import math
import os
import shutil
import signal
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mom_tokenizers.errors import EXIT_PREEMPTED, UserError, exit_clearly, read_json
from mom_tokenizers.files import write_whole
from mom_tools.compare.curves import Run
from mom_tools.options import check_free, command_parser, named_rates
from mom_tools.output import markdown_table
from mom_tools.processes import Processes
from mom_train.config.files import load_config
from mom_train.config.preflight import check_places

log = logging.getLogger("transfer")
MODELS = {"dense": ["model.decoupled=[]"], "mixture": []}
FORMS = {"standard": "standard parametrisation", "muP": "muP (model.base_dim)"}
Losses = Mapping[tuple[str, str, int, int], Mapping[float, float]]
"""(model, form, width, seed) -> learning rate -> held-out loss after the last step."""


@dataclass(frozen=True)
class Job:
    """One run."""

    model: str
    form: str
    width: int
    rate: float
    seed: int

    @property
    def id(self) -> str:
        return f"{self.model}/{self.form}/{self.width}/rate-{self.rate:g}/seed-{self.seed}"


def jobs_of(arguments: argparse.Namespace) -> list[Job]:
    """All runs, seed by seed, so that a command that is cut short has whole seeds."""
    base = arguments.widths[0]
    wanted = itertools.product(range(arguments.seeds), arguments.widths, arguments.models, FORMS, arguments.rates)
    return [
        Job(model, form, width, rate, seed)
        for seed, width, model, form, rate in wanted
        if width != base or form == "standard"  # at the base they are the same model
    ]


def overrides(job: Job, arguments: argparse.Namespace) -> list[str]:
    base = arguments.widths[0]
    return [
        *arguments.overrides,
        *MODELS[job.model],
        f"model.dim={job.width}",
        f"model.base_dim={base if job.form == 'muP' else 'null'}",
        f"optimizer.learning_rate={job.rate!r}",
        f"seed={job.seed}",
        f"run_dir={json.dumps(str(arguments.output / 'runs' / job.id))}",
    ]


def loss_of(run: Path, figure: str) -> float | None:
    """The held-out loss after the last step of a finished run, or None if the run is not finished. A run whose steps
    stayed bad has an infinite loss."""
    status = read_json(run / "status.json") if (run / "status.json").is_file() else {}
    if status.get("state") == "failed" and (run / "incident.json").exists():
        return math.inf
    if status.get("state") != "finished":
        return None
    loss = Run(run).lines[-1].get(figure, math.nan)
    return loss if math.isfinite(loss) else math.inf


def train(arguments: argparse.Namespace) -> dict[Job, float]:
    """Trains what is missing. Returns the held-out loss of every run. Ends with exit code 75 if it is asked to end."""
    stopped: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda n, _: stopped.append(n))
    processes = Processes(arguments.jobs, arguments.threads, arguments.gpus)
    jobs = {job.id: job for job in jobs_of(arguments)}
    place = {job: arguments.output / "runs" / job.id for job in jobs.values()}
    found = {job: loss for job in jobs.values() if (loss := loss_of(place[job], arguments.figure)) is not None}
    waiting = [job for job in jobs.values() if job not in found]
    tries = dict.fromkeys(waiting, 0)
    while (waiting or processes.names) and not stopped:
        while waiting and processes.free:
            job = waiting.pop(0)
            logs = arguments.output / "logs" / f"{job.id.replace('/', '--')}.log"
            processes.start(job.id, "mom_train.__main__", [arguments.config, *overrides(job, arguments)], logs)
        for ended in processes.ended():
            job = jobs[ended.name]
            loss = loss_of(place[job], arguments.figure)
            if loss is None:
                tries[job] += 1
                if tries[job] == 2:
                    processes.stop()
                    raise UserError(f"{job.id} ended with {ended.code}: see {arguments.output / 'logs'}")
                waiting.insert(0, job)
                continue
            found[job] = loss
            shutil.rmtree(place[job] / "checkpoints", ignore_errors=True)  # nothing goes on from it
            (place[job] / "LATEST").unlink(missing_ok=True)
            log.info("%d of %d  %s: %.4f, %.0f s", len(found), len(jobs), job.id, loss, ended.seconds)
        time.sleep(0.2)
    processes.stop()
    if stopped:
        log.warning("%s: runs are saved, start again to go on", signal.Signals(stopped[0]).name)
        raise SystemExit(EXIT_PREEMPTED)
    return found


# ---- what came of it ----------------------------------------------------------------------------------------


def best_rate(losses: Mapping[float, float]) -> tuple[float, bool]:
    """The rate at which the loss is lowest, and whether it lies within the rates that were tried.

    It is the vertex of the parabola through the lowest point and its neighbours, over the logarithm of the rate. At
    the edge of what was tried, or beside a loss that is not finite, it is the rate of the lowest point itself.
    """
    rates = sorted(losses)
    k = min(range(len(rates)), key=lambda i: losses[rates[i]])
    if not 0 < k < len(rates) - 1:
        return rates[k], False
    (x0, x1, x2), (y0, y1, y2) = zip(*((math.log(r), losses[r]) for r in rates[k - 1 : k + 2]), strict=True)
    if not all(map(math.isfinite, (y0, y1, y2))):
        return rates[k], True
    left, right = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    curvature = (right - left) / (x2 - x0)
    return math.exp((x0 + x1) / 2 - left / (2 * curvature)) if curvature > 0 else rates[k], True


def by_group(found: Mapping[Job, float], base: int) -> dict[tuple[str, str, int, int], dict[float, float]]:
    """The losses by (model, form, width, seed) and rate. At the width `base`, both forms have the same."""
    groups: dict[tuple[str, str, int, int], dict[float, float]] = {}
    for job, loss in found.items():
        for form in FORMS if job.width == base else (job.form,):
            groups.setdefault((job.model, form, job.width, job.seed), {})[job.rate] = loss
    return groups


def summary(losses: Losses, base: int) -> list[dict[str, Any]]:
    """One entry for each model, form and width: over seeds, mean and standard deviation of the best rate's logarithm to
    base 2, of its shift from the width `base`, of the lowest loss, and of what it costs to take over the rate that is
    best at `base` (the grid's best by the mean over seeds) instead of the grid's best here."""
    entries = []
    for model, form, width in dict.fromkeys(key[:3] for key in losses):
        seeds = [key[3] for key in losses if key[:3] == (model, form, width)]
        here = [losses[model, form, width, seed] for seed in seeds]
        there = [losses[model, form, base, seed] for seed in seeds]
        best, best_there = [best_rate(x) for x in here], [best_rate(x) for x in there]
        taken = _lowest(there)
        entries.append(
            {
                "model": model,
                "form": form,
                "width": width,
                "seeds": len(seeds),
                "log2_rate": _spread([math.log2(rate) for rate, _ in best]),
                "inside": all(inside for _, inside in best),
                "shift": _spread([math.log2(a[0] / b[0]) for a, b in zip(best, best_there, strict=True)]),
                "loss": _spread([min(x.values()) for x in here]),
                "excess": _spread([x[taken] - x[_lowest(here)] for x in here]),
            }
        )
    return entries


def _lowest(losses: Sequence[Mapping[float, float]]) -> float:
    return min(losses[0], key=lambda rate: statistics.fmean(x[rate] for x in losses))


def _spread(values: Sequence[float]) -> tuple[float, float]:
    finite = all(map(math.isfinite, values))
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 and finite else 0.0


def table(entries: Sequence[Mapping[str, Any]]) -> str:
    """The summary as a Markdown table. A rate at the edge of what was tried has a mark."""
    rows = [
        [
            e["model"],
            FORMS[e["form"]],
            str(e["width"]),
            f"{2 ** e['log2_rate'][0]:.2e}{'' if e['inside'] else ' (edge)'}",
            *(f"{e[key][0]:+.2f} ± {e[key][1]:.2f}" for key in ("shift",)),
            *(f"{e[key][0]:.3f} ± {e[key][1]:.3f}" for key in ("loss", "excess")),
        ]
        for e in entries
    ]
    header = ["model", "", "width", "best rate", "shift (octaves)", "lowest loss", "cost of the base's rate"]
    return markdown_table(header, rows, left=2)


def draw(losses: Losses, path: Path) -> None:
    """Writes the losses over the learning rate, a panel for each model and form: means over seeds, with the range."""
    import matplotlib
    from matplotlib.figure import Figure

    models, widths = [*dict.fromkeys(key[0] for key in losses)], [*dict.fromkeys(key[2] for key in losses)]
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "transfer", "font.size": 9}):
        figure = Figure(figsize=(9, 3.4 * len(models)), layout="constrained")
        panels = figure.subplots(len(models), len(FORMS), sharex=True, sharey="row", squeeze=False)
        for (row, model), (column, form) in itertools.product(enumerate(models), enumerate(FORMS)):
            axes = panels[row][column]
            for k, width in enumerate(widths):
                colour = f"C{k}"
                seeds = [x for key, x in losses.items() if key[:3] == (model, form, width)]
                rates = sorted(seeds[0])
                points = [[x[rate] for x in seeds] for rate in rates]
                means = [statistics.fmean(p) for p in points]
                axes.plot(rates, means, marker="o", markersize=3, color=colour, label=f"width {width}")
                axes.fill_between(rates, [min(p) for p in points], [max(p) for p in points], color=colour, alpha=0.2)
                best, _ = best_rate(dict(zip(rates, means, strict=True)))
                axes.axvline(best, color=colour, linestyle="--", linewidth=1)
            axes.set_xscale("log", base=2)
            axes.set_title(f"{model}, {FORMS[form]}")
            axes.grid(alpha=0.3)
            if finite := sorted(
                v for key, x in losses.items() if key[0] == model for v in x.values() if math.isfinite(v)
            ):
                # a run that diverged does not hide the others
                axes.set_ylim(finite[0] - 0.05, finite[int(0.9 * (len(finite) - 1))] + 0.1)
            if row == len(models) - 1:
                axes.set_xlabel("learning rate (dashed: the best of each width)")
            if column == 0:
                axes.set_ylabel("held-out loss")
                axes.legend()
        figure.savefig(
            path, format=path.suffix[1:], metadata={"Date": None} if path.suffix == ".svg" else None, dpi=120
        )


def write_results(found: Mapping[Job, float], arguments: argparse.Namespace) -> str:
    """Writes transfer.md, transfer.json and transfer.svg. Returns the table."""
    base = arguments.widths[0]
    losses = by_group(found, base)
    entries = summary(losses, base)
    output: Path = arguments.output
    runs = [{**vars(job), "loss": loss if math.isfinite(loss) else None} for job, loss in found.items()]
    (output / "transfer.json").write_text(json.dumps({"summary": entries, "runs": runs}, indent=1) + "\n")
    text = table(entries)
    (output / "transfer.md").write_text(text + "\n")
    draw(losses, output / "transfer.svg")
    return text


def check(arguments: argparse.Namespace) -> str:
    """Checks the arguments before torch is imported. Returns the name of the held-out loss. Raises UserError for
    what cannot be trained, and where OUTPUT was begun with other settings."""
    if min(arguments.seeds, 1 if arguments.jobs is None else arguments.jobs, *arguments.widths) < 1:
        raise UserError("--seeds, --jobs and --widths must be at least 1")
    if len(arguments.widths) < 2 or len({*arguments.widths}) < len(arguments.widths):
        raise UserError("--widths: name at least 2 different ones, the base first")
    if not all(0 < rate < math.inf for rate in arguments.rates) or len({*arguments.rates}) < 3:
        raise UserError("--rates: name at least 3 learning rates above 0")
    arguments.rates = named_rates(arguments.rates)
    if len(arguments.rates) < 3:
        raise UserError("--rates: name at least 3 learning rates that differ in their first 6 digits")
    check_free(arguments.overrides, ["model.dim", "model.base_dim", "optimizer.learning_rate", "seed", "run_dir"])
    for job in jobs_of(arguments):
        if job.rate == arguments.rates[0] and job.seed == 0:
            config = load_config(arguments.config, overrides(job, arguments))
            if job.model == "mixture" and not config.model.decoupled:
                raise UserError(f"{arguments.config}: model.decoupled is empty, so there is no mixture: --models dense")
            if not config.data.validation:
                raise UserError("data.validation: name a set, whose loss after the last step is what is compared")
    check_places(config)
    begun = arguments.output / "begun.json"
    settings = {"config": config.model_dump(mode="json", exclude={"run_dir", "seed", "model", "optimizer"})}
    settings |= {"base": arguments.widths[0], "optimizer": config.optimizer.model_dump(exclude={"learning_rate"})}
    settings |= {"model": config.model.model_dump(exclude={"dim", "base_dim", "decoupled"})}
    settings = json.loads(json.dumps(settings))
    if begun.is_file() and read_json(begun) != settings:
        raise UserError(f"{arguments.output} was begun with other settings ({begun}); take another --output")
    arguments.output.mkdir(parents=True, exist_ok=True)
    write_whole(begun, json.dumps(settings, indent=1) + "\n")
    return f"val/{next(iter(config.data.validation))}/loss/total"


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes of the config, for all runs")
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256], help="the base first (%(default)s)")
    parser.add_argument("--rates", type=float, nargs="+", required=True, help="learning rates, such as powers of two")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each model (default: %(default)s)")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS], help="(default: dense mixture)")
    parser.add_argument("--output", type=Path, default=Path("runs/transfer"), help="folder (default: %(default)s)")
    parser.add_argument("--jobs", type=int, help="runs at a time (default: one a GPU, or one a core)")
    arguments = parser.parse_intermixed_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    with exit_clearly():
        arguments.figure = check(arguments)
        import torch  # only to know the machine

        cores = len(os.sched_getaffinity(0))
        arguments.gpus = torch.cuda.device_count()
        arguments.jobs = arguments.jobs or arguments.gpus or cores
        arguments.threads = max(1, cores // arguments.jobs)
        try:
            with FileLock(arguments.output / ".lock", timeout=0):
                print(write_results(train(arguments), arguments))
        except Timeout:
            raise UserError(f"{arguments.output}: another `mom transfer` is at work there") from None


if __name__ == "__main__":
    main()
