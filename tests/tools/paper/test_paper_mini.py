"""tools/paper_mini.py: the plan by itself, and a miniature trained for real, killed and carried on."""

import io
import json
import math
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import webdataset
import yaml
from PIL import Image

from mom_data.batches.loader import Share, batches
from mom_data.order.plan import Plan, Source
from mom_data.shards.dataset import TokenDataset
from mom_data.shards.format import TokenSegment
from mom_tokenizers.errors import UserError
from mom_tools.campaign import startable
from mom_tools.data.mixture import sources
from mom_tools.paper.miniature import SHARES, chosen_experiments, prepare, settle
from mom_tools.paper.plan import (
    EXPERIMENTS,
    RATES,
    RESERVE,
    SETTINGS,
    Job,
    State,
    best_rate,
    changes,
    done_seeds,
    seconds,
    sequences,
    steps_for,
    todo,
    variants,
    wanted_rates,
)
from mom_tools.paper.results import router_parameters
from mom_train.config.files import load_config
from mom_train.config.model import ModelConfig
from mom_train.cost.flops import training_flops_per_token
from mom_train.model.language_model import LanguageModel
from tests.helpers import CHECKOUT, corpus
from tests.helpers.ranks import mom_train, program

BATCH = 8


def timed(per_step=0.1, startup=2.0):
    state = State(settings=list(SETTINGS))
    for s in SETTINGS:
        for a in SETTINGS[s]:
            state.per_step[f"{s}/{a}"], state.startup[f"{s}/{a}"] = per_step, startup
    return state


def loss(job):
    """The loss that a rate leads to. The best rate of all is 1e-2."""
    return 3 + abs(math.log(job.rate / 1e-2)) + 0.01 * job.seed


