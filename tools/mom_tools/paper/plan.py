"""Decides what the paper in miniature trains, in which order and for how long. All functions here are pure."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from mom_tokenizers.files import write_whole
from mom_tools.options import named_rates
from mom_train.config.model import PROJECTIONS

DENSE, MIXTURE, TRANSFORMER = "dense", "mixture", "transformer"
SETTINGS: dict[str, tuple[str, ...]] = {
    "chameleon_speech": (DENSE, MIXTURE),
    "transfusion": (DENSE, MIXTURE, TRANSFORMER),
    "chameleon": (DENSE, MIXTURE),
}
"""Setting -> architectures that the paper compares in it."""
ABLATION = ("in_proj", "dt_proj", "dt_proj+out_proj")
"""Rows of Table 3 besides none and all: the best single projection, a harmful one, and the best pair. They are trained
in chameleon_speech, at the mixture's learning rate."""
MODELS: dict[str, dict[str, Any]] = {
    DENSE: {"decoupled": []},
    MIXTURE: {"decoupled": list(PROJECTIONS)},
    **{row: {"decoupled": row.split("+")} for row in ABLATION},
    TRANSFORMER: {"architecture": "transformer", "heads": 8, "decoupled": []},
}
"""Variant -> its model section besides the sizes. All have the same active FLOPs per token; the Transformer to
2 % at rows of 512, and more at longer ones, where attention grows."""
EXPERIMENTS: dict[str, dict[str, Any]] = {
    "learned": {"model.router": "learned"},
    "learned-pool": {"model.router": "learned", "model.experts": 2},
    "experts-2": {"model.experts": 2},
    "corrupt-10": {"data.corrupt_share": 0.1},
    "corrupt-50": {"data.corrupt_share": 0.5},
    "corrupt-uninformative": {"data.corrupt_share": 2 / 3},
}
"""Experiment -> keys in which its config differs from the mixture's; docs/explanation/experiments.md explains each.
They are trained where they are asked for, in the setting EXPERIMENTS_IN, at the mixture's learning rate.
With M modalities a token that is routed
elsewhere at 1 - 1/M goes to each of them equally often, whatever it is: with three, at 2/3."""
EXPERIMENTS_IN = "chameleon_speech"
RATES = {DENSE: (2.5e-3, 5e-3, 1e-2), MIXTURE: (2.5e-3, 5e-3, 1e-2), TRANSFORMER: (1.25e-3, 2.5e-3, 5e-3)}
"""Learning rates tried first for each architecture; where the best is the first or last of them, its neighbour too."""
FEWEST_STEPS, TIMED_STEPS, EVALUATIONS = 20, 12, 16
SWEEP_SEED = 1000
RESERVE = 0.1
"""Share of the budget that the plan leaves free, for a machine that slows down."""
Kind = Literal["time", "sweep", "run"]


@dataclass(frozen=True)
class Job:
    """One training run."""

    kind: Kind
    setting: str
    variant: str
    seed: int
    rate: float
    steps: int

    @property
    def id(self) -> str:
        detail = {"time": "time", "sweep": f"lr-{self.rate:g}", "run": f"seed-{self.seed}"}[self.kind]
        return f"{self.setting}/{self.variant}/{detail}"


@dataclass
class State:
    """Everything that is needed to go on after a restart. It is kept in state.json."""

    settings: list[str] = field(default_factory=list)
    """Those that the corpus has the modalities for."""
    experiments: list[str] = field(default_factory=list)
    """Those of EXPERIMENTS that this start wants."""
    rates: dict[str, list[float]] = field(default_factory=lambda: {k: list(v) for k, v in RATES.items()})
    """Architecture -> learning rates that the sweep begins with; a single one is taken as it is."""
    precision: str = ""
    """Of the matrix products, in all runs; empty until the first start decides it."""
    spent: float = 0.0
    """Seconds of the budget, over all starts."""
    startup: dict[str, float] = field(default_factory=dict)
    """setting/variant -> seconds of a run besides its steps."""
    per_step: dict[str, float] = field(default_factory=dict)
    """setting/variant -> seconds of a step."""
    steps: int = 0
    """Of every run; 0 until it is decided."""
    finished: dict[str, float] = field(default_factory=dict)
    """Job -> held-out loss (total) at its end."""
    failed: dict[str, str] = field(default_factory=dict)
    """Job -> why, after a second try."""

    @staticmethod
    def load(path: Path) -> State:
        return State(**json.loads(path.read_text())) if path.exists() else State()

    def save(self, path: Path) -> None:
        write_whole(path, json.dumps(asdict(self), indent=1) + "\n")


