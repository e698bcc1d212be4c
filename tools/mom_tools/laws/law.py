"""A scaling law: its fit to losses, what it says is optimal, and the intervals of both.

The law is L(N, D) = E + A (N / n0)^-alpha + B (D / d0)^-beta (Hoffmann et al. 2022, arXiv 2203.15556, approach 3), with
N parameters and D tokens. n0 and d0 are the geometric means of the points, so that A and B are losses in nats and
hardly depend on the exponents.

The fit is by variable projection: for given exponents, E, A and B follow from linear least squares without negative
values, so only two numbers are searched. That finds the best fit wherever one starts, which a descent in all five
numbers does not (Besiroglu et al. 2024, arXiv 2404.10102).

The intervals are from a wild cluster bootstrap (Cameron, Gelbach and Miller 2008) with Webb's six weights. A cluster is
one training trunk: all of its branches share their data and most of their steps, so their errors are not independent.
Each replicate multiplies the residuals of a cluster by one random weight, and fits again. An error of the law itself,
which the residuals hold too, widens the intervals. With K clusters and k constants, residuals are too small by about
(K - k) / K, which is made good; with K <= k, such as four sizes and one seed, they say nothing, and there are no
intervals.

Letters: P points, K clusters, R replicates (the first is the fit itself), G points of a grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
"""Coverage of all intervals."""
SMALLEST_EXPONENT, LARGEST_EXPONENT = 0.02, 2.0
_COARSE = 25  # exponents tried along each side of the first grid
_REFINEMENTS = 7  # after these the exponents are known to 0.1 %
_WEBB = np.sqrt(np.array([1.5, 1.0, 0.5]))  # and their negatives: mean 0, variance 1
_SUBSETS = ((0, 1, 2), (0, 1), (0, 2), (1, 2), (0,), (1,), (2,))  # of E, A, B: those that are not held at 0
_ROOM = 1e3  # sizes and budgets are searched this far beyond those of the grid
_GRID = 120  # budgets, and sizes, that are compared


@dataclass(frozen=True)
class Law:
    """A fitted law and its bootstrap replicates. Every array has R values, and the first belongs to the fit itself."""

    E_R: np.ndarray
    """The loss that no size and no amount of data goes below, in nats."""
    A_R: np.ndarray
    """What a model of n0 parameters loses for its size, in nats."""
    alpha_R: np.ndarray
    B_R: np.ndarray
    """What training on d0 tokens loses for its length, in nats. 0 where all points have the same number of tokens."""
    beta_R: np.ndarray
    n0: float
    d0: float
    residual: float
    """Root mean square of the residuals, in nats."""

    def loss(self, sizes: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """The loss of every replicate, (R, ...), at `sizes` and `tokens`, which may be broadcast to (...) or to
        (R, ...)."""
        shape = (-1,) + (1,) * np.broadcast(sizes, tokens).ndim
        E, A, alpha, B, beta = (x.reshape(shape) for x in (self.E_R, self.A_R, self.alpha_R, self.B_R, self.beta_R))
        return E + A * (sizes / self.n0) ** -alpha + B * (tokens / self.d0) ** -beta

    @property
    def at_a_bound(self) -> float:
        """The share of the replicates in which a constant is 0 or an exponent is at the end of the search."""
        ends = (SMALLEST_EXPONENT * 1.01, LARGEST_EXPONENT / 1.01)
        bound = (self.E_R <= 0) | (self.A_R <= 0) | (self.alpha_R < ends[0]) | (self.alpha_R > ends[1])
        if self.B_R[0] > 0:
            bound |= (self.B_R <= 0) | (self.beta_R < ends[0]) | (self.beta_R > ends[1])
        return float(bound.mean())


def fit(
    sizes_P: np.ndarray,
    tokens_P: np.ndarray,
    losses_P: np.ndarray,
    clusters_P: Sequence[object] = (),
    replicates: int = 0,
    seed: int = 0,
) -> Law:
    """Fit a law to points. Where all points have the same number of tokens, the term in D is left out.

    `clusters_P` names the cluster of each point. The weight of a cluster depends on its name, `seed` and the replicate
    only, so that laws of two models whose clusters have the same names are resampled in pairs. There are no replicates
    where there are no more clusters than constants. Raises ValueError for fewer points than constants.
    """
    sizes_P, tokens_P, losses_P = (np.asarray(x, dtype=np.float64) for x in (sizes_P, tokens_P, losses_P))
    with_tokens = bool(np.ptp(np.log(tokens_P)) > 0.05)
    constants = 5 if with_tokens else 3
    if len(losses_P) < constants:
        raise ValueError(f"a law of {constants} constants needs as many points, and there are {len(losses_P)}")
    n0, d0 = (float(np.exp(np.log(x).mean())) for x in (sizes_P, tokens_P))
    n_P, d_P = np.log(sizes_P / n0), np.log(tokens_P / d0)
    first = _search(n_P, d_P, losses_P[None], with_tokens)
    fitted_P = _predicted(first, n_P, d_P)[0]
    residuals_P = losses_P - fitted_P
    found = first
    clusters = len(set(clusters_P))
    if replicates and clusters > constants:
        weights_RP = _weights(clusters_P, replicates, seed)
        scale = math.sqrt(clusters / (clusters - constants))
        found = np.concatenate(
            [first, _search(n_P, d_P, fitted_P + scale * weights_RP * residuals_P, with_tokens)], axis=1
        )
    E_R, A_R, B_R, alpha_R, beta_R = found
    return Law(E_R, A_R, alpha_R, B_R, beta_R, n0, d0, float(np.sqrt((residuals_P**2).mean())))


def _weights(clusters_P: Sequence[object], replicates: int, seed: int) -> np.ndarray:
    """The weight of each point in each replicate, (R, P)."""
    drawn = {}
    for name in dict.fromkeys(clusters_P):
        key = [seed, *str(name).encode()]
        drawn[name] = np.random.default_rng(key).choice(np.r_[_WEBB, -_WEBB], replicates)
    return np.stack([drawn[name] for name in clusters_P], axis=1)


def _predicted(found: np.ndarray, n_P: np.ndarray, d_P: np.ndarray) -> np.ndarray:
    """The losses (R, P) of laws (5, R), whose rows are E, A, B, alpha and beta, at centred logarithms of N and D."""
    E, A, B, alpha, beta = found[:, :, None]
    return E + A * np.exp(-alpha * n_P) + B * np.exp(-beta * d_P)


def _search(n_P: np.ndarray, d_P: np.ndarray, losses_RP: np.ndarray, with_tokens: bool) -> np.ndarray:
    """The least-squares fits of R sets of losses at the same points, (5, R): E, A, B, alpha, beta.

    A coarse grid of exponents, with one design for all sets, and then finer grids around the best of each set.
    """
    sets = len(losses_RP)
    span = math.log(LARGEST_EXPONENT / SMALLEST_EXPONENT)
    axis = np.linspace(0, span, _COARSE)
    exponents_G2 = np.stack(np.meshgrid(axis, axis if with_tokens else axis[:1], indexing="ij"), -1).reshape(-1, 2)
    best_R2, lowest_R, constants_R3 = np.zeros((sets, 2)), np.full(sets, np.inf), np.zeros((sets, 3))
    step = axis[1]
    for level in range(_REFINEMENTS + 1):
        if level:
            step /= 2.5
            offsets = np.arange(-2, 3) * step
            around = np.stack(np.meshgrid(offsets, offsets if with_tokens else [0.0], indexing="ij"), -1).reshape(-1, 2)
            tried_RG2 = np.clip(best_R2[:, None] + around, 0, span)
        else:
            tried_RG2 = exponents_G2[None]
        squares_RG, constants_RG3 = _nonnegative(n_P, d_P, losses_RP, tried_RG2, with_tokens)
        chosen = squares_RG.argmin(1)
        every = np.arange(sets)
        better = squares_RG[every, chosen] < lowest_R
        picked_R2 = np.broadcast_to(tried_RG2, (sets, *tried_RG2.shape[1:]))[every, chosen]
        best_R2[better] = picked_R2[better]
        lowest_R[better] = squares_RG[every, chosen][better]
        constants_R3[better] = constants_RG3[every, chosen][better]
    alpha_R, beta_R = SMALLEST_EXPONENT * np.exp(best_R2.T)
    return np.stack([*constants_R3.T, alpha_R, beta_R])


def _nonnegative(
    n_P: np.ndarray, d_P: np.ndarray, losses_RP: np.ndarray, tried_XG2: np.ndarray, with_tokens: bool
) -> tuple[np.ndarray, np.ndarray]:
    """(sum of squares (R, G), constants (R, G, 3)) of the best E, A, B >= 0 for each pair of exponents.

    X is 1 where all sets try the same exponents, and R otherwise. The best fit without negative constants is the best
    of the plain least-squares fits to a subset of the columns in which none is negative.
    """
    alpha, beta = SMALLEST_EXPONENT * np.exp(np.moveaxis(tried_XG2, -1, 0))[..., None]  # (X, G, 1)
    columns_XG3P = np.stack(
        [np.ones(np.broadcast_shapes(alpha.shape, n_P.shape)), np.exp(-alpha * n_P), np.exp(-beta * d_P)], -2
    )
    shape = (len(losses_RP), tried_XG2.shape[1])
    lowest, constants = np.full(shape, np.inf), np.zeros((*shape, 3))
    sets = np.arange(len(losses_RP))
    for subset in _SUBSETS if with_tokens else _SUBSETS[1:2] + _SUBSETS[4:6]:
        if not len(sets):
            break
        basis_XGsP = columns_XG3P[sets if len(columns_XG3P) > 1 else [0]][..., list(subset), :]
        squares, solved = _least_squares(basis_XGsP, losses_RP[sets])
        better = (solved >= 0).all(-1) & (squares < lowest[sets])
        lowest[sets] = np.where(better, squares, lowest[sets])
        placed = np.zeros((*better.shape, 3))
        placed[..., list(subset)] = solved
        constants[sets] = np.where(better[..., None], placed, constants[sets])
        if len(subset) == 2 + with_tokens:  # where all columns do without a negative constant, nothing fits better
            sets = np.flatnonzero(~np.isfinite(lowest).all(1))
    return lowest, constants


def _least_squares(basis_XGsP: np.ndarray, losses_RP: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(sum of squares (R, G), constants (R, G, s)) of the plain least-squares fits of s columns."""
    q, r = np.linalg.qr(np.swapaxes(basis_XGsP, -1, -2))
    if len(basis_XGsP) == 1:
        projected = np.tensordot(losses_RP, q[0], (1, 1))
    else:
        projected = (losses_RP[:, None, None] @ q)[..., 0, :]
    solved = np.linalg.solve(np.broadcast_to(r, (*projected.shape[:2], *r.shape[2:])), projected[..., None])[..., 0]
    return (losses_RP**2).sum(1)[:, None] - (projected**2).sum(-1), solved


