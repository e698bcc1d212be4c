"""What earlier versions saved is read for good: a run that version 0.1.0 made before saved files had a number, stored
in tests/config/stored, and configs and train states by hand.

The stored run is of two modalities and 2 blocks, three steps on one rank, made by commit f5f22e6. Its expected.json has
what that commit's code computed of its weights: nats of each next id of a short document.
"""

import importlib
import importlib.metadata
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import yaml

from mom_tokenizers.errors import UserError
from mom_tools.__main__ import MODULES
from mom_train.config.files import load_config, read_saved, validated
from mom_train.config.migrations import SCHEMA, migrated_config, migrated_state
from mom_train.config.run import RunConfig

STORED = Path(__file__).parent / "stored" / "schema-1.tar.xz"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stored")
    with tarfile.open(STORED) as tar:
        tar.extractall(folder, filter="data")
    return folder


def test_the_stored_checkpoint_has_no_number_and_is_small(run):
    assert STORED.stat().st_size < 100_000
    assert "schema" not in json.loads((run / "checkpoints/step-3/train_state.json").read_text())
    assert "schema" not in yaml.safe_load((run / "config.yaml").read_text())


def nats(folder, ema):
    import torch

    from mom_train.checkpoint.load import load_run
    from mom_train.ops.layout import RowLayout

    model, config = load_run(folder, weights="ema" if ema else "model")
    ids = torch.tensor(json.loads((folder / "expected.json").read_text())["ids"])
    modality = torch.from_numpy(config.layout.modality_of_id)[ids][None]
    layout = RowLayout.sort(modality, torch.zeros_like(modality).int(), len(config.layout.modalities))
    with torch.no_grad():
        rows, _ = model(ids[layout.rows], layout)
    logits = rows[layout.order.long()].float()
    return torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none").tolist()


@pytest.mark.parametrize("weights", ["model", "ema"])
def test_a_checkpoint_of_every_schema_gives_the_losses_that_its_own_version_computed(run, weights):
    expected = json.loads((run / "expected.json").read_text())[weights]
    assert nats(run, weights == "ema") == pytest.approx(expected, rel=1e-5)


def carried_on(folder):
    """What a Checkpointer of today's code loads: (step, whether it is a moment of the optimiser -> values)."""
    import torch

    from mom_train.checkpoint.saver import Checkpointer, read_train_state, tensors
    from mom_train.checkpoint.store import Checkpoints
    from mom_train.distributed.ranks import process_group
    from mom_train.model.language_model import LanguageModel
    from mom_train.model.sharding import shard
    from mom_train.optim.ema import Ema
    from mom_train.optim.optimizer import build_optimizer

    with process_group() as ranks:
        checkpointer = Checkpointer(Checkpoints.of(folder), load_config(folder / "config.yaml").checkpoint)
        newest = checkpointer.newest()
        state = read_train_state(newest)
        config = newest.config()
        with torch.device("meta"):
            model = LanguageModel(config.model, config.layout.size, len(config.layout.modalities))
        model = shard(model, ranks.mesh).to_empty(device="cpu")
        optimizer = build_optimizer(model, config.optimizer)
        ema = Ema(model, config.training.ema_decay)
        checkpointer.load(newest, model, optimizer, ema)
        held = tensors(model, optimizer, ema)
        moments = [v["exp_avg"].full_tensor().abs().sum().item() for v in held["optimizer"]["state"].values()]
        steps = {v["step"].item() for v in held["optimizer"]["state"].values()}
    return state.step, state.tokens, state.best["figure"], len(held["model"]), moments, steps


def test_a_run_carries_on_from_a_checkpoint_of_every_schema(run):
    step, tokens, best, n, moments, steps = carried_on(run)
    assert (step, tokens, best, steps) == (3, {"text": 96, "image": 24}, "val/held/loss/total", {3.0})
    assert n == len(moments) == 23
    assert np.isfinite(moments).all()
    assert sum(m > 0 for m in moments) == 23


def test_what_is_saved_today_has_a_number_and_is_read_as_it_was(tmp_path, run):
    config = load_config(run / "config.yaml")
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["schema"] == SCHEMA
    assert load_config(tmp_path / "config.yaml") == config
    assert read_saved(tmp_path) == config.model_dump(mode="json")


