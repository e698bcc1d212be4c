"""Muon in whole runs: resumed, refused, and what a config may ask for."""

import pytest

from mom_tokenizers.errors import UserError
from mom_train.checkpoint.saver import TrainState
from mom_train.config.muon import MuonConfig
from mom_train.resume import check_same_model
from tests.helpers.run_config import tiny_config, write_config
from tests.helpers.runs import assert_equal_tensors, metrics, run, weights

MUON = {"learning_rate": 0.01, "warmup": 2, "kind": "muon"}


def test_a_run_resumes_to_the_last_bit(tmp_path):
    config = write_config(tmp_path, optimizer=MUON, training={"steps": 3, "batch": 4, "micro_batch": 4})
    run(config, f"run_dir={tmp_path}/whole", ranks=0)
    run(config, "training.stop_at=2", ranks=0)
    run(config, ranks=0)
    lines = metrics(tmp_path / "whole")
    assert lines[3]["loss/total"] < lines[1]["loss/total"]
    assert metrics(tmp_path / "run")[-1] == lines[-1]
    assert_equal_tensors(weights(tmp_path / "run"), weights(tmp_path / "whole"))


def test_a_run_does_not_resume_with_an_optimizer_of_another_state(tmp_path):
    kinds = [{"kind": "adamw"}, {"kind": "muon"}, {"kind": "muon", "muon": {"exclude": ["in_proj"]}}]
    configs = [tiny_config(tmp_path, optimizer=MUON | kind) for kind in kinds]
    old = TrainState.begin(configs[0], "", [])
    del old.config["optimizer"]["kind"], old.config["optimizer"]["muon"]  # saved before there was a choice
    check_same_model(configs[0], old, "step-2")
    for was in configs:
        for now in configs:
            saved = TrainState.begin(was, "", [])
            if was is now:
                check_same_model(now, saved, "step-2")
            else:
                with pytest.raises(UserError, match=r"optimizer\.kind: step-2 was trained with"):
                    check_same_model(now, saved, "step-2")
    changed = tiny_config(tmp_path, optimizer=MUON | {"muon": {"momentum": 0.9}})
    check_same_model(changed, TrainState.begin(configs[1], "", []), "step-2")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer__muon": {"momentum": 0.9}}, "optimizer.kind is adamw"),
        (
            {"optimizer": MUON | {"muon": {"exclude": ["in_proj", "x_proj", "dt_proj", "out_proj"]}}},
            "nothing to orthogonalise",
        ),
        ({"optimizer": MUON | {"muon": {"exclude": ["qkv_proj"]}}}, "has only in_proj, x_proj, dt_proj, out_proj"),
        ({"optimizer": MUON | {"muon": {"exclude": ["in_proj", "in_proj"]}}}, "twice"),
        ({"optimizer": MUON, "parallel": {"cpu_offload": True}}, "parallel.cpu_offload"),
    ],
)
def test_a_config_is_refused_if(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(tmp_path, **changes)


def test_without_settings_muon_takes_the_published_ones(tmp_path):
    assert tiny_config(tmp_path).optimizer.as_muon is None
    assert tiny_config(tmp_path, optimizer=MUON).optimizer.as_muon == MuonConfig()
