"""Decides what `mom laws` trains, in which order and for how long. All functions here are pure.

A trunk is one run with a constant learning rate, for one model, size and seed. Budget k is 2^k times the smallest one.
For each budget a branch leaves the trunk and decays the rate over the last fifth of the budget's steps, so that five
budgets cost 0.61 of what five separate runs would (docs/how-to/branch-and-ramp.md).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from mom_tokenizers.errors import UserError
from mom_tokenizers.files import write_whole
from mom_tools.paper.plan import DENSE, MIXTURE, MODELS, RATES, RESERVE, SWEEP_SEED, TIMED_STEPS, to_try

ARCHITECTURES = (DENSE, MIXTURE, "transformer")
DECAY_SHARE = 0.2
"""Share of a budget's steps over which its branch decays (Hägele et al. 2024, arXiv 2405.18392)."""
FEWEST_STEPS = 20
"""Steps of the smallest budget, at least. With fewer, warm-up and decay would be all of it."""
Kind = Literal["time", "tune", "trunk", "branch"]


@dataclass(frozen=True)
class Size:
    """Width and layers of a model, written as 96x2. A layer of a Mamba is two blocks."""

    dim: int
    layers: int

    def __str__(self) -> str:
        return f"{self.dim}x{self.layers}"

    @staticmethod
    def parse(text: str) -> Size:
        """Raises UserError for anything but two whole numbers above 0 with an x between them."""
        found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
        if not found:
            raise UserError(f"--sizes {text}: a size is written as WIDTHxLAYERS, such as 96x2")
        return Size(int(found[1]), int(found[2]))


@dataclass(frozen=True)
class Job:
    """One training run."""

    kind: Kind
    model: str
    size: str
    seed: int
    rate: float
    steps: int
    """Steps at its end, those of the trunk included."""
    decay: int = 0
    """Steps of decay at its end."""
    budget: int = 0

    @property
    def folder(self) -> str:
        """The folder of a trunk, or of the job where it has none."""
        return f"{self.model}/{self.size}/seed-{self.seed}"

    @property
    def id(self) -> str:
        if self.kind == "time":
            return f"{self.model}/{self.size}/time"
        if self.kind == "tune":
            return f"{self.model}/{self.size}/lr-{self.rate:g}"
        return f"{self.folder}/trunk" if self.kind == "trunk" else f"{self.folder}/budget-{self.budget}"


@dataclass
class State:
    """Everything that is needed to go on after a restart. It is kept in state.json."""

    models: list[str]
    sizes: list[str]
    budgets: int
    setting: str
    transfer: bool
    """Whether only the smallest size is tuned, and the others take its rate by muP (model.base_dim)."""
    rates: dict[str, list[float]] = field(default_factory=lambda: {k: list(v) for k, v in RATES.items()})
    """Model -> learning rates that are tried first; a single one is taken as it is."""
    precision: str = "fp32"
    sequences: int = 64
    """Rows of the held-out set, the same in all runs."""
    overrides: list[str] | None = None
    """Further changes of all configs. None in a grid that was begun before they were noted."""
    spent: float = 0.0
    """Seconds over all starts."""
    startup: dict[str, float] = field(default_factory=dict)
    """model/size -> seconds of a run besides its steps."""
    per_step: dict[str, float] = field(default_factory=dict)
    """model/size -> seconds of a step."""
    flops: dict[str, float] = field(default_factory=dict)
    """model/size -> training FLOPs of a step."""
    base: float = 0.0
    """The smallest budget in training FLOPs; 0 until it is decided."""
    finished: dict[str, dict[str, float]] = field(default_factory=dict)
    """Job -> the last line of its metrics."""
    failed: dict[str, str] = field(default_factory=dict)
    """Job -> why, after a second try."""

    @staticmethod
    def load(path: Path) -> State:
        return State(**json.loads(path.read_text()))

    def save(self, path: Path) -> None:
        write_whole(path, json.dumps(asdict(self), indent=1) + "\n")

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """(model, size), the smallest sizes first."""
        return [(m, s) for s in self.sizes for m in self.models]


