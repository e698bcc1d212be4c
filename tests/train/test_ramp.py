"""Runs whose batch grows: resumed inside the ramp, and on another number of ranks."""

import json

import pytest

from tests.helpers.run_config import write_config
from tests.helpers.runs import assert_equal_tensors, metrics, run, weights

RAMP = [{"until": 2, "batch": 2}, {"until": 5, "batch": 4}]
SETTINGS = {
    "training": {"steps": 7, "batch": 8, "micro_batch": 1, "batch_ramp": RAMP},
    "optimizer": {"learning_rate": 0.01, "scale_with_batch": True, "schedule": "wsd", "decay": 3},
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ramp")
    run(write_config(folder, **SETTINGS), ranks=0)
    return folder


def test_a_run_that_was_resumed_inside_the_ramp_equals_the_uninterrupted_one_bit_for_bit(whole, tmp_path):
    config = write_config(tmp_path, **SETTINGS)
    assert [line.get("batch") for line in metrics(whole / "run")] == [None, 2, 2, 4, 4, 4, 8, 8]
    for stop in ("training.stop_at=1", "training.stop_at=3", "training.steps=7"):
        run(config, stop, "data.validation={}", ranks=0)

    def trained(folder):
        return [{k: v for k, v in line.items() if "val/" not in k} for line in metrics(folder / "run")[-7:]]

    assert trained(tmp_path) == trained(whole)
    assert_equal_tensors(weights(tmp_path / "run"), weights(whole / "run"))
    state = json.loads((tmp_path / "run/checkpoints/step-7/train_state.json").read_text())
    assert state["sequence"] == 2 * 2 + 3 * 4 + 2 * 8


def test_another_number_of_ranks_takes_the_same_data_in_every_step_of_the_ramp(whole, tmp_path):
    run(write_config(tmp_path, **SETTINGS), "data.validation={}", ranks=2)
    for ours, theirs in zip(metrics(tmp_path / "run")[-7:], metrics(whole / "run")[-7:], strict=True):
        assert {k: v for k, v in ours.items() if k.startswith(("tokens/", "batch"))} == {
            k: v for k, v in theirs.items() if k.startswith(("tokens/", "batch"))
        }
        assert ours["flops/total"] == theirs["flops/total"]
        assert ours["learning_rate"] == theirs["learning_rate"]
        assert ours["loss/total"] == pytest.approx(theirs["loss/total"], rel=1e-4)


def test_a_batch_of_the_ramp_that_the_ranks_cannot_share_is_refused_by_its_entry(tmp_path):
    config = write_config(tmp_path, **SETTINGS)
    said = run(config, "training.micro_batch=2", ranks=2, code=2)
    assert "training.batch_ramp.0.batch (2) must be a multiple of training.micro_batch x ranks (2 x 2 = 4)" in said