def simulate(state, seeds, left, slots=2, stop_after=None):
    """The jobs in the order in which they start, where each takes as long as the plan predicts."""
    started = []
    while stop_after is None or len(started) < stop_after:
        jobs = startable(todo(state, seeds), set(), set(), lambda job: seconds(state, job, BATCH), left)[:slots]
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
    assert {j.steps for j in jobs if j.kind == "sweep"} == {200}


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
    short = max(20, more.steps // 2)
    sweep = [Job("sweep", s, a, 0, r, short) for s in SETTINGS for a in SETTINGS[s] for r in (*RATES[a], 1.0)]
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


def test_a_restart_with_other_rates_or_precision_is_refused_and_none_goes_on_with_those_of_the_start():
    state = State()
    settle(state, [2e-3, 1e-3], None, "fp32")
    settle(state, [4e-3], None, "bf16")  # nothing depends on the rates before the steps are decided
    assert ([*state.rates.values()], state.precision) == ([[4e-3]] * len(state.rates), "fp32")
    state.steps = 100
    settle(state, None, None, "bf16")
    settle(state, [4e-3], "fp32", "bf16")
    assert ([*state.rates.values()], state.precision) == ([[4e-3]] * len(state.rates), "fp32")
    with pytest.raises(UserError, match="--rates: this miniature was begun with"):
        settle(state, [8e-3], None, "fp32")
    with pytest.raises(UserError, match="--precision bf16: this miniature was begun with fp32"):
        settle(state, None, "bf16", "bf16")


def test_experiments_asked_for_later_train_only_themselves_and_last_in_each_round():
    state = timed()
    state.steps = 400
    earlier, _ = simulate(state, 2, 1e9)
    before = set(state.finished)
    state.experiments = ["learned", "corrupt-50"]
    jobs = list(todo(state, 2))
    # what has routers is timed before it may start: its steps take longer than the mixture's
    assert [j.id for j in jobs] == ["chameleon_speech/learned/time"]
    assert jobs[0].rate == RATES["mixture"][0]
    state.finished[jobs[0].id] = 3.0
    state.per_step["chameleon_speech/learned"], state.startup["chameleon_speech/learned"] = 0.7, 2.0
    later, _ = simulate(state, 2, 1e9)
    named = [f"chameleon_speech/{v}/seed-{k}" for k in (0, 1) for v in state.experiments]
    assert [j.id for j in later] == named
    assert set(state.finished) - before == {*named, jobs[0].id}
    rates = {j.variant: j.rate for j in (*earlier, *later) if j.setting == "chameleon_speech" and j.kind == "run"}
    assert rates["learned"] == rates["corrupt-50"] == rates["mixture"]
    learned, corrupted = (seconds(state, j, BATCH) for j in later[:2])
    assert learned > 6 * corrupted
    # wanted from the beginning: counted in the budget, and the last of each round
    fresh = timed()
    fresh.steps = 400
    fresh.experiments, fresh.per_step["chameleon_speech/learned"] = ["learned"], 0.7
    fresh.startup["chameleon_speech/learned"] = 2.0
    rounds = [j for j in simulate(fresh, 2, 1e9)[0] if j.kind == "run"]
    assert [rounds[i].variant for i in (10, 21)] == ["learned", "learned"]
    assert [j.seed for j in rounds] == [0] * 11 + [1] * 11
    assert steps_for(fresh, 5e4, 2, 3, BATCH, 100_000) < steps_for(timed(), 5e4, 2, 3, BATCH, 100_000)


def test_the_configs_at_scale_are_the_experiments_in_miniature():
    folder = CHECKOUT / "configs/experiments"
    assert {p.name for p in folder.iterdir()} == {f"443m-{name}.yaml" for name in EXPERIMENTS}
    mixture = load_config(CHECKOUT / "configs/chameleon_speech/443m-mom.yaml")
    for name in EXPERIMENTS:
        own = [f"{key}={json.dumps(value)}" for key, value in changes(name).items()]
        small = load_config(CHECKOUT / "configs/mini/chameleon_speech.yaml", own)
        config = load_config(folder / f"443m-{name}.yaml")
        assert config.run_dir.name == f"443m-{name}"
        share = config.data.corrupt_share
        assert share == pytest.approx(small.data.corrupt_share, abs=1e-6)
        sizes = {"dim": small.model.dim, "layers": small.model.layers}
        assert config.model.model_copy(update=sizes) == small.model
        assert config.model != mixture.model or share > 0
        data = config.data.model_copy(update={"corrupt_share": 0.0})
        same = {"run_dir": mixture.run_dir, "model": mixture.model, "data": data}
        assert config.model_copy(update=same) == mixture


def test_the_uninformative_mask_says_nothing_about_a_token(tmp_path):
    corpus.write_dataset(tmp_path / "data", documents=300)
    plan = Plan((Source(TokenDataset(tmp_path / "data"), 1.0),), 256, 2, 64, 0)
    share = Share(0, 1, 48, 48)
    true = next(batches(plan, corpus.VOCAB, share)).modality.reshape(-1).numpy()
    wrong = EXPERIMENTS["corrupt-uninformative"]["data.corrupt_share"]
    routed = next(batches(plan, corpus.VOCAB, share, corrupt_share=wrong)).modality.reshape(-1).numpy()
    for m in range(3):
        here = routed[true == m]
        assert len(here) > 1000
        assert np.bincount(here, minlength=3) / len(here) == pytest.approx([1 / 3] * 3, abs=4 * 0.47 / len(here) ** 0.5)


@pytest.mark.parametrize("name", ["learned", "learned-pool", "experts-2", "corrupt-50"])
def test_routers_are_counted_as_built(name):
    model = {k.removeprefix("model."): v for k, v in changes(name).items() if k.startswith("model.")}
    config = ModelConfig.model_validate({"dim": 48, "layers": 2, **model})
    built = LanguageModel(config, 64, 3)
    routers = sum(p.numel() for n, p in built.named_parameters() if n.endswith("router"))
    assert router_parameters(config, 3) == routers
    assert (routers > 0) == (name != "corrupt-50")


def test_all_models_of_a_setting_have_the_same_active_flops():
    for full in (False, True):
        extra = yaml.safe_load((CHECKOUT / "configs/mini/_full.yaml").read_text()) if full else {}
        sizes = [f"{s}.{k}={json.dumps(v)}" for s, keys in extra.items() for k, v in keys.items()]
        for setting in SETTINGS:
            flops = {}
            for variant in variants(setting, tuple(EXPERIMENTS)):
                own = [f"{key}={json.dumps(value)}" for key, value in changes(variant).items()]
                config = load_config(CHECKOUT / f"configs/mini/{setting}.yaml", [*sizes, *own])
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
    found = {s["shards"]: s["weight"] for s in sources(tmp_path, 4, SHARES)}
    assert set(found) == {"a", "b", "c"}
    image = sum(w * s["tokens"]["image"] / sum(s["tokens"].values()) for s in shards[:3] for w in [found[s["name"]]])
    assert image == pytest.approx(0.40 / 0.85, abs=1e-6)
    assert found["b"] == pytest.approx(3 * found["a"], abs=1e-7)  # both lean to text, and weigh by size
    # captions longer than their pictures: the shards with most pictures, as far as they go
    shards[2]["tokens"] = {"text": 700, "image": 300}
    (tmp_path / "manifest.json").write_text(json.dumps({"shards": shards}))
    found = {s["shards"]: s["weight"] for s in sources(tmp_path, 4, SHARES)}
    assert found["a"] + found["c"] > 0.98


SMALL = {
    "model": {"dim": 16, "layers": 1, "decoupled": []},
    "data": {"train": [{"path": "x"}], "sequence_length": 128, "lanes": 2, "workers": 0},
    "optimizer": {"learning_rate": 0.01},
    "training": {"steps": 20, "batch": 2, "micro_batch": 2},
    "checkpoint": {"seconds": 1, "keep": 1},
}


def begun(folder, setting, sizes, make=corpus.random_document):
    """A miniature of one setting whose token shards are there already: its output, its configs, its command."""
    output, configs = folder / "out", folder / "mini"
    configs.mkdir()
    tokenizers = {m: corpus.TOKENIZERS[m] for m in sizes}
    for part, seed in (("train", 1), ("val", 2)):
        where = output / "tokens" / setting / part
        corpus.write_dataset(where, documents=90, seed=seed, tokenizers=tokenizers, make=make)
    (output / "data.json").write_text(json.dumps({"corpus": str(folder.resolve()), "settings": [setting]}))
    (configs / "_common.yaml").write_text(yaml.safe_dump(SMALL))
    own = {"base": "_common.yaml", "run_dir": "x", "vocabulary": sizes}
    (configs / f"{setting}.yaml").write_text(yaml.safe_dump(own, sort_keys=False))
    command = ["tools/paper_mini.py", "--corpus", str(folder), "--output", str(output)]
    command += ["--configs", str(configs), "--rates", "5e-3", "--max-steps", "20", "--minutes", "600"]
    return output, configs, command


def test_experiments_join_a_miniature_that_was_finished_without_them(tmp_path):
    """An earlier miniature: runs trained here, and a state file that knows no experiments."""
    output, configs, command = begun(tmp_path, "chameleon_speech", dict(corpus.VOCAB.sizes))
    runs, tokens = output / "runs/chameleon_speech", output / "tokens/chameleon_speech"
    common = {
        "data.train": json.dumps(sources(tokens / "train", 2, SHARES)),
        "data.validation": json.dumps({"held_out": sources(tokens / "val", 1, SHARES)}),
        "optimizer.learning_rate": 5e-3,
        "validation.sequences": sequences(20, 2),
    }
    for name in ("dense", "mixture"):
        own = {"run_dir": runs / name / "seed-0", "model.decoupled": changes(name)["model.decoupled"]}
        code, said = mom_train(configs / "chameleon_speech.yaml", *(f"{k}={v}" for k, v in (common | own).items()))
        assert code == 0, said[-3000:]
    others = variants("chameleon_speech")[2:]
    for name in others:
        shutil.copytree(runs / "mixture", runs / name)
    done = {f"chameleon_speech/{v}/seed-0": 3.0 for v in ("dense", "mixture", *others)}
    known = {f"chameleon_speech/{v}": 0.01 for v in ("dense", "mixture")}
    earlier = {"settings": ["chameleon_speech"], "rates": {k: [5e-3] for k in RATES}, "spent": 60.0, "steps": 20}
    earlier |= {"startup": known, "per_step": known, "finished": done, "failed": {}}
    (output / "state.json").write_text(json.dumps(earlier))
    wanted = ["learned", "corrupt-uninformative"]
    ended = program(*command, "--seeds", "1", "--experiments", *wanted)
    assert ended.returncode == 0, ended.stderr[-3000:]
    started = [line.split()[2] for line in ended.stderr.splitlines() if " start " in line]
    assert started == ["chameleon_speech/learned/time", *(f"chameleon_speech/{v}/seed-0" for v in wanted)]
    results = json.loads((output / "results.json").read_text())
    assert results["complete"]
    squeezed = " ".join(ended.stdout.split())
    assert set(results["experiments"]) == set(wanted)

    def last(name, key):
        return json.loads((runs / name / "seed-0/metrics.jsonl").read_text().splitlines()[-1])[key]

    for name in wanted:
        figures = results["experiments"][name]
        for modality in ("text", "image", "speech", "total"):
            key = f"val/held_out/loss/{modality}"
            for baseline in ("dense", "mixture"):
                gain = 100 * (1 - last(name, key) / last(baseline, key))
                assert figures[f"over_{baseline}"][key]["gain_percent"] == pytest.approx(gain)
            assert f"| {name} | {modality} | {last('dense', key):.4f} | {last('mixture', key):.4f} |" in squeezed
        assert last(name, "tokens/image") == last("mixture", "tokens/image")
        assert last(name, "flops/total") == last("mixture", "flops/total")
    assert yaml.safe_load((runs / "learned/seed-0/config.yaml").read_text())["model"]["router"] == "learned"
    corrupted = yaml.safe_load((runs / "corrupt-uninformative/seed-0/config.yaml").read_text())
    assert corrupted["data"]["corrupt_share"] == pytest.approx(2 / 3)
    assert results["experiments"]["learned"]["router_flops_percent"] > 0
    assert results["experiments"]["corrupt-uninformative"]["router_flops_percent"] == 0


def test_experiments_need_a_corpus_with_their_modalities(tmp_path):
    assert chosen_experiments(["experts-2", "learned"], ["chameleon", "chameleon_speech"]) == ["learned", "experts-2"]
    assert chosen_experiments(["all"], ["chameleon_speech"]) == list(EXPERIMENTS)
    assert chosen_experiments([], ["chameleon"]) == []
    with pytest.raises(ValueError, match="they are trained with text, image, speech, and the corpus has not all"):
        chosen_experiments(["learned"], ["chameleon", "transfusion"])
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    (tmp_path / "raw").mkdir()
    with webdataset.TarWriter(str(tmp_path / "raw/a.tar")) as tar:
        tar.write({"__key__": "a", "png": picture.getvalue(), "txt": "a caption"})
    with pytest.raises(ValueError, match="the corpus has not all"):
        prepare(tmp_path / "raw", tmp_path / "out", CHECKOUT / "configs/mini", ["all"])
    assert not (tmp_path / "out").exists()  # said before anything is made


def text_and_pictures(rng, _):
    return [TokenSegment(m, rng.integers(0, 32, 16).astype(np.uint16)) for m in rng.integers(0, 2, 4)]


def test_a_miniature_killed_and_started_again_ends_with_its_tables(tmp_path, monkeypatch):
    """Chameleon alone, a single learning rate, on token shards that are there already."""
    monkeypatch.setattr(corpus, "MODALITIES", ("text", "image"))
    output, _, command = begun(tmp_path, "chameleon", {"text": 100, "image": 32}, text_and_pictures)
    command += ["--seeds", "2"]
    first = subprocess.Popen([sys.executable, *command], cwd=CHECKOUT, stderr=subprocess.PIPE, text=True)
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
    done = program(*command)
    assert done.returncode == 0, done.stderr[-3000:]
    state = json.loads((output / "state.json").read_text())
    assert state["spent"] > before["spent"]
    assert "chameleon/dense/time" not in done.stderr, "timed again"
    runs = {f"chameleon/{v}/seed-{k}" for v in ("dense", "mixture") for k in (0, 1)}
    assert {k for k in state["finished"] if "seed" in k} == runs
    results = json.loads((output / "results.json").read_text())
    assert results["complete"]
    assert "experiments" not in results
    assert "Experiments" not in (output / "report.md").read_text()
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
