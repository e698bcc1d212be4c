"""tools/match_loss.py against curves whose answers are known, and against the paper's own tables."""

import json
import math
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path

import numpy as np
import pytest
import yaml

from mom_tools.compare.curves import Run, compare, first_reach, unlike
from mom_tools.compare.match_loss import as_json, notes
from mom_tools.compare.published import TABLES, read, select
from tests.helpers.ranks import program

STEP = 4e9  # FLOPs


def write_run(path, losses, seed=0, flops=STEP):
    """Write the folder of a run. `losses` has a name -> its loss as a function of FLOPs. Of 1,000 steps, every 20th
    validates."""
    path.mkdir(parents=True)
    lines = []
    for step in range(0, 1001):
        line = {"step": step}
        if step:
            line["flops/total"] = flops * step
        for name, loss in losses.items():
            if (step % 20 == 0) if name.startswith("val/") else step > 0:
                line[name] = float(loss(flops * step))
        lines.append(line)
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "config.yaml").write_text(yaml.safe_dump({"seed": seed, "data": {}, "training": {"batch": 8}}))
    return Run(path)


def law(scale=1.0):
    """A loss that falls as a power of FLOPs. With `scale` s it needs s times the FLOPs for the same loss."""
    return lambda flops: 1.5 + 3.0 * (1 + flops / scale / 3e10) ** -0.4


def tool(*arguments):
    return program("tools/match_loss.py", *arguments)


@pytest.mark.parametrize("scale", [0.3476, 0.654, 0.99])
def test_known_gain_and_flops_are_found_to_a_tenth_of_a_percent(tmp_path, scale):
    names = ["loss/text", "val/held/loss/text"]
    dense = write_run(tmp_path / "dense", {n: law() for n in names})
    mixture = write_run(tmp_path / "mixture", {n: law(scale) for n in names})
    found = as_json(compare([dense], [mixture]))
    assert list(found) == names
    end = 1000 * STEP
    gain = 100 * (law()(end) - law(scale)(end)) / law()(end)
    for name in names:
        assert found[name]["relative_flops_percent"] == pytest.approx(100 * scale, rel=1e-3)
        assert found[name]["baseline_reach_percent"] == pytest.approx(100)
    # the mean over the last tenth of the FLOPs, integrated
    last = np.linspace(0.9 * end, end, 100_001)
    ends = [np.mean(law(s)(last)) for s in (1.0, scale)]
    assert found["loss/text"]["gain_percent"] == pytest.approx(100 * (1 - ends[1] / ends[0]), rel=1e-3)
    assert found["val/held/loss/text"]["gain_percent"] == pytest.approx(gain, rel=1e-9)


def test_a_candidate_that_is_worse_never_matches_or_needs_more(tmp_path):
    dense = write_run(tmp_path / "dense", {"loss/image": law(), "val/held/loss/image": law()})
    worse = write_run(tmp_path / "worse", {"loss/image": law(1.25), "val/held/loss/image": law(1.25)})
    longer = write_run(tmp_path / "longer", {"loss/image": law(1.25), "val/held/loss/image": law(1.25)}, flops=2 * STEP)
    for result in compare([dense], [worse]).values():
        assert result.gain_percent < 0
        assert result.relative_flops_percent is None
        assert result.relative_flops_interval is None
    for result in compare([dense], [longer]).values():
        assert result.relative_flops_percent == pytest.approx(125, rel=1e-3)
    done = tool("--baseline", dense.path, "--candidate", worse.path, "--markdown", tmp_path / "table.md", "--json", "-")
    assert json.loads(done.stdout)["loss/image"]["relative_flops_percent"] is None
    assert (tmp_path / "table.md").read_text().count("never |") == 2


def test_the_first_reach_lies_where_loss_is_linear_in_log_flops():
    flops, loss = np.array([0.0, 1e3, 1e5, 1e6]), np.array([9.0, 5.0, 3.0, 3.5])
    reached = first_reach(flops, loss, np.array([10.0, 9.0, 7.0, 4.0, 3.5, 3.0, 2.9]))
    wanted = [0.0, 0.0, 500.0, 1e4, 1e3 * 100**0.75, 1e5, math.nan]
    np.testing.assert_allclose(reached, wanted, rtol=1e-12)


