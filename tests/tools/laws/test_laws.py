"""mom laws: a grid trained for real, refused, carried on and reported; the published losses; bad input."""

import json
import math

import numpy as np
import pytest
import yaml
from scipy import stats

from mom_tokenizers.errors import EXIT_USER_ERROR, UserError
from mom_tools.compare.published import read
from mom_tools.laws.laws import parser, state_of
from mom_tools.laws.published import report, size_of, trend
from tests.helpers import CHECKOUT, corpus
from tests.helpers.ranks import program
from tests.tools.paper.test_paper_mini import begun

SIZES = ["8x1", "16x1", "24x1"]


def last_line(run):
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])


def test_a_grid_that_was_refused_goes_on_with_more_time_and_ends_with_its_laws(tmp_path):
    output, configs, _ = begun(tmp_path, "chameleon_speech", dict(corpus.VOCAB.sizes))
    command = ["mom_tools.laws.laws", "--corpus", tmp_path, "--output", output, "--configs", configs]
    command += ["--sizes", *SIZES, "--budgets", "2", "--rates", "5e-3", "--seeds", "1", "--sequences", "4"]
    refused = program(*command, "--minutes", "0.05")
    assert refused.returncode == EXIT_USER_ERROR, refused.stderr[-3000:]
    assert "6 models, 2 budgets and 1 seeds needs at least" in refused.stderr
    state = json.loads((output / "state.json").read_text())
    assert set(state["flops"]) == {f"{m}/{s}" for m in ("dense", "mixture") for s in SIZES}
    assert state["flops"]["dense/16x1"] == state["flops"]["mixture/16x1"]  # active FLOPs are equal
    state["base"] = 4 * max(state["flops"].values())  # a grid as small as there can be, for the test's sake
    (output / "state.json").write_text(json.dumps(state))
    other = program(*command, "--minutes", "600", "--budgets", "3")
    assert other.returncode == EXIT_USER_ERROR
    assert "was begun with --budgets 2, and this is 3" in other.stderr
    done = program(*command, "--minutes", "600")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "/time" not in done.stderr, "timed again"
    results = json.loads((output / "results.json").read_text())
    assert results["complete"]
    assert done.stdout.strip() == (output / "report.md").read_text().strip()
    assert {f"{n}/{m}" for n in ("text", "image", "speech", "total") for m in ("dense", "mixture")} == set(
        results["laws"]
    )
    assert set(results["match/mixture"]) == {"text", "image", "speech", "total"}
    assert (output / "laws.svg").read_text().startswith("<?xml")
    runs = output / "runs"
    for size in SIZES:
        trunk = yaml.safe_load((runs / f"dense/{size}/seed-0/trunk/config.yaml").read_text())
        for budget in (0, 1):
            dense, mixture = (runs / f"{m}/{size}/seed-0/budget-{budget}" for m in ("dense", "mixture"))
            config = yaml.safe_load((dense / "config.yaml").read_text())
            assert config["optimizer"]["schedule"] == "wsd"
            assert config["branch"]["step"] % trunk["checkpoint"]["keep_every"] == 0
            ends = [last_line(x) for x in (dense, mixture)]
            same = [{k: v for k, v in end.items() if k.startswith(("tokens/", "flops/"))} for end in ends]
            assert same[0] == same[1]  # they saw the same tokens
            assert f"{ends[0]['val/held_out/loss/total']:.3f}" in done.stdout
    assert not list(runs.glob("*/*/*/*/checkpoints")), "checkpoints that nobody needs any more"


def test_published_flops_to_match_are_fitted_over_the_size():
    """Speech of Table 2: the line of log(FLOPs to match) over log(N), written with polyfit and its covariance."""
    rows = [p for p in read(2) if (p.modality, p.metric) == ("speech", "training")]
    x = np.log10([float(p.row[:-1]) * (1e9 if p.row.endswith("B") else 1e6) for p in rows])
    y = np.log10([p.relative_flops_percent for p in rows])
    (slope, _), covariance = np.polyfit(x, y, 1, cov=True)
    half = stats.t.ppf(0.975, len(rows) - 2) * math.sqrt(covariance[0, 0])
    factor, (low, high) = trend(rows)
    assert factor == pytest.approx(10**slope)
    assert (low, high) == (pytest.approx(10 ** (slope - half)), pytest.approx(10 ** (slope + half)))
    assert size_of("1.5B") == 1.5e9
    said = " ".join(report().split())
    assert "| 2 | speech | training | 10.3 (37M) | 24.8 (1.5B) | 1.78 [1.6, 1.98] | shrinks |" in said


def test_a_grid_goes_on_with_the_settings_that_it_was_begun_with_and_no_others(tmp_path):
    def begun(*given):
        return state_of(tmp_path, parser().parse_args(["--corpus", ".", *given]), "chameleon")

    begun("optimizer.weight_decay=0.1", "--rates", "2e-3", "1e-3").save(tmp_path / "state.json")
    assert begun("optimizer.weight_decay=0.1").rates["dense"] == [1e-3, 2e-3]
    for given, said in (
        ([], "begun with the changes"),
        (["optimizer.weight_decay=0.1", "--precision", "bf16"], "begun with --precision fp32"),
        (["optimizer.weight_decay=0.1", "--rates", "5e-3"], "begun with --rates"),
    ):
        with pytest.raises(UserError, match=said):
            begun(*given)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "--corpus: name the folder of raw tars or JSON lines"),
        (["--corpus", "/nowhere"], "--corpus /nowhere: nothing there"),
        (["--corpus", ".", "--seeds", "0"], "must be at least 1"),
        (["--corpus", ".", "--minutes", "nan"], "--minutes nan: above 0"),
        (["--corpus", ".", "--budgets", "1"], "--budgets 1: a law needs at least 2"),
        (["--corpus", ".", "--sizes", "8x1", "16x1"], "a law needs at least 3 different sizes"),
        (["--corpus", ".", "--sizes", "8x1", "16x1", "wide"], "--sizes wide: a size is written as WIDTHxLAYERS"),
        (["--corpus", ".", "--models", "dense", "dense"], "--models: name each once"),
        (["--corpus", ".", "model.dim=64"], "model.dim: this command sets it for every run"),
        (["--corpus", ".", "data={train: []}"], "data.train: this command sets it for every run"),
        (["--corpus", ".", "--rates", "0"], "--rates: learning rates are above 0"),
        (["--corpus", ".", "--configs", "docs"], "--configs docs: no _common.yaml there"),
    ],
)
def test_bad_input_is_refused_in_one_line(given, said, monkeypatch, capsys):
    from mom_tools.laws.laws import main

    monkeypatch.chdir(CHECKOUT)
    monkeypatch.setattr("sys.argv", ["mom laws", *given])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == EXIT_USER_ERROR
    assert said in capsys.readouterr().err
