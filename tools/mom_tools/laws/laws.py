"""Fit scaling laws by modality: the loss of dense Mamba, Mixture-of-Mamba and a Transformer over size and tokens, the
size that is best for a budget, and the FLOPs that the mixture needs for the dense model's loss at every scale.

    mom laws --corpus raw/ --minutes 480 --seeds 3 --output runs/laws
    mom laws --published

Trains tokenizers and tokenizes the corpus (once, not counted in --minutes), times each model, chooses budgets that fit
the time, tunes the learning rate of each size, and trains everything with one seed, then with the next. Each seed of a
model is one trunk with a constant rate, and each budget a decay branch of it. OUTPUT/report.md, results.json and
laws.svg have the laws with bootstrap intervals. A command that was killed goes on when it is started again; with more
--minutes and --seeds it trains what is missing.
--published puts the losses that the paper prints through the same fit and trains nothing.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from mom_tokenizers.errors import UserError, exit_clearly
from mom_tools.campaign import HELD_OUT, Campaign, as_overrides, step_seconds
from mom_tools.compare.curves import Run
from mom_tools.data.mixture import sources
from mom_tools.laws.grid import (
    ARCHITECTURES,
    Job,
    Size,
    State,
    changes,
    seconds,
    seed_jobs,
    smallest_budget,
    todo,
)
from mom_tools.options import check_free, command_parser, named_rates
from mom_tools.paper.miniature import MODALITIES, SHARES, check_no_ramp, prepare, recipe, sizes
from mom_tools.paper.plan import SETTINGS, TIMED_STEPS
from mom_tools.processes import Processes
from mom_train.config.files import overridden

log = logging.getLogger("grid")
DATA_KEYS = ("vocabulary", "tokenizers", "data.train", "data.validation", "run_dir")
"""The keys that every run gets from the corpus and from its place."""
DEFAULT_SIZES = ("32x1", "64x1", "96x2", "144x2")


class Grid(Campaign[Job]):
    """All runs of a grid: those that are finished and those that run now."""

    def __init__(self, output: Path, arguments: argparse.Namespace, state: State):
        self.arguments, self.state = arguments, state
        self.config = arguments.configs / f"{state.setting}.yaml"
        base = yaml.safe_load((arguments.configs / "_common.yaml").read_text())
        given = overridden({}, arguments.overrides)
        check_no_ramp(base)
        check_no_ramp({"training": {}, **given})
        self.batch: int = given.get("training", {}).get("batch", base["training"]["batch"])
        self.lanes: int = given.get("data", {}).get("lanes", base["data"]["lanes"])
        super().__init__(output, state, arguments.minutes, Processes(arguments.jobs, arguments.threads, arguments.gpus))

    def todo(self) -> Iterator[Job]:
        return todo(self.state, self.arguments.seeds)

    def seconds(self, job: Job) -> float:
        return seconds(self.state, job, self.batch)

    def decide(self) -> None:
        state, wanted = self.state, self.arguments
        if state.base:
            return
        if missing := [f"{m}/{s}" for m, s in state.pairs if f"{m}/{s}" not in state.per_step]:
            raise UserError(f"the first runs failed: {', '.join(missing)}; see {self.output / 'logs'}")
        state.base = smallest_budget(state, self.left, wanted.jobs, wanted.seeds, self.batch)
        steps = {f"{m}/{s}": round(state.base / state.flops[f"{m}/{s}"]) for m, s in state.pairs}
        log.info("%d budgets from %.3g FLOPs; steps of the smallest: %s", state.budgets, state.base, steps)

    def command(self, job: Job) -> tuple[str, list[str]]:
        if job.kind != "branch":
            return "mom_train.__main__", [str(self.config), *self._overrides(job)]
        trunk = self.output / "runs" / job.folder / "trunk"
        arguments = [str(trunk), f"run_dir={self.directory(job)}", f"validation.every={job.steps}"]
        arguments += ["--at", str(job.steps - job.decay), "--decay", str(job.decay), "--shape", "sqrt"]
        return "mom_tools.model.branch", arguments

    def _overrides(self, job: Job) -> list[str]:
        setting, output = self.state.setting, self.output
        tokens = output / "tokens" / setting
        bundle = output / "tokenizers" / recipe(setting) / f"{setting}.yaml"
        values = {
            "vocabulary": {m: 1 if latents else n for m, n, latents in sizes(tokens / "train", MODALITIES[setting])},
            **({"tokenizers": str(bundle)} if bundle.exists() else {}),  # shards may have come without
            "data.train": sources(tokens / "train", self.lanes, SHARES),
            "data.validation": {HELD_OUT: sources(tokens / "val", 1, SHARES)},
            **changes(self.state, job),
            "run_dir": str(self.directory(job)),
        }
        return [*self.arguments.overrides, *as_overrides(values)]

    def finish(self, job: Job, took: float, run: Run, loss: float) -> None:
        state, known, last = self.state, f"{job.model}/{job.size}", run.lines[-1]
        if job.kind == "time":
            state.per_step[known] = step_seconds(run, job.steps)
            evaluated = state.sequences / (3 * self.batch)
            state.startup[known] = max(1.0, took - (job.steps + evaluated) * state.per_step[known])
            state.flops[known] = last["flops/total"] / job.steps
        if job.kind != "trunk":  # branches are begun from the trunk's own
            self.forget_checkpoints(job)
        state.finished[job.id] = {
            k: v for k, v in last.items() if k.startswith(("val/", "tokens/", "flops/")) and isinstance(v, int | float)
        }
        if job.kind == "branch":
            trunk, *branches = seed_jobs(state, job.model, job.size, job.seed, job.rate)
            if all(branch.id in state.finished for branch in branches):
                self.forget_checkpoints(trunk)


def check(arguments: argparse.Namespace) -> None:
    """Check the arguments before torch is imported. Raises UserError for an impossible value."""
    corpus: Path | None = arguments.corpus
    if corpus is None:
        raise UserError(
            "--corpus: name the folder of raw tars or JSON lines to train on (docs/reference/raw-documents.md), or ask "
            "for --published"
        )
    if not corpus.exists():
        raise UserError(f"--corpus {corpus}: nothing there")
    if min(arguments.seeds, 1 if arguments.jobs is None else arguments.jobs, arguments.sequences) < 1:
        raise UserError("--seeds, --jobs and --sequences must be at least 1")
    if not 0 < arguments.minutes < math.inf:
        raise UserError(f"--minutes {arguments.minutes}: above 0")
    if arguments.budgets < 2:
        raise UserError(f"--budgets {arguments.budgets}: a law needs at least 2")
    if len(set(arguments.models)) < len(arguments.models):
        raise UserError("--models: name each once")
    if len(arguments.sizes) < 3 or len(set(arguments.sizes)) < len(arguments.sizes):
        raise UserError("--sizes: a law needs at least 3 different sizes")
    for size in arguments.sizes:
        Size.parse(size)
    if not all(0 < rate < math.inf for rate in arguments.rates or ()):
        raise UserError("--rates: learning rates are above 0")
    if not (arguments.configs / "_common.yaml").is_file():
        raise UserError(f"--configs {arguments.configs}: no _common.yaml there")
    state = new_state(arguments, arguments.setting)
    own = changes(state, Job("trunk", arguments.models[0], state.sizes[0], 0, 1.0, TIMED_STEPS, 1))
    check_free(arguments.overrides, [*own, *DATA_KEYS])


def new_state(arguments: argparse.Namespace, setting: str) -> State:
    """The state of a grid of which nothing is trained."""
    ordered = sorted(arguments.sizes, key=lambda s: (Size.parse(s).dim ** 2 * Size.parse(s).layers, s))
    state = State(arguments.models, ordered, arguments.budgets, setting, arguments.transfer)
    state.precision, state.sequences, state.overrides = arguments.precision, arguments.sequences, arguments.overrides
    if arguments.rates:
        state.rates = dict.fromkeys(state.rates, named_rates(arguments.rates))
    return state


def state_of(output: Path, arguments: argparse.Namespace, setting: str) -> State:
    """The state of a grid that was begun in `output`, or a new one. Raises UserError where the grid that was begun is
    another one."""
    path, new = output / "state.json", new_state(arguments, setting)
    if not path.exists():
        return new
    state = State.load(path)
    if state.overrides is None:  # begun before they were noted
        state.overrides = arguments.overrides
    for name, was, now in (
        ("--models", sorted(state.models), sorted(new.models)),
        ("--sizes", state.sizes, new.sizes),
        ("--budgets", state.budgets, new.budgets),
        ("--transfer", state.transfer, new.transfer),
        ("--setting", state.setting, new.setting),
        ("--sequences", state.sequences, new.sequences),
        ("--precision", state.precision, new.precision),
        ("--rates", state.rates, new.rates if arguments.rates else state.rates),
        ("the changes", state.overrides, new.overrides),
    ):
        if was != now:
            raise UserError(f"{output} was begun with {name} {was}, and this is {now}; take another --output")
    return state


def parser() -> argparse.ArgumentParser:
    found = command_parser(__doc__)
    found.add_argument(
        "--published", action="store_true", help="fit the losses that the paper prints, and train nothing"
    )
    found.add_argument("--corpus", type=Path, help="folder of your raw tars, which may have train/ and val/")
    found.add_argument("--output", type=Path, default=Path("runs/laws"), help="folder (default: %(default)s)")
    found.add_argument("--minutes", type=float, default=480, help="minutes of training, over all starts (%(default)s)")
    found.add_argument("--seeds", type=int, default=3, help="seeds of each model (default: %(default)s)")
    found.add_argument(
        "--models", nargs="+", choices=ARCHITECTURES, default=["dense", "mixture"], help="(default: dense mixture)"
    )
    found.add_argument(
        "--sizes", nargs="+", default=list(DEFAULT_SIZES), metavar="WxL", help="widths and layers (%(default)s)"
    )
    found.add_argument(
        "--budgets", type=int, default=5, help="budgets, each twice the one before (default: %(default)s)"
    )
    found.add_argument("--rates", type=float, nargs="+", help="learning rates to try; a single one is taken (three)")
    found.add_argument(
        "--transfer", action="store_true", help="tune the smallest size alone, and take its rate for all by muP"
    )
    found.add_argument("--setting", choices=tuple(SETTINGS), default="chameleon_speech", help="(default: %(default)s)")
    found.add_argument("--sequences", type=int, default=64, help="held-out rows of every loss (default: %(default)s)")
    found.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="(default: %(default)s)")
    found.add_argument("--jobs", type=int, help="runs at a time (default: one a GPU, or one a core)")
    found.add_argument("--configs", type=Path, default=Path("configs/mini"), help="settings (default: %(default)s)")
    found.add_argument("overrides", nargs="*", metavar="key=value", help="further changes of all configs")
    return found


def main() -> None:
    arguments: Any = parser().parse_intermixed_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    with exit_clearly():
        if arguments.published:
            from mom_tools.laws.published import report

            print(report())
            return
        check(arguments)
        import torch  # only to know the machine

        from mom_tools.laws.results import write_report

        cores = len(os.sched_getaffinity(0))
        arguments.gpus = torch.cuda.device_count()
        arguments.jobs = arguments.jobs or arguments.gpus or cores
        arguments.threads = max(1, cores // arguments.jobs)
        output: Path = arguments.output
        output.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(output / ".lock", timeout=0):
                state = state_of(output, arguments, arguments.setting)
                settings = prepare(arguments.corpus, output, arguments.configs, [], [state.setting])
                if state.setting not in settings:
                    needed = ", ".join(MODALITIES[state.setting])
                    raise UserError(
                        f"{arguments.corpus}: --setting {state.setting} needs {needed}, and not all are there"
                    )
                grid = Grid(output, arguments, state)
                complete = grid.run()
                print(write_report(output, grid.state, arguments.seeds, complete))
        except Timeout:
            raise UserError(f"{output}: another `mom laws` is at work there") from None


if __name__ == "__main__":
    main()
