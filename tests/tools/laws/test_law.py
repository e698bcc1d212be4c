"""mom_tools.laws.law: fits and intervals against scipy, closed forms and laws that are known."""

import math

import numpy as np
import pytest
from scipy.optimize import least_squares, nnls

from mom_tools.laws.law import Cost, _nonnegative, fit, flops_to_match, frontier, interval, parabola

SIZES_S = np.geomspace(2.5e5, 6e6, 4)
BUDGETS_G = 3e13 * 2.0 ** np.arange(5)
SIX = Cost(tuple(SIZES_S), tuple(6 * SIZES_S))
DENSE = {"E": 1.7, "A": 1.0, "alpha": 0.30, "B": 0.70, "beta": 0.28}
MIXTURE = DENSE | {"A": 0.85, "B": 0.62}


def loss(sizes, tokens, E, A, alpha, B, beta):
    return E + A * (sizes / 1e6) ** -alpha + B * (tokens / 2e7) ** -beta


def grid(seeds):
    """(sizes, tokens, clusters) of a grid, one cluster for each size and seed."""
    found = [(n, c / (6 * n), (f"{n:.0f}", s)) for s in range(seeds) for n in SIZES_S for c in BUDGETS_G]
    sizes, tokens, clusters = zip(*found, strict=True)
    return np.array(sizes), np.array(tokens), list(clusters)


def best_of(law, flops):
    """(size, loss) for a budget where a token costs 6 N: Hoffmann's closed form, with constants in N and D."""
    A, B = law["A"] * 1e6 ** law["alpha"], law["B"] * 2e7 ** law["beta"]
    a, b = law["alpha"], law["beta"]
    size = (a * A / (b * B)) ** (1 / (a + b)) * (flops / 6) ** (b / (a + b))
    return size, loss(size, flops / 6 / size, **law)


def test_a_law_without_noise_is_recovered():
    sizes, tokens, _ = grid(1)
    law = fit(sizes, tokens, loss(sizes, tokens, **DENSE))
    assert law.E_R[0] == pytest.approx(1.7, abs=2e-3)
    assert law.alpha_R[0] == pytest.approx(0.30, abs=2e-3)
    assert law.beta_R[0] == pytest.approx(0.28, abs=2e-3)
    assert law.A_R[0] * (1e6 / law.n0) ** -0.30 == pytest.approx(1.0, abs=5e-3)
    assert law.residual < 1e-4


def test_no_start_of_a_descent_finds_a_better_fit():
    sizes, tokens, _ = grid(2)
    rng = np.random.default_rng(3)
    losses = loss(sizes, tokens, **DENSE) + 0.01 * rng.standard_normal(len(sizes))
    law = fit(sizes, tokens, losses)
    ours = float(((law.loss(sizes, tokens)[0] - losses) ** 2).sum())

    def residuals(x):
        return x[0] + x[1] * (sizes / 1e6) ** -x[3] + x[2] * (tokens / 2e7) ** -x[4] - losses

    starts = [(e, 1, 1, a, b) for e in (0.5, 1.5) for a in (0.2, 0.6) for b in (0.2, 0.6)]
    bounds = ([0, 0, 0, 0.02, 0.02], [np.inf, np.inf, np.inf, 2, 2])
    theirs = min(2 * least_squares(residuals, s, bounds=bounds, x_scale="jac").cost for s in starts)
    assert ours <= theirs * 1.001


def test_constants_are_those_of_nonnegative_least_squares():
    sizes, tokens, _ = grid(1)
    n, d = np.log(sizes / 1e6), np.log(tokens / 2e7)
    rng = np.random.default_rng(0)
    losses = np.stack([rng.standard_normal(len(n)) + k for k in (-1.0, 0.0, 0.5, 3.0)])
    at = np.array([[0.5, 2.0], [3.0, 1.0], [4.5, 4.0]])
    squares, constants = _nonnegative(n, d, losses, at[None], True)
    for row, values in enumerate(losses):
        for column, (a, b) in enumerate(0.02 * np.exp(at)):
            basis = np.stack([np.ones_like(n), np.exp(-a * n), np.exp(-b * d)], 1)
            expected, norm = nnls(basis, values)
            if norm**2 > (values**2).sum() * (1 - 1e-9):
                continue  # nothing but zeros: no subset of columns helps
            assert squares[row, column] == pytest.approx(norm**2, rel=1e-9)
            np.testing.assert_allclose(constants[row, column], expected, atol=1e-8)


def test_the_frontier_is_the_closed_form():
    sizes, tokens, _ = grid(1)
    law = fit(sizes, tokens, loss(sizes, tokens, **DENSE))
    lowest, best = frontier(law, SIX, BUDGETS_G)
    for k, flops in enumerate(BUDGETS_G):
        size, value = best_of(DENSE, flops)
        assert lowest[0, k] == pytest.approx(value, abs=1e-4)
        assert best[0, k] == pytest.approx(size, rel=0.03)


