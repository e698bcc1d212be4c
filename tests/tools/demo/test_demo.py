"""The demo, whole but small, by the same program as `make demo`."""

import json
import shlex
import subprocess
import sys

import yaml

from tests.helpers import CHECKOUT
from tests.helpers.ranks import program

RECIPE = {
    "text": {"size": 400},
    "image": {"size": 32, "resolution": 16, "patch": 4, "max_images": 40, "batch_size": 8, "steps": 5},
    "speech": {"size": 20, "max_seconds": 20},
}  # fmt: skip


def demo(work, recipe, *more, forked=True):
    options = ["--work", str(work), "--tokenizers", str(recipe), "--documents", "60", *more]
    options += ["--vocoder", "2"] if "--corpus" not in more else []
    options += ["model.dim=32", "model.layers=1", "data.sequence_length=128", "data.lanes=1", "training.steps=20"]
    options += ["optimizer.warmup=2", "validation.every=10", "validation.sequences=48"]
    if forked:
        done = program("tests.helpers.forked_demo", *options)
    else:
        command = [sys.executable, "tools/demo.py", *options]
        done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_from_documents_to_a_trained_model_and_again_on_ones_own_shards(tmp_path, monkeypatch):
    """The first run trains by `mom local` as a user would, the second starts every other command so."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    work = tmp_path / "demo"
    table = demo(work, recipe)
    for word in ("unigram baseline", "held out, at the end", "tokens seen", "FLOPs spent", "tokens/s", "curves.png"):
        assert word in table
    lines = [json.loads(line) for line in (work / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(21))
    for modality in ("text", "image", "speech"):
        key = f"val/held_out/loss/{modality}"
        assert lines[20][key] < lines[0][key]
    assert sorted(p.name for p in (work / "run/checkpoints").iterdir()) == ["step-10", "step-20"]
    assert (work / "run/curves.png").read_bytes().startswith(b"\x89PNG")

    assert "| digit" in table  # whether captions decide what is drawn
    assert (work / "run/captions.png").read_bytes().startswith(b"\x89PNG")
    page = (work / "run/report.html").read_text()
    assert "Drawn for captions" in page
    shown = page.split("Before and after the tokenizers")[1].split("<h2>")[0]
    assert shown.count("original.png") == shown.count("decoded.png") > 2
    assert shown.count("original.wav") == shown.count("decoded.wav") > 0
    assert (work / "run/samples/sample-1.md").exists()
    assert (work / "tokenizers/speech/vocoder/config.json").exists()  # so these sounds are the vocoder's
    assert (work / "run/samples/sample-0-0.png").exists()

    again = demo(work, recipe, forked=False)
    assert [json.loads(x) for x in (work / "run/metrics.jsonl").read_text().splitlines()] == lines, "trained again"
    assert again.split("loss (nats")[1].split("run  ")[0] == table.split("loss (nats")[1].split("run  ")[0]

    raw = tmp_path / "my own"  # with a space, as folders have
    raw.mkdir()
    text = "".join(json.dumps({"text": f"document {i} about nothing but text " * 20}) + "\n" for i in range(200))
    (raw / "pages.jsonl").write_text(text)
    monkeypatch.setenv("FORKED_RANKS", "1")
    table = demo(tmp_path / "demo own", recipe, "--corpus", str(raw))
    assert "image" not in table.split("loss (nats")[1].split("FLOPs")[0]


def test_a_corpus_with_a_space_in_its_name_reaches_the_program_whole():
    for target in ("demo", "paper-mini"):
        said = subprocess.run(
            ["make", "--no-print-directory", "-n", "-o", ".venv/.ok", target, "CORPUS=my raw/tars"],
            cwd=CHECKOUT,
            capture_output=True,
            text=True,
        )
        assert said.returncode == 0, said.stderr
        words = shlex.split(said.stdout.splitlines()[-1])
        assert words[words.index("--corpus") + 1] == "my raw/tars"
