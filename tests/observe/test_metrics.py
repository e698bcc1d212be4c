"""What a run writes for people: read back with TensorBoard's own reader, and from Weights & Biases' file."""

import importlib.util
import json
import re
import struct
import subprocess

import numpy as np
import pytest
from PIL import Image

from mom_train.observe.metrics import Record, read_metrics
from tests.helpers import CHECKOUT
from tests.helpers.run_config import tiny_config
from tests.helpers.runs import run
from tests.helpers.tokenized import tokenized_config


def board(run_dir):
    """{tag: [(step, value), ...]} of scalars, and of other things [(step, None), ...], as TensorBoard's server reads
    them."""
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
    from tensorboard.util import tensor_util

    reader = EventAccumulator(str(run_dir / "tensorboard"))
    reader.Reload()
    found = {}
    for tag in reader.Tags()["tensors"]:
        events = [(e.step, tensor_util.make_ndarray(e.tensor_proto)) for e in reader.Tensors(tag)]
        found[tag] = [
            (step, float(value) if value.shape == () and value.dtype.kind == "f" else None) for step, value in events
        ]
    return found


def test_a_resume_takes_back_what_came_after_its_checkpoint_over_steps_and_over_flops(tmp_path):
    config = tiny_config(tmp_path)
    config.run_dir.mkdir()

    def values(step, attempt):
        return {"loss/total": 9.0 - step - attempt / 8, "flops/total": step * 20e9, "perf/tokens_per_s": 1.0}

    with Record(config, 0, 9) as record:
        for step in range(1, 7):
            record.write(step, values(step, 0))
    with Record(config, 3, 9) as record:
        record.write(3, {"flops/total": 3 * 20e9, "val/held/loss/total": 1.5})  # a validation that is made up for
        for step in range(4, 6):
            record.write(step, values(step, 1))
    expected = [(s, 9.0 - s) for s in (1, 2, 3)] + [(s, 9.0 - s - 1 / 8) for s in (4, 5)]
    lines = read_metrics(config.run_dir)
    assert [(line["step"], line["loss/total"]) for line in lines] == expected
    assert lines[2]["val/held/loss/total"] == 1.5
    shown = board(config.run_dir)
    assert shown["loss/total"] == expected
    assert shown["flops_axis/loss/total"] == [(s * 20, v) for s, v in expected]
    assert shown["flops_axis/val/held/loss/total"] == [(60, 1.5)]


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """A run over two ranks that samples, and that logs to Weights & Biases where that is installed."""
    folder = tmp_path_factory.mktemp("seen")
    changes = {
        "training": {"steps": 4, "batch": 4, "micro_batch": 2},
        "sampling": {"every": 2, "max_tokens": 24, "denoising_steps": 3,
                     "prompts": [{"text": "the model", "start": "image"}, {}]},
        "objective": {"diffusion": {"patch_width": 12}, "z_loss": 1e-6},
    }  # fmt: skip
    if importlib.util.find_spec("wandb"):
        changes["wandb"] = {"project": "test", "mode": "offline"}
    path = folder / "config.yaml"
    path.write_text(tokenized_config(folder, **changes).to_yaml())
    run(path, ranks=2, torchrun=True)
    return folder / "run"


def test_samples_are_what_the_checkpoint_writes(seen):
    from mom_tokenizers.bundle import Tokenizers
    from mom_train.checkpoint.load import load_run
    from mom_train.config.files import load_config
    from mom_train.generate.sampler import Sampling, sample_document

    assert sorted(p.name for p in (seen / "samples").iterdir()) == ["step-2", "step-4"]
    model, _ = load_run(seen)
    config = load_config(seen / "config.yaml")
    tokenizers = Tokenizers.load(config.tokenizers)
    sampling = Sampling(
        max_tokens=24, denoising_steps=3, patches_per_picture=16, sizes={"text": tokenizers.describe()["text"]["size"]}
    )
    spans = list(sample_document(model, config.layout, [], sampling, config.seed + 1))
    text = (seen / "samples/step-4/text.txt").read_text()
    assert text.startswith("> the model\n\n![picture](0-0.png)")
    written = [tokenizers.tokenizer("text").decode(value) for modality, value in spans if modality == "text"]
    assert written
    assert all(words in text for words in written)
    assert np.asarray(Image.open(seen / "samples/step-4/0-0.png")).shape == (16, 16, 3)
    assert np.load(seen / "samples/step-4/0-0.npy").shape == (16, 12)


def test_tensorboard_has_one_run_whose_every_chart_shows_something(seen):
    from mom_train.config.files import load_config
    from mom_train.observe.tensorboard import layout

    assert [p.is_file() for p in (seen / "tensorboard").iterdir()] == [True]
    shown = board(seen)
    config = load_config(seen / "config.yaml")
    charts = [(name, patterns) for charts in layout(config).values() for name, (_, patterns) in charts.items()]
    assert len(charts) > 12
    assert ("z-loss per target", ["^z_loss$"]) in charts
    unmatched = [(n, p) for n, patterns in charts for p in patterns if not any(re.match(p, tag) for tag in shown)]
    assert unmatched == []
    assert {"config/text_summary", "samples/0/text_summary", "samples/0-0", "_hparams_/experiment"} <= shown.keys()
    assert [step for step, _ in shown["samples/0-0"]] == [2, 4]
    assert [step for step, _ in shown["samples/grid"]] == [2, 4]
    for line in read_metrics(seen):
        if "loss/total" in line:
            step = round(line["flops/total"] / 1e9)
            assert step in [s for s, _ in shown["flops_axis/loss/total"]]


def wandb_history(run_dir):
    """The logged lines in an offline run's file: records in LevelDB's log format, each a protocol buffer."""
    from wandb.proto.wandb_internal_pb2 import Record as Entry

    [path] = run_dir.glob("wandb/offline-run-*/*.wandb")
    content, at, lines, part = path.read_bytes(), 7, [], b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:  # a block's end has no room for a header
            at += 32768 - at % 32768
            continue
        _, size, kind = struct.unpack("<IHB", content[at : at + 7])
        part += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last of several
            entry, part = Entry.FromString(part), b""
            if entry.HasField("history"):
                lines.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in entry.history.item})
    return lines


def test_weights_and_biases_gets_the_same_figures(seen):
    if importlib.util.find_spec("wandb") is None:
        pytest.skip("wandb is not installed: pip install wandb")
    lines = {line["step"]: line for line in wandb_history(seen) if "loss/total" in line}
    ours = {line["step"]: line for line in read_metrics(seen) if "loss/total" in line}
    assert lines.keys() == ours.keys() == {1, 2, 3, 4}
    for step, line in ours.items():
        assert {k: lines[step][k] for k in line} == pytest.approx(line)
    assert len(list((seen / "wandb").glob("offline-run-*/files/media/images/**/*.png"))) == 2 * len(
        list((seen / "samples/step-4").glob("*.png"))
    )


def test_the_environment_names_every_rank_and_start(seen):
    found = json.loads((seen / "environment.json").read_text())
    assert [rank for host in found["hosts"] for rank in host["ranks"]] == [0, 1]
    assert found["command"][-1].endswith("config.yaml")
    assert [start["step"] for start in found["starts"]] == [0]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=CHECKOUT, capture_output=True, text=True).stdout.strip()
    assert (found["git"] or {}).get("commit", "") == commit
