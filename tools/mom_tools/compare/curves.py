"""Loss curves of runs over training FLOPs, and how those of two models compare.

docs/explanation/judging.md has the definitions.

Letters: N points of a curve, R runs (seeds) of one model, G points that these runs share.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from mom_data.order.forecast import FEW_TARGETS
from mom_tokenizers.errors import UserError
from mom_train.config.files import differences, read_saved, with_defaults
from mom_train.observe.metrics import read_metrics

WINDOW = 0.1
"""Training losses are averaged over this last share of the FLOPs spent so far."""
_LOSS = re.compile(r"(val/[^/]+/)?loss/[^/]+")
_REPLICATES = 2000
_SHOWN = 6  # differences between runs, in a warning
_FEWEST_LINES = 20  # in the window, for a bootstrap
Interval = tuple[float, float] | None
AXES = {"steps": "steps", "tokens": "tokens", "flops": "training FLOPs"}


def tokens_of(line: dict[str, float]) -> dict[str, float]:
    """Modality -> input tokens trained on so far."""
    return {name.removeprefix("tokens/"): n for name, n in line.items() if name.startswith("tokens/")}


@dataclass(frozen=True)
class Run:
    path: Path

    @cached_property
    def lines(self) -> list[dict[str, float]]:
        if not (self.path / "metrics.jsonl").is_file():
            raise UserError(f"{self.path}: no metrics.jsonl, so not a run directory (or one that has not begun)")
        return read_metrics(self.path)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The config as it was resolved when the run started, in today's schema; empty where there is none."""
        return with_defaults(read_saved(self.path))

    @property
    def seed(self) -> int | None:
        return self.config.get("seed")

    @property
    def names(self) -> list[str]:
        """The names of the run's losses: loss/<modality>, then val/<set>/loss/<modality>."""
        found = dict.fromkeys(name for line in self.lines for name in line if _LOSS.fullmatch(name))
        return sorted(found, key=lambda name: name.startswith("val/"))

    def targets(self, name: str) -> int | None:
        """About how many targets one value of a validation loss is a mean of, at most: the positions that a validation
        reads, times the modality's share of the tokens trained on. None where the run does not say."""
        modality = name.rpartition("/")[2]
        sequences = self.config.get("validation", {}).get("sequences")
        length = self.config.get("data", {}).get("sequence_length")
        tokens: dict[str, float] = next((t for line in reversed(self.lines) if (t := tokens_of(line))), {})
        if not name.startswith("val/") or None in (sequences, length) or not sum(tokens.values()):
            return None
        share = 1.0 if modality == "total" else tokens.get(modality, 0.0) / sum(tokens.values())
        return round(sequences * length * share)

    def over(self, name: str, axis: str) -> tuple[np.ndarray, np.ndarray]:
        """(x (N,), y (N,)): the values logged as `name`, over one of AXES."""
        known = {"steps": "step", "flops": "flops/total"}
        points = []
        for line in self.lines:
            x = sum(tokens_of(line).values()) if axis == "tokens" else line.get(known[axis], 0)
            if name in line and (x or not line["step"]):
                points.append((x, line[name]))
        x_N, y_N = np.array(points, dtype=np.float64).reshape(-1, 2).T
        return x_N, y_N

    def curve(self, name: str, window: float) -> tuple[np.ndarray, np.ndarray]:
        """(FLOPs (N,), loss (N,)), a training loss smoothed over `window`. Raises ValueError where it is not logged."""
        flops, values = self.over(name, "flops")
        if not len(flops):
            raise UserError(f"{self.path}: metrics.jsonl has no {name} with flops/total")
        return flops, values if name.startswith("val/") else smoothed(flops, values, window)


def smoothed(flops_N: np.ndarray, loss_N: np.ndarray, window: float) -> np.ndarray:
    """The mean loss over the last `window` share of the FLOPs spent at each point, (N,).

    A logged loss stands for the FLOPs since the one before. A window that grows with FLOPs delays every curve by the
    same factor, so a model that needs r times another's FLOPs still does after smoothing.
    """
    assert 0 <= window < 1
    if window == 0:
        return loss_N
    spent = np.r_[0.0, flops_N]
    area = np.r_[0.0, np.cumsum(loss_N * np.diff(spent))]
    since = (1 - window) * flops_N
    return (area[1:] - np.interp(since, spent, area)) / (flops_N - since)