def variants(setting: str, experiments: Sequence[str] = ()) -> tuple[str, ...]:
    further = tuple(experiments) if setting == EXPERIMENTS_IN else ()
    return SETTINGS[setting] + (ABLATION if setting == "chameleon_speech" else ()) + further


def tuned_as(variant: str) -> str:
    """The architecture from which a variant takes its learning rate."""
    return MIXTURE if variant in ABLATION or variant in EXPERIMENTS else variant


def changes(variant: str) -> dict[str, Any]:
    """The keys in which the config of a variant differs from that of its setting."""
    model = MODELS[MIXTURE if variant in EXPERIMENTS else variant]
    return {f"model.{key}": value for key, value in model.items()} | EXPERIMENTS.get(variant, {})


def routed(variant: str) -> bool:
    """Whether the variant has learned routers. They take more time than their FLOPs say, so such a variant is timed by
    itself."""
    return any(key.startswith("model.") for key in EXPERIMENTS.get(variant, {}))


def seconds(state: State, job: Job, batch: int) -> float:
    """The predicted seconds of a job, its evaluations included, where a forward pass costs a third of a step."""
    own = f"{job.setting}/{job.variant}"
    known = own if own in state.per_step else f"{job.setting}/{tuned_as(job.variant)}"
    evaluated = EVALUATIONS * sequences(job.steps, batch) / (3 * batch)
    return state.startup[known] + state.per_step[known] * (job.steps + evaluated)


def sequences(steps: int, batch: int) -> int:
    """The number of sequences of an evaluation: 128, or fewer where they would cost more than a tenth of the
    training."""
    return max(4, min(128, int(0.1 * 3 * steps * batch / EVALUATIONS)))


def swept(state: State, architecture: str) -> int:
    """The largest number of runs that a sweep can need, including a neighbour at the edge."""
    rates = state.rates[architecture]
    return len(rates) + 1 if len(rates) > 1 else 0