def test_flops_to_match_reach_the_same_loss():
    sizes, tokens, _ = grid(1)
    dense, mixture = (fit(sizes, tokens, loss(sizes, tokens, **x)) for x in (DENSE, MIXTURE))
    flops = np.r_[BUDGETS_G[0], 10 * BUDGETS_G[-1]]
    ratios = flops_to_match(mixture, dense, SIX, SIX, flops)[0]
    for ratio, budget in zip(ratios, flops, strict=True):
        assert best_of(MIXTURE, ratio * budget)[1] == pytest.approx(best_of(DENSE, budget)[1], abs=5e-4)
    better = fit(sizes, tokens, loss(sizes, tokens, **DENSE | {"E": 0.2}))
    out_of_reach = flops_to_match(dense, better, SIX, SIX, flops)
    assert np.isnan(out_of_reach[0, 1])


def test_intervals_hold_what_is_true():
    """Points of one trunk share most of their error, as branches do."""
    sizes, tokens, clusters = grid(3)
    held, narrow, known = 0, 0, best_of(DENSE, BUDGETS_G[-1])[1]
    flops = BUDGETS_G[[0, -1]]
    exact = [fit(sizes, tokens, loss(sizes, tokens, **x)) for x in (MIXTURE, DENSE)]
    truth = flops_to_match(*exact, SIX, SIX, flops)[0]
    trials = 5
    for trial in range(trials):
        rng = np.random.default_rng(trial)
        laws = []
        for constants in (MIXTURE, DENSE):
            shared = {c: 0.008 * rng.standard_normal() for c in dict.fromkeys(clusters)}
            noise = np.array([shared[c] for c in clusters]) + 0.003 * rng.standard_normal(len(sizes))
            laws.append(fit(sizes, tokens, loss(sizes, tokens, **constants) + noise, clusters, 100))
        ratios = flops_to_match(*laws, SIX, SIX, flops)
        lowest = frontier(laws[1], SIX, flops)[0][:, 1]
        for values, true in ((ratios[:, 0], truth[0]), (ratios[:, 1], truth[1]), (lowest, known)):
            low, high = interval(values)
            held += low <= true <= high
            narrow += high - low < 0.2
    assert held >= 0.75 * 3 * trials, held
    assert narrow >= 0.9 * 3 * trials, narrow


def test_one_seed_of_four_sizes_gives_no_intervals():
    sizes, tokens, clusters = grid(1)
    law = fit(sizes, tokens, loss(sizes, tokens, **DENSE), clusters, 20)
    assert len(law.E_R) == 1
    assert np.isnan(interval(law.E_R)).all()


def test_clusters_of_the_same_name_are_resampled_together():
    """What two models share, such as the order of the data, then leaves no spread in their ratio."""
    sizes, tokens, clusters = grid(3)
    rng = np.random.default_rng(1)
    shared = {c: 0.02 * rng.standard_normal() for c in dict.fromkeys(clusters)}
    noise = np.array([shared[c] for c in clusters])
    mixture, dense = (fit(sizes, tokens, loss(sizes, tokens, **x) + noise, clusters, 60) for x in (MIXTURE, DENSE))
    others = [("other", *c) for c in clusters]
    alone = fit(sizes, tokens, loss(sizes, tokens, **MIXTURE) + noise, others, 60)

    def width(law):
        low, high = interval(flops_to_match(law, dense, SIX, SIX, BUDGETS_G[-1:])[:, 0])
        return high - low

    assert width(mixture) < 0.75 * width(alone)


def test_equal_tokens_leave_their_term_out():
    sizes = np.geomspace(4e7, 1.5e9, 5)
    law = fit(sizes, np.full(5, 8e10), 2.0 + 0.5 * (sizes / 1e8) ** -0.4)
    assert law.B_R[0] == 0
    assert (law.E_R[0], law.alpha_R[0]) == (pytest.approx(2.0, abs=5e-3), pytest.approx(0.4, abs=5e-3))
    with pytest.raises(ValueError, match="a law of 3 constants needs as many points, and there are 2"):
        fit(sizes[:2], np.full(2, 8e10), np.ones(2))


def test_the_minimum_of_a_parabola_is_between_the_sizes_or_none():
    sizes = np.array([1e6, 2e6, 4e6, 8e6])
    at, value = parabola(sizes, 3 + 0.1 * np.log(sizes / 3e6) ** 2)
    assert (at, value) == (pytest.approx(3e6), pytest.approx(3))
    assert parabola(sizes, 3 + 0.1 * np.log(sizes / 9e6) ** 2) is None
    assert parabola(sizes, 3 - 0.1 * np.log(sizes / 3e6) ** 2) is None
    assert parabola(sizes[:2], np.array([3.0, 2.9])) is None


def test_a_replicate_without_an_answer_counts_as_infinitely_large():
    values = np.r_[0.5, np.linspace(0, 1, 90), np.full(10, np.nan)]
    low, high = interval(values)
    assert 0 < low < 0.05
    assert math.isinf(high)
    assert math.isnan(interval(np.array([0.5]))[0])


def test_costs_between_and_beyond_the_sizes_are_powers():
    cost = Cost((1e5, 1e6), (6e5, 12e6))  # slope log10(20)
    slope = math.log10(20)
    for size in (1e4, 3e5, 1e8):
        assert cost(np.array([size]))[0] == pytest.approx(6e5 * (size / 1e5) ** slope)
