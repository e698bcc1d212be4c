"""The chore that compares variants of a recipe: what it calls usable, and that it trains each run once."""

import json
import math
import runpy
import sys

import pytest

from tests.helpers import CHECKOUT
from tests.helpers.run_config import write_config

TOOL = CHECKOUT / "tools/dev/compare_variants.py"


@pytest.fixture(scope="module")
def tool():
    return runpy.run_path(str(TOOL))


def test_the_range_of_a_parabola_is_where_it_is_below_the_limit(tool):
    """Sampled densely enough, the straight lines between the rates change nothing."""
    curve = {2**x: 3 + 0.1 * (x + 6) ** 2 for x in [i / 64 for i in range(-10 * 64, -2 * 64)]}
    octaves, highest, open_ended = tool["usable"](curve, 3.4)  # 2 octaves to each side of 2^-6
    assert octaves == pytest.approx(4, abs=1e-3)
    assert highest == pytest.approx(2**-4, rel=1e-3)
    assert not open_ended


@pytest.mark.parametrize(
    ("losses", "octaves", "highest", "open_ended"),
    [
        ([2.0, 1.0, 2.0], 1.0, 2**1.5, False),  # half of each octave
        ([1.0, 1.0, 2.0], 1.5, 2**1.5, True),
        ([2.0, 2.0, 1.0], 0.5, 4.0, True),
        ([2.0, 3.0, 4.0], 0.0, None, False),  # a variant whose best is worse than the best of all by more than allowed
        ([1.0, 9.0, 1.0], 0.125, 4.0, True),  # a gap is not usable
    ],
)
def test_the_range_has_its_ends_on_straight_lines_between_the_rates(tool, losses, octaves, highest, open_ended):
    found = tool["usable"](dict(zip([1.0, 2.0, 4.0], losses, strict=True)), 1.5)
    assert found == (pytest.approx(octaves), highest and pytest.approx(highest), open_ended)


def test_a_run_that_diverged_counts_with_the_loss_it_began_with_and_widens_no_range(tool):
    result, variant = tool["Result"], tool["Variant"]
    variants = [variant("plain", "plain"), variant("tamed", "plain", ("x=1",))]
    lost = {"losses": {}, "start": 8.0, "diverged": True, "skipped": 9}
    good = {"start": 8.0, "diverged": False, "skipped": 0}
    results = [
        *(result("plain", rate, 0, losses={"total": x}, **good) for rate, x in ((1.0, 5.0), (2.0, 4.0))),
        result("plain", 4.0, 0, **lost),
        *(result("tamed", rate, 0, losses={"total": x}, **good) for rate, x in ((1.0, 5.0), (2.0, 4.2), (4.0, 4.2))),
    ]
    _, _, plain, tamed = tool["summary"](variants, results, {"tamed": [1.1, 1.2, 1.3]}, 0.4).splitlines()
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in (plain, tamed)]
    # plain: 0.4 of the octave below 2 and 0.1 of the one above; tamed: 0.5 and 1, or 0.25 and 1 against plain's best
    assert cells[0] == ["plain", "2", "4.000", "0.50", "0.50", f"{2 * 2**0.1:.3g}", "1 of 3", ""]
    assert cells[1] == ["tamed", "2", "4.200", "≥ 1.50", "≥ 1.25", "4", "0 of 3", "1.200 [1.150, 1.250]"]


def test_every_variant_is_trained_once_and_a_second_start_trains_what_is_missing(tool, tmp_path, monkeypatch, capsys):
    config = write_config(tmp_path, training__steps=3, training__batch=1, validation={"sequences": 2})
    output = tmp_path / "out"
    arguments = ["stability", str(config), "--rates", "1e-2", "--output", str(output), "--cost-steps", "1"]

    def main(*more):
        monkeypatch.setattr(sys, "argv", [str(TOOL), *arguments, *more])
        tool["main"]()
        return [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]

    first = main("--seeds", "1")
    names = [v.name for v in tool["SETS"]["stability"]]
    assert [(r["variant"], r["seed"], r["diverged"]) for r in first] == [(name, 1, False) for name in names]
    assert len({r["losses"]["total"] for r in first}) == len(names)
    assert all(0 < r["losses"]["total"] < r["start"] < 2 * math.log(200) for r in first)
    costs = (output / "costs.json").read_text()
    (output / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in first[:-1]))  # as if cut short
    capsys.readouterr()
    assert main("--seeds", "1") == first
    said = capsys.readouterr().out
    assert said.count("CPU seconds") == 1
    assert (output / "costs.json").read_text() == costs
    assert f"| {names[-1]}" in (output / "results.md").read_text()
    with pytest.raises(SystemExit) as refused:
        main("--seeds", "1", "--margin", "0.1", "training.steps=4")
    assert refused.value.code == 2
    assert "begun with other settings" in capsys.readouterr().err