# ---- what is optimal --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """Training FLOPs per token as a function of the size: a straight line between the measured points in logarithms,
    and beyond them with the slope of the last two."""

    sizes: tuple[float, ...]
    per_token: tuple[float, ...]

    def __call__(self, sizes: np.ndarray) -> np.ndarray:
        x, y = np.log(self.sizes), np.log(self.per_token)
        at = np.log(np.asarray(sizes, dtype=np.float64))
        inside = np.interp(at, x, y)
        if len(x) == 1:
            return np.exp(y[0] + at - x[0])
        low = y[0] + (at - x[0]) * (y[1] - y[0]) / (x[1] - x[0])
        high = y[-1] + (at - x[-1]) * (y[-1] - y[-2]) / (x[-1] - x[-2])
        return np.exp(np.where(at < x[0], low, np.where(at > x[-1], high, inside)))


def frontier(law: Law, cost: Cost, flops_G: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the lowest loss that a budget buys, the size that reaches it), each (R, G), for budgets in training FLOPs.

    Sizes from 1,000 times below the smallest to 1,000 times above the largest are compared, and a parabola through
    the best and its neighbours gives the size between them.
    """
    sizes_S = np.geomspace(cost.sizes[0] / _ROOM, cost.sizes[-1] * _ROOM, _GRID)
    tokens_GS = flops_G[:, None] / cost(sizes_S)
    losses_RGS = law.loss(sizes_S, tokens_GS)
    best = np.clip(losses_RGS.argmin(-1), 1, len(sizes_S) - 2)
    left, middle, right = (np.take_along_axis(losses_RGS, (best + k)[..., None], -1)[..., 0] for k in (-1, 0, 1))
    bend = left - 2 * middle + right
    shift = np.clip(np.divide(left - right, 2 * bend, out=np.zeros_like(bend), where=bend > 0), -1, 1)
    step = math.log(sizes_S[1] / sizes_S[0])
    lowest = np.where(bend > 0, middle - 0.25 * (left - right) * shift, np.minimum(np.minimum(left, middle), right))
    return lowest, np.exp(np.log(sizes_S[best]) + step * shift)