def test_intervals_from_seeds_hold_the_truth_about_as_often_as_they_say(tmp_path):
    """Losses of three pairs share half of their noise; over 200 draws a 95 % interval misses 10 times or so."""
    rng = np.random.default_rng(1)
    hits = {"gain": 0, "flops": 0}
    flops = STEP * np.arange(1, 41)

    class Drawn(Run):
        def __init__(self, path, loss):
            super().__init__(path)
            object.__setattr__(self, "loss", loss)

        names = ("val/held/loss/text",)
        seed = None

        def curve(self, name, window):
            return flops, self.loss

    truth = 100 * (1 - law(0.6)(flops[-1]) / law()(flops[-1]))
    for _ in range(200):
        shared, own = rng.normal(0, 0.01, 3), rng.normal(0, 0.01, (2, 3))
        dense = [Drawn(Path("d"), law()(flops) + shared[k] + own[0, k]) for k in range(3)]
        mixture = [Drawn(Path("m"), law(0.6)(flops) + shared[k] + own[1, k]) for k in range(3)]
        [result] = compare(dense, mixture).values()
        assert result.interval_from == "pairs"
        low, high = result.gain_interval
        hits["gain"] += low <= truth <= high
        low, high = result.relative_flops_interval
        hits["flops"] += low <= 60 <= high
    assert 180 <= hits["gain"] <= 198  # 190 expected; 3 standard deviations are 9
    assert 180 <= hits["flops"] <= 199


def test_a_baseline_too_noisy_to_be_matched_is_called_so(tmp_path):
    """A curve that dips under its own final loss half-way matches itself there: the table says it."""
    dip = write_run(
        tmp_path / "dip", {"val/v/loss/text": lambda f: law()(f) - (0.5 if 0.5 <= f / STEP / 1e3 <= 0.52 else 0)}
    )
    result = compare([dip], [dip])
    assert result["val/v/loss/text"].relative_flops_percent == result["val/v/loss/text"].baseline_reach_percent
    assert 48 < result["val/v/loss/text"].baseline_reach_percent < 50
    assert "val/v/loss/text 49 %" in notes(result, 0.1)
    calm = write_run(tmp_path / "calm", {"val/v/loss/text": law()})
    assert "first has its final loss" not in notes(compare([calm], [calm]), 0.1)


def test_pairs_are_by_seed_and_take_away_what_seeds_share(tmp_path):
    shift = {0: 0.3, 1: -0.2, 2: 0.05}

    def runs(kind, scale, seeds):
        return [
            write_run(tmp_path / f"{kind}-{s}", {"val/v/loss/text": lambda f, s=s: law(scale)(f) + shift[s]}, s)
            for s in seeds
        ]

    dense, mixture = runs("dense", 1.0, [0, 1, 2]), runs("mixture", 0.5, [2, 0, 1])
    [paired] = compare(dense, mixture).values()
    [shuffled] = compare(dense, [mixture[1], mixture[2], mixture[0]]).values()
    assert paired == shuffled
    [unpaired] = compare(dense, mixture[:2]).values()
    assert unpaired.interval_from == "seeds"
    width = [x.gain_interval[1] - x.gain_interval[0] for x in (paired, unpaired)]
    assert 5 * width[0] < width[1]


def test_blocks_of_one_run_show_the_noise_of_its_batches(tmp_path):
    rng = np.random.default_rng(0)
    noisy = [write_run(tmp_path / f"{k}", {"loss/text": lambda f: 3.0 + rng.normal(0, 0.05)}, seed=k) for k in range(2)]
    result = compare(noisy[:1], noisy[1:])["loss/text"]
    assert result.interval_from == "blocks"
    low, high = result.gain_interval
    # the difference of two means of 100 losses, in percent of 3: 1.96 standard errors either way
    assert high - low == pytest.approx(2 * 1.96 * 100 * math.sqrt(2 / 100) * 0.05 / 3, rel=0.35)


@pytest.mark.parametrize("table", TABLES)
def test_published_gains_follow_the_definition_that_the_readme_names(table):
    """Every printed gain lies within what the rounding of the printed losses to four digits leaves open."""
    rows = read(table)
    by_dense = by_mixture = equal = 0
    for p in rows:
        dense, mixture, e = Decimal(str(p.dense_loss)), Decimal(str(p.mixture_loss)), Decimal("0.00005")
        gain = Decimal(str(p.gain_percent))
        bounds = {
            "dense": (1 - (mixture + e) / (dense - e), 1 - (mixture - e) / (dense + e)),
            "mixture": ((dense - e) / (mixture + e) - 1, (dense + e) / (mixture - e) - 1),
        }
        half = Decimal("0.005")
        fits = {k: 100 * low - half <= gain <= 100 * high + half for k, (low, high) in bounds.items()}
        by_dense += fits["dense"]
        by_mixture += fits["mixture"]
        value = dense / mixture - 1 if table == 3 else 1 - mixture / dense
        equal += (100 * value).quantize(Decimal("0.01"), ROUND_HALF_UP) == gain
    assert (by_mixture if table == 3 else by_dense) == len(rows)
    assert (by_dense if table == 3 else by_mixture) < len(rows)
    assert equal == {2: 17, 3: 14, 4: 13, 7: 32}[table]  # from the printed losses alone; the rest is rounding