def plan_of(first: int, budgets: int) -> list[tuple[int, int]]:
    """(steps, decay) of each budget, where the smallest has `first` steps. Its decay begins at a step that divides all
    others, so that a checkpoint every so many steps is all that the branches need."""
    decay = max(1, round(DECAY_SHARE * first))
    return [(first * 2**k, decay * 2**k) for k in range(budgets)]


def first_steps(state: State, model: str, size: str, base: float = 0.0) -> int:
    """Steps of the smallest budget, to the nearest."""
    return max(2, round((base or state.base) / state.flops[f"{model}/{size}"]))


def trunk_steps(first: int, budgets: int) -> int:
    steps, decay = plan_of(first, budgets)[-1]
    return steps - decay


def tuned_budget(budgets: int) -> int:
    """The budget at which learning rates are tried: the middle one, because short runs prefer higher rates."""
    return budgets // 2


def tuned_at(state: State, size: str) -> str:
    """The size whose best learning rate a size takes."""
    return state.sizes[0] if state.transfer else size


def tried(state: State, model: str, size: str) -> dict[float, float]:
    """Learning rate -> held-out loss, for the finished runs of the sweep, smallest rate first."""
    prefix = f"{model}/{size}/lr-"
    found = {float(i.removeprefix(prefix)): last for i, last in state.finished.items() if i.startswith(prefix)}
    return {rate: last["val/held_out/loss/total"] for rate, last in sorted(found.items())}


def rates_to_try(state: State, model: str, size: str) -> list[float]:
    prefix = f"{model}/{size}/lr-"
    failed = [float(i.removeprefix(prefix)) for i in state.failed if i.startswith(prefix)]
    return to_try(state.rates[model], tried(state, model, size), failed)