def flops_to_match(candidate: Law, baseline: Law, cost_c: Cost, cost_b: Cost, flops_G: np.ndarray) -> np.ndarray:
    """The candidate's FLOPs for the loss that the baseline reaches with `flops_G`, each at its best size, over those
    FLOPs, (R, G). nan where the candidate does not reach it with 1,000 times the largest of the budgets, or reaches it
    with a thousandth of the smallest."""
    wanted_RG = frontier(baseline, cost_b, flops_G)[0]
    budgets_C = np.geomspace(flops_G.min() / _ROOM, flops_G.max() * _ROOM, _GRID)
    reached_RC = np.minimum.accumulate(frontier(candidate, cost_c, budgets_C)[0], axis=1)
    ratios = np.full_like(wanted_RG, np.nan)
    for replicate, (wanted, reached) in enumerate(zip(wanted_RG, reached_RC, strict=True)):
        inside = (wanted <= reached[0]) & (wanted >= reached[-1])
        at = np.exp(np.interp(-wanted, -reached, np.log(budgets_C)))
        ratios[replicate] = np.where(inside, at / flops_G, np.nan)
    return ratios


def interval(values_R: np.ndarray) -> tuple[float, float]:
    """The percentile interval of LEVEL of the replicates, without the first, which is the estimate itself. Replicates
    that are not finite count as infinitely large; both ends are nan where there are no replicates."""
    replicates = values_R[1:]
    if not len(replicates):
        return math.nan, math.nan
    ordered = np.sort(np.where(np.isfinite(replicates), replicates, np.inf))
    last = len(ordered) - 1
    low = ordered[math.floor((1 - LEVEL) / 2 * last)]
    high = ordered[math.ceil((1 + LEVEL) / 2 * last)]
    return float(low), float(high)


# ---- IsoFLOP curves ---------------------------------------------------------------------------------------------


def parabola(sizes_P: np.ndarray, losses_P: np.ndarray) -> tuple[float, float] | None:
    """(size, loss) at the minimum of the parabola of the loss over log N (Hoffmann's approach 2). None where it has no
    minimum, or where the minimum is not between the smallest and the largest size. Needs three sizes."""
    if len(set(sizes_P)) < 3:
        return None
    x = np.log(sizes_P)
    a, b, c = np.polyfit(x, losses_P, 2)
    if a <= 0 or not x.min() <= (at := -b / (2 * a)) <= x.max():
        return None
    return float(np.exp(at)), float(c - b * b / (4 * a))
