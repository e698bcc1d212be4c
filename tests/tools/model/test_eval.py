"""tools/eval.py computes the losses that the run's own validation computed, whatever the number of processes."""

import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import termios
from contextlib import suppress

import pytest

from mom_train.config.files import load_config
from mom_train.observe.metrics import read_metrics
from tests.helpers import CHECKOUT
from tests.helpers.ranks import mom_train, program
from tests.helpers.tokenized import tokenized_config

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def call(*line, code=0):
    line = list(map(str, line))
    if line[0].endswith(".py"):
        done = program(*line)
    else:
        done = subprocess.run(line, cwd=CHECKOUT, capture_output=True, text=True)
    assert done.returncode == code, done.stderr[-3000:]
    return done.stdout + done.stderr


def in_a_terminal(*line):
    """What a tool shows on a terminal, where progress bars are drawn. The tool must succeed."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))  # none is drawn on no columns
    command = [sys.executable, *map(str, line)]
    with subprocess.Popen(command, cwd=CHECKOUT, stdin=its, stdout=its, stderr=its) as process:
        os.close(its)
        shown = b""
        with suppress(OSError):  # what a terminal's end is to who reads it
            while block := os.read(ours, 1 << 16):
                shown += block
    os.close(ours)
    assert process.returncode == 0, shown.decode()[-3000:]
    return shown.decode()


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    path = folder / "config.yaml"
    changes = {
        "training": {"steps": 4, "batch": 4, "micro_batch": 2, "ema_decay": 0.9},
        "checkpoint": {"every": 2, "best": "val/held/loss/text"},
    }
    path.write_text(tokenized_config(folder, **changes).to_yaml())
    assert mom_train(path)[0] == 0
    return folder / "run"


def test_the_figures_are_those_that_validation_logged(run_dir, tmp_path):
    shards = run_dir.parent / "val"
    lines = {line["step"]: line for line in read_metrics(run_dir)}

    def figures(*more, line=()):
        rows = ["--sequences", str(load_config(run_dir / "config.yaml").validation.sequences)]
        call(*line, "tools/eval.py", *more, "--shards", shards, *rows, "--json", tmp_path / "out.json")
        found = json.loads((tmp_path / "out.json").read_text())
        beside = ("targets/", "unigram/", "sequences", "whole")  # what training does not log
        return found, {name: value for name, value in found["sets"]["val"].items() if not name.startswith(beside)}

    newest, values = figures(run_dir)
    logged = {name.removeprefix("val/held/"): v for name, v in lines[4].items() if name.startswith("val/held/")}
    assert newest["step"] == 4
    assert values == pytest.approx(logged, rel=1e-6)
    assert {"loss/text", "loss/image", "bits_per_byte/text"} <= values.keys()
    older, by_two = figures(run_dir / "checkpoints/step-2", line=TORCHRUN)
    assert older["step"] == 2
    logged = {name.removeprefix("val/held/"): v for name, v in lines[2].items() if name.startswith("val/held/")}
    assert by_two == pytest.approx(logged, rel=1e-4)
    out = tmp_path / "average.json"
    shown = in_a_terminal(
        "tools/eval.py", run_dir, "--weights", "ema", "--step", "best", "--shards", shards, "--json", out
    )
    assert "pass/s]" in shown or "s/pass]" in shown, "a progress bar"
    average = json.loads(out.read_text())["sets"]["val"]
    assert all(average[name] != values[name] for name in ("loss/text", "loss/image"))


def test_what_cannot_be_evaluated_is_said(run_dir, tmp_path):
    def says(*more):
        error = call("tools/eval.py", run_dir, *more, code=2)
        assert "Traceback" not in error
        return error

    assert "step-3: no committed checkpoint there" in says("--shards", run_dir.parent / "val", "--step", "3")
    assert "manifest.json" in says("--shards", tmp_path)
