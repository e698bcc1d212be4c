"""tools/paper_mini.py: the plan by itself, and a miniature trained for real, killed and carried on."""

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import corpus
import numpy as np
import pytest
import yaml

from mom_data.shards import TokenSegment
from mom_train.config_file import load_config
from mom_train.flops import training_flops_per_token

CHECKOUT = Path(__file__).parents[2]
sys.path.insert(0, str(CHECKOUT / "tools"))
from mini_plan import (  # noqa: E402
    MODELS,
    RATES,
    RESERVE,
    SETTINGS,
    Job,
    State,
    best_rate,
    done_seeds,
    seconds,
    startable,
    steps_for,
    todo,
    variants,
    wanted_rates,
)
from paper_mini import sources  # noqa: E402

BATCH = 8


def timed(per_step=0.1, startup=2.0):
    state = State(settings=list(SETTINGS))
    for s in SETTINGS:
        for a in SETTINGS[s]:
            state.per_step[f"{s}/{a}"], state.startup[f"{s}/{a}"] = per_step, startup
    return state


def loss(job):
    """The best rate of all is 1e-2."""
    return 3 + abs(math.log(job.rate / 1e-2)) + 0.01 * job.seed


def simulate(state, seeds, left, slots=2, stop_after=None):
    """Jobs in the order they start; every one takes what the plan thinks."""
    started = []
    while stop_after is None or len(started) < stop_after:
        jobs = startable(state, seeds, BATCH, set(), set(), left)[:slots]
        if not jobs:
            break
        for job in jobs:
            started.append(job)
            state.finished[job.id] = loss(job)
        left -= max(seconds(state, j, BATCH) for j in jobs)
    return started, left


def test_one_seed_of_everything_comes_before_the_next():
    state = timed()
    state.steps = 400
    jobs, _ = simulate(state, 3, 1e9)
    kinds = [j.kind for j in jobs]
    runs = [j for j in jobs if j.kind == "run"]
    everything = {(s, v) for s in SETTINGS for v in variants(s)}
    assert len(everything) == 10
    assert [j.seed for j in runs] == sorted(j.seed for j in runs)
    for seed in range(3):
        assert {(j.setting, j.variant) for j in runs if j.seed == seed} == everything
    assert kinds.index("run") >= kinds.count("sweep") - 3  # the last neighbours may be tried beside the first runs
    assert {j.steps for j in runs} == {400}
    assert {j.steps for j in jobs if j.kind == "sweep"} == {100}


def test_rates_are_tried_beyond_an_edge_and_the_best_one_is_taken():
    state = timed()
    state.steps = 400
    simulate(state, 1, 1e9)
    # 1e-2 is the last of the first rates: the one beyond it was tried, and is worse
    assert f"chameleon/mixture/lr-{2e-2:g}" in state.finished
    assert best_rate(state, "chameleon", "mixture") == 1e-2
    # of the Transformer's, 1e-2 itself lies beyond the edge
    assert best_rate(state, "transfusion", "transformer") == 1e-2
    assert wanted_rates(state, "transfusion", "transformer") == []
    state.failed["x"] = ""
    fresh = timed()
    fresh.failed = {f"chameleon/dense/lr-{r:g}": "diverged" for r in RATES["dense"]}
    assert wanted_rates(fresh, "chameleon", "dense") == []
    assert best_rate(fresh, "chameleon", "dense") == RATES["dense"][1]


