"""Evaluations while a run trains are the same on one rank and on two, and the same as those of the command."""

import contextlib
import io
import json
import re
import sys

import numpy as np
import pytest

from mom_data.shards.format import TokenSegment
from mom_train.config.run import RunConfig
from mom_train.observe.metrics import read_metrics
from tests.helpers.corpus import TOKENIZERS, write_dataset
from tests.helpers.ranks import run_ranks
from tests.helpers.run_config import tiny_config


def document(rng, _):
    """One text with a picture or an utterance, or two utterances."""
    said = TokenSegment(0, rng.integers(0, 100, int(rng.integers(2, 9))).astype(np.uint16))
    shown = TokenSegment(1, rng.integers(0, 32, 16).astype(np.uint16))
    spoken = TokenSegment(2, rng.integers(0, 20, int(rng.integers(20, 40))).astype(np.uint16))
    return [[said, shown], [shown, said], [said, spoken], [spoken, spoken]][int(rng.integers(4))]


def minimal(rng, _):
    return [TokenSegment(2, rng.integers(0, 20, int(n)).astype(np.uint16)) for n in rng.integers(5, 9, 2)]


def config_of(folder, name):
    if not (folder / "val").exists():
        write_dataset(folder / "train", documents=60, shards=1, seed=1, make=document)
        write_dataset(folder / "val", documents=60, shards=1, seed=2, make=document)
        write_dataset(folder / "pairs", documents=9, shards=1, seed=3, make=minimal)
        larger = TOKENIZERS | {"speech": {"kind": "test", "fingerprint": "speech-1", "size": 30}}
        write_dataset(folder / "foreign", documents=9, shards=1, seed=3, make=minimal, tokenizers=larger)
    pairs = {"words": [{"path": str(folder / "pairs")}]}
    return tiny_config(
        folder,
        run_dir=str(folder / name),
        training={"steps": 4, "batch": 4, "micro_batch": 2},
        validation={"every": 1, "sequences": 2},
        evaluation={"every": 2, "pairs": 10, "pool": 3, "draws": 1, "minimal_pairs": pairs},
    )


def evaluated(folder, name):
    """What a run logs of its evaluations, by step; and after it, what the command finds with one process."""
    from mom_tools.evaluate import multimodal
    from mom_train.trainer import train

    config = config_of(folder, name)
    assert train(config) == 0
    logged = {
        line["step"]: {name: value for name, value in line.items() if name.startswith("eval/")}
        for line in read_metrics(config.run_dir)
    }
    if name != "one":
        return logged, None
    out = folder / "out.json"
    line = ["mom evaluate", name, "--shards", "val", "--minimal-pairs", "pairs", "--pairs", "10", "--pool", "3"]
    sys.argv = [str(folder / part) if part in (name, "val", "pairs") else part for part in line]
    sys.argv += ["--draws", "1", "--json", str(out)]
    multimodal.main()
    found = json.loads(out.read_text())
    del sys.argv[2:4]  # --shards val
    multimodal.main()
    found["minimal pairs alone"] = json.loads(out.read_text())["sets"]
    sys.argv[sys.argv.index("--minimal-pairs") + 1] = str(folder / "foreign")
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.suppress(SystemExit):
        multimodal.main()
    return logged, {**found, "of a foreign vocabulary": said.getvalue()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    config_of(folder, "one")
    [(one, command)] = run_ranks(1, evaluated, folder, "one")
    (two, _), _ = run_ranks(2, evaluated, folder, "two")
    return one, two, command, config_of(folder, "one")


def test_one_rank_and_two_find_the_same_every_second_validation(runs):
    one, two, _, _ = runs
    assert [step for step, figures in one.items() if figures] == [0, 2, 4]
    assert [step for step, figures in two.items() if figures] == [0, 2, 4]
    assert one[0] == two[0], "before the first step the weights are the same, and so is every figure"
    assert one[4] == pytest.approx(two[4], rel=1e-3, abs=1e-4)
    assert one[0] != one[4]
    for name in ("recall1/text_to_image", "recall1_pmi/speech_to_text", "gain/speech_after_text", "chance/recall1"):
        assert f"eval/held/{name}" in one[4]
    assert one[4]["eval/held/chance/recall1"] == 1 / 3
    assert {"eval/held/minimal_pairs/altered_speech", "eval/words/minimal_pairs/speech"} <= one[4].keys()


def test_the_command_finds_what_was_logged_and_more(runs):
    one, _, command, _ = runs
    found = {
        f"eval/{place}/{name}": figure for place, figures in command["sets"].items() for name, figure in figures.items()
    }
    logged = {
        name.replace("eval/held", "eval/val").replace("eval/words", "eval/pairs"): value
        for name, value in one[4].items()
        if "/chance/" not in name
    }
    assert {name: found[name]["value"] for name in logged} == pytest.approx(logged, rel=1e-6)
    assert command["minimal pairs alone"] == {"pairs": command["sets"]["pairs"]}
    beside = found["eval/val/recall1_shuffled/text_to_image"]
    assert beside["chance"] == 1 / 3
    assert beside["n"] == 9, "three pools of three; the tenth pair is in none"
    assert found["eval/val/gain/image_after_text"]["n"] == 10
    low, high = found["eval/val/loss/image"]["interval"]
    assert low < found["eval/val/loss/image"]["value"] < high


def test_shards_of_another_vocabulary_are_refused(runs):
    *_, command, _ = runs
    said = command["of a foreign vocabulary"]
    assert "its speech tokenizer has 30 ids, but the config has vocabulary.speech=20" in said
    assert "Traceback" not in said


def test_every_chart_of_evaluations_shows_something(runs):
    from mom_train.observe.tensorboard import layout

    one, _, _, config = runs
    for title, (_, patterns) in layout(config)["What can it do?"].items():
        for pattern in patterns:
            assert any(re.match(pattern, name) for name in one[4]), title


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        ({"every": 1, "pairs": 8, "pool": 9}, r"pool \(9\) must not be above evaluation.pairs \(8\)"),
        ({"minimal_pairs": {"words": [{"path": "x"}]}}, "nothing is evaluated; set evaluation.every"),
        ({"every": 1, "minimal_pairs": {"held": [{"path": "x"}]}}, "'held' is not a name for a set"),
        ({"every": 1, "minimal_pairs": {"words": []}}, "evaluation.minimal_pairs.words: name at least one source"),
    ],
)
def test_an_impossible_section_is_refused(tmp_path, evaluation, message):
    values = config_of(tmp_path, "one").model_dump(mode="json")
    with pytest.raises(ValueError, match=message):
        RunConfig.model_validate(values | {"evaluation": evaluation})