WITHOUT_EFFECT = {
    "run_dir": "r",
    "vocabulary": {"text": 9},
    "model": {"dim": 32, "layers": 1, "decoupled": ["norm", "norm"], "router": "learned", "experts": 4,
              "rope_base": 5e5, "state": 8},
    "data": {"train": [{"path": "a", "split": "val"}], "sequence_length": 64},
    "optimizer": {"learning_rate": 1e-3},
    "training": {"steps": 10, "batch": 2, "micro_batch": 1},
    "validation": {"every": 5},
    "sampling": {"guidance": 3.0, "prompts": [], "denoising_steps": 2000},
}  # fmt: skip


def test_what_schema_1_accepted_without_effect_is_left_out_and_the_rest_kept():
    with pytest.raises(UserError, match="decoupled names 'norm' twice"):
        validated(WITHOUT_EFFECT, "today's")
    before = json.dumps(WITHOUT_EFFECT)
    config = validated(migrated_config(WITHOUT_EFFECT, "old"), "old")
    assert json.dumps(WITHOUT_EFFECT) == before
    assert config.model.decoupled == ("norm",)
    assert (config.model.router, config.model.experts, config.model.state) == ("rule", 1, 8)
    assert (config.data.train[0].path, config.validation.every, config.sampling.guidance) == ("a", None, 1.0)
    transformer = {"architecture": "transformer", "dim": 32, "layers": 1, "heads": 2, "decoupled": [], "state": 4}
    config = validated(migrated_config({**WITHOUT_EFFECT, "model": transformer}, "old"), "old")
    assert (config.model.heads, config.model.state) == (2, 16)
    # with an effect, it stays
    learned = {**WITHOUT_EFFECT["model"], "decoupled": ["in_proj"]}
    assert migrated_config({"model": learned}, "old")["model"]["experts"] == 4
    guided = {"vocabulary": {"text": 9, "image": 1}, "sampling": {"guidance": 3.0}}
    guided["objective"] = {"diffusion": {"patch_width": 4, "condition_dropout": 0.1}}
    assert migrated_config(guided, "old") == guided


def test_a_key_that_is_new_takes_its_default_and_a_train_state_brings_its_config_along(run):
    from mom_train.checkpoint.saver import TrainState

    values = json.loads((run / "checkpoints/step-3/train_state.json").read_text())
    del values["best"], values["config"]["anomaly"], values["config"]["model"]["norm_eps"]
    state = TrainState()
    state.load_state_dict(migrated_state(values, "old"))
    assert state.best == {}
    config = validated(state.config, "old")
    assert config.model.norm_eps == RunConfig.model_fields["model"].annotation.model_fields["norm_eps"].default
    assert state.state_dict()["schema"] == SCHEMA


def test_a_schema_from_the_future_names_the_version_that_wrote_it():
    newer = {"schema": SCHEMA + 1, "version": "9.9.0", "config": {}}
    here = importlib.metadata.version("mixture-of-mamba")
    with pytest.raises(UserError, match=rf"X has schema {SCHEMA + 1}; .*\({here}\).*up to {SCHEMA}.*version 9.9.0"):
        migrated_state(newer, "X")
    with pytest.raises(UserError, match=r"Y has schema .* Install a newer one"):
        migrated_config({"schema": SCHEMA + 1}, "Y")
    for wrong in (0, "2", None, True, 1.5):
        with pytest.raises(UserError, match="is not the number of a schema"):
            migrated_config({"schema": wrong}, "Z")


def test_tools_read_a_stored_run_of_every_schema(run, tmp_path, monkeypatch):
    """Export, and the report of a run; tools/match_loss.py reads its curves."""
    for tool, line in [
        ("checkpoint", [run, "verify"]),
        ("checkpoint", [run, "export", "--out", tmp_path / "ours"]),
        ("report", [run, "--output", tmp_path / "report.html"]),
        ("match-loss", ["--baseline", run, "--candidate", run]),
    ]:
        monkeypatch.setattr(sys, "argv", [tool, *map(str, line)])
        importlib.import_module(MODULES[tool]).main()
    exported = yaml.safe_load((tmp_path / "ours/config.yaml").read_text())
    assert exported["schema"] == SCHEMA
    assert validated(migrated_config(exported, "exported"), "exported").model.dim == 8