@pytest.mark.parametrize("minutes", [30, 480])
def test_the_steps_fill_the_budget_and_fit_it(minutes):
    state = timed()
    budget = 60 * minutes
    state.steps = steps_for(state, budget, 2, 3, BATCH, 100_000)
    assert state.steps > 20
    everything = simulate(state, 3, budget)[0]
    assert len([j for j in everything if j.kind == "run"]) == 30
    state.finished.clear()
    more = timed()
    more.steps = state.steps + 1
    short = max(20, more.steps // 4)
    sweep = [Job("sweep", s, a, 0, r, short) for s in SETTINGS for a in SETTINGS[s] for r in RATES[a]]
    runs = [Job("run", s, v, k, 1.0, more.steps) for s in SETTINGS for v in variants(s) for k in range(3)]
    planned = sum(seconds(more, job, BATCH) for job in (*sweep, *runs))
    assert planned / 2 > (1 - RESERVE) * budget
    assert steps_for(timed(), 1, 2, 3, BATCH, 100_000) == 20  # never fewer, whatever the budget


def test_a_budget_that_runs_out_leaves_whole_rounds():
    state = timed()
    state.steps = 400
    simulate(state, 3, 700)
    seeds = [len(done_seeds(state, s, v, 3)) for s in SETTINGS for v in variants(s)]
    assert min(seeds) >= 1
    assert max(seeds) < 3
    assert max(seeds) - min(seeds) <= 1


def test_a_restart_from_its_file_goes_on_the_same_way(tmp_path):
    whole, cut = timed(), timed()
    whole.steps = cut.steps = 400
    jobs, _ = simulate(whole, 2, 1e9)
    first, left = simulate(cut, 2, 1e9, stop_after=14)
    cut.save(tmp_path / "state.json")
    again = State.load(tmp_path / "state.json")
    assert first + simulate(again, 2, left)[0] == jobs
    assert list(todo(again, 2)) == []
    assert State.load(tmp_path / "none.json") == State()


def test_all_models_of_a_setting_have_the_same_active_flops():
    for full in (False, True):
        extra = yaml.safe_load((CHECKOUT / "configs/mini/_full.yaml").read_text()) if full else {}
        sizes = [f"{s}.{k}={json.dumps(v)}" for s, keys in extra.items() for k, v in keys.items()]
        for setting in SETTINGS:
            flops = {}
            for variant in variants(setting):
                model = [f"model.{key}={json.dumps(value)}" for key, value in MODELS[variant].items()]
                config = load_config(CHECKOUT / f"configs/mini/{setting}.yaml", [*sizes, *model])
                per_token = training_flops_per_token(config.model, config.layout.size, config.data.sequence_length)
                flops[variant] = per_token
            mamba = {v for k, v in flops.items() if k != "transformer"}
            assert len(mamba) == 1
            if "transformer" in flops and not full:
                assert flops["transformer"] == pytest.approx(flops["dense"], rel=0.02)


def test_shards_are_weighted_to_the_shares_and_small_ones_left_out(tmp_path):
    shards = [
        {"name": "a", "documents": 50, "tokens": {"text": 900, "image": 100}},
        {"name": "b", "documents": 50, "tokens": {"text": 3000, "image": 0}},
        {"name": "c", "documents": 50, "tokens": {"text": 10, "image": 490}},
        {"name": "d", "documents": 1, "tokens": {"text": 0, "image": 100}},
    ]
    (tmp_path / "manifest.json").write_text(json.dumps({"shards": shards}))
    found = {s["shards"]: s["weight"] for s in sources(tmp_path, 4)}
    assert set(found) == {"a", "b", "c"}
    image = sum(w * s["tokens"]["image"] / sum(s["tokens"].values()) for s in shards[:3] for w in [found[s["name"]]])
    assert image == pytest.approx(0.40 / 0.85, abs=1e-6)
    assert found["b"] == pytest.approx(3 * found["a"], abs=1e-7)  # both lean to text, and weigh by size
    # captions longer than their pictures: the shards with most pictures, as far as they go
    shards[2]["tokens"] = {"text": 700, "image": 300}
    (tmp_path / "manifest.json").write_text(json.dumps({"shards": shards}))
    found = {s["shards"]: s["weight"] for s in sources(tmp_path, 4)}
    assert found["a"] + found["c"] > 0.98


def test_a_miniature_killed_and_started_again_ends_with_its_tables(tmp_path, monkeypatch):
    """Chameleon alone, a single learning rate, on token shards that are there already."""
    output, configs = tmp_path / "out", tmp_path / "mini"
    configs.mkdir()
    monkeypatch.setattr(corpus, "MODALITIES", ("text", "image"))
    tokenizers = {m: corpus.TOKENIZERS[m] for m in ("text", "image")}

    def document(rng, _):
        return [TokenSegment(m, rng.integers(0, 32, 16).astype(np.uint16)) for m in rng.integers(0, 2, 4)]

    for part, seed in (("train", 1), ("val", 2)):
        folder = output / "tokens/chameleon" / part
        corpus.write_dataset(folder, documents=90, seed=seed, tokenizers=tokenizers, make=document)
    (output / "data.json").write_text(json.dumps({"corpus": str(tmp_path.resolve()), "settings": ["chameleon"]}))
    small = {
        "model": {"dim": 16, "layers": 1, "decoupled": []},
        "data": {"train": [{"path": "x"}], "sequence_length": 128, "lanes": 2, "workers": 0},
        "optimizer": {"learning_rate": 0.01},
        "training": {"steps": 20, "batch": 2, "micro_batch": 2},
        "checkpoint": {"seconds": 1, "keep": 1},
    }
    (configs / "_common.yaml").write_text(yaml.safe_dump(small))
    setting = {"base": "_common.yaml", "run_dir": "x", "vocabulary": {"text": 100, "image": 32}}
    (configs / "chameleon.yaml").write_text(yaml.safe_dump(setting))
    command = [sys.executable, "tools/paper_mini.py", "--corpus", str(tmp_path), "--output", str(output)]
    command += ["--configs", str(configs), "--seeds", "2", "--rates", "5e-3", "--max-steps", "20"]
    first = subprocess.Popen([*command, "--minutes", "600"], cwd=CHECKOUT, stderr=subprocess.PIPE, text=True)
    said = []
    for line in first.stderr:
        said.append(line)
        if "start chameleon/dense/seed-0" in line:
            break
    else:
        pytest.fail("".join(said))
    time.sleep(0.5)
    first.kill()
    first.wait()
    before = json.loads((output / "state.json").read_text())
    assert before["steps"] == 20
    assert before["spent"] > 0
    done = subprocess.run([*command, "--minutes", "600"], cwd=CHECKOUT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    state = json.loads((output / "state.json").read_text())
    assert state["spent"] > before["spent"]
    assert "chameleon/dense/time" not in done.stderr, "timed again"
    runs = {f"chameleon/{v}/seed-{k}" for v in ("dense", "mixture") for k in (0, 1)}
    assert {k for k in state["finished"] if "seed" in k} == runs
    results = json.loads((output / "results.json").read_text())
    assert results["complete"]
    table = results["tables"]["7"]["mixture"]
    for name in ("loss/text", "val/held_out/loss/image"):
        assert table[name]["interval_from"] == "pairs"
        low, high = table[name]["gain_interval"]
        assert low <= table[name]["gain_percent"] <= high
    assert table["loss/text"]["published"][0]["gain_percent"] == 3.0
    report = (output / "report.md").read_text()
    assert "Table 7 in miniature" in report
    assert "Seeds: 2." in report
    assert done.stdout.strip() == report.strip()
    # the two models saw the same tokens
    ends = [
        [json.loads(x) for x in (output / f"runs/chameleon/{v}/seed-1/metrics.jsonl").read_text().splitlines()][-1]
        for v in ("dense", "mixture")
    ]
    assert len({json.dumps({k: v for k, v in end.items() if k.startswith(("tokens/", "flops/"))}) for end in ends}) == 1
