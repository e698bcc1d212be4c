"""mom_tools.laws.grid: what is trained, in which order, and how it fits the time."""

import json

import pytest

from mom_tokenizers.errors import UserError
from mom_tools.campaign import startable
from mom_tools.laws.grid import (
    FEWEST_STEPS,
    Size,
    State,
    best_rate,
    changes,
    first_steps,
    plan_of,
    planned_seconds,
    seconds,
    seed_jobs,
    smallest_budget,
    steps_taken,
    todo,
)
from mom_tools.options import named_rates
from mom_tools.paper.plan import RESERVE
from mom_train.config.files import load_config
from tests.helpers import CHECKOUT

BATCH = 8
SIZES = ["32x1", "64x1", "96x2"]


def state(**values):
    """A grid whose models are timed. A step of the next size takes three times the FLOPs and seconds."""
    found = State(["dense", "mixture"], SIZES, 4, "chameleon_speech", False, **values)
    for number, size in enumerate(SIZES):
        for model in found.models:
            found.flops[f"{model}/{size}"] = 1e9 * 3.0**number
            found.per_step[f"{model}/{size}"] = 0.02 * 3.0**number
            found.startup[f"{model}/{size}"] = 2.0
    return found


def loss(job):
    return {"val/held_out/loss/total": 3 + abs(job.rate - 5e-3) + 0.001 * job.seed}


def simulate(grid, seeds, left, stop_after=10**6):
    """The jobs in the order in which they start, one at a time, each as long as the plan predicts."""
    started = []
    while len(started) < stop_after:
        jobs = startable(todo(grid, seeds), set(), set(), lambda job: seconds(grid, job, BATCH), left)[:1]
        if not jobs:
            break
        started += jobs
        grid.finished[jobs[0].id] = loss(jobs[0])
        left -= seconds(grid, jobs[0], BATCH)
    return started, left


@pytest.mark.parametrize("first", [20, 37, 1000])
def test_budgets_double_and_leave_the_trunk_at_steps_that_have_checkpoints(first):
    plan = plan_of(first, 5)
    assert [steps for steps, _ in plan] == [first * 2**k for k in range(5)]
    every = plan[0][0] - plan[0][1]
    for steps, decay in plan:
        assert (steps - decay) % every == 0
        assert 0.15 < decay / steps < 0.25


def test_branches_cost_what_is_said():
    """0.61 of five separate runs: a trunk of 0.8 of the longest one, and a fifth of each."""
    grid = state(base=1e12)
    grid.budgets = 5
    jobs = seed_jobs(grid, "dense", "32x1", 0, 5e-3)
    together = sum(map(steps_taken, jobs))
    apart = sum(j.steps for j in jobs if j.kind == "branch")
    assert together / apart == pytest.approx((0.8 * 16 + 0.2 * 31) / 31, rel=0.01)
    assert together / apart == pytest.approx(0.61, abs=0.01)


def test_all_sizes_spend_the_same_flops_at_a_budget():
    grid = state(base=9e10)
    spent = {s: first_steps(grid, "dense", s) * grid.flops[f"dense/{s}"] for s in SIZES}
    assert list(spent.values()) == [pytest.approx(9e10, rel=0.05)] * 3


def test_the_plan_fits_the_time_and_is_refused_where_it_cannot():
    grid = state()
    grid.base = smallest_budget(grid, 4000, 1, 2, BATCH)
    assert planned_seconds(grid, grid.base, 1, 2, BATCH) == pytest.approx(4000 * (1 - RESERVE), rel=0.05)
    _, left = simulate(grid, 2, 4000)
    assert not list(todo(grid, 2))
    assert 0 < left < 0.35 * 4000  # the reserve, and neighbours of rates that were not needed
    assert min(first_steps(grid, "dense", s) for s in SIZES) >= FEWEST_STEPS
    with pytest.raises(UserError, match=r"6 models, 4 budgets and 2 seeds needs at least \d+ minutes"):
        smallest_budget(state(), 300, 1, 2, BATCH)


def test_rates_are_tuned_at_every_size_before_any_seed_and_branches_follow_their_trunk():
    grid = state(base=1e11)
    started, _ = simulate(grid, 2, 1e9)
    kinds = [j.kind for j in started]
    assert kinds.index("trunk") == sum(k == "tune" for k in kinds) == 6 * 3
    assert all(j.rate == 5e-3 for j in started if j.kind in ("trunk", "branch"))
    for job in started:
        if job.kind == "branch":
            trunk = next(j for j in started if j.kind == "trunk" and j.folder == job.folder)
            assert started.index(trunk) < started.index(job)
    assert [j.seed for j in started if j.kind != "tune"] == [0] * 30 + [1] * 30


def test_a_rate_of_many_digits_is_found_again_among_the_finished_runs():
    """The runs of 1/190 and of its neighbour 2/190 are named by six digits."""
    rates = named_rates([1 / 190, 1 / 300, 1 / 300])
    assert rates == [0.00333333, 0.00526316]
    grid = state(rates=dict.fromkeys(("dense", "mixture"), rates), base=1e11)
    simulate(grid, 1, 1e9)
    assert best_rate(grid, "dense", "32x1") == 0.00526316
    assert len(grid.finished) == 6 * (3 + 5)


def test_transfer_tunes_the_smallest_size_alone():
    grid = state(base=1e11)
    grid.transfer = True
    started, _ = simulate(grid, 1, 1e9)
    assert {j.size for j in started if j.kind == "tune"} == {"32x1"}
    assert best_rate(grid, "mixture", "96x2") == 5e-3
    job = next(j for j in started if j.kind == "trunk" and j.size == "96x2")
    assert changes(grid, job)["model.base_dim"] == 32


def test_a_restart_from_its_file_goes_on_the_same_way(tmp_path):
    whole, _ = simulate(state(base=1e11), 2, 1e9)
    cut = state(base=1e11)
    before, _ = simulate(cut, 2, 1e9, stop_after=31)
    cut.save(tmp_path / "state.json")
    after, _ = simulate(State.load(tmp_path / "state.json"), 2, 1e9)
    assert [j.id for j in before + after] == [j.id for j in whole]


@pytest.mark.parametrize("transfer", [False, True])
@pytest.mark.parametrize("model", ["dense", "mixture", "transformer"])
def test_the_config_of_every_job_is_valid(model, transfer):
    grid = state(base=1e11)
    grid.transfer = transfer
    grid.models = [model]
    if model == "transformer":
        for table in (grid.flops, grid.per_step, grid.startup):
            table |= {f"transformer/{s}": table[f"dense/{s}"] for s in SIZES}
    started, _ = simulate(grid, 1, 1e9)
    for job in started:
        if job.kind == "branch":
            continue
        values = [f"{k}={json.dumps(v)}" for k, v in changes(grid, job).items()]
        config = load_config(CHECKOUT / "configs/mini/chameleon_speech.yaml", values)
        assert config.training.steps == job.steps
        assert config.optimizer.learning_rate == job.rate


@pytest.mark.parametrize("text", ["96", "96x", "x2", "0x2", "96x2x1", "96 x 2"])
def test_a_size_that_cannot_be_read_is_refused(text):
    with pytest.raises(UserError, match="a size is written as WIDTHxLAYERS, such as 96x2"):
        Size.parse(text)
