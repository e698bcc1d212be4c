"""The mean of several checkpoints of a run."""

import sys

import numpy as np
import pytest
import torch

from mom_tokenizers.errors import UserError
from mom_tools.model.checkpoint import main
from mom_train.checkpoint.average import coefficients
from mom_train.checkpoint.load import load_run
from mom_train.checkpoint.store import Checkpoints
from mom_train.exchange.weights import open_weights
from tests.helpers.run_config import write_config
from tests.helpers.runs import run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("averaged")
    config = write_config(
        folder, checkpoint={"every": 2, "keep": 9}, training={"steps": 6, "batch": 2, "micro_batch": 1}
    )
    run(config, "data.validation={}", ranks=0)
    return folder


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["mom checkpoint", *map(str, arguments)])
    main()


def test_the_coefficients_are_those_of_the_decay_that_they_emulate():
    for shape, left in {"linear": lambda p: 1 - p, "sqrt": lambda p: 1 - p**0.5}.items():
        c = coefficients(7, shape)
        assert sum(c) == pytest.approx(1)
        # an update between checkpoints i - 1 and i, counted from 0, is in all checkpoints from i on
        assert [sum(c[i:]) for i in range(7)] == pytest.approx([left(i / 7) for i in range(7)])


@pytest.mark.parametrize("shape", ["linear", "sqrt"])
def test_the_average_is_the_weighted_mean_of_the_weights_and_loads_like_a_run(trained, tmp_path, monkeypatch, shape):
    which = ("--last", 3) if shape == "linear" else ("--steps", "6,2,4")  # in any order
    call(monkeypatch, trained / "run", "average", *which, "--shape", shape, "--out", tmp_path / "mean")
    models = [load_run(trained / "run", step)[0].state_dict() for step in (2, 4, 6)]
    weight = [1 / 3] * 3 if shape == "linear" else np.diff(np.sqrt(np.arange(4) / 3))
    mean, config = load_run(tmp_path / "mean")
    assert config.run_dir == tmp_path / "mean"
    read = open_weights(tmp_path / "mean").tensors  # as init_from does
    for name, value in mean.state_dict().items():
        wanted = sum(w * m[name].numpy().astype(np.float64) for w, m in zip(weight, models, strict=True))
        assert value.dtype == torch.float32
        np.testing.assert_allclose(value.numpy(), wanted, rtol=1e-6, atol=1e-9)
        assert torch.equal(read[name].read(), value)


def test_an_average_cannot_be_trained_on_and_says_what_can_be_done(trained, tmp_path, monkeypatch):
    call(monkeypatch, trained / "run", "average", "--last", 2, "--out", tmp_path / "mean")
    said = run(tmp_path / "mean/config.yaml", ranks=0, code=2)
    assert "is an average of checkpoints and has no state of an optimiser" in said


def test_checkpoints_of_different_settings_are_not_mixed(trained, tmp_path):
    import shutil

    from mom_train.checkpoint.average import average

    shutil.copytree(trained / "run", tmp_path / "run")
    state = tmp_path / "run/checkpoints/step-4/train_state.json"
    state.write_text(state.read_text().replace('"learning_rate": 0.01', '"learning_rate": 0.02'))
    with pytest.raises(
        UserError, match=r"step-4 was trained with other settings .*optimizer.learning_rate: 0.01 -> 0.02"
    ):
        average(Checkpoints(tmp_path / "run").committed(), "linear", tmp_path / "mean")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--last", 9), "--last 9: at least 2, and there are 3 checkpoints"),
        (("--steps", "2,3"), "step-3: no committed checkpoint there"),
        (("--steps", "2,2"), "expected different steps"),
        (("--steps", "2"), "at least two checkpoints"),
    ],
)
def test_what_cannot_be_averaged_is_one_message(trained, tmp_path, monkeypatch, capsys, arguments, message):
    with pytest.raises(SystemExit):
        call(monkeypatch, trained / "run", "average", *arguments, "--out", tmp_path / "mean")
    assert message in capsys.readouterr().err
