import logging

import pytest

from mom_tokenizers.errors import UserError
from mom_tokenizers.vocab import VocabLayout
from mom_train.checkpoint.saver import TrainState
from mom_train.checkpoint.store import Checkpoints, with_absolute_place
from mom_train.data import Datasets, build_plans, log_forecast, planned_as_now, training_plan
from mom_train.resume import check_same_model
from tests.helpers.corpus import write_dataset
from tests.helpers.run_config import tiny_config

LATENTS = {"diffusion": {"patch_width": 4}}


def test_diffusion_of_pictures_that_no_source_holds_is_refused(tmp_path):
    config = tiny_config(tmp_path, objective=LATENTS)
    with pytest.raises(UserError, match=r"no source of data.train holds any: .*/train\. Tokenize them"):
        build_plans(config)
    write_dataset(tmp_path / "latents", documents=8, shards=1, latent_width=4)
    sources = [{"path": str(tmp_path / "train")}, {"path": str(tmp_path / "latents")}]
    mixed = tiny_config(tmp_path, objective=LATENTS, data__train=sources)
    phases = training_plan(mixed, Datasets(mixed))[1]  # one source with latents is enough
    assert [source["path"] for source in phases[0]["train"]] == [s["path"] for s in sources]


def test_a_checkpoint_of_an_older_order_asks_for_a_new_phase_and_begins_a_new_order_there(tmp_path):
    config = tiny_config(tmp_path)
    _, phases = training_plan(config, Datasets(config))
    older = [{k: v for k, v in phases[0].items() if k != "plan_version"}]
    assert planned_as_now(phases)
    assert not planned_as_now(older)
    with pytest.raises(UserError, match=r"old order cannot be continued.*data.new_phase=true: from sequence 32 on"):
        training_plan(config, Datasets(config), older, "0" * 16, 32)
    again = tiny_config(tmp_path, data={**config.model_dump(mode="json")["data"], "new_phase": True})
    begun, now = training_plan(again, Datasets(again), older, "0" * 16, 32)
    assert (begun.since, begun.before, planned_as_now(now)) == (32, None, True)
    resumed, _ = training_plan(again, Datasets(again), now, begun.fingerprint, 48)
    assert resumed.fingerprint == begun.fingerprint


def test_a_validation_set_that_is_trained_on_is_warned_about(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    config = tiny_config(tmp_path)
    log_forecast(config, *build_plans(config))
    assert "trained on as well" not in caplog.text
    (tmp_path / "moved").symlink_to(tmp_path / "train")
    config = tiny_config(tmp_path, data__validation={"held": [{"path": str(tmp_path / "moved")}]})
    log_forecast(config, *build_plans(config))
    assert f"validation set 'held' is trained on as well ({tmp_path / 'moved'})" in caplog.text


def test_a_run_whose_checkpoints_are_elsewhere_does_not_begin_anew(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = tiny_config(tmp_path, checkpoint={"path": "kept"})
    Checkpoints("kept").check_begins_anew(config)  # the run has nothing yet
    config.run_dir.mkdir()
    (config.run_dir / "config.yaml").write_text(with_absolute_place(config).to_yaml())
    (tmp_path / "kept/checkpoints/step-8").mkdir(parents=True)
    (tmp_path / "kept/checkpoints/step-8/.metadata").touch()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # where the same relative path is another place
    with pytest.raises(UserError, match=rf"are in {tmp_path}/kept \(step 8 is there\)"):
        Checkpoints("kept").check_begins_anew(config)
    Checkpoints(tmp_path / "kept").check_begins_anew(config)


def test_a_layout_that_changed_in_its_file_is_refused_when_the_run_carries_on(tmp_path):
    layout = tmp_path / "layout.json"
    was = VocabLayout({"text": 100, "image": 4}, {"image": [7, 8, 9, 10]}, {})
    was.save(layout)
    config = tiny_config(tmp_path, vocabulary=str(layout))
    config.run_dir.mkdir()
    was.save(config.run_dir / "vocab.json")  # as a run keeps it
    saved = TrainState(config=config.model_dump(mode="json"))
    check_same_model(config, saved, "step-8")
    VocabLayout({"text": 100, "image": 4}, {"image": [8, 7, 9, 10]}, {}).save(layout)  # the same sizes, other ids
    changed = tiny_config(tmp_path, vocabulary=str(layout))
    with pytest.raises(UserError, match=r"layout.json is another layout than the one that step-8 was trained with"):
        check_same_model(changed, saved, "step-8")
