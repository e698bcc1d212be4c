"""The command that shows whether the best learning rate is the same at other widths: what it plans, and what it finds
in losses whose best rate is known."""

import argparse
import math

import pytest

from mom_tools.compare import transfer
from mom_tools.compare.transfer import Job, best_rate, by_group, jobs_of, summary, table

RATES = [2.0**-k for k in range(10, 4, -1)]


def bowl(best, rate, lowest=3.0):
    """A loss that is a parabola over the logarithm of the rate."""
    return lowest + 0.05 * (math.log2(rate) - best) ** 2


def test_the_best_rate_is_that_of_the_parabola_also_between_the_rates_that_were_tried():
    for best in (-8.3, -7.0, -6.6):
        found, inside = best_rate({rate: bowl(best, rate) for rate in RATES})
        assert math.log2(found) == pytest.approx(best)
        assert inside
    assert best_rate({rate: bowl(-12, rate) for rate in RATES}) == (RATES[0], False)
    diverged = {rate: bowl(-7, rate) if rate < 2.0**-6.5 else math.inf for rate in RATES}
    assert best_rate(diverged) == (2.0**-7, True)


def test_shifts_and_costs_are_those_of_the_losses():
    """The standard form's best rate falls by an octave with each doubling of the width; muP's stays."""
    given = argparse.Namespace(seeds=2, widths=[64, 128, 256], models=["dense"], rates=RATES)
    jobs = jobs_of(given)
    assert len(jobs) == len({job.id for job in jobs}) == 2 * 5 * 6  # at the base, both forms are one run
    assert {job.form for job in jobs if job.width == 64} == {"standard"}

    def loss(job):
        octaves = math.log2(job.width / 64) if job.form == "standard" else 0
        return bowl(-7 - octaves + (0.2 if job.seed else -0.2), job.rate)

    losses = by_group({job: loss(job) for job in jobs}, 64)
    found = {(e["form"], e["width"]): e for e in summary(losses, 64)}
    assert len(found) == 6
    for width, octaves in ((64, 0), (128, -1), (256, -2)):
        standard, mup = found["standard", width], found["muP", width]
        assert standard["shift"] == pytest.approx((octaves, 0), abs=1e-9)
        assert mup["shift"] == pytest.approx((0, 0), abs=1e-9)
        assert standard["log2_rate"] == pytest.approx((-7 + octaves, 0.2 * math.sqrt(2)))
        assert standard["excess"][0] == pytest.approx(0.05 * octaves**2)
        assert mup["excess"][0] == pytest.approx(0)
    assert "-2.00 ± 0.00" in table(summary(losses, 64))


def test_a_run_that_is_not_finished_has_no_loss_and_the_figure_is_drawn(tmp_path):
    assert transfer.loss_of(tmp_path, "val/a/loss/total") is None
    (tmp_path / "status.json").write_text('{"state": "preempted"}')
    assert transfer.loss_of(tmp_path, "val/a/loss/total") is None
    (tmp_path / "status.json").write_text('{"state": "finished"}')
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "val/a/loss/total": 2.5}\n')
    assert transfer.loss_of(tmp_path, "val/a/loss/total") == 2.5
    losses = {("dense", f, w, 0): {r: bowl(-7, r) for r in RATES} for f in transfer.FORMS for w in (64, 128)}
    transfer.draw(losses, tmp_path / "a.svg")
    drawn = (tmp_path / "a.svg").read_text()
    assert "width 128" in drawn
    assert "dense, muP" in drawn
    assert Job("dense", "muP", 128, 0.5, 0).id == "dense/muP/128/rate-0.5/seed-0"
