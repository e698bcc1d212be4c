"""Options that several commands share."""

import pytest

from mom_tokenizers.errors import UserError
from mom_tools.options import check_free, configs_and_overrides
from mom_tools.processes import gpu_of


def test_a_key_with_a_value_is_an_override_whatever_the_value_ends_with(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = ["a.yaml", "tokenizers=x/tokenizers.yaml", "runs/lr=0.1/config.yaml", "model.layers=2", "b"]
    configs, overrides = configs_and_overrides(given)
    assert configs == ["a.yaml", "runs/lr=0.1/config.yaml", "b"]
    assert overrides == ["tokenizers=x/tokenizers.yaml", "model.layers=2"]
    (tmp_path / "lr=1.yaml").touch()
    assert configs_and_overrides(["lr=1.yaml"]) == (["lr=1.yaml"], [])
    with pytest.raises(UserError, match="no CONFIG"):
        configs_and_overrides(["model.layers=3"])


def test_a_change_of_what_a_command_sets_itself_is_refused_by_its_name():
    own = ["model.dim", "seed"]
    check_free(["model.layers=2", "model={state: 4}", "seeds=3"], own)
    for change, key in (("seed=1", "seed"), ("model={dim: 3}", "model.dim"), ("model.dim=3", "model.dim")):
        with pytest.raises(UserError, match=f"{key}: this command sets it"):
            check_free([change], own)


def test_runs_side_by_side_keep_to_the_gpus_that_may_be_seen(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-6b")
    assert [gpu_of(slot, 2) for slot in range(3)] == ["4", "GPU-6b", "4"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert [gpu_of(slot, 2) for slot in range(3)] == ["0", "1", "0"]
