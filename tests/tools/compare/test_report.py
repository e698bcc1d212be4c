"""tools/report.py on real runs, trained here, and on what hostile or old ones hold."""

import base64
import json
import math
import re
import shutil
from html.parser import HTMLParser

import pytest
import yaml

from mom_tools.compare.charts import Series, chart, short
from mom_tools.compare.curves import Run
from mom_tools.compare.report import page, samples, scored
from mom_train.baseline import read_baseline, unigram
from mom_train.config.files import load_config
from tests.helpers import CHECKOUT
from tests.helpers.ranks import mom_train, program
from tests.helpers.run_config import write_config

EVIL = '<script>alert("x")</script><img src=http://example.org/x> & "quoted"'
VOID = {"meta", "img", "input"}
PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


class Page(HTMLParser):
    """The tags, attributes and text of a page, in which every tag must be closed."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.text, self.tooltips = [], [], [], []
        self._open = []
        self.feed(html)
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if self._open[-1:] == ["title"]:
            self.tooltips.append(data)

    def says(self, words):
        return words in " ".join(" ".join(self.text).split())

    def asks_for_nothing(self):
        places = [v for name, v in self.attributes if name in ("src", "href", "srcset", "action", "data", "xlink:href")]
        return all(p.startswith(("data:", "#")) for p in places) and not {"script", "link", "iframe", "object"} & set(
            self.tags
        )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A dense model and a mixture, trained by the public command, and a copy of the dense one as if with another
    seed."""
    folder = tmp_path_factory.mktemp("report")
    runs = []
    for name, seed, decoupled in [("dense-0", 0, []), ("mixture-0", 0, ["in_proj"])]:
        run = folder / name
        model = {"dim": 16, "layers": 1, "decoupled": decoupled}
        config = write_config(folder, run_dir=str(run), seed=seed, model=model, training__steps=4, validation__every=2)
        code, said = mom_train(config)
        assert code == 0, said
        runs.append(run)
    again = shutil.copytree(runs[0], folder / "dense-1", ignore=shutil.ignore_patterns("checkpoints", "tensorboard"))
    config = yaml.safe_load((again / "config.yaml").read_text()) | {"seed": 1, "run_dir": str(again)}
    (again / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return [runs[0], again, runs[1]]


def test_a_run_and_several_are_pages_that_need_no_network(trained, tmp_path):
    out = tmp_path / "report.html"
    done = program("tools/report.py", *trained, "--output", out, "--price", 2)
    assert done.returncode == 0, done.stderr
    found = Page(out.read_text())
    assert found.asks_for_nothing()
    last = [Run(path).lines[-1] for path in trained]
    for line in last:
        assert found.says(f"{line['val/held/loss/text']:.4f}")
        assert found.says(f"{line['flops/total']:.3g}")
    # the seeds are one model, and the mixture is compared with both of them
    assert found.says("Against the baseline")
    assert found.tags.count("h3") == 2  # one comparison, and the differences of the configs
    assert found.says("model.decoupled")
    titles = [title for title in found.tooltips if "loss/text" in title]
    # axes x runs x (one training curve, validation after 0, 2 and 4 steps)
    assert len(titles) == 3 * 3 * (1 + 3)
    alone = Page(page([Run(trained[0])]))
    assert alone.asks_for_nothing()
    assert not alone.says("Against the baseline")


def test_what_documents_configs_and_hosts_say_is_only_text(trained, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_bytes((trained[0] / "metrics.jsonl").read_bytes())
    config = yaml.safe_load((trained[0] / "config.yaml").read_text())
    config["tokenizers"] = EVIL
    config["data"]["train"] = [{"path": EVIL, "shards": EVIL, "weight": 1.0}]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "environment.json").write_text(json.dumps({"hosts": [EVIL], EVIL: {"cpu": EVIL}, "world_size": 2}))
    (run / "incident.json").write_text(json.dumps({"why": EVIL}))
    (run / "rollbacks.jsonl").write_text(json.dumps({"step": 1, "why": EVIL}) + "\n")
    (run / "status.json").write_text(json.dumps({"state": "failed", "step": 4, "steps": 4, "reason": EVIL}))
    for step in (2, 10):
        (run / f"samples/step-{step}").mkdir(parents=True)
        (run / f"samples/step-{step}/text.txt").write_text(f"{EVIL} after {step}")
    (run / "samples/step-10/0.png").write_bytes(PIXEL)
    (run / "samples/step-10/0.wav").write_bytes(b"RIFF....WAVE")
    row = {"figure": EVIL, "of": "samples", "value": 2.6415, "interval": None, "n": 1234}
    (run / "scores/step-4").mkdir(parents=True)
    (run / "scores/step-4/scores.json").write_text(json.dumps({"step": 4, "scores": [row], "notes": [f"{EVIL}, said"]}))
    html = page([Run(run)])
    found = Page(html)
    assert found.asks_for_nothing()
    assert html.count("<script") == 0
    assert found.says("2.642")
    assert found.says("1,234")
    assert found.says(f"{EVIL}, said")
    assert found.says(f"{EVIL} after 10")
    assert html.index("after 10") < html.index("after 2")
    assert found.tags.count("img") == 1
    assert found.tags.count("audio") == 1
    assert found.says("failed")
    assert found.says("device hours")


def test_a_sample_shows_its_pictures_where_they_stand_and_is_not_cut(tmp_path):
    folder = tmp_path / "samples/step-8"
    folder.mkdir(parents=True)
    (tmp_path / "metrics.jsonl").write_text('{"step": 8, "loss/text": 3.0}\n')
    long = "word " * 5000
    lines = ["> A seven", "![picture](0-0.png)", long, "[0.5 s of speech](0-1.wav)", "[9 x ids](0-2.json)"]
    (folder / "text.txt").write_text("\n\n".join([*lines, "![picture](gone.png)", "![picture](../../secret.png)"]))
    for name in ("0-0.png", "9-unnamed.png", "../../secret.png"):
        (folder / name).write_bytes(PIXEL)
    (folder / "0-1.wav").write_bytes(b"RIFF....WAVE")
    (folder / "0-2.json").write_text("{}")
    [sample] = samples(Run(tmp_path))
    kinds = [(kind, part["name"]) for part in sample["parts"] for kind in ("text", "picture", "sound") if kind in part]
    text = ("text", "text.txt")
    assert kinds == [text, ("picture", "0-0.png"), text, ("sound", "0-1.wav"), text, ("picture", "9-unnamed.png")]
    written = "".join(part.get("text", "") for part in sample["parts"])
    assert long in written
    assert "0-0.png" not in written
    for kept in ("[9 x ids](0-2.json)", "![picture](gone.png)", "![picture](../../secret.png)"):
        assert kept in written


def test_what_the_tokenizers_keep_stands_beside_the_original_and_captions_above_the_samples(tmp_path):
    folder = tmp_path / "round_trip"
    folder.mkdir()
    (tmp_path / "metrics.jsonl").write_text('{"step": 8, "loss/text": 3.0, "flops/total": 1, "tokens/text": 1}\n')
    assert "Before and after" not in page([Run(tmp_path)])
    lines = ["A seven.", "![original](0-0-original.png)", "![from its tokens](0-0-decoded.png)"]
    (folder / "document-0.md").write_text("\n\n".join(lines))
    for name in ("round_trip/0-0-original.png", "round_trip/0-0-decoded.png", "captions.png"):
        (tmp_path / name).write_bytes(PIXEL)
    html = page([Run(tmp_path)])
    shown = html.split("Before and after the tokenizers")[1].split("<h2>")[0]
    assert [shown.index(x) for x in ("A seven.", "0-0-original.png", "0-0-decoded.png")] == sorted(
        shown.index(x) for x in ("A seven.", "0-0-original.png", "0-0-decoded.png")
    )
    assert 'alt="captions.png"' in html.split("Drawn for captions")[1]


def test_a_branch_says_which_trunk_it_left_and_where(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 8, "loss/text": 3.0, "flops/total": 1, "tokens/text": 1}\n')
    branch = "branch={run: /runs/t, step: 1500}"
    config = load_config(
        CHECKOUT / "configs/mini/chameleon.yaml", [branch, "optimizer.schedule=wsd", "optimizer.decay=9"]
    )
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert "is a branch of /runs/t, from step 1,500 on" in page([Run(tmp_path)])


def test_the_loss_of_counting_stands_beside_a_runs_own(trained):
    (trained[0] / "unigram.json").unlink(missing_ok=True)
    page([Run(trained[0])])
    kept = read_baseline(trained[0])
    config = load_config(trained[0] / "config.yaml")
    assert kept == unigram(config)
    assert list(kept) == list(config.data.validation)
    found = Page(page([Run(trained[0])]))
    for losses in kept.values():
        for loss in losses.values():
            assert found.says(f"{loss:.4f}")


def test_a_directory_with_nothing_but_metrics_is_enough(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss/text": 3.0, "tokens/text": 10, "flops/total": 100}\n{"st'
    )
    found = Page(page([Run(tmp_path)]))
    assert found.says("Not recorded")
    with pytest.raises(ValueError, match=r"no metrics\.jsonl"):
        page([Run(tmp_path / "other")])


def test_a_chart_is_small_repeats_and_takes_its_colours_from_the_page():
    assert [short(v) for v in (0.004, 1500, 1.4e13, 2e18)] == ["0.004", "1.5k", "14T", "2e+18"]
    series = [
        Series([0, 50, 100], [9.0, 2.0, 1.0], 0, "line", EVIL),
        Series([0, 50, 100], [9.0, 2.5, 1.5], 1, "dots", "held"),
        Series([], [], 2, "dots", "empty"),
        Series([50, 100], [math.nan, 1.2], 3, "dots", "diverged"),
    ]
    drawn = chart("text", series, "steps")
    assert drawn == chart("text", series, "steps")
    assert len(drawn) < 12_000
    found = Page(drawn)
    assert found.asks_for_nothing()
    assert "script" not in found.tags
    assert EVIL in found.tooltips
    # the first loss is off the chart, for losses fall steeply in the first twentieth of a run
    dots = [t for t in found.tooltips if t != EVIL]
    assert dots == ["held: 2.5000 at 50 steps", "held: 1.5000 at 100 steps", "diverged: 1.2000 at 100 steps"]
    assert {"0", "20", "40", "60", "80", "100", "steps"} <= set(found.text)
    assert "var(--c1)" in drawn
    assert "#" not in drawn.replace("url(#", "").replace('href="#', "")  # no colour but the page's


def test_the_names_inside_two_charts_differ():
    series = [Series([0, 1], [1.0, 2.0], 0, "dots", "one")]
    names = [re.findall(r' id="([^"]+)"', chart("text", series, label)) for label in ("steps", "tokens")]
    assert names[0]
    assert not set(names[0]) & set(names[1])


def test_scores_come_newest_first_and_a_file_cut_short_is_left_out(tmp_path):
    for step, text in (
        (4, '{"step": 4, "scores": []}'),
        (12, '{"step": 12, "scores": [], "notes": ["a"]}'),
        (20, '{"st'),
    ):
        (tmp_path / f"scores/step-{step}").mkdir(parents=True)
        (tmp_path / f"scores/step-{step}/scores.json").write_text(text)
    assert [(one["name"], one["notes"]) for one in scored(Run(tmp_path))] == [("step-12", ["a"]), ("step-4", None)]