def first_reach(flops_N: np.ndarray, loss_N: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """FLOPs at which the curve first is at or below each target; nan where it never is. Shape of `targets`.

    Between two points the loss is taken to be linear in log FLOPs (in FLOPs where the first point has spent none).
    """
    lowest = np.minimum.accumulate(loss_N)
    after = np.searchsorted(-lowest, -targets, side="left")  # the first point at or below
    reached = after < len(loss_N)
    i = np.where(reached, after, 0)
    before = np.maximum(i - 1, 0)
    drop = loss_N[before] - loss_N[i]
    part = np.divide(loss_N[before] - targets, drop, out=np.ones_like(drop), where=drop > 0)
    left, right = flops_N[before], flops_N[i]
    curved = left > 0
    ratio = np.where(curved, right / np.where(curved, left, 1.0), 1.0)
    at = np.where(curved, left * ratio**part, left + (right - left) * part)
    return np.where(reached, at, np.nan)


@dataclass(frozen=True)
class Model:
    """The curves of one model's runs (seeds) for one loss."""

    flops_G: np.ndarray
    """(G,): mean FLOPs of the runs at the same share of their training."""
    loss_RG: np.ndarray

    @staticmethod
    def of(runs: Sequence[Run], name: str, window: float) -> Model:
        """The curves of `runs`. Raises UserError where runs of one model were trained for different FLOPs."""
        curves = [run.curve(name, window) for run in runs]
        ends = np.array([flops[-1] for flops, _ in curves])
        if ends.max() > 1.2 * ends.min():  # padding varies with the seed, in short runs by a tenth
            said = ", ".join(f"{run.path} {end:.3g}" for run, end in zip(runs, ends, strict=True))
            raise UserError(f"runs of one model must have spent the same FLOPs, to 20 %: {said}")
        share = curves[0][0] / ends[0]
        loss_RG = np.stack([np.interp(share, f / end, loss) for (f, loss), end in zip(curves, ends, strict=True)])
        return Model(share * ends.mean(), loss_RG)

    def loss(self, keep: Sequence[int]) -> np.ndarray:
        return self.loss_RG[list(keep)].mean(0)

    @property
    def all(self) -> list[int]:
        return list(range(len(self.loss_RG)))


@dataclass(frozen=True)
class Comparison:
    """How a candidate does on one loss, in percent of the baseline. Intervals are of 95 %, None where there is none."""

    gain_percent: float
    """(baseline's final loss - candidate's) / baseline's."""
    gain_interval: Interval
    relative_flops_percent: float | None
    """The candidate's FLOPs when it first reaches the baseline's final loss, over the baseline's at its end. None where
    it never does."""
    relative_flops_interval: Interval
    baseline_reach_percent: float
    """When the baseline first reaches its own final loss, in percent of its FLOPs: 100, or less where noise
    dips below early.
    FLOPs to match say something where they are below this."""
    baseline_loss: float
    candidate_loss: float
    baseline_flops: float
    candidate_flops: float
    runs: tuple[int, int]
    """Number of runs of the baseline and of the candidate."""
    interval_from: str | None
    """`pairs` of seeds, `seeds` (not paired), or `blocks` of one run's last training losses."""


def compare(baseline: Sequence[Run], candidate: Sequence[Run], window: float = WINDOW) -> dict[str, Comparison]:
    """Name of each loss that all runs have in common -> its comparison. Raises UserError where there is none."""
    if not 0 <= window < 1:
        raise UserError(f"the window is a share of the FLOPs, from 0 to below 1, not {window}")
    common = [n for n in baseline[0].names if all(n in run.names for run in (*baseline, *candidate))]
    if not common:
        raise UserError(f"{baseline[0].path} and the others have no loss in common")
    baseline, candidate = in_pairs(baseline, candidate)
    return {name: _compare(baseline, candidate, name, window) for name in common}


def unlike(baseline: Sequence[Run], candidate: Sequence[Run]) -> str | None:
    """A warning that names what decides which tokens a loss is of, where the runs' configs differ in it: then their
    losses differ for more than their models."""
    keys = ("vocabulary", "tokenizers", "data.sequence_length", "data.train", "data.validation", "validation.sequences")
    first, *others = (*baseline, *candidate)
    said = []
    for run in others:
        for key in keys:
            section, _, leaf = key.partition(".")
            was, now = (r.config.get(section, {}) for r in (first, run))
            if leaf:
                was, now = was.get(leaf), now.get(leaf)
            said += [f"{run.path}: {line}" for line in differences(was, now, key)]
    if not said:
        return None
    listed = "; ".join(said[:_SHOWN]) + (f"; and {len(said) - _SHOWN} more" if len(said) > _SHOWN else "")
    return (
        "The runs differ in more than their models, so their losses may not be of the same tokens "
        f"({first.path} -> the other): {listed}"
    )


def few_targets(counts: dict[str, int]) -> str | None:
    """A warning that names the losses (name -> targets) which are means of too few targets to decide anything by.

    One token's loss spreads about as much as its mean, so a mean of n targets has a standard error of about
    1 / sqrt(n): 2 % at FEW_TARGETS, which is as much as models are apart, and 8 % at 176.
    """
    few = {name: n for name, n in counts.items() if 0 < n < FEW_TARGETS}
    if not few:
        return None
    listed = ", ".join(f"{name} {n:,} (about ±{100 / math.sqrt(n):.0f} %)" for name, n in few.items())
    return f"Few targets, so chance alone may decide: {listed}. Validate on {FEW_TARGETS:,} or more."


def in_pairs(baseline: Sequence[Run], candidate: Sequence[Run]) -> tuple[list[Run], list[Run]]:
    """Both sides in the order of their seeds where these are the same ones, as given otherwise."""
    seeds_b, seeds_c = [r.seed for r in baseline], [r.seed for r in candidate]
    if None in seeds_b or None in seeds_c or sorted(map(str, seeds_b)) != sorted(map(str, seeds_c)):
        return list(baseline), list(candidate)
    return sorted(baseline, key=lambda r: r.seed or 0), sorted(candidate, key=lambda r: r.seed or 0)


def _compare(baseline: Sequence[Run], candidate: Sequence[Run], name: str, window: float) -> Comparison:
    b, c = Model.of(baseline, name, window), Model.of(candidate, name, window)

    def gain(keep_b: Sequence[int], keep_c: Sequence[int]) -> float:
        return 100 * (1 - c.loss(keep_c)[-1] / b.loss(keep_b)[-1])

    def log_flops(keep_b: Sequence[int], keep_c: Sequence[int]) -> float:
        at = first_reach(c.flops_G, c.loss(keep_c), b.loss(keep_b)[-1:])[0] / b.flops_G[-1]
        return math.log(at) if at > 0 else math.nan if math.isnan(at) else -math.inf

    runs = len(baseline), len(candidate)
    log_relative = log_flops(b.all, c.all)
    own = first_reach(b.flops_G, b.loss(b.all), b.loss(b.all)[-1:])
    gain_interval, flops_interval, source = None, None, None
    if min(runs) > 1:
        source = "pairs" if runs[0] == runs[1] else "seeds"
        gain_interval = _jackknife(gain, *runs)
        if (logs := _jackknife(log_flops, *runs)) is not None:
            flops_interval = 100 * math.exp(logs[0]), 100 * math.exp(logs[1])
    elif runs == (1, 1) and not name.startswith("val/"):
        gain_interval = _bootstrap(baseline[0], candidate[0], name, window)
        source = "blocks" if gain_interval is not None else None
    return Comparison(
        gain_percent=gain(b.all, c.all),
        gain_interval=gain_interval,
        relative_flops_percent=None if math.isnan(log_relative) else 100 * math.exp(log_relative),
        relative_flops_interval=flops_interval,
        baseline_reach_percent=100 * float(own[0] / b.flops_G[-1]),
        baseline_loss=float(b.loss(b.all)[-1]),
        candidate_loss=float(c.loss(c.all)[-1]),
        baseline_flops=float(b.flops_G[-1]),
        candidate_flops=float(c.flops_G[-1]),
        runs=runs,
        interval_from=source,
    )


def _jackknife(statistic: Callable[[Sequence[int], Sequence[int]], float], n_b: int, n_c: int) -> Interval:
    """A t interval around statistic(all, all), its variance from leaving out one pair of runs at a time, or one run of
    either side where they are not as many. None where the statistic does not exist without one of them."""

    def without(k: int, n: int) -> list[int]:
        return [i for i in range(n) if i != k]

    everything = list(range(n_b)), list(range(n_c))
    if n_b == n_c:
        groups = [[statistic(without(k, n_b), without(k, n_c)) for k in range(n_b)]]
    else:
        groups = [
            [statistic(without(k, n_b), everything[1]) for k in range(n_b)],
            [statistic(everything[0], without(k, n_c)) for k in range(n_c)],
        ]
    middle = statistic(*everything)
    if not np.isfinite([middle, *(x for group in groups for x in group)]).all():
        return None
    variances = [(len(group) - 1) * float(np.var(group)) for group in groups]
    spread = sum(variances)
    if spread == 0:
        return middle, middle
    freedom = spread**2 / sum(v**2 / (len(group) - 1) for v, group in zip(variances, groups, strict=True))
    half = float(stats.t.ppf(0.975, int(freedom + 1e-9))) * math.sqrt(spread)
    return middle - half, middle + half


def _bootstrap(baseline: Run, candidate: Run, name: str, window: float) -> Interval:
    """Percentiles of the gain over resampled blocks of the losses in the last window: what the choice of batches
    explains, not what another seed would. The same blocks on both sides where both saw the same data."""
    last = []
    for run in (baseline, candidate):
        flops, losses = run.over(name, "flops")
        last.append(losses[flops > (1 - window) * flops[-1]])
    if min(map(len, last)) < _FEWEST_LINES:
        return None
    rng = np.random.default_rng(0)
    same = len(last[0]) == len(last[1]) and baseline.config and _order(baseline) == _order(candidate)
    means = []
    for number, losses in enumerate(last):
        if number == 0 or not same:
            length = math.ceil(math.sqrt(len(losses)))
            starts = rng.integers(0, len(losses), (_REPLICATES, -(-len(losses) // length), 1))
            chosen = ((starts + np.arange(length)) % len(losses)).reshape(_REPLICATES, -1)[:, : len(losses)]
        means.append(losses[chosen].mean(1))
    low, high = np.percentile(100 * (1 - means[1] / means[0]), [2.5, 97.5])
    return float(low), float(high)


def _order(run: Run) -> list[Any]:
    """The settings that decide which data a step sees. How tokens are routed is not among them."""
    data = {key: value for key, value in run.config.get("data", {}).items() if key != "corrupt_share"}
    return [run.config.get("seed"), data, run.config.get("training", {}).get("batch")]