def best_rate(state: State, model: str, size: str) -> float | None:
    """The best learning rate. None while some are still to be tried. The middle one where all of them failed."""
    size = tuned_at(state, size)
    if rates_to_try(state, model, size):
        return None
    done, rates = tried(state, model, size), state.rates[model]
    return min(done, key=lambda r: done[r]) if done else rates[len(rates) // 2]


def steps_taken(job: Job) -> int:
    """The steps that the job itself takes, without those that a branch takes over from its trunk."""
    return job.decay if job.kind == "branch" else job.steps


def seconds(state: State, job: Job, batch: int) -> float:
    """The predicted seconds of a job, its evaluation included, where a forward pass costs a third of a step."""
    known = f"{job.model}/{job.size}"
    return state.startup[known] + state.per_step[known] * (steps_taken(job) + state.sequences / (3 * batch))


def seed_jobs(state: State, model: str, size: str, seed: int, rate: float, base: float = 0.0) -> list[Job]:
    """The trunk of a model, size and seed, and then its branches."""
    first = first_steps(state, model, size, base)
    trunk = Job("trunk", model, size, seed, rate, trunk_steps(first, state.budgets))
    branches = [
        Job("branch", model, size, seed, rate, steps, decay, k)
        for k, (steps, decay) in enumerate(plan_of(first, state.budgets))
    ]
    return [trunk, *branches]


def tune_job(state: State, model: str, size: str, rate: float, base: float = 0.0) -> Job:
    first = first_steps(state, model, size, base)
    steps, decay = plan_of(first, state.budgets)[tuned_budget(state.budgets)]
    return Job("tune", model, size, SWEEP_SEED, rate, steps, decay)


def planned_seconds(state: State, base: float, slots: int, seeds: int, batch: int) -> float:
    """The seconds of everything, with `slots` runs at a time: sweeps with a neighbour at the edge, and all seeds."""
    total = 0.0
    for model, size in state.pairs:
        rates = state.rates[model]
        if len(rates) > 1 and size == tuned_at(state, size):
            total += (len(rates) + 1) * seconds(state, tune_job(state, model, size, rates[0], base), batch)
        total += seeds * sum(seconds(state, j, batch) for j in seed_jobs(state, model, size, 0, rates[0], base))
    return total / slots


def smallest_budget(state: State, available: float, slots: int, seeds: int, batch: int) -> float:
    """The smallest budget in FLOPs, chosen so that everything takes `available` seconds. Raises UserError where the
    largest model would then take fewer than FEWEST_STEPS, and says how long it would have to be."""
    least = FEWEST_STEPS * max(state.flops.values())
    available *= 1 - RESERVE
    needed = planned_seconds(state, least, slots, seeds, batch)
    if needed > available:
        minutes = (needed + state.spent) / (1 - RESERVE) / 60
        raise UserError(
            f"the grid of {len(state.pairs)} models, {state.budgets} budgets and {seeds} seeds needs at least "
            f"{minutes:.0f} minutes on this machine; give more --minutes, or fewer --sizes, --budgets or --seeds"
        )
    low, high = least, least
    while planned_seconds(state, high, slots, seeds, batch) <= available:
        low, high = high, 2 * high
    for _ in range(40):
        middle = (low * high) ** 0.5
        if planned_seconds(state, middle, slots, seeds, batch) <= available:
            low = middle
        else:
            high = middle
    return low


def todo(state: State, seeds: int) -> Iterator[Job]:
    """The jobs that can start now, in the order in which they are wanted: the timing, the sweep, and then all runs of
    one seed before any of the next. A branch comes when its trunk is finished."""

    def open_(jobs: Sequence[Job]) -> list[Job]:
        return [j for j in jobs if j.id not in state.finished and j.id not in state.failed]

    if not state.base:
        yield from open_([Job("time", m, s, SWEEP_SEED, state.rates[m][0], TIMED_STEPS) for m, s in state.pairs])
        return
    tuned = [(m, s) for m, s in state.pairs if s == tuned_at(state, s)]
    yield from open_([tune_job(state, m, s, r) for m, s in tuned for r in rates_to_try(state, m, s)])
    for seed in range(seeds):
        waiting = False
        for model, size in state.pairs:
            if (rate := best_rate(state, model, size)) is None:
                waiting = True
                continue
            trunk, *branches = seed_jobs(state, model, size, seed, rate)
            if trunk.id in state.finished:
                yield from open_(branches)
            else:
                yield from open_([trunk])
        if waiting:
            return  # cut short, the rounds are still even


def heads_of(dim: int) -> int:
    """The number of attention heads of a Transformer of this width: as many as leave each at least 24 wide."""
    return max(h for h in range(1, 17) if dim % (2 * h) == 0 and dim // h >= min(24, dim))


def changes(state: State, job: Job) -> dict[str, Any]:
    """The keys in which the config of a job differs from that of its setting, besides its data."""
    size = Size.parse(job.size)
    model: dict[str, Any] = MODELS[job.model] | {"dim": size.dim, "layers": size.layers}
    if job.model == "transformer":
        model["heads"] = heads_of(size.dim)
    if state.transfer:
        base = Size.parse(state.sizes[0]).dim
        model["base_dim"] = base
        if job.model == "transformer":
            model["base_heads"] = heads_of(base)
    first = plan_of(first_steps(state, job.model, job.size), 1)[0] if state.base else (TIMED_STEPS, 1)
    every = first[0] - first[1]  # where branches may leave the trunk
    schedule: dict[str, Any] = {"schedule": "constant"}
    if job.decay:
        schedule = {"schedule": "wsd", "decay": job.decay, "decay_shape": "sqrt"}
    return {
        **{f"model.{key}": value for key, value in model.items()},
        **{f"optimizer.{key}": value for key, value in schedule.items()},
        "optimizer.learning_rate": job.rate,
        "optimizer.warmup": max(1, every // 4),
        "seed": job.seed,
        "training.steps": job.steps,
        "training.precision": state.precision,
        "validation.every": job.steps,
        "validation.sequences": state.sequences,
        **({"checkpoint.keep_every": every} if job.kind == "trunk" else {}),
    }