def test_the_papers_row_stands_beside_ones_own(tmp_path):
    names = ["loss/total", "loss/image", "val/Obelisc/loss/text", "val/mine/loss/image"]
    dense = write_run(tmp_path / "dense", {n: law() for n in names})
    mixture = write_run(tmp_path / "mixture", {n: law(0.5) for n in names})
    paths = {kind: tmp_path / f"out.{kind}" for kind in ("json", "csv", "png", "svg")}
    command = ["--baseline", dense.path, "--candidate", mixture.path, "--paper", "7:1.5b"]
    done = tool(*command, "--json", paths["json"], "--csv", paths["csv"], "--plot", paths["png"])
    assert done.returncode == 0, done.stderr
    found = {
        name: [(p["metric"], p["gain_percent"], p["relative_flops_percent"]) for p in values["published"]]
        for name, values in json.loads(paths["json"].read_text()).items()
    }
    assert found == {
        "loss/total": [("training", 2.69, 54.7)],
        "loss/image": [("training", 2.51, 42.5)],
        "val/Obelisc/loss/text": [("Obelisc", 2.24, 71.6)],
        "val/mine/loss/image": [("Obelisc", 2.71, 44.5), ("SSTK", 2.1, 44.6)],
    }
    assert "| +2.51 | 42.5 |" in " ".join(done.stdout.split())
    assert paths["png"].read_bytes().startswith(b"\x89PNG")
    assert len(paths["csv"].read_text().splitlines()) == 5
    assert [p.mixture_loss for p in select("3:in_proj")] == [3.2916]


def test_mistakes_are_one_message(tmp_path):
    dense = write_run(tmp_path / "dense", {"loss/text": law()})
    short = write_run(tmp_path / "short", {"loss/text": law()}, flops=STEP / 2)
    other = write_run(tmp_path / "other", {"loss/image": law()})
    for sides, window, said in [
        (([Run(tmp_path / "none")], [dense]), 0.05, "no metrics.jsonl"),
        (([dense], [other]), 0.05, "no loss in common"),
        (([dense, short], [dense]), 0.05, "same FLOPs"),
        (([dense], [dense]), 1, "a share of the FLOPs"),
    ]:
        with pytest.raises(ValueError, match=said):
            compare(*sides, window)
    done = tool("--baseline", dense.path, "--candidate", dense.path, "--paper", "7:2B")
    assert done.returncode == 2
    assert "no row '2B'; it has 37M" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_validation_loss_of_few_targets_is_called_so_with_its_number(tmp_path):
    from mom_tools.compare.curves import Run, few_targets

    run = tmp_path / "run"
    run.mkdir()
    lines = [{"step": 1, "tokens/text": 900, "tokens/speech": 100, "flops/total": 5, "val/v/loss/speech": 2.0}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "config.yaml").write_text("validation: {sequences: 11}\ndata: {sequence_length: 160}\n")
    counts = {name: Run(run).targets(name) for name in ("val/v/loss/speech", "val/v/loss/text", "loss/text")}
    assert counts == {"val/v/loss/speech": 176, "val/v/loss/text": 1584, "loss/text": None}
    assert "val/v/loss/speech 176 (about ±8 %)" in few_targets({"val/v/loss/speech": 176, "val/v/loss/total": 99_999})
    assert few_targets({"val/v/loss/speech": 2000}) is None


def test_runs_that_differ_in_their_tokens_are_compared_with_a_warning_that_names_the_keys(tmp_path):
    dense, mixture, other = (write_run(tmp_path / name, {"loss/text": law()}) for name in ("dense", "mixture", "other"))
    assert unlike([dense], [mixture]) is None
    settings = {"vocabulary": {"text": 100}, "data": {"train": [{"path": "a"}]}, "model": {"dim": 32}}
    for run, text in ((dense, 100), (mixture, 100), (other, 200)):
        found = {**settings, "vocabulary": {"text": text}, "model": {"dim": text}}
        (run.path / "config.yaml").write_text(yaml.safe_dump(found))
    dense, mixture, other = (Run(run.path) for run in (dense, mixture, other))
    assert unlike([dense], [mixture]) is None  # models may differ
    said = unlike([dense], [mixture, other])
    assert said.endswith(f"{other.path}: vocabulary.text: 100 -> 200")
    done = tool("--baseline", dense.path, "--candidate", other.path)
    assert "WARNING: The runs differ in more than their models" in done.stdout
