"""The learning rate and the batch of a step, against closed forms and the schedulers of torch and Transformers."""

import math

import pytest
import torch
from transformers import get_wsd_schedule

from mom_data.batches.loader import Share
from mom_train.config.optimizer import OptimizerConfig
from mom_train.config.run import TrainingConfig
from mom_train.optim.schedule import learning_rate, rate_of_step


def test_the_rate_warms_up_and_follows_half_a_cosine():
    config = OptimizerConfig(learning_rate=2.0, warmup=10, final_fraction=0.1)
    assert [learning_rate(s, 111, config) for s in (0, 4, 9)] == pytest.approx([0.2, 1.0, 2.0])
    assert learning_rate(10, 111, config) == 2.0
    assert learning_rate(60, 111, config) == pytest.approx(1.1)  # half way: the mean of peak and floor
    quarter = 0.2 + 1.8 * (1 + math.sqrt(0.5)) / 2
    assert learning_rate(35, 111, config) == pytest.approx(quarter)
    constant = OptimizerConfig(learning_rate=2.0, warmup=0, schedule="constant")
    assert learning_rate(99, 100, constant) == 2.0


@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.1, 1 / 3, 1.0])
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (2, 1), (3, 0), (7, 6), (360, 30), (250_000, 4000)])
def test_the_last_steps_rate_is_exactly_the_final_fraction_of_the_peak(steps, warmup, fraction):
    config = OptimizerConfig(learning_rate=3e-4, warmup=warmup, final_fraction=fraction)
    assert learning_rate(steps - 1, steps, config) == 3e-4 * fraction
    if steps > warmup + 1:
        assert learning_rate(warmup, steps, config) == 3e-4
        assert learning_rate(steps - 2, steps, config) >= 3e-4 * fraction


def wsd(**changes):
    return OptimizerConfig(**{"learning_rate": 3e-4, "warmup": 4, "schedule": "wsd", "decay": 8, **changes})


CLOSED = {
    "linear": lambda left, decay: left / decay,
    "sqrt": lambda left, decay: 1 - ((decay - left) / decay) ** 0.5,
    "cosine": lambda left, decay: math.cos(math.pi * (decay - left) / decay / 2) ** 2,
}


@pytest.mark.parametrize("fraction", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("shape", CLOSED)
def test_the_decay_has_its_closed_form_and_ends_exactly_where_it_was_asked_to(shape, fraction):
    config = wsd(decay_shape=shape, final_fraction=fraction)
    rates = [learning_rate(s, 30, config) for s in range(30)]
    assert rates[:4] == pytest.approx([3e-4 * n / 4 for n in (1, 2, 3, 4)])
    assert rates[4:22] == [3e-4] * 18
    for left, rate in zip(range(7, -1, -1), rates[22:], strict=True):  # `left` more steps come after it
        assert rate == pytest.approx(3e-4 * fraction + 3e-4 * (1 - fraction) * CLOSED[shape](left, 8), abs=1e-18)
    assert rates[-1] == 3e-4 * fraction
    assert rates == sorted(rates[:4]) + sorted(rates[4:], reverse=True)


@pytest.mark.parametrize(("shape", "theirs"), [("linear", "linear"), ("cosine", "cosine"), ("sqrt", "1-sqrt")])
def test_the_schedule_is_that_of_transformers_one_step_earlier(shape, theirs):
    """Theirs begins the warm-up at 0 and reaches the end of the decay only after the last step."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-4)
    schedule = get_wsd_schedule(optimizer, 4, 8, num_stable_steps=18, decay_type=theirs)
    for step in range(30):
        optimizer.step()
        schedule.step()
        rate = learning_rate(step, 30, wsd(decay_shape=shape, final_fraction=0))
        assert rate == pytest.approx(schedule.get_last_lr()[0], rel=1e-12, abs=1e-18)


def test_the_linear_decay_is_that_of_torch():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-4)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=8)
    for step in range(22, 30):
        optimizer.step()
        schedule.step()
        assert learning_rate(step, 30, wsd()) == pytest.approx(schedule.get_last_lr()[0], rel=1e-12)


def test_settings_of_the_decay_are_refused_where_nothing_would_come_of_them():
    with pytest.raises(ValueError, match="needs decay"):
        OptimizerConfig(learning_rate=1, schedule="wsd")
    for key, value in {"decay": 3, "decay_shape": "sqrt"}.items():
        with pytest.raises(ValueError, match=f"{key}: only the schedule wsd has it, and this is cosine"):
            OptimizerConfig(learning_rate=1, **{key: value})


RAMP = TrainingConfig(steps=12, batch=8, micro_batch=1, batch_ramp=[{"until": 3, "batch": 2}, {"until": 5, "batch": 4}])


def test_batch_and_first_sequence_of_a_step_follow_from_the_step_alone():
    sizes = [2, 2, 2, 4, 4, *[8] * 7]
    assert [RAMP.batch_at(s) for s in range(12)] == sizes
    assert [RAMP.sequences_before(s) for s in range(13)] == [sum(sizes[:s]) for s in range(13)]
    assert [batch for steps, batch in RAMP.parts for _ in range(steps)] == sizes
    short = RAMP.model_copy(update={"steps": 4})
    assert short.parts == [(3, 2), (1, 4)]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("start", [0, 2, 3, 4, 5, 9])
def test_every_sequence_of_a_step_is_taken_once_wherever_the_run_resumes(ranks, start):
    taken = [[] for _ in range(12)]
    for rank in range(ranks):
        share = Share(rank, ranks, RAMP.batch, RAMP.micro_batch, RAMP.ramp_from(start))
        stream = share.micro_batches(RAMP.sequences_before(start))
        for step in range(start, 12):
            for _ in range(RAMP.batch_at(step) // ranks):
                sequences, end = next(stream)
                assert end == RAMP.sequences_before(step + 1)
                taken[step] += sequences
    for step in range(start, 12):
        assert taken[step] == [*range(RAMP.sequences_before(step), RAMP.sequences_before(step + 1))]


def test_the_rate_follows_the_root_of_the_batch_only_where_that_is_asked_for():
    constant = {"learning_rate": 0.5, "schedule": "constant"}
    assert rate_of_step(0, RAMP, OptimizerConfig(**constant)) == 0.5
    scaled = OptimizerConfig(**constant, scale_with_batch=True)
    assert [rate_of_step(s, RAMP, scaled) for s in (0, 3, 5)] == pytest.approx([0.25, 0.5 / 2**0.5, 0.5])


@pytest.mark.parametrize(
    ("ramp", "message"),
    [
        ([(3, 8)], r"batch_ramp.0.batch \(8\) must be below training.batch \(8\)"),
        ([(3, 4), (5, 2)], r"batch_ramp.0.batch \(4\) must be below training.batch_ramp.1.batch \(2\)"),
        ([(5, 2), (5, 4)], r"batch_ramp.1.until \(5\) must be above that of the entry before \(5\)"),
    ],
)
def test_a_ramp_that_does_not_rise_is_refused_by_the_name_of_its_entry(ramp, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(steps=9, batch=8, micro_batch=1, batch_ramp=[{"until": u, "batch": b} for u, b in ramp])