def sweep_steps(steps: int) -> int:
    """The steps of a run of the sweep: half of a whole run, because short runs prefer higher rates
    (docs/results/expected.md)."""
    return max(FEWEST_STEPS, steps // 2)


def steps_for(state: State, budget: float, slots: int, seeds: int, batch: int, most: int) -> int:
    """The steps of every run, chosen so that the sweep and all seeds fit the rest of `budget` seconds with `slots` runs
    at a time. It is never below FEWEST_STEPS, whatever the budget."""

    def needed(steps: int) -> float:
        total = 0.0
        for s in state.settings:
            for a in SETTINGS[s]:
                total += swept(state, a) * seconds(state, Job("sweep", s, a, 0, 0.0, sweep_steps(steps)), batch)
            for v in variants(s, state.experiments):
                total += seeds * seconds(state, Job("run", s, v, 0, 0.0, steps), batch)
        return total / slots

    low, high = FEWEST_STEPS, max(FEWEST_STEPS, most)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if needed(middle) <= (1 - RESERVE) * (budget - state.spent) else (low, middle - 1)
    return low


def tried(state: State, setting: str, architecture: str) -> dict[float, float]:
    """Learning rate -> held-out loss, for the finished runs of the sweep, smallest rate first."""
    prefix = f"{setting}/{architecture}/lr-"
    found = {float(i.removeprefix(prefix)): loss for i, loss in state.finished.items() if i.startswith(prefix)}
    return dict(sorted(found.items()))


def to_try(first: Sequence[float], done: Mapping[float, float], failed: Sequence[float]) -> list[float]:
    """The learning rates that are still to be tried: the `first` ones, in order, and then a neighbour where the best
    one is at the edge (once on each side). `done` has the losses of those that were tried, and `failed` those that
    could not be. All are as `named_rates` gives them. A single rate is taken as it is."""
    if len(first) == 1:
        return []
    if missing := [r for r in first if r not in done and r not in failed]:
        return missing
    if not done:
        return []
    best = min(done, key=lambda r: done[r])
    edge = {first[0]: first[0] / 2, first[-1]: first[-1] * 2}.get(best)
    return [] if edge is None else [rate for rate in named_rates([edge]) if rate not in done and rate not in failed]


def wanted_rates(state: State, setting: str, architecture: str) -> list[float]:
    """The rates that are still to be tried for an architecture."""
    first = state.rates[architecture]
    prefix = f"{setting}/{architecture}/lr-"
    failed = [float(i.removeprefix(prefix)) for i in state.failed if i.startswith(prefix)]
    return to_try(first, tried(state, setting, architecture), failed)


def best_rate(state: State, setting: str, architecture: str) -> float | None:
    """The best learning rate. None while some are still to be tried. The middle one where all of them failed."""
    if wanted_rates(state, setting, architecture):
        return None
    done = tried(state, setting, architecture)
    rates = state.rates[architecture]
    return min(done, key=lambda r: done[r]) if done else rates[len(rates) // 2]


def todo(state: State, seeds: int) -> Iterator[Job]:
    """The jobs that can start now, in the order in which they are wanted: the timing, the sweep, and then all runs with
    the first seed before any with the next. The main models of a setting come before the ablation, and that before
    experiments."""

    def open_(jobs: Iterator[Job]) -> list[Job]:
        return [j for j in jobs if j.id not in state.finished and j.id not in state.failed]

    pairs = [(s, a) for s in state.settings for a in SETTINGS[s]]
    further = [(s, v) for s in state.settings if s == EXPERIMENTS_IN for v in state.experiments]
    untimed = [x for x in pairs + [x for x in further if routed(x[1])] if "/".join(x) not in state.per_step]
    timing = open_(Job("time", s, v, SWEEP_SEED, state.rates[tuned_as(v)][0], TIMED_STEPS) for s, v in untimed)
    if timing or not state.steps:  # experiments can be asked for when the steps are long decided
        yield from timing
        return
    short = sweep_steps(state.steps)
    sweep = ((s, a, r) for s, a in pairs for r in wanted_rates(state, s, a))
    yield from open_(Job("sweep", s, a, SWEEP_SEED, r, short) for s, a, r in sweep)
    rows = [(s, v) for s in state.settings for v in SETTINGS[s]]
    rows += [(s, v) for s in state.settings for v in variants(s) if v not in SETTINGS[s]] + further
    for seed in range(seeds):
        rates = {(s, v): best_rate(state, s, tuned_as(v)) for s, v in rows}
        yield from open_(Job("run", s, v, seed, r, state.steps) for (s, v), r in rates.items() if r is not None)
        if None in rates.values():
            return  # cut short, the rounds are still even


def done_seeds(state: State, setting: str, variant: str, seeds: int) -> list[int]:
    return [k for k in range(seeds) if f"{setting}/{variant}/seed-{k}" in state.finished]


def common_seeds(state: State, setting: str, names: Sequence[str], seeds: int) -> list[int]:
    """The seeds with which all of the variants `names` are finished."""
    return [k for k in range(seeds) if all(f"{setting}/{v}/seed-{k}" in state.finished for v in names)]


def epochs(tokens: Mapping[str, float], stored: Mapping[str, int]) -> dict[str, float]:
    """Modality -> how many times a run trains on the tokens that are stored, brackets and the like included."""
    return {m: n / stored[m] for m, n in tokens.items() if stored.get(m)}
