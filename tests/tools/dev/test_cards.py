"""docs/reference/cards has a card for each config, and every figure on it follows from the code."""

import runpy
import sys

import pytest
import yaml

from tests.helpers import CHECKOUT

TOOL = CHECKOUT / "tools/dev/cards.py"


@pytest.fixture
def cards():
    return runpy.run_path(str(TOOL))


def test_the_cards_are_what_follows_from_the_code_and_none_is_missing(cards, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(TOOL), "--check"])
    cards["main"]()
    shown = "".join((cards["OUT"] / f"{page}.md").read_text() for page in cards["TITLES"])
    presets = [p for p in (CHECKOUT / "configs").rglob("[!_]*.yaml") if "tokenizers" not in p.name]
    assert len(presets) > 70
    assert [p for p in presets if f"\n## {p.relative_to(CHECKOUT)}\n" not in shown] == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": "configs/none.yaml"}, "there is no config configs/none.yaml"),
        ({"as": {"steps": 1}}, "steps 1 then, 640 now.*measure them again, or remove the entry"),
    ],
)
def test_losses_of_a_config_that_is_another_now_are_refused(cards, change, message, tmp_path):
    entry = {
        "config": "configs/demo.yaml",
        "as": {"steps": 640},
        "date": "a day",
        "losses": {"text": 3.5},
    }
    changed = tmp_path / "measured.yaml"
    changed.write_text(yaml.safe_dump([entry | change]))

    class Measured:
        """The file, which says its place as if it stood in the repository."""

        def read_text(self):
            return changed.read_text()

        def relative_to(self, _):
            return "measured.yaml"

    cards["pages"].__globals__["MEASURED"] = Measured()
    with pytest.raises(ValueError, match=message):
        cards["pages"]()
