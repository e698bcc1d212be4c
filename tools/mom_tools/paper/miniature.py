"""Repeat the paper in miniature: dense Mamba, Mixture-of-Mamba and a Transformer on your corpus, in three settings.

    mom paper-mini --corpus raw/ --minutes 480 --seeds 3 --output runs/paper-mini

Trains tokenizers and tokenizes the corpus (once, not counted in --minutes), times each model, chooses the steps that
fit the budget, tunes each architecture's learning rate with runs of half as many, then trains everything with one
seed, then with the next, and writes OUTPUT/report.md and results.json: Tables 2, 3, 4 and 7 beside the published ones.
All models of a setting see the same tokens with the same seed and have equal active FLOPs. A command that was killed
goes on when it is started again; with more --minutes, --seeds or --experiments it trains what is missing, with the same
number of steps.
--experiments adds rows to the Chameleon + Speech setting: learned routing, experts, wrong masks
(docs/explanation/experiments.md).
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from mom_data.shards.content import keep_inputs
from mom_tokenizers.errors import UserError, exit_clearly
from mom_tools.campaign import HELD_OUT, Campaign, as_overrides, step_seconds
from mom_tools.compare.curves import Run
from mom_tools.data.mixture import sources
from mom_tools.options import command_parser, named_rates
from mom_tools.paper.plan import (
    EVALUATIONS,
    EXPERIMENTS,
    EXPERIMENTS_IN,
    SETTINGS,
    TIMED_STEPS,
    Job,
    State,
    changes,
    seconds,
    sequences,
    steps_for,
    todo,
)
from mom_tools.paper.results import write_report
from mom_tools.processes import Processes

SHARES = {"text": 0.45, "image": 0.40, "speech": 0.15}  # of the tokens, scaled to the modalities of a setting
MODALITIES = {
    "chameleon_speech": ("text", "image", "speech"),
    "transfusion": ("text", "image"),
    "chameleon": ("text", "image"),
}
log = logging.getLogger("miniature")


# ---- data ----------------------------------------------------------------------------------------------------


def prepare(
    corpus: Path, output: Path, configs: Path, experiments: list[str], wanted: Sequence[str] = tuple(SETTINGS)
) -> list[str]:
    """Make the tokenizers and token shards of every setting of `wanted` whose modalities the corpus has, once;
    OUTPUT/data.json says that they are there. Returns the settings. Raises ValueError for a corpus without pictures, or
    without what the `experiments` need."""
    from mom_data.documents.document import expand_inputs  # here, for it imports torch

    place = str(corpus.resolve())
    record = output / "data.json"
    if record.exists():
        before = json.loads(record.read_text())
        if before["corpus"] != place:
            raise UserError(f"{output} was begun with {before['corpus']}; take another --output for {corpus}")
        if (output / "inputs.json").exists() and corpus.exists():
            keep_inputs(output, expand_inputs([place]))
        return before["settings"]
    from mom_tools.demo.demo import call, present_modalities  # here, for they import torch

    files = expand_inputs([place])
    split = (corpus / "train").is_dir() and (corpus / "val").is_dir()
    found = present_modalities(corpus / "train" if split else corpus)
    if "image" not in found:
        raise UserError(f"{corpus}: no pictures, which all settings of the paper have; found {', '.join(found)}")
    settings = [s for s in wanted if set(MODALITIES[s]) <= set(found)]
    chosen_experiments(experiments, settings)  # before hours of work
    keep_inputs(output, files)
    for setting in settings:
        kind = recipe(setting)
        known = yaml.safe_load((configs / f"{kind}_tokenizers.yaml").read_text())
        made = output / "tokenizers" / kind
        made.mkdir(parents=True, exist_ok=True)
        config = made / "recipe.yaml"
        config.write_text(yaml.safe_dump({m: known[m] for m in found if m in known}, sort_keys=False))
        train = corpus / "train" if split else corpus
        threads = len(os.sched_getaffinity(0))
        call("train-tokenizers", "--config", config, "--input", train, "--output", made, threads=threads)
        bundle = yaml.safe_load((made / "tokenizers.yaml").read_text())
        own = made / f"{setting}.yaml"
        own.write_text(yaml.safe_dump({m: bundle[m] for m in MODALITIES[setting]}, sort_keys=False))
        dropped = [m for m in found if m not in MODALITIES[setting]]
        for part in ("train", "val"):
            inputs: list[str | Path] = [corpus / part] if split else [corpus, "--split", part]
            target: list[str | Path] = ["--output", output / "tokens" / setting / part, "--config", own]
            drop: list[str | Path] = ["--drop-modalities", *dropped] if dropped else []
            call("tokenize", *target, "--input", *inputs, *drop)
    record.write_text(json.dumps({"corpus": place, "settings": settings}) + "\n")
    return settings


def chosen_experiments(wanted: list[str], settings: list[str]) -> list[str]:
    """The experiments that are named, in the order of EXPERIMENTS. Raises ValueError where the corpus does not have the
    modalities for them."""
    if wanted and EXPERIMENTS_IN not in settings:
        needed = ", ".join(MODALITIES[EXPERIMENTS_IN])
        raise UserError(f"--experiments: they are trained with {needed}, and the corpus has not all of these")
    return [name for name in EXPERIMENTS if name in wanted or "all" in wanted]


# ---- runs ----------------------------------------------------------------------------------------------------


def settle(state: State, rates: Sequence[float] | None, precision: str | None, fast: str) -> None:
    """Takes what a start asks for into the state: the learning rates to try, and the precision, without which `fast` is
    taken. Raises UserError where the miniature was begun with others, which its finished runs have."""
    if rates:
        wanted = {architecture: named_rates(rates) for architecture in state.rates}
        if state.steps and wanted != state.rates:
            raise UserError(
                f"--rates: this miniature was begun with {state.rates}; leave --rates out, or take another --output"
            )
        state.rates = wanted
    if not state.precision:  # a miniature begun before this was noted has none
        state.precision = "fp32" if state.finished else precision or fast
    if precision not in (None, state.precision):
        raise UserError(
            f"--precision {precision}: this miniature was begun with {state.precision}; leave --precision out, or take "
            "another --output"
        )


class Miniature(Campaign[Job]):
    """All runs of a miniature: those that are finished and those that run now."""

    def __init__(self, output: Path, arguments: argparse.Namespace, settings: list[str]):
        self.arguments = arguments
        self.state = State.load(output / "state.json")
        self.state.settings = settings
        self.state.experiments = chosen_experiments(arguments.experiments, settings)
        settle(self.state, arguments.rates, arguments.precision, arguments.fast_precision)
        self.full = yaml.safe_load((arguments.configs / "_full.yaml").read_text()) if arguments.full else {}
        common = yaml.safe_load((arguments.configs / "_common.yaml").read_text())
        check_no_ramp(common)
        self.batch: int = {**common["training"], **self.full.get("training", {})}["batch"]
        self.lanes: int = {**common["data"], **self.full.get("data", {})}["lanes"]
        processes = Processes(arguments.jobs, arguments.threads, arguments.gpus)
        super().__init__(output, self.state, arguments.minutes, processes)

    def todo(self) -> Iterator[Job]:
        return todo(self.state, self.arguments.seeds)

    def seconds(self, job: Job) -> float:
        return seconds(self.state, job, self.batch)

    def decide(self) -> None:
        state, wanted = self.state, self.arguments
        if state.steps:
            return
        missing = [f"{s}/{a}" for s in state.settings for a in SETTINGS[s] if f"{s}/{a}" not in state.per_step]
        if missing:
            raise UserError(f"runs of {TIMED_STEPS} steps failed: {', '.join(missing)}; see {self.output / 'logs'}")
        budget = 60 * wanted.minutes
        state.steps = steps_for(state, budget, wanted.jobs, wanted.seeds, self.batch, wanted.max_steps)
        log.info("%d steps a run; s/step %s", state.steps, {k: round(v, 3) for k, v in state.per_step.items()})

    def command(self, job: Job) -> tuple[str, list[str]]:
        return "mom_train.__main__", [str(self.arguments.configs / f"{job.setting}.yaml"), *self._overrides(job)]

    def _overrides(self, job: Job) -> list[str]:
        tokens = self.output / "tokens" / job.setting
        bundle = self.output / "tokenizers" / recipe(job.setting) / f"{job.setting}.yaml"
        vocabulary = {m: 1 if latents else n for m, n, latents in sizes(tokens / "train", MODALITIES[job.setting])}
        every = max(1, job.steps // EVALUATIONS)
        values = {
            **{f"{section}.{key}": v for section, keys in self.full.items() for key, v in keys.items()},
            "training.precision": self.state.precision,
            **changes(job.variant),
            "run_dir": str(self.directory(job)),
            "seed": job.seed,
            "vocabulary": vocabulary,
            **({"tokenizers": str(bundle)} if bundle.exists() else {}),  # shards may have come without
            "data.train": sources(tokens / "train", self.lanes, SHARES),
            "data.validation": {HELD_OUT: sources(tokens / "val", 1, SHARES)},
            "optimizer.learning_rate": job.rate,
            "optimizer.warmup": max(1, job.steps // 16),
            "training.steps": job.steps,
            "validation.every": every if job.kind == "run" else job.steps,
            "validation.sequences": sequences(job.steps, self.batch),
        }
        return as_overrides(values)

    def finish(self, job: Job, took: float, run: Run, loss: float) -> None:
        if job.kind == "time":
            known = f"{job.setting}/{job.variant}"
            self.state.per_step[known] = step_seconds(run, job.steps)
            self.state.startup[known] = max(0.0, took - job.steps * self.state.per_step[known])
        if job.kind != "run":
            self.forget_checkpoints(job)
        self.state.finished[job.id] = loss


def check_no_ramp(common: dict[str, Any]) -> None:
    """Raises UserError for a ramp of the batch: the steps are chosen here, and every step counts as a whole batch."""
    if common["training"].get("batch_ramp"):
        raise UserError(
            "_common.yaml: training.batch_ramp cannot be used here, because the steps are chosen to fit; leave it out"
        )


def recipe(setting: str) -> str:
    return "continuous" if setting == "transfusion" else "discrete"


def sizes(dataset: Path, modalities: tuple[str, ...]) -> list[tuple[str, int, bool]]:
    """(modality, number of ids, whether it is latents) for each modality of a token dataset."""
    tokenizers = json.loads((dataset / "manifest.json").read_text())["tokenizers"]
    return [(m, tokenizers[m]["size"], tokenizers[m]["kind"] == "kl") for m in modalities]


def check(arguments: argparse.Namespace) -> None:
    """Check the arguments before torch is imported. Raises UserError for an impossible value."""
    corpus: Path | None = arguments.corpus
    if corpus is None:
        raise UserError(
            "name the corpus to train on: make paper-mini CORPUS=path/to/raw/tars, or --corpus. It is a folder of tars "
            "or JSON lines with text, pictures and, for two of the three settings, speech "
            "(docs/reference/raw-documents.md)."
        )
    if not corpus.exists():
        raise UserError(f"--corpus {corpus}: nothing there")
    counts = (arguments.seeds, arguments.max_steps, 1 if arguments.jobs is None else arguments.jobs)
    if min(counts) < 1 or not 0 < arguments.minutes < math.inf:
        raise UserError("--seeds, --max-steps and --jobs must be at least 1, --minutes above 0")
    if not all(0 < rate < math.inf for rate in arguments.rates or ()):
        raise UserError("--rates: learning rates are above 0")
    if not (arguments.configs / "_common.yaml").is_file():
        raise UserError(f"--configs {arguments.configs}: no _common.yaml there")


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("--corpus", type=Path, help="folder of your raw tars, which may have train/ and val/")
    parser.add_argument("--output", type=Path, default=Path("runs/paper-mini"), help="folder (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=240, help="minutes of training, over all starts (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each model (default: %(default)s)")
    parser.add_argument(
        "--rates", type=float, nargs="+", help="learning rates to try; a single one is taken (default: three)"
    )
    known = ["all", *EXPERIMENTS]
    parser.add_argument("--experiments", nargs="+", choices=known, default=[], metavar="NAME", help=", ".join(known))
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), help="precision of matrix products (default: bf16 where it is fast)"
    )
    parser.add_argument("--full", action="store_true", help="use the sizes of the paper's 37M models, for a GPU")
    parser.add_argument("--jobs", type=int, help="runs at a time (default: one a GPU, or one a core)")
    parser.add_argument("--max-steps", type=int, default=20_000, help="most steps of a run (default: %(default)s)")
    default = Path("configs/mini")
    parser.add_argument("--configs", type=Path, default=default, help="settings and tokenizers (default: configs/mini)")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    with exit_clearly():
        check(arguments)
        import torch  # only to know the machine

        cores = len(os.sched_getaffinity(0))
        arguments.gpus = torch.cuda.device_count()
        cpu: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        arguments.fast_precision = "bf16" if arguments.gpus or cpu.get("amx_bf16") else "fp32"
        arguments.jobs = arguments.jobs or arguments.gpus or cores
        arguments.threads = max(1, cores // arguments.jobs)
        output: Path = arguments.output
        output.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(output / ".lock", timeout=0):
                settings = prepare(arguments.corpus, output, arguments.configs, arguments.experiments)
                miniature = Miniature(output, arguments, settings)
                complete = miniature.run()
                write_report(output, miniature.state, arguments.seeds, complete)
        except Timeout:
            raise UserError(f"{output}: another paper_mini is at work there") from None
        print((output / "report.md").read_text())


if __name__ == "__main__":
    main()
