"""Options that several commands share."""

import pytest

from mom_tokenizers.errors import UserError
from mom_tools.options import configs_and_overrides


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
